"""Account -> the pipeline's graph as SVG."""

from collections.abc import Iterator, Mapping, Sequence

from pipelines.page.account import Account, Step
from pipelines.page.layers import Arranged, Box, Point, arranged
from pipelines.page.markup import Markup, element, joined
from pipelines.page.scales import took
from pipelines.page.states import badge, icon_in, word

COMPACT_ABOVE = 40  # steps; then a box is one line
MARGIN = 8.0
NAME, SMALL = 6.93, 6.33  # how wide a letter is: 0.602 of 11.5 and 10.5 pixels, as in every usual monospaced font
LONGEST = 28  # letters of a name that are shown
SMALLEST_SHARE = 0.8  # of its size to which the drawing shrinks in a narrow window; below that it scrolls


def graph(account: Account) -> Markup:
    """The graph, and what its marks mean."""
    compact = len(account.steps) > COMPACT_ABOVE
    boxes = {f"input {n}": _input_box(n) for n in account.inputs}
    boxes |= {n: _step_box(s, compact=compact) for n, s in account.steps.items()}
    arrows = _arrows(account)
    placed = arranged(boxes, list(arrows))
    numbers = {n: i for i, n in enumerate(boxes)}
    width, height = placed.width + 2 * MARGIN, placed.height + 2 * MARGIN
    drawing = element(
        "svg",
        element("title", f"Graph of {len(account.steps)} steps"),
        [_line(a, role, kind, placed, numbers) for a, (role, kind) in arrows.items()],
        [_input(n, uri["uri"], placed.boxes[f"input {n}"], numbers) for n, uri in account.inputs.items()],
        [_step(s, placed.boxes[n], numbers[n], compact=compact) for n, s in account.steps.items()],
        viewBox=f"{-MARGIN:.0f} {-MARGIN:.0f} {width:.0f} {height:.0f}",
        style=f"max-width:{width:.0f}px;min-width:{width * SMALLEST_SHARE:.0f}px",
        role="group",
        aria_label=f"The pipeline's graph: {_told(account)}",
    )
    return joined(
        element("div", drawing, class_="scroll graph", tabindex="0", role="region", aria_label="Graph, scrolls"),
        _legend(account),
    )


def _arrows(account: Account) -> dict[tuple[str, str], tuple[str, str]]:
    """For each arrow what its target takes, by the name of the edge, and the kind of artifact that goes along it."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for target, step in account.steps.items():
        for edge, source in filled(step.planned["inputs"]):
            if source in account.steps:
                arrow, kind = (source, target), account.steps[source].planned["kind"]
            else:
                arrow, kind = (f"input {source}", target), account.inputs[source]["kind"]
            edges = f"{found[arrow][0]}, {edge}" if arrow in found else edge
            found[arrow] = (edges, kind)
    return found


def filled(inputs: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each thing that fills an edge, with the edge's name."""
    for edge, filled in inputs.items():
        if isinstance(filled, str):
            yield edge, filled
        elif isinstance(filled, Mapping):
            yield from ((f"{edge}.{name}", str(one)) for name, one in filled.items())
        elif isinstance(filled, list):
            yield from ((f"{edge}[{i}]", str(one)) for i, one in enumerate(filled))


def _told(account: Account) -> str:
    return "; ".join(
        f"{s.name} ({word(s.state)})" + (f" after {', '.join(s.needs)}" if s.needs else "")
        for s in account.steps.values()
    )


def _step_box(step: Step, *, compact: bool) -> Box:
    name = len(_short(step.name)) * NAME
    if compact:
        return Box(name + len(_fact(step)) * SMALL + 44, 24)
    return Box(max(name, len(_short(step.verb)) * SMALL, len(_fact(step)) * SMALL + 16) + 20, 54)


def _input_box(name: str) -> Box:
    return Box(len(_short(name)) * NAME + 22, 24)


def _step(step: Step, box: Box, number: int, *, compact: bool) -> Markup:
    x, y = box.x + 12, box.y
    fact = _fact(step)
    if compact:
        inner = [
            icon_in(step.state, x - 4, y + 6),
            element("text", _short(step.name), class_="name", x=x + 13, y=y + 16.0),
            element("text", fact, class_="fact", x=box.x + box.width - 9, y=y + 16.0, text_anchor="end"),
        ]
    else:
        inner = [
            element("text", _short(step.name), class_="name", x=x, y=y + 17.5),
            element("text", _short(step.verb), class_="verb", x=x, y=y + 31.5),
            icon_in(step.state, x - 1, y + 37),
            element("text", fact, class_="fact", x=x + 16, y=y + 46.5),
        ]
    return element(
        "a",
        element("title", f"{step.name}: {step.verb}, {word(step.state)}, {fact}"),
        element("rect", class_="box", x=box.x, y=y, width=box.width, height=box.height, rx=6),
        element("path", class_="side", d=_side(box)),
        inner,
        href=f"#step-{step.name}",
        id=f"n{number}",
        class_=f"step {step.state}",
    )


def _side(box: Box) -> str:
    """The left edge of a box, as a bar that is round where the box is."""
    return f"M{box.x + 4:.1f},{box.y:.1f}v{box.height:.1f}a4,6 0 0 1 -4,-6v{12 - box.height:.1f}a4,6 0 0 1 4,-6z"


def _input(name: str, uri: str, box: Box, numbers: Mapping[str, int]) -> Markup:
    return element(
        "g",
        element("title", f"{name}: {uri}"),
        element("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=box.height / 2),
        element("text", _short(name), x=box.x + box.width / 2, y=box.y + 16, text_anchor="middle"),
        id=f"n{numbers[f'input {name}']}",
        class_="input",
    )


def _line(arrow: tuple[str, str], edges: str, kind: str, placed: Arranged, numbers: Mapping[str, int]) -> Markup:
    source, target = arrow
    return element(
        "g",
        element("title", f"{source.removeprefix('input ')} → {target} as {edges}"),
        element("path", d=curve(placed.routes[arrow])),
        class_=f"edge {kind} f{numbers[source]} t{numbers[target]}",
    )


def curve(points: Sequence[Point]) -> str:
    """A smooth way through points that leaves each of them level."""
    (x, y), *rest = points
    written = f"M{x:.1f},{y:.1f}"
    for to_x, to_y in rest:
        middle = (x + to_x) / 2
        level = abs(to_y - y) < 0.05
        written += f"H{to_x:.1f}" if level else f"C{middle:.1f},{y:.1f} {middle:.1f},{to_y:.1f} {to_x:.1f},{to_y:.1f}"
        x, y = to_x, to_y
    return written


def lit(account: Account) -> Markup:
    """Style that makes the arrows of the box stand out at which somebody points."""
    count = len(account.inputs) + len(account.steps)
    return Markup(
        "\n".join(
            f".graph:has(#n{i}:is(:hover,:focus-visible)) :is(.f{i},.t{i}){{stroke:var(--lit);stroke-width:2}}"
            for i in range(count)
        )
    )


def _legend(account: Account) -> Markup:
    kinds = {"model" if kind == "adapter" else kind for _, kind in _arrows(account).values()}
    states = dict.fromkeys(s.state for s in account.steps.values())
    line = [
        element(
            "span",
            element(
                "svg",
                element("g", element("path", d="M0 5H26"), class_=f"edge {kind}"),
                viewBox="0 0 26 10",
                class_="sample",
                aria_hidden="true",
            ),
            "model or adapter" if kind == "model" else kind,
        )
        for kind in sorted(kinds)
    ]
    return element("p", [badge(s) for s in states], line, class_="legend")


def _fact(step: Step) -> str:
    """What the box says below its name: how long it took, or what else became of the step."""
    if step.state == "done":
        return took(step.seconds)
    if step.state == "running" and step.lines:
        return f"{step.lines[-1]['done']}/{step.lines[-1]['total']}"
    return word(step.state)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
