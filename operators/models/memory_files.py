"""A memory's folder: what is remembered, by which method, and beside which model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch.utils.hooks import RemovableHandle

import lfm
from lfm.errors import LfmError, UnknownName
from lfm.hooks import Blocks
from lfm.memory.base import OtherMemory, Remember, State
from lfm.weights import Weights, parsed
from operators.artifact import Memory, Model

STEM = "memory"
FAMILY = "memory"


def write(folder: Path, method: Remember, state: State, model: str) -> None:
    """Write ``memory.safetensors`` and ``memory.json``.

    Args:
        folder: Where to.
        method: Who can read the state.
        state: What is remembered.
        model: The digest of the model that it is kept beside.
    """
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, folder / f"{STEM}.safetensors")
    noted = {
        "model": model,
        "method": {"name": name_of(method), **method.hyperparameters()},
        "notes": state.notes,
    }
    (folder / f"{STEM}.json").write_text(json.dumps(noted, indent=2, sort_keys=True) + "\n")


def name_of(method: Remember) -> str:
    """What a memory's file calls a method.

    Raises:
        UnknownName: Nobody could read what it remembers.
    """
    name = type(method).__module__.removeprefix("lfm.").replace(".", "/")
    if name not in lfm.names(FAMILY):
        raise UnknownName("memory method that can be read", type(method).__name__, lfm.names(FAMILY))
    return name.partition("/")[2]


def read(memory: Memory) -> tuple[Remember, State]:
    """What `write` wrote.

    Raises:
        WeightsError: A file is not there or damaged.
        OtherMemory: ``memory.json`` does not say what such a file does.
        UnknownName: It is of a method that this project does not have.
    """
    noted = _noted(memory)
    try:
        fields, notes = dict(noted["method"]), dict(noted["notes"])
        name = str(fields.pop("name"))
        method: Any = TypeAdapter(lfm.find(f"{FAMILY}/{name}")).validate_python(fields)
    except (KeyError, TypeError, ValueError) as error:
        where, allowed = str(memory.path / f"{STEM}.json"), "'model', 'method' and 'notes'"
        raise OtherMemory(where, "does not say how it is read", allowed, "Make the memory again.") from error
    weights = Weights(memory.path, STEM)
    return method, State({name: weights.read(name) for name in weights.headers}, notes)


def unfit(memory: Memory, model: Model | None) -> Iterator[LfmError]:
    """Why a memory is not to be put beside a model, as far as is known."""
    try:
        wanted = str(memory.about.get("model") or _noted(memory).get("model", ""))
    except LfmError as problem:
        yield problem
        return
    if model is not None and model.digest and wanted and wanted != model.digest:
        fix = "Give the model that it was made for, or remember the facts anew."
        yield OtherMemory(
            f"memory {memory.uri!r}", f"it is kept beside {wanted[:12]}", f"model {model.digest[:12]}", fix
        )


def consult(whole: Any, memory: Memory, model: Model) -> RemovableHandle:
    """Have a model's network consult a memory from now on, whoever asks it, until the handle is removed.

    Raises:
        OtherMemory: It was made for another model.
        WeightsError: A file is not there or damaged.
    """
    for problem in unfit(memory, model):
        raise problem
    method, state = read(memory)
    return method.attach(whole, Blocks(whole), state)


def _noted(memory: Memory) -> dict[str, Any]:
    path = memory.path / f"{STEM}.json"
    if not path.is_file():
        fix = "Give what remember made."
        raise OtherMemory(f"memory {memory.uri!r}", f"it has no {path.name}", "a folder with one", fix)
    return parsed(path, path.read_bytes())
