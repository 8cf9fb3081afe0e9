"""Merging against reading and writing the same bytes, and against mergekit in an environment of its own.

All get the same models, of random weights, as folders. Each merge is a process of its own, as a user starts one; what
importing takes is measured apart, and `net` figures leave it out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rounds import Figure, command_line, compared, interleaved, said

ROOT = Path(__file__).resolve().parent.parent
COPY, MERGEKIT = "read and write the same bytes", "mergekit 0.1.5"
PACKAGES = ("mergekit==0.1.5", "torch", "safetensors", "transformers")

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # Ours; mergekit's, for each model and for all; what is aimed at against the copy and against mergekit.
    "linear": ({}, {"weight": 1.0}, "<= 1.43", "<= 0.333"),
    "task_arithmetic": ({"scale": 0.3}, {"weight": 0.3}, "<= 1.43", "<= 0.333"),
    "slerp": ({"t": 0.4}, {"t": 0.4}, "", "<= 0.333"),
    "ties": ({"density": 0.2}, {"weight": 1.0, "density": 0.2}, "", "<= 0.2"),
}

OURS = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from pydantic import TypeAdapter
import lfm
from operators.artifact import Model
from operators.merging import Streaming, merge
from operators.resources import Resources
asked = json.loads(sys.argv[1])
class Work:
    scratch, seed, resources = Path(asked["out"]), 0, Resources(cpus_per_worker=asked["cpus"])
    def progress(self, done, total, **measures): pass
    def keep(self, folder): pass
    def kept(self): return None
    def leaving(self): return False
    def save(self, kind, path, about=None): return kind(str(path), "", dict(about or {}))
method = TypeAdapter(lfm.find("merging/" + asked["method"])).validate_python(asked["fields"])
def memory(which): return next(int(l.split()[1]) for l in Path("/proc/self/status").open() if l.startswith(which)) << 10
Path("/proc/self/clear_refs").write_text("5")  # what importing took at its most is forgotten
before, here = memory("VmRSS"), time.perf_counter()
base, *experts = (Model(m) for m in asked["models"])
streaming = Streaming(memory_budget=asked["budget"])
merge.body(Work(), base=base, experts=experts, method=method, streaming=streaming)
print(json.dumps({"imports": here - began, "merge": time.perf_counter() - here, "bytes": memory("VmHWM") - before}))
"""


def made(home: Path, number: int, size: int, dtype: str) -> list[Path]:
    """Models of about so many bytes each: a base, and what a little noise makes of it."""
    import torch

    from lfm.weights import Header, Writer

    stored, width, inner, words = getattr(torch, dtype), 1024, 2816, 32000
    layer = 4 * width * width + 3 * width * inner + 2 * width
    layers = max(1, round((size / stored.itemsize - 2 * words * width) / layer))
    shapes = {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{at}.{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": words,
        "intermediate_size": inner, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": layers,
        "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip
    folders = [home / f"model-{i}" for i in range(number)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(i)
        with Writer(folder, {n: Header(shape, stored) for n, shape in shapes.items()}) as out:
            for name, shape in shapes.items():
                value = 0.02 * torch.randn(shape, generator=draws[0])
                noise = 0.002 * torch.randn(shape, generator=draws[1]) if i else 0.0
                out.write(name, (value + noise).to(stored))
    return folders


def copy(models: Sequence[Path], out: Path, number: int) -> float:
    """Seconds to read all of some models and to write as much as one of them has."""
    buffer = memoryview(bytearray(1 << 20))
    began = time.perf_counter()
    with (out / "copy").open("wb", buffering=0) as target:
        for i, folder in enumerate(models):
            with (folder / "model.safetensors").open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if i == 0:
                        target.write(buffer[:count])
    took = time.perf_counter() - began
    (out / "copy").unlink()
    return took


class Ours:
    """This project, in a process for each merge; remembers what it said of each."""

    def __init__(self, models: Sequence[Path], method: str, asked: argparse.Namespace, home: Path) -> None:
        self.out, self.net, self.peak = home / f"ours-{method}", list[float](), list[float]()
        self.job = {
            "models": [str(m) for m in models], "method": method, "fields": METHODS[method][0],
            "budget": asked.budget << 20, "cpus": asked.cpus, "out": str(self.out),
        }  # fmt: skip

    def __call__(self, number: int) -> float:
        """Seconds of one merge, from the start of its process to the end."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        words = [sys.executable, "-c", OURS, json.dumps(self.job)]
        told = json.loads(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout)
        took = time.perf_counter() - began
        self.net.append(told["merge"])
        self.peak.append(told["bytes"] / (1 << 20))
        shutil.rmtree(self.out)
        return took


class Mergekit:
    """mergekit, as its command line does it."""

    def __init__(self, python: Path, models: Sequence[Path], method: str, home: Path) -> None:
        self.out, self.config = home / f"mergekit-{method}", home / f"{method}.yml"
        base, *experts = map(str, models)
        each = METHODS[method][1]
        said: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
        if method == "slerp":  # its base is the first of the two
            said |= {"base_model": experts[0], "models": [{"model": m} for m in experts], "parameters": each}
        else:
            said["models"] = [{"model": m, "parameters": each} for m in experts]
            said |= {} if method == "linear" else {"base_model": base}
        self.config.write_text(json.dumps(said))  # which is YAML too
        self.words = [str(python.parent / "mergekit-yaml"), str(self.config), str(self.out), "--no-copy-tokenizer"]

    def __call__(self, number: int) -> float:
        """Seconds of one merge."""
        shutil.rmtree(self.out, ignore_errors=True)
        began = time.perf_counter()
        subprocess.run(self.words, check=True, capture_output=True)
        took = time.perf_counter() - began
        shutil.rmtree(self.out)
        return took


def environment(folder: Path) -> Path:
    """The Python of an environment that has mergekit; made where it is not there yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def measured(
    method: str, models: Sequence[Path], asked: argparse.Namespace, home: Path, python: Path | None
) -> list[Figure]:
    """One method: its speed beside the copy's, as a process beside mergekit's, and its memory beside the budget."""
    given = models[:3] if method == "slerp" else models
    ours = Ours(given, method, asked, home)
    rivals: dict[str, Callable[[int], float]] = {COPY: partial(copy, given, home), method: ours}
    if python is not None:
        rivals[MERGEKIT] = Mergekit(python, given, method, home)
    found = interleaved(rivals, asked.rounds)
    size = sum((m / "model.safetensors").stat().st_size for m in (*given, given[0])) / 1e9
    rates = {method: [size / s for s in ours.net], COPY: [size / s for s in found[COPY]]}
    budget = {method: ours.peak, "the budget": [float(asked.budget)] * asked.rounds}
    _, _, of_copy, of_mergekit = METHODS[method]
    found = {**found, f"{method}, net": ours.net}
    figures = [
        compared(found, f"{method}, net", COPY, unit="s", label=f"{method}, net of imports", aim=of_copy),
        compared(rates, method, COPY, unit="GB/s", label=f"{method}, net of imports", aim=">= 0.7" if of_copy else ""),
        compared(budget, method, "the budget", unit="MiB", label=f"{method}, peak memory net of imports", aim="<= 1.1"),
    ]
    if python is not None:
        label = f"{method}, a whole process"
        figures.append(compared(found, method, MERGEKIT, unit="s", label=label, aim=of_mergekit))
    return figures


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--models", type=int, default=4, help="how many there are, the base among them")
    parser.add_argument("--size", type=int, default=1000, metavar="MB", help="of each")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--budget", type=int, default=2048, metavar="MIB", help="memory_budget")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)), help="threads of a merge")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--folder", type=Path, help="where models and results lie meanwhile")
    parser.add_argument("--mergekit", type=Path, metavar="FOLDER", help="its environment, kept; default is a new one")
    parser.add_argument("--alone", action="store_true", help="leave mergekit out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        home = Path(folder)
        python = None if asked.alone else environment(asked.mergekit or home / "mergekit")
        models = made(home, asked.models, asked.size * 10**6, asked.dtype)
        figures = [f for m in asked.methods for f in measured(m, models, asked, home, python)]
    said(figures, asked)


if __name__ == "__main__":
    main()
