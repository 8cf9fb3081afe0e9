"""Account -> each step with all that is known of it, and what failed."""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.page.account import Account, Step
from pipelines.page.graph import filled
from pipelines.page.markup import Markup, element
from pipelines.page.results import digest, facts
from pipelines.page.scales import took
from pipelines.page.states import badge


def failures(account: Account) -> Markup | None:
    """A sentence for every attempt that failed; None where none did."""
    items = [
        element(
            "li",
            element("a", s.name, href=f"#step-{s.name}"),
            f" failed in attempt {a.number} with ",
            element("strong", a.said["error"]),
            f": {str(a.said['sentence']).rstrip('.')}.",
            *((" Log: ", element("code", f"{account.store}/{a.log}", class_="path")) if a.log else ()),
            "; another attempt went well." if s.state == "done" else None,
        )
        for s in account.steps.values()
        for a in s.attempts
        if a.state == "failed"
    ]
    return element("ul", items, class_="failures") if items else None


def details(account: Account) -> Markup:
    """A line for each step, which opens to show the rest."""
    return element("div", [_step(s, account) for s in account.steps.values()], class_="steps")


def _step(step: Step, account: Account) -> Markup:
    planned, made = step.planned, step.made
    line = element(
        "summary",
        element("span", step.name, class_="name"),
        element("span", step.verb, class_="verb"),
        badge(step.state),
        element("span", took(step.seconds) if step.attempts else "", class_="number"),
        element("span", f"{made['artifact']} ", digest(made["digest"]) if made["digest"] else None)
        if made
        else element("span"),
    )
    method = planned["method"] or {}
    fields = {k: v for k, v in method.items() if k != "name"}
    tables = [
        _table("takes", dict(filled(planned["inputs"]))),
        _table(f"method {method.get('name', '')}", fields),
        _table("params", planned["params"]),
        _table("resources", planned["resources"]),
        _table("noted on what it made", {k: v for k, v in step.about.items() if k != "search"}),  # drawn above
    ]
    identity = facts(
        [
            ("fingerprint", digest(planned["fingerprint"])),
            ("digest", digest(made["digest"]) if made else None),
            (
                "reused from",
                f"run {made['run']}, where it took {took(made['seconds'])}" if step.state == "reused" else None,
            ),
            *(("waited", why) for why in step.waits),
            *(
                (f"workers of attempt {a.number}", "; ".join(f"{g['workers']}: {g['why']}" for g in a.groups))
                for a in step.attempts
                if a.groups
            ),
            *(
                (f"log of attempt {a.number}", element("code", f"{account.store}/{a.log}", class_="path"))
                for a in step.attempts
                if a.log
            ),
        ],
        style="identity",
    )
    return element(
        "details",
        line,
        element("div", element("div", tables, class_="tables"), identity, id=f"step-{step.name}", class_="inside"),
    )


def _table(name: str, values: Mapping[str, Any]) -> Markup | None:
    if not values:
        return None
    rows = [element("tr", element("th", k, scope="row"), element("td", _value(v))) for k, v in values.items()]
    return element("table", element("caption", name), element("tbody", rows))


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
