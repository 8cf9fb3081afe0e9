"""The memory that a plan foresees for a step of training, beside what a process takes for it.

Measured is the most that a process of its own holds while it loads a model and trains it for two steps, less what it
held before it loaded the model. Of several workers it is the one that takes most. An estimate that has changed can
be compared with what was measured before, as a measurement takes minutes and an estimate seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import Figure, command_line, compared, said

from cluster.profile import HUGE_PAGES
from lfm.distillation.forward_kl import ForwardKL
from lfm.tuning.base import Tune
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators import tuning
from operators.artifact import Model
from operators.data.batches import Rows
from operators.distillation import FromTeacher, distill
from operators.footprint import Footprint
from operators.learning.group import learn
from operators.learning.learner import Place
from operators.learning.loop import Job
from operators.models.language_models import load
from operators.models.objectives import NextToken
from operators.resources import Resources
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.tuning import learner, tune
from pipelines.__main__ import ROOT

MIB = 1 << 20
SIZES = {"width": 768, "layers": 12, "inner": 2048, "heads": 12, "vocabulary": 32000}
ESTIMATED, MEASURED = "estimated", "measured"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    method: Tune = field(default_factory=Full)
    teacher: bool = False
    strategy: Any = "single"
    workers: int = 1
    length: int = 128
    rows: int = 2
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> Training:
        """Two steps, without checkpoints unless they are asked for."""
        usual = {"max_steps": 2, "checkpoint_every": 0, "packing": False}
        return Training(**{**usual, "length": self.length, "batch_size": self.rows * self.workers, **self.more})

    @property
    def resources(self) -> Resources:
        """On CPUs."""
        return Resources(workers=self.workers, strategy=self.strategy)

    def foreseen(self, folder: Path) -> Footprint:
        """What a plan says."""
        given = {"data": None, "training": self.training, "resources": self.resources}
        model = Model(str(folder))
        if self.teacher:
            given |= {"teacher": model, "student": model, "method": ForwardKL(), "hard_weight": 0.0}
            found = distill.footprint(**given, kinds={"teacher": (Model,)})
        else:
            found = tune.footprint(**given, model=model, method=self.method)
        assert found is not None
        return found


CASES = {
    "full, 128 tokens": Case(),
    "full, 512 tokens": Case(length=512),
    "full, 512 tokens, gradient checkpointing": Case(length=512, more={"gradient_checkpointing": True}),
    "full, 512 tokens, bfloat16": Case(length=512, more={"precision": "bfloat16"}),
    "full, 128 tokens, checkpoints on disk": Case(more={"checkpoint_every": 1}),
    "full, 512 tokens, accumulated": Case(length=512, more={"micro_batch_size": 1}),
    "LoRA, 128 tokens": Case(method=LoRA()),
    "LoRA, 512 tokens": Case(method=LoRA(), length=512),
    "LoRA, 512 tokens, gradient checkpointing": Case(method=LoRA(), length=512, more={"gradient_checkpointing": True}),
    "teacher, 128 tokens": Case(teacher=True),
    "teacher, 512 tokens": Case(teacher=True, length=512),
    "ddp x 2, 128 tokens": Case(strategy="ddp", workers=2),
    "zero1 x 2, 128 tokens": Case(strategy="zero1", workers=2),
    "zero2 x 2, 128 tokens": Case(strategy="zero2", workers=2),
    "zero3 x 2, 128 tokens": Case(strategy="zero3", workers=2),
}


class Quiet:
    """What the loop tells, and nobody hears."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def progress(self, done: int, total: int, **measures: float) -> None:
        """Nobody hears."""

    def keep(self, folder: Path) -> None:
        """It stays where it is."""

    def kept(self) -> Path | None:
        """Nothing."""
        return None

    def leaving(self) -> bool:
        """Never."""
        return False


def made(folder: Path) -> None:
    """A decoder with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocabulary"],
        hidden_size=SIZES["width"],
        intermediate_size=SIZES["inner"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["heads"],
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    model.save_pretrained(folder)


def trained(case: Case, place: Place, folder: Path, scratch: Path) -> int:
    """Bytes that this process takes at most from here on, beside what it holds."""
    training = case.training
    draw = np.random.default_rng(0)
    shape = (training.batch_size * training.steps(1), training.length)
    ids = draw.integers(1, SIZES["vocabulary"], shape).astype(np.int32)
    rows = Rows(ids, np.tile(np.arange(training.length, dtype=np.int32), (len(ids), 1)), ids)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = memory("VmRSS")

    def job(place: Place) -> Job:
        model = learner(folder, Full() if case.teacher else case.method, training, place)
        objective: torch.nn.Module = NextToken(model, packed=False)
        if case.teacher:
            teacher = Teacher(load(folder, torch.float32), temperature=1.0, packed=False)
            objective = FromTeacher(model, teacher, ForwardKL(), hard_weight=0.0, packed=False)
        return Job(objective=objective, rows=rows, held_out=None, export=lambda weights, folder: None)

    learn(place, job, {}, training, Quiet(scratch), scratch)
    return memory("VmHWM") - before


def memory(word: str) -> int:
    """What the system says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {word}")


def one(name: str, rank: int, folder: Path, meeting: Path) -> None:
    """Train in this process and print what it took."""
    case = CASES[name]
    torch.set_num_threads(1)
    tuning.check = lambda *_, **__: None  # the model has no tokenizer and no packing to be looked at
    import peft  # noqa: F401  what is imported is no part of the model
    import transformers.models.llama.modeling_llama  # noqa: F401

    if case.strategy != "single":
        url = f"file://{meeting}/meet"
        torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=case.workers)
    if case.strategy.startswith("zero"):
        from operators.learning.zero import _deepspeed

        _deepspeed(Place(rank=rank, world=case.workers))
    scratch = meeting / str(rank)
    scratch.mkdir()
    print(trained(case, Place(rank=rank, world=case.workers, strategy=case.strategy), folder, scratch))


def measured(name: str, folder: Path) -> float:
    """The most that a worker takes, in MiB."""
    with tempfile.TemporaryDirectory() as meeting:
        words = [sys.executable, __file__, "--one", name, "--model", str(folder), "--meeting", meeting]
        environment = {**os.environ, **HUGE_PAGES, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen(
                [*words, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, "LOCAL_RANK": str(rank)},
            )
            for rank in range(CASES[name].workers)
        ]
        said = [child.communicate()[0].split() for child in children]
    return max(int(words[-1]) for words in said) / MIB


def figures(names: list[str], folder: Path, known: Mapping[str, float]) -> Iterator[Figure]:
    """What is foreseen, measured by what is; what is known already is not measured again."""
    for name in names:
        found = CASES[name].foreseen(folder)
        real = known.get(name) or measured(name, folder)
        error = found.on_host / MIB / real - 1
        values = {ESTIMATED: [found.on_host / MIB], MEASURED: [real]}
        each = {k: round(v / MIB) for k, v in found.items().items()}
        print(f"{name}: {found.on_host / MIB:.0f} MiB for {real:.0f}, {error:+.1%}; {each}")
        sys.stdout.flush()
        yield compared(values, ESTIMATED, MEASURED, unit="MiB", label=f"{name}: {error:+.1%}", aim="0.9 to 1.2")


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=1)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="JSON of MiB by case, measured before")
    parser.add_argument("--one", choices=list(CASES), help="only print the bytes that one worker takes")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--meeting", type=Path)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.rank, asked.model, asked.meeting)
        return
    with tempfile.TemporaryDirectory() as home:
        made(Path(home))
        known = json.loads(asked.measured.read_text()) if asked.measured else {}
        found = list(figures(asked.cases, Path(home), known))
    missing = [f"{name}: not measured" for name in CASES if name not in asked.cases]
    short = [f"{f.what}, too low by more than 10 %" for f in found if f.ratio < 0.9]
    over = [f"{f.what}, too high by more than 20 %" for f in found if f.ratio > 1.2]
    said(found, asked, remarks=[*short, *over, *missing])


if __name__ == "__main__":
    main()
