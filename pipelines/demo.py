"""The main job end to end: run the recipe, ask the model that it made, prove which one answers, take it down again."""

import argparse
import json
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

from operators.artifact import Dataset
from operators.data.rows import read_rows
from pipelines.__main__ import main
from pipelines.findings import endpoints
from pipelines.lineage import find_run, history, states
from pipelines.storage.opening import open_storage
from pipelines.store import Store

RECIPE = "distill_lora_merge_serve"
QUESTIONS = {"summaries_held_out": 48, "names_held_out": 12}  # a step with questions -> the most tokens of an answer


def demo(arguments: argparse.Namespace) -> int:
    """Run, show, ask, prove, and stop unless told to keep it up."""
    changes = [word for change in arguments.changes for word in ("--set", change)]
    code = main(["run", RECIPE, "--detach", *changes])
    if code:
        return code  # and all there is to say was said
    run = find_run(open_storage(".lfm"), "last")
    try:
        _present(run)
    finally:
        if arguments.keep:
            print(f"\nLeft up. Stop it with: lfm stop {run}")
        else:
            print()
            main(["stop", run])
    return 0


def _present(run: str) -> None:
    store = Store(open_storage(".lfm"))
    main(["show", run])
    events = history(store.storage, run)
    made = states(events, events[0].data["steps"])
    (endpoint,) = endpoints(made)
    for step, limit in QUESTIONS.items():
        rows = store.get(made[step].data["digest"])
        assert isinstance(rows, Dataset)
        (row,) = read_rows(rows).slice(7, 1).to_pylist()
        print(f"\nasked (held out): {row['prompt']}")
        print(f"answered: {_ask(endpoint, row['prompt'], limit)}")
        print(f"Python itself says: {row['completion']}")
    probe: Mapping[str, float] = endpoint["probe"]
    print(
        f"\nproof: the endpoint's probe logits differ from those of digest {endpoint['model']} by "
        f"{probe['from_artifact']:.1g} and from the student's by {probe['from_base']:.2g}, of the largest logit."
    )
    print("\nWhat it serves came from:")
    main(["lineage", f"{run}/endpoint"])


def _ask(endpoint: Mapping[str, Any], question: str, limit: int) -> str:
    """What the endpoint answers, as any OpenAI client would ask it."""
    wish = {
        "model": endpoint["name"],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": limit,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{endpoint['url']}/chat/completions", json.dumps(wish).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said: str = json.load(answer)["choices"][0]["message"]["content"]
    return said.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the endpoint up")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="changes")
    sys.exit(demo(parser.parse_args()))
