"""What a training step costs on a warm Ray before its first batch, and where the time goes, against a bare script.

The step is `tune` with LoRA on a tiny model, run as `lfm run` does: from the driver's call to the moment when its first
batch lies on the device. The first such step of a worker imports what it needs; the next one finds that there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rounds import command_line, compared, interleaved, said
from stages import staged
from warm_ray import driven

import pipelines.run
from cluster.connect import cluster
from operators.pretraining import Architecture, new_model, train_tokenizer

PIPELINE = """
name: first-batch
inputs:
  model: {model: HOME/model}
  data: {dataset: HOME/text.jsonl}
steps:
  tuned:
    operator: tune
    inputs: {model: model, data: data}
    method: {name: lora, rank: 8}
    params: {max_steps: 1, batch_size: 8, length: 256, seed: NUMBER}
"""
BARE = """
import sys, time, json
import peft, torch, transformers
home = sys.argv[1]
tokenizer = transformers.AutoTokenizer.from_pretrained(home + "/model")
model = transformers.AutoModelForCausalLM.from_pretrained(home + "/model")
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
texts = [json.loads(line)["text"] for line in open(home + "/text.jsonl")]
ids = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
batch = rows[torch.randperm(len(rows))[:8]]
print(time.time())
"""
OURS, FIRST, SCRIPT = "next step of a worker", "first step of a worker", "bare script"


def one_step(home: Path, number: int) -> dict[str, Any]:
    """Run it; another number is another seed, so that nothing is reused."""
    path = home / "first_batch.yaml"
    path.write_text(PIPELINE.replace("HOME", str(home)).replace("NUMBER", str(number)))
    pipelines.run._remote.cache_clear()
    began = time.time()
    with mock.patch("pipelines.run.execute", lambda task: staged(task, began)):
        _, events = driven(path, home / "store")
    (ended,) = (e for e in events if e.kind == "commit")
    return dict(ended.data)


def script(home: Path) -> float:
    """Seconds from the start of a bare script to its first batch."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", BARE, str(home)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]) - began


def prepared(home: Path, asked: argparse.Namespace) -> None:
    """A tiny model with its tokenizer, and some hundred texts."""
    texts = Path(argparse.__file__).read_text().split("\n\n")
    (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = train_tokenizer(texts, 1000)
    tokenizer.save_pretrained(home / "model")
    torch.manual_seed(0)
    new_model(Architecture(layers=asked.layers, width=asked.width), tokenizer).save_pretrained(home / "model")


def usual(others: list[dict[str, Any]]) -> dict[str, float]:
    """Each stage's median."""
    return {
        n: statistics.median(r["stages"].get(n, 0.0) for r in others) for n in {k for r in others for k in r["stages"]}
    }


def table(stages: dict[str, dict[str, float]]) -> None:
    """Print where the time goes."""
    print(f"{'':16}" + "".join(f"{column:>26}" for column in stages))
    for name in sorted(stages[FIRST], key=lambda n: -stages[FIRST][n]):
        print(f"{name:16}" + "".join(f"{seconds.get(name, 0.0):24.3f} s" for seconds in stages.values()))


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-") as folder, cluster("local"):
        home = Path(folder)
        prepared(home, asked)
        first = one_step(home, 0)
        known, nexts = {first["worker"]}, []

        def ours(number: int) -> float:
            while True:  # Ray has a worker for each CPU and may choose one that has not run a step yet
                found = one_step(home, 1 + len(known) + number)
                if found["worker"] in known:
                    nexts.append(found)
                    return float(found["before"])
                known.add(found["worker"])

        values = interleaved({SCRIPT: lambda _: script(home), OURS: ours}, asked.rounds)
    stages = {FIRST: first["stages"], OURS: usual(nexts)}
    table(stages)
    values |= {FIRST: [first["before"]] * asked.rounds}
    figures = [
        compared(values, OURS, SCRIPT, unit="s", label=f"before the first batch, {OURS}", aim="< 1 s"),
        compared(values, FIRST, SCRIPT, unit="s", label=f"before the first batch, {FIRST} (once)"),
    ]
    said(figures, asked, stages=stages)


if __name__ == "__main__":
    main()
