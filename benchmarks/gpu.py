"""What a GPU changes, in parts of a few minutes; each thing next to a bare PyTorch loop in the same run.

Most parts run in this process and import no Ray: torch, numpy, transformers, safetensors, pyarrow and jaxtyping are
enough, and PEFT for LoRA. Parts that cannot run say why. All of them on a machine without a GPU, to see that they work:

    .venv/bin/python benchmarks/gpu.py --device cpu --tiny

and on one with a GPU, for `results.py`:

    .venv/bin/python benchmarks/gpu.py --json figures/gpu.json
"""

import argparse
import importlib
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_models import Bench, NotRun, name_of
from rounds import Figure, command_line, keep, told

LIMIT_S = 470  # of a part: under 8 minutes
CLOSING = 0.15  # share of the limit in which no round begins that might not end

HERE = ("transformers", "safetensors", "pyarrow", "jaxtyping")


class OutOfTime(Exception):
    """A part that took longer than its limit."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to run.

    Attributes:
        what: What it shows, in a line.
        run: The name of a generator of figures and remarks, as ``module.function``, imported only when it runs.
        needs: What has to be installed.
        given: What the function takes before the bench.
    """

    what: str
    run: str
    needs: tuple[str, ...] = HERE
    given: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    **{f"full-{n}": Part(f"full tuning, {n}", "gpu_training.full", given=(n,)) for n in ("0.5b", "1.5b")},
    **{f"lora-{n}": Part(f"LoRA tuning, {n}", "gpu_training.lora", (*HERE, "peft"), (n,)) for n in ("0.5b", "1.5b")},
    **{
        f"distil-{n}": Part(f"distillation into {n} from 1.5b", "gpu_training.distillation", given=(n,))
        for n in ("0.5b", "1.5b")
    },
    "kd-loss": Part("distillation loss in chunks and whole", "gpu_tensors.distillation_loss"),
    "merge": Part("merging on the device and of files", "gpu_tensors.merging"),
    **{f"serve-{n}": Part(f"serving {n}", "gpu_serving.native", given=(n,)) for n in ("0.5b", "1.5b")},
    "ray": Part("a worker group of one against one process", "gpu_groups.group", (*HERE, "ray")),
    "zero": Part("ZeRO against whole copies over two workers", "gpu_groups.zero", (*HERE, "ray", "deepspeed")),
    "offload": Part("ZeRO with and without CPU offload", "gpu_groups.offload", (*HERE, "ray", "deepspeed")),
    "vllm": Part("the native engine against vLLM", "gpu_serving.vllm", (*HERE, "vllm")),
}


def missing(part: Part) -> list[str]:
    """What is not installed of what a part needs, or cannot be imported."""
    found = []
    for name in part.needs:
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    return found


def figures_of(part: Part, bench: Bench) -> Iterator[Figure | str]:
    """What a part yields.

    Raises:
        NotRun: It cannot run here.
    """
    if lacking := missing(part):
        raise NotRun(f"needs {', '.join(lacking)}")
    if "transformers" in part.needs:
        importlib.import_module("transformers").utils.logging.disable_progress_bar()
    module, _, function = part.run.rpartition(".")
    run: Callable[..., Iterator[Figure | str]] = getattr(importlib.import_module(module), function)
    yield from run(*part.given, bench)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` where the block takes longer."""

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """What was found so far, part by part; kept after each of them."""

    def __init__(self, asked: argparse.Namespace, device: torch.device) -> None:
        self.asked, self.device = asked, device
        self.figures: list[Figure] = []
        self.remarks: list[str] = []
        self.failed = False

    def ran(self, name: str, part: Part, bench: Bench) -> None:
        """Run a part, with what it has to say until it ends, however it does."""
        print(f"== {name}: {part.what} on {name_of(self.device)}")
        try:
            with limited(self.asked.limit):
                for each in figures_of(part, bench):
                    self._one(each)
        except NotRun as reason:
            self._one(f"{name}: not run: {reason}")
        except torch.OutOfMemoryError as error:
            self._one(f"{name}: not run to its end: {str(error).partition('.')[0]}")
        except OutOfTime:
            self._one(f"{name}: not run to its end: it took longer than {self.asked.limit:g} s")
        except Exception:
            traceback.print_exc()
            self._one(f"{name}: FAILED: {traceback.format_exc().strip().rpartition(chr(10))[2]}")
            self.failed = True
        bench.clear()
        keep(
            self.asked,
            figures=[asdict(f) for f in self.figures],
            remarks=self.remarks,
            device=name_of(self.device),
        )

    def _one(self, each: Figure | str) -> None:
        if isinstance(each, str):
            print(each, flush=True)
            self.remarks.append(each)
        else:
            told(each)
            self.figures.append(each)


def options() -> argparse.ArgumentParser:
    """What can be asked."""
    parser = command_line(__doc__.partition("\n")[0], rounds=3)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--device", default="cuda", help="what torch calls it")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: to see that it works, not how fast")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of a part")
    parser.add_argument("--data-sheet", type=float, metavar="TFLOPS", help="of the device in bfloat16, for the MFU")
    return parser


def main() -> None:
    """Measure."""
    parser = options()
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{name:12} {part.what}" for name, part in PARTS.items()))
        return
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny shows that everything works")
    report = Report(asked, device)
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.parts:
            bench = Bench(
                device=device,
                tiny=asked.tiny,
                rounds=asked.rounds,
                home=Path(folder),
                until=time.monotonic() + (1 - CLOSING) * asked.limit,
                data_sheet=None if asked.data_sheet is None else asked.data_sheet * 1e12,
            )
            report.ran(name, PARTS[name], bench)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
