"""The generated parts of the README: `make docs` writes them, a test finds them stale."""

import contextlib
import io
import re
from pathlib import Path

import lfm
from operators.artifact import kind_of
from operators.catalog import Catalog
from pipelines.__main__ import main

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def filled(text: str, first: Path) -> str:
    """The README with its generated parts made anew; `first` is its first pipeline in a folder of its own."""
    for mark, part in (("methods", methods()), ("verbs", verbs()), ("lfm plan first.yaml", planned(first))):
        pattern = rf"(<!-- generated: {re.escape(mark)} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda found, part=part: found[1] + part + found[2], text, flags=re.DOTALL)
        assert count == 1, mark
    return text


def methods() -> str:
    """The table of methods."""
    rows = ["| method | class | what for | where it is written down |", "|---|---|---|---|"]
    for name in lfm.names():
        method = lfm.find(name)
        about = (method.__doc__ or "").strip().partition("\n")[0]
        link = method.reference.replace("arXiv:", "https://arxiv.org/abs/")
        rows.append(f"| `{name}` | `{method.__name__}` | {about} | [{method.reference}]({link}) |")
    return "\n".join(rows) + "\n"


def verbs() -> str:
    """The table of operators; inputs that may be left out stand in brackets."""
    rows = ["| verb | takes | makes | what for |", "|---|---|---|---|"]
    catalog = Catalog()
    for name in sorted(catalog.verbs()):
        verb = catalog.operator(name)
        about = (verb.body.__doc__ or "").strip().partition("\n")[0]
        takes = ", ".join(f"{k}" if e.required else f"({k})" for k, e in verb.edges.items())
        makes = f"what {verb.follows} is" if verb.follows else " or ".join(kind_of(kind) for kind in verb.gives)
        rows.append(f"| `{name}` | {takes} | {makes} | {about} |")
    return "\n".join(rows) + "\n"


def planned(first: Path) -> str:
    """What `lfm plan` prints for the first pipeline."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["plan", str(first), "--store", str(first.parent / ".lfm")]) == 0
    lines = [line.rstrip() for line in said.getvalue().splitlines()]
    return "```\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "first.yaml"
        pipeline.write_text(blocks("yaml")[0])
        README.write_text(filled(README.read_text(), pipeline))
