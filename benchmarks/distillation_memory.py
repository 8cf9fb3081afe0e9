"""Peak memory of the chunked distillation loss and of the dense one, while tokens x vocabulary grows.

The memory is what a process of its own holds at most while loss and gradients are computed, less what it held before.
The gradients themselves are in it; they grow with tokens + vocabulary, as they have to.
"""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rounds import Figure, command_line, compared, interleaved, said
from torch import Tensor

from lfm.distillation.forward_kl import ForwardKL
from lfm.soft_targets import Dense, chunked_distillation

ROOT = Path(__file__).resolve().parent.parent
METHOD = ForwardKL(temperature=2.0)
OURS, DENSE = "chunked", "dense"
MIB = 1 << 20

Given = tuple[Tensor, Tensor, Dense]


def drawn(tokens: int, vocabulary: int, width: int, device: torch.device | None = None) -> Given:
    """A student's hidden states and head, and a teacher of twice its width."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, width, device=device).requires_grad_() for n in (tokens, vocabulary))
    theirs = [torch.randn(n, 2 * width, device=device) for n in (tokens, vocabulary)]
    return hidden, weight, Dense(hidden=theirs[0], weight=theirs[1], temperature=METHOD.temperature)


def chunked(hidden: Tensor, weight: Tensor, teacher: Dense, *, chunk: int | None = None) -> float:
    """Ours."""
    loss = chunked_distillation(hidden, weight, teacher, METHOD, chunk=chunk) / len(hidden)
    loss.backward()
    return float(loss.detach())


def dense(hidden: Tensor, weight: Tensor, teacher: Dense) -> float:
    """What one writes by hand: both models' logits, whole."""
    with torch.no_grad():
        theirs = torch.log_softmax(teacher.hidden @ teacher.weight.T / METHOD.temperature, dim=-1)
    mine = torch.log_softmax(hidden @ weight.T / METHOD.temperature, dim=-1)
    loss = METHOD.temperature**2 * torch.nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)
    loss = loss / len(hidden)
    loss.backward()
    return float(loss.detach())


FORMS = {OURS: chunked, DENSE: dense}


def peak(form: str, tokens: int, vocabulary: int, width: int) -> int:
    """Bytes that one call adds at most to what this process holds."""
    FORMS[form](*drawn(8, 16, 4))  # what the first call of anything allocates
    given = drawn(tokens, vocabulary, width)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = _high_water()
    FORMS[form](*given)
    return _high_water() - before


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def peak_elsewhere(form: str, tokens: int, vocabulary: int, width: int, number: int) -> float:
    """The same in a new process, in MiB."""
    words = [sys.executable, __file__, "--one", form, "--tokens", str(tokens), "--vocabulary", str(vocabulary)]
    # What is freed goes back to the system at once: the allocator's own reserves are not what is compared.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([*words, "--width", str(width)], capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout) / MIB


def seconds(form: str, given: Given, number: int) -> float:
    """One call's time."""
    began = time.perf_counter()
    FORMS[form](*given)
    return time.perf_counter() - began


def at(tokens: int, vocabulary: int, width: int, rounds: int) -> list[Figure]:
    """Memory and time at one size."""
    given = drawn(tokens, vocabulary, width)
    losses = {form: FORMS[form](*given) for form in FORMS}
    assert abs(losses[OURS] - losses[DENSE]) < 1e-4 * abs(losses[DENSE]), losses
    memory = interleaved({f: partial(peak_elsewhere, f, tokens, vocabulary, width) for f in FORMS}, rounds)
    times = interleaved({f: partial(seconds, f, given) for f in FORMS}, 3 * rounds)
    label = f"{tokens} tokens x {vocabulary} words"
    return [
        compared(memory, OURS, DENSE, unit="MiB", label=f"peak memory, {label}"),
        compared(times, OURS, DENSE, unit="s", label=f"time of a call, {label}"),
    ]


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--width", type=int, default=128, help="of the student; the teacher has twice as much")
    parser.add_argument("--one", choices=list(FORMS), help="only print the bytes that one call takes in this process")
    asked = parser.parse_args()
    if asked.one:
        print(peak(asked.one, asked.tokens[0], asked.vocabulary[0], asked.width))
        return
    figures = []
    for vocabulary in sorted(asked.vocabulary):
        for tokens in sorted(asked.tokens):
            figures += at(tokens, vocabulary, asked.width, asked.rounds)
    said(figures, asked)
    first, last = figures[0], figures[-2]
    grown = max(asked.tokens) * max(asked.vocabulary) / (min(asked.tokens) * min(asked.vocabulary))
    ours, theirs = last.value / first.value, last.baseline_value / first.baseline_value
    print(f"tokens x vocabulary grew {grown:.3g} times: {OURS} memory {ours:.3g} times, {DENSE} {theirs:.3g}")


if __name__ == "__main__":
    main()
