"""YAML text -> plain values, the place of every key, and what is not plain YAML."""

import re
from typing import Any

import yaml

from lfm.errors import LfmError
from pipelines.problems import Part, Place, Places, Problem, shown

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads ten times as fast
MAX_VALUES = 100_000  # aliases of aliases can unfold to more than any memory holds
MAX_DEPTH = 50
PLAIN = {f"tag:yaml.org,2002:{k}" for k in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "binary")}
MERGE = "tag:yaml.org,2002:merge"


class _TooMuch(LfmError, ValueError):
    """Text that unfolds without end."""


class Text:
    """A read text.

    Attributes:
        raw: Its value; None where it has none, or where it is not YAML.
        places: Where its keys are.
        problems: What is wrong with it as YAML.
    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.places = Places(source)
        self.problems: list[Problem] = []
        self.raw: Any = None
        self._values = 0
        self._scalars = yaml.SafeLoader("")
        try:
            root = yaml.compose(text, Loader=LOADER)
            at = 1 if root is None else root.start_mark.line + 1
            self.places.known[()] = Place(f"{source}:{at}", at)
            self.raw = None if root is None else self._value(root, (), 1)
        except yaml.YAMLError as error:
            self._refuse(_line(error, text), f"not YAML: {_reason(error, text)}")
        except _TooMuch as error:
            self._refuse(1, f"{error}. Write it out, without aliases of aliases.")

    def _refuse(self, line: int, sentence: str) -> None:
        path = (f":{line}", str(len(self.problems)))  # of no key: where something has the wrong form
        self.places.known[path] = Place(f"{self.source}:{line}", line)
        self.problems.append(Problem(path, sentence))

    def _value(self, node: Any, path: Part, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _TooMuch(f"unfolds to more than {MAX_VALUES} values, expected a pipeline")
        if depth > MAX_DEPTH:
            raise _TooMuch(f"nested deeper than {MAX_DEPTH} levels, expected a pipeline")
        line = node.start_mark.line + 1
        if node.tag not in PLAIN:
            self._refuse(line, f"the tag {node.tag!r}, expected plain YAML. Take it out.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            found = []
            for number, value in enumerate(node.value):
                at = value.start_mark.line + 1
                below = (*path, str(number))
                self.places.known[below] = Place(f"{self.source}:{at}", at)
                found.append(self._value(value, below, depth + 1))
            return found
        if node.tag not in PLAIN:
            return str(node.value)
        try:
            return self._scalars.construct_object(node)
        except ValueError:  # ``!!int two``, the 32nd of a month
            kind = node.tag.rpartition(":")[2]
            self._refuse(line, f"{shown(node.value)} is no {kind}, expected plain YAML. Put quotes around it.")
            return str(node.value)

    def _mapping(self, node: Any, path: Part, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                for merged in value_node.value if isinstance(value_node, yaml.SequenceNode) else (value_node,):
                    value = self._value(merged, path, depth + 1)
                    found = {**(value if isinstance(value, dict) else {}), **found}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(line, "a key that is itself a list or a mapping, expected a name. Write one.")
                continue
            key = str(key_node.value)
            if key in lines:
                again = f"the key {key!r} stands twice, first in line {lines[key]}, expected once"
                self._refuse(line, f"{again}. Take one of them out.")
            lines[key] = line
            self.places.known[(*path, key)] = Place(f"{self.source}:{line}", line)
            found[key] = self._value(value_node, (*path, key), depth + 1)
        return found


def _line(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    return text.encode()[: getattr(error, "position", 0)].count(b"\n") + 1


def _reason(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        number = error.character if isinstance(error.character, int) else ord(error.character)  # libyaml's, or Python's
        return f"the character #x{number:04x}, expected text. Take it out."
    lines = text.splitlines()
    at = _line(error, text) - 1
    if at < len(lines) and re.match(r" *\t", lines[at]):
        return "a tab, expected spaces. Indent with spaces."
    context, began = str(getattr(error, "context", "")), getattr(error, "context_mark", None)
    if context.startswith("expected a single document"):
        return "a second document, expected one pipeline in a file. Give each a file of its own."
    since = f" {context} that begins in line {began.line + 1}" if began and began.line != at else ""
    return f"{getattr(error, 'problem', None) or error}{since}. Correct it."
