"""CLINC150's questions -> rows of text and intent by domain, for `configurations/fisher_ada_merging.yaml`.

    python benchmarks/clinc150.py FOLDER    # reads $LFM_DATA/clinc150/data_full.json and domains.json

FOLDER gets ``probe.jsonl``, a few questions of each of the 150 intents, and ``<domain>_train.jsonl``,
``<domain>_unlabelled.jsonl`` and ``<domain>_test.jsonl``. What is unlabelled is the validation set without its intents.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PROBE = 5  # questions of each intent


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def probe(questions: Iterable[tuple[str, str]], each: int) -> Iterator[Mapping[str, str]]:
    """The first questions of each intent."""
    seen = Counter[str]()
    for text, intent in questions:
        seen[intent] += 1
        if seen[intent] <= each:
            yield {"text": text, "label": intent}


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--probe", type=int, default=PROBE, help="questions of each intent that the probe learns from")
    asked = parser.parse_args()
    source = Path(os.environ["LFM_DATA"]) / "clinc150"
    data = json.loads((source / "data_full.json").read_text())
    asked.folder.mkdir(parents=True, exist_ok=True)
    write(asked.folder / "probe.jsonl", probe(data["train"], asked.probe))
    for domain, intents in json.loads((source / "domains.json").read_text()).items():
        for part in ("train", "test"):
            rows = ({"text": text, "label": intent} for text, intent in data[part] if intent in intents)
            write(asked.folder / f"{domain}_{part}.jsonl", rows)
        bare = ({"text": text} for text, intent in data["val"] if intent in intents)
        write(asked.folder / f"{domain}_unlabelled.jsonl", bare)


if __name__ == "__main__":
    main()
