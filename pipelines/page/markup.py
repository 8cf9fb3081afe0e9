"""Values -> HTML in which only tags written here are tags."""

import html
import re
from collections.abc import Iterable

ALONE = frozenset({"meta", "link", "br", "path", "rect", "line", "circle", "use"})  # have no content, need no end
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # HTML has no way to write them


class Markup(str):
    """HTML that is finished and must not be escaped again."""

    __slots__ = ()


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """An element of HTML or SVG.

    Args:
        tag: Its name.
        content: Text, which is escaped, `Markup`, None, which is left out, or several of these.
        attributes: ``class_`` means class, ``aria_label`` aria-label; None and False leave one out.
    """
    kept = {k: v for k, v in attributes.items() if v is not None and v is not False}
    written = "".join(_attribute(name, value) for name, value in kept.items())
    if tag in ALONE:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{_inner(content)}</{tag}>")


def joined(*content: object) -> Markup:
    """Contents, one after the other."""
    return Markup(_inner(content))


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is as fine as anybody sees."""
    return f"{value:.1f}".removesuffix(".0")


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{_text(number(value) if isinstance(value, float) else value)}"'


def _inner(content: Iterable[object]) -> str:
    return "".join(_piece(one) for one in content)


def _piece(one: object) -> str:
    if one is None:
        return ""
    if isinstance(one, Markup):
        return one
    if isinstance(one, Iterable) and not isinstance(one, str):
        return _inner(one)
    return _text(one)


def _text(value: object) -> str:
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))
