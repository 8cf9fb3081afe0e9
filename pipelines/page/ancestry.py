"""Account -> what its last artifact came from, as nested lists."""

from collections.abc import Sequence

from pipelines.ancestry import Ancestor
from pipelines.page.account import Account
from pipelines.page.markup import Markup, element
from pipelines.page.results import digest


def ancestors(account: Account) -> Markup | None:
    """Each thing with what it was made from below it; None where nothing was made."""
    if not account.ancestors:
        return None
    return element("ul", _branches(account.ancestors, set()), class_="ancestry card")


def _branches(found: Sequence[Ancestor], seen: set[str]) -> list[Markup]:
    """Items of one depth, each with the deeper ones that follow it."""
    starts = [i for i, one in enumerate(found) if one.depth == found[0].depth]
    items = []
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        one, below = found[start], found[start + 1 : end]
        again = one.digest in seen and one.made_by is not None
        seen.add(one.digest)
        items.append(element("li", _line(one, again=again), element("ul", _branches(below, seen)) if below else None))
    return items


def _line(one: Ancestor, *, again: bool) -> Markup:
    maker = one.made_by or one.remade
    method = maker.components.get("method") if maker is not None else None
    verb = f"{maker.components['operator']}{f' · {method[0]}' if method else ''}" if maker is not None else ""
    return element(
        "div",
        element("span", one.role, class_="role") if one.role else None,
        element("span", maker.step if maker is not None else one.uri, class_="name"),
        element("span", verb, class_="verb") if verb else None,
        element("span", one.kind, class_="kind"),
        element("span", "made as above", class_="kind") if again else None,
        digest(one.digest),
        element("span", "which it has since made anew as", class_="kind") if one.remade is not None else None,
        digest(one.remade.digest) if one.remade is not None else None,
    )
