"""Account -> what the run found: evaluations, gates, endpoints, what was registered."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.findings import MEASURES, Measured, evaluation
from pipelines.page.account import Account, Step
from pipelines.page.curves import plain
from pipelines.page.markup import Markup, element
from pipelines.page.scales import alike, brief


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one step measured, set by set."""

    step: Step
    sets: Mapping[str, Measured]

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
    found = [Evaluation(s, {one.on: one for one in evaluation(s.about)}) for s in account.steps.values()]
    return [e for e in found if e.sets]


def evaluated(account: Account) -> Markup | None:
    """A row for each model, and for each set a column for each measure; the best of a column stands out."""
    found = evaluations(account)
    if not found:
        return None
    sets = list(dict.fromkeys(name for e in found for name in (*e.asked, *e.sets) if name in e.sets))
    columns = {s: _measures(e.sets[s] for e in found if s in e.sets) for s in sets}
    cells = {
        (s, m): _column(m, [e.sets[s].values.get(m) if s in e.sets else None for e in found])
        for s in sets
        for m in columns[s]
    }
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


def _measures(of: Iterable[Measured]) -> list[str]:
    names = dict.fromkeys(n for one in of for n in one.values if n != "tokens")
    return [n for n in MEASURES if n in names] + [n for n in names if n not in MEASURES]


def _column(measure: str, values: Sequence[float | None]) -> list[Markup]:
    """What stands in each row of a column; the best stands out where no other looks the same."""
    known = [v for v in values if v is not None]
    written = alike(known)
    finite = [v for v in known if math.isfinite(v)]
    best = written[known.index(MEASURES[measure](finite))] if measure in MEASURES and finite else ""
    texts = iter([element("b" if t == best and len(known) > 1 == written.count(t) else "span", t) for t in written])
    return [element("span", "not measured", class_="hidden") if v is None else next(texts) for v in values]


def _documents(name: str, found: Sequence[Evaluation]) -> str:
    counts = sorted({e.sets[name].documents for e in found if name in e.sets})
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
