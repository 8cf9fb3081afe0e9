"""Account -> one HTML page that needs nothing else: no script, no request."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from lfm.errors import LfmError
from pipelines.page.account import Account, Step
from pipelines.page.ancestry import ancestors
from pipelines.page.curves import curves
from pipelines.page.graph import graph, lit
from pipelines.page.intervals import gates
from pipelines.page.machines import machines, node_hours
from pipelines.page.markup import Markup, element, joined
from pipelines.page.results import delivered, evaluated, facts
from pipelines.page.scales import took
from pipelines.page.searches import searched
from pipelines.page.states import badge, icons, word
from pipelines.page.steps import details, failures
from pipelines.page.style import STYLE
from pipelines.page.timeline import timeline
from pipelines.usage import Usage

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser, too, lets nothing else in


class PageNotWritten(LfmError, OSError):
    """A place where the page cannot be put."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"--html {self.path!r}: {self.what}, expected a file that can be written. Give another place."


def write(path: Path, page: str) -> None:
    """Put the page at `path`, whole or not at all.

    Raises:
        PageNotWritten: It cannot be written there.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise PageNotWritten(str(path), "is there and no plain file")
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            new.write_text(page, encoding="utf-8", errors="replace")
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise PageNotWritten(str(path), (error.strerror or str(error)).lower()) from error


def document(account: Account) -> str:
    """The page."""
    name = str(account.started["spec"]["name"])
    sections = [(title, made) for title, make in SECTIONS.items() if (made := make(account)) is not None]
    return "<!doctype html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("link", rel="icon", href="data:,"),
            element("title", f"{name}: {account.status}"),
            element("style", STYLE, lit(account)),
        ),
        element(
            "body",
            icons(),
            _header(name, account, [title for title, _ in sections]),
            element(
                "main",
                [
                    element("section", element("h2", title), made, id=_anchor(title), class_="part")
                    for title, made in sections
                ],
            ),
        ),
        lang="en",
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _header(name: str, account: Account, titles: list[str]) -> Markup:
    states = [s.state for s in account.steps.values()]
    counts = ", ".join(f"{states.count(s)} {word(s)}" for s in dict.fromkeys(states))
    worked = sum(ended - began for began, ended in account.sessions)
    return element(
        "header",
        element("h1", name, badge(account.status)),
        facts(
            [
                ("run", element("code", account.run)),
                ("began", _moment(account.sessions[0][0])),
                ("took", took(worked)),
                ("as of", _moment(account.now) if account.now else None),
                ("resumed", _times(len(account.sessions) - 1)),
                ("served", took(account.served) if account.served else None),
                ("cost", _cost(account.usage)),
                ("steps", counts),
                ("lfm", account.started["version"]),
                ("store", element("code", account.store, class_="path")),
            ]
        ),
        element(
            "nav",
            [element("a", title, href=f"#{_anchor(title)}") for title in titles],
            aria_label="On this page",
        ),
    )


def _cost(used: Usage | None) -> str | None:
    cost = None if used is None else used.whole.cost
    return None if used is None or cost is None else f"{cost:.2f} {used.currency}"


def _times(count: int) -> str:
    return {0: "", 1: "once"}.get(count, f"{count} times")


def _moment(time: float) -> Markup:
    moment = datetime.fromtimestamp(time, tz=UTC)
    return element("time", f"{moment:%Y-%m-%d %H:%M:%S} UTC", datetime=f"{moment:%Y-%m-%dT%H:%M:%SZ}")


def _failed(account: Account) -> Markup | None:
    said = failures(account)
    again = account.status in ("failed", "interrupted")
    hint = [
        "It was interrupted before it ended. " if account.status == "interrupted" else None,
        "Go on with ",
        element("code", f"lfm resume {account.run}"),
        "; what is done stays done.",
    ]
    if said is None and not again:
        return None
    return joined(said, element("p", hint, class_="note") if again else None)


def _drawn(step: Step) -> bool:
    """Whether what a step measured has a part of its own: a gate's is no curve, a search's trials are drawn there."""
    verb = step.planned["operator"]
    return verb == "gate" or (verb == "search" and "search" in step.about)


SECTIONS: dict[str, Callable[[Account], Markup | None]] = {
    "What went wrong": _failed,
    "Graph": graph,
    "Evaluations": evaluated,
    "Search": searched,
    "Gate": gates,
    "Registered and served": delivered,
    "Timeline": timeline,
    "Machines": machines,
    "Node-hours": node_hours,
    "Curves": lambda account: curves([s for s in account.steps.values() if not _drawn(s)]),
    "Steps": details,
    "Ancestry": ancestors,
}
