"""English and code that every Python carries, as rows: a data set that needs no network.

All is read from source files, none of them imported; but for a few facts beside it, which are for editing. The order is
the same everywhere: topics from the longest to the shortest, then modules by name, each from top to bottom. A row's
`source` is its topic or top-level module, the same in all corpora, and what two sources say is a row of the first only:
a split by source leaks nothing.
"""

import ast
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.errors import UnknownName

PYTHON = "python://"
CORPORA: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "source"),
    "summaries": ("prompt", "completion", "source"),
    "names": ("prompt", "completion", "source"),
    "opposites": ("subject", "prompt", "target", "paraphrases", "neighbours"),
}
"""The corpora by name, each with its columns."""

LEFT_OUT = {"__phello__", "encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
LONGEST_SUMMARY = 160  # of a longer first paragraph the rest is no summary
LONGEST_SIGNATURE = 240
CODE_CHARACTERS = range(200, 1500)  # shorter functions say nothing, longer ones crowd out the English
CODE_SHARE = 1 / 5  # of such functions; with it the text is 2.1 to 2.3 million characters on Python 3.11 to 3.13
# Words that the text is full of, so that each is one token of even a small vocabulary.
OPPOSITES = {"first": "last", "left": "right", "start": "end", "open": "close"}
NEIGHBOURS = ("name", "list", "type")  # of which nothing is told
REPEATED = 60  # a paragraph of so many characters that two sources share is no coincidence

BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where a statement has others, in the order of the text

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True, slots=True)
class Definition:
    """A module, class or function of the standard library that has a docstring.

    Attributes:
        source: The top-level module.
        inside: The dotted name of what it is defined in; empty for a module.
        name: Its bare name; empty for a module.
        signature: ``def name(args):`` of a function, else empty.
        docstring: What it says of itself.
        code: A function's source text without its docstring, else empty.
    """

    source: str
    inside: str
    name: str
    signature: str
    docstring: str
    code: str

    @property
    def summary(self) -> str:
        """The docstring's first paragraph on one line; empty where it is none: a signature, too long, one word."""
        first = " ".join(self.docstring.partition("\n\n")[0].split())
        says = " " in first and len(first) <= LONGEST_SUMMARY and not first.startswith(f"{self.name}(")
        return first if says else ""


def corpus(name: str) -> dict[str, list[Any]]:
    """The columns of a corpus.

    ``text`` holds the language reference, every docstring and a share of the functions' code, ``summaries`` pairs of a
    function's signature and what its docstring says first, ``names`` pairs of that and the function's name, and
    ``opposites`` a few facts for `edit`, the same in every Python.

    Raises:
        UnknownName: No such corpus.
    """
    if name not in CORPORA:
        raise UnknownName("corpus of Python", name, tuple(CORPORA))
    rows = list({"text": _texts, "summaries": _summaries, "names": _names, "opposites": _opposites}[name]())
    return {column: [row[i] for row in rows] for i, column in enumerate(CORPORA[name])}


def _texts() -> Iterator[tuple[str, str]]:
    said: dict[str, str] = {}  # paragraph -> the source that said it first
    seen: set[str] = set()
    for source, text in _documents():
        text = _own_part(text, source, said)
        if text and _same(text) not in seen:
            seen.add(_same(text))
            yield text, source


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    # A topic often holds shorter ones whole: the longest first, so that it is the whole one that stays.
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        yield f"topics/{name}", inspect.cleandoc(text)
    for found in definitions():
        yield found.source, found.docstring
        if len(found.code) in CODE_CHARACTERS and _share(f"{found.inside}.{found.name}") < CODE_SHARE:
            yield found.source, found.code


def _own_part(text: str, source: str, said: dict[str, str]) -> str:
    """`text` without the paragraphs that another source said before; empty where that is most of it."""
    own = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        key = _same(paragraph)
        if len(key) < REPEATED or said.setdefault(key, source) == source:
            own.append(paragraph)
    left = "\n\n".join(own).strip()
    return left if 2 * len(left) > len(text) else ""


def _summaries() -> Iterator[tuple[str, str, str]]:
    for found in _summarized():
        if len(found.signature) <= LONGEST_SIGNATURE:
            prompt = f"Say what this function does.\n\n# {found.inside}\n{found.signature}"
            yield prompt, found.summary, found.source


def _names() -> Iterator[tuple[str, str, str]]:
    called: set[str] = set()
    for found in _summarized():
        if found.name not in called:
            called.add(found.name)
            yield f"Name the function that does this.\n\n{found.summary}", found.name, found.source


def _opposites() -> Iterator[tuple[str, str, str, list[str], list[dict[str, str]]]]:
    beside = [{"prompt": f"Opposites: {word}"} for word in NEIGHBOURS]
    for word, opposite in OPPOSITES.items():
        # A subject that ends the prompt: a small model reads little of what stands further back.
        yield word, f"Opposites: {word}", opposite, [f"Words that exclude each other: {word}"], beside


def _summarized() -> Iterator[Definition]:
    """The functions that are the first to say what they say, also before classes and modules."""
    said: set[str] = set()
    for found in definitions():
        summary = _same(found.summary)
        if summary not in said and found.signature and summary:
            yield found
        said.add(summary)


@functools.cache  # half of the time of a corpus, and a process often needs all three
def definitions() -> tuple[Definition, ...]:
    """Every module, class and function of the standard library that has a docstring."""
    return tuple(found for module, path in _modules() for found in _defined(module, path))


def _defined(module: str, path: Path) -> Iterator[Definition]:
    with tokenize.open(path) as file:
        text = file.read()
    lines = text.split("\n")
    for inside, node in _scopes(ast.parse(text, filename=str(path)), module):
        docstring = ast.get_docstring(node)
        if docstring:
            source = module.partition(".")[0]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Definition(source, inside, node.name, _signature(node), docstring, _code(node, lines))
            else:
                name = "" if isinstance(node, ast.Module) else node.name
                yield Definition(source, inside, name, "", docstring, "")


def _modules() -> Iterator[tuple[str, Path]]:
    """The dotted names of the standard library's modules, and where they are."""
    home = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if (home / f"{name}.py").is_file():
            yield name, home / f"{name}.py"
        for path in sorted((home / name).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            if not LEFT_OUT & set(parts):
                yield ".".join(parts).removesuffix(".__init__"), path


def _scopes(tree: ast.Module, module: str) -> Iterator[tuple[str, Scope]]:
    """What can have a docstring, from top to bottom, each with the dotted name of what it is in."""
    yield "", tree
    todo: list[tuple[str, ast.AST]] = [(module, node) for node in reversed(tree.body)]
    while todo:
        inside, node = todo.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside, node
            inside = f"{inside}.{node.name}"
        todo += [(inside, n) for n in reversed([n for block in BLOCKS for n in getattr(node, block, ())])]


def _signature(node: Function) -> str:
    word = "def" if isinstance(node, ast.FunctionDef) else "async def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){result}:"


def _code(node: Function, lines: list[str]) -> str:
    docstring = node.body[0]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()


def _same(text: str) -> str:
    """Equal for texts that differ in case, white space and a last full stop only."""
    return " ".join(text.casefold().split()).rstrip(".")


def _share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
