"""Account -> how many machines there were, as high as their number at each time; and who had how much of them."""

from pipelines.costs import Row as Costs, heads, rows
from pipelines.page.account import Account
from pipelines.page.markup import Markup, element
from pipelines.page.scales import took
from pipelines.page.timeline import Axis


def machines(account: Account) -> Markup | None:
    """The table; None where nobody has counted any."""
    groups = sorted({group for span in account.machines for group in span.counts})
    if not groups:
        return None
    axis = Axis(account.sessions)
    head = element(
        "tr",
        element("th", "group", scope="col"),
        element("th", scope="col", aria_label="how many there were"),
        element("th", "most", scope="col", class_="number"),
    )
    rows = [_row(group, account, axis) for group in groups]
    return element("div", element("table", element("thead", head), element("tbody", rows), class_="timeline"),
                   class_="card")  # fmt: skip


def _row(group: str, account: Account, axis: Axis) -> Markup:
    spans = [(s, s.counts[group]) for s in account.machines if s.counts.get(group)]
    most, zero = max(count for _, count in spans), account.sessions[0][0]
    bars, told = [], []
    for span, count in spans:
        left, right = axis.at(span.began), axis.at(span.ended)
        told.append(f"{count} from +{took(span.began - zero)} to +{took(span.ended - zero)}")
        place = f"left:{left:.2f}%;width:{right - left:.2f}%;top:{100 - 90 * count / most:.0f}%"
        bars.append(element("i", class_="count", style=place, title=told[-1]))
    return element(
        "tr",
        element("th", group, scope="row"),
        element("td", element("div", bars, class_="track", role="img", aria_label="; ".join(told))),
        element("td", most, class_="number"),
    )


def node_hours(account: Account) -> Markup | None:
    """What each step took beside what was foreseen, then what idled, the head and all; None where nobody knows."""
    if account.usage is None:
        return None
    head = [element("th", name, scope="col", class_="number" if i else None) for i, name in
            enumerate(heads(account.usage))]  # fmt: skip
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", element("th", "step", scope="col"), head)),
            element("tbody", [_costs(row) for row in rows(tuple(account.steps), account.usage, account.foreseen)]),
            class_="costs",
        ),
        class_="scroll fit",
        tabindex="0",
        role="region",
        aria_label="Node-hours, scrolls",
    )


def _costs(row: Costs) -> Markup:
    name = element("a", row.what, href=f"#step-{row.what}") if row.step else row.what
    cells = [element("td", text, class_="number" if i else None) for i, text in enumerate(row.cells)]
    return element("tr", element("th", name, scope="row"), cells, class_=None if row.step else "besides")
