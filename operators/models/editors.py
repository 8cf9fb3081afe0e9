"""Trained editors on disk: `editor.safetensors`, and `editor.json` with what they were made for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lfm.editing.base import TrainedEdit
from lfm.errors import LfmError
from lfm.hooks import Blocks
from lfm.weights import Weights
from operators.artifact import Editor, Model
from operators.catalog import method_name
from operators.models.belonging import noted, strange

STEM = "editor"


class DamagedEditor(LfmError, ValueError):
    """A file that does not hold the network that its method has for this model."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected what its method has for this model. Train it again."


def write(editor: nn.Module, folder: Path, *, model: Model, method: TrainedEdit, changes: tuple[str, ...]) -> None:
    """Write an editor, its parameters and what it has observed.

    Args:
        editor: What was trained.
        folder: Where to.
        model: What it edits.
        method: How it edits.
        changes: The parameters of the model that it changes.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in editor.state_dict().items()}
    save_file(state, folder / f"{STEM}.safetensors")
    about = {
        "model": model.digest,
        "method": method_name(type(method)),
        "fields": _plain(method),
        "changes": list(changes),
    }
    (folder / f"{STEM}.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def unsuited(verb: str, editor: Editor, method: TrainedEdit, model: Model | None) -> Iterator[str]:
    """What headers tell against editing a model with an editor, a clause each: part of an operator's ``problems``.

    Args:
        verb: Who asks.
        editor: What was trained.
        method: How it shall edit.
        model: What it shall edit, or None where that is not here yet.
    """
    try:
        about = noted(editor)
    except LfmError as error:
        yield f"editor: {error}"
        return
    yield from map(str, strange(verb, editor, model, "Train one for this model."))
    if about.get("method") != method_name(type(method)):
        fix = "Name that method, or give an editor of this one."
        yield f"editor: one of the method {about.get('method')!r}, expected {method_name(type(method))!r}. {fix}"
        return
    fields = about.get("fields")
    trained = fields if isinstance(fields, dict) else {}
    for field, value in _plain(method).items():
        if trained.get(field) != value:
            fix = f"Write {field}: {json.dumps(trained.get(field))}, or train it so."
            yield f"editor: trained with {field}={trained.get(field)!r}, expected the method's {value!r}. {fix}"


def read(editor: Editor, method: TrainedEdit, model: nn.Module, blocks: Blocks) -> nn.Module:
    """The editor in a folder that `unsuited` has nothing against, on the device of the model that it edits.

    Raises:
        DamagedEditor: It has other parts than its method builds for this model.
        WeightsError: Its file is no safetensors file.
    """
    made, weights = method.build(model, blocks), Weights(editor.path, STEM)
    state = made.state_dict()
    for name in sorted({*state, *weights.headers}):
        wanted = tuple(state[name].shape) if name in state else None
        found = weights.headers[name].shape if name in weights.headers else None
        if wanted != found:
            raise DamagedEditor(str(editor.path), f"{name!r} of shape {found}" if found is not None else f"no {name!r}")
    made.load_state_dict({name: weights.read(name) for name in state})
    return made.to(next(model.parameters()).device)


def _plain(method: TrainedEdit) -> dict[str, Any]:
    """A method's fields as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(method.hyperparameters()))
    return found
