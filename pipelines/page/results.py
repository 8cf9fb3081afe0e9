"""Account -> what the run found: evaluations, gates, endpoints, what was registered."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.page.account import Account, Step
from pipelines.page.curves import plain
from pipelines.page.markup import Markup, element
from pipelines.page.scales import alike, brief

BETTER = {"loss": min, "perplexity": min, "exact_match": max, "chrf": max}
"""The measures of an evaluation that come first, and which of two values is the better one."""

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one step measured: for each set its values."""

    step: Step
    sets: Mapping[str, Values]

    @property
    def model(self) -> str:
        """What it measured."""
        model = self.step.planned["inputs"].get("model")
        return model if isinstance(model, str) else self.step.name

    @property
    def asked(self) -> tuple[str, ...]:
        """The sets in the order in which the pipeline names them."""
        data = self.step.planned["inputs"].get("data")
        return tuple(data) if isinstance(data, Mapping) else ()


def evaluations(account: Account) -> list[Evaluation]:
    """Every evaluation that ended well."""
    return [
        Evaluation(step, {k: _numbers(v) for k, v in step.about["sets"].items() if isinstance(v, Mapping)})
        for step in account.steps.values()
        if isinstance(step.about.get("sets"), Mapping)
    ]


def evaluated(account: Account) -> Markup | None:
    """A row for each model, and for each set a column for each measure; the best of a column stands out."""
    found = evaluations(account)
    if not found:
        return None
    sets = list(dict.fromkeys(name for e in found for name in (*e.asked, *e.sets) if name in e.sets))
    columns = {s: _measures(e.sets[s] for e in found if s in e.sets) for s in sets}
    cells = {(s, m): _column(m, [e.sets.get(s, {}).get(m) for e in found]) for s in sets for m in columns[s]}
    above = [
        element(
            "th", s, element("small", _documents(s, found)), colspan=len(columns[s]), scope="colgroup", class_="set"
        )
        for s in sets
    ]
    below = [element("th", plain(m), scope="col", class_=_edge(i)) for s in sets for i, m in enumerate(columns[s])]
    head = element(
        "thead",
        element("tr", element("th", "model", rowspan=2, scope="col"), above),
        element("tr", below),
    )
    rows = [
        element(
            "tr",
            element("th", e.model, element("small", _size(e)), scope="row"),
            [element("td", cells[s, m][row], class_=_edge(i)) for s in sets for i, m in enumerate(columns[s])],
        )
        for row, e in enumerate(found)
    ]
    return element(
        "div",
        element("table", head, element("tbody", rows), class_="evaluations"),
        class_="scroll fit",
        tabindex="0",
        role="region",
        aria_label="Evaluations, scrolls",
    )


def delivered(account: Account) -> Markup | None:
    """Endpoints and registry entries."""
    cards = [_endpoint(s) for s in account.steps.values() if s.planned["operator"] == "serve" and s.made]
    cards += [
        _entry(s) for s in account.steps.values() if s.planned["operator"] == "register" and "registered" in s.about
    ]
    return element("div", cards, class_="delivered") if cards else None


def facts(pairs: Iterable[tuple[str, object]], *, style: str = "facts") -> Markup:
    """Names with values; what is empty is left out."""
    shown = [(k, v) for k, v in pairs if v not in ("", None)]
    return element("dl", [element("div", element("dt", k), element("dd", v)) for k, v in shown], class_=style)


def digest(value: str) -> Markup:
    """A digest, which shows as much of itself as there is room."""
    return element("code", value, class_="digest", title=value)


def _endpoint(step: Step) -> Markup:
    about = step.about
    proof: Mapping[str, float] = about["probe"]
    url = str(about["url"])
    link: object = element("a", url, href=url) if url.startswith(("http://", "https://")) else url
    said = [(f"logits differ {plain(k)} by", brief(v)) for k, v in proof.items()]
    pairs = [("url", link), ("name", about["name"]), ("serves", digest(str(about["model"]))), *said]
    return element("section", element("h3", "Endpoint ", element("code", step.name)), facts(pairs), class_="card")


def _entry(step: Step) -> Markup:
    noted: Mapping[str, object] = step.about["registered"]
    pairs = [(k, str(v)) for k, v in noted.items()]
    return element(
        "section",
        element("h3", "Registered by ", element("code", step.name)),
        facts([*pairs, ("model", digest(str(step.made["digest"])))]),
        class_="card",
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}


def _measures(of: Iterable[Values]) -> list[str]:
    names = dict.fromkeys(n for values in of for n in values if n not in ("documents", "tokens"))
    return [n for n in BETTER if n in names] + [n for n in names if n not in BETTER]


def _column(measure: str, values: Sequence[float | None]) -> list[Markup]:
    """What stands in each row of a column; the best of several stands out."""
    known = [v for v in values if v is not None]
    best = BETTER[measure](known) if measure in BETTER and len(known) > 1 else None
    written = iter(alike(known))
    return [
        element("span", "not measured", class_="hidden")
        if value is None
        else element("b" if value == best else "span", next(written))
        for value in values
    ]


def _documents(name: str, found: Sequence[Evaluation]) -> str:
    counts = sorted({int(e.sets[name]["documents"]) for e in found if "documents" in e.sets.get(name, {})})
    if not counts:
        return ""
    return f"{' or '.join(map(str, counts))} document{'' if counts == [1] else 's'}"


def _size(evaluation: Evaluation) -> str:
    parameters = evaluation.step.about.get("parameters")
    size = f"{parameters / 1e6:.3g} M parameters" if isinstance(parameters, int) else ""
    return ", ".join(part for part in (evaluation.step.name, size) if part != evaluation.model and part)


def _edge(column: int) -> str | None:
    """Marks where another set begins."""
    return "set" if column == 0 else None
