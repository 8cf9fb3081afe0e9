"""A state as a word and as an icon: never as a colour alone."""

from pipelines.page.markup import Markup, element, joined

ICONS = {
    "done": "M2 6.5l2.8 2.8L10 3.2",
    "reused": "M9.8 6.9A4 4 0 1 1 9.2 3.6M9.9 1v3H7",
    "running": "M3.5 2.2l6 3.8-6 3.8z",
    "failed": "M2.6 2.6l6.8 6.8M9.4 2.6L2.6 9.4",
    "interrupted": "M4 2v8M8 2v8",
    "stopped": "M3 3h6v6h-6z",
    "waiting": "M6 2a4 4 0 1 0 .01 0zM6 4v2.2l1.5 1",
    "skipped": "M2.5 6h7",
    "serving": "M6 10V6M3.2 3.2a4 4 0 0 0 0 5.6M8.8 3.2a4 4 0 0 1 0 5.6M6 6h.01",
}
WORDS = {"skipped": "not run"}


def word(state: str) -> str:
    """What a state is called."""
    return WORDS.get(state, state)


def badge(state: str) -> Markup:
    """A state as text with its icon."""
    return element("span", icon(state), word(state), class_=f"state {state}")


def icon(state: str) -> Markup:
    """A state's icon, to stand in text that says the same."""
    return element("svg", _use(state), class_="icon", viewBox="0 0 12 12", aria_hidden="true")


def icon_in(state: str, x: float, y: float) -> Markup:
    """The same inside a drawing."""
    return element("use", href=f"#icon-{state}", x=x, y=y, width=12, height=12, class_="icon")


def icons() -> Markup:
    """What the others refer to; stands once in a page."""
    symbols = [
        element("symbol", element("path", d=path), id=f"icon-{state}", viewBox="0 0 12 12")
        for state, path in ICONS.items()
    ]
    return element("svg", joined(symbols), width=0, height=0, class_="icons", aria_hidden="true")


def _use(state: str) -> Markup:
    return element("use", href=f"#icon-{state}")
