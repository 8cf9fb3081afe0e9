"""A model as it is, or what became of one: with an adapter on it, a change of its weights, or a memory beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lfm.deltas import add, read
from lfm.errors import LfmError
from lfm.memory.base import OtherMemory
from operators.artifact import Adapter, Artifact, Delta, Memory, Model, kind_of
from operators.data.vocabulary import tokens
from operators.models import classifiers
from operators.models.ensembles import load_any
from operators.models.language_models import adapted, architecture_of, heads_of, load
from operators.models.memory_files import consult
from operators.models.objectives import plain
from operators.models.rewrites import made_for
from operators.models.weight_changes import base_of

CHANGES = (Adapter, Delta)


class BaseNeeded(LfmError, ValueError):
    """An adapter or a change of weights without the model that it belongs to, or with another."""

    def __init__(self, verb: str, kind: str, got: str, wanted: str) -> None:
        super().__init__(verb, kind, got, wanted)
        self.verb, self.kind, self.got, self.wanted = verb, kind, got, wanted

    def __str__(self) -> str:
        return (
            f"{self.verb}: base is {self.got[:12] or 'none'}, expected the {self.kind}'s, "
            f"{self.wanted[:12] or 'unknown'}. Give the model that it was made for as 'base'."
        )


class AnotherVocabulary(LfmError, ValueError):
    """Two models whose tokens are not the same ones, and so cannot be compared token by token."""

    def __init__(self, where: str, model: int, base: int) -> None:
        super().__init__(where, model, base)
        self.where, self.model, self.base = where, model, base

    def __str__(self) -> str:
        return (
            f"{self.where}: its {self.base} tokens are not the model's {self.model}, expected the same ones. "
            "Compare with what the model was made from, or with nothing."
        )


def without_base(kinds: Mapping[str, Sequence[type[Artifact]]]) -> str | None:
    """What a plan says where `model` is going to be no whole model, and no base is given."""
    for kind in CHANGES:
        if kind in kinds["model"] and "base" not in kinds:
            article = "an" if kind is Adapter else "a"
            return (
                f"base: none is given and model is {article} {kind_of(kind)}, expected the model that it was made for. "
                "Name it."
            )
    return None


def not_whole(memory: str, kind: str) -> OtherMemory:
    """What is said where a memory comes with something else than a whole model."""
    allowed = "the model that it was made for"
    return OtherMemory(f"memory {memory!r}", f"it is given with {kind!r}", allowed, "Write the whole model first.")


def home_of(model: Model | Adapter | Delta | None, base: Model | None) -> Path | None:
    """The folder with the config and the tokenizer; None where it is not here yet."""
    whole = base if isinstance(model, CHANGES) else model
    return None if whole is None else whole.path


def opened(
    verb: str, model: Model | Adapter | Delta, base: Model | None, memory: Memory | None = None
) -> tuple[Any, Path]:
    """The network in float32, and the folder with its tokenizer; nothing is written.

    Args:
        verb: Who asks, for messages.
        model: What is opened.
        base: What it was made for, where it is an adapter or a change.
        memory: What a whole model consults.

    Raises:
        BaseNeeded: It came without its base, or with another model.
        OtherMemory: The memory was not made for this very model.
    """
    home = home_with(verb, model, base)
    if memory is not None and not isinstance(model, Model):
        raise not_whole(memory.uri, kind_of(type(model)))
    # Of a model that is changed a plain one: what was made for it names parameters of its own.
    whole = load_any(home, torch.float32) if isinstance(model, Model) else _loaded(home)
    if isinstance(model, Model) and memory is not None:
        consult(whole, memory, model)
    if isinstance(model, Adapter):
        return adapted(whole, model.path), home
    if isinstance(model, Delta):
        add(whole, read(model.path))
    return whole, home


def home_with(verb: str, model: Model | Adapter | Delta, base: Model | None) -> Path:
    """The folder with the config and the tokenizer.

    Raises:
        BaseNeeded: An adapter or a change came without its base, or with another model.
    """
    if isinstance(model, Model):
        return model.path
    own = base_of(model.path) if isinstance(model, Delta) else made_for(model.path)
    wanted = str(model.about.get("base") or own)
    if base is None or (wanted and base.digest and wanted != base.digest):
        raise BaseNeeded(verb, kind_of(type(model)), base.digest if base else "", wanted)
    return base.path


def _loaded(folder: Path) -> Any:
    return (load if architecture_of(folder) == "decoder" else classifiers.load)(folder, torch.float32)


def beside(whole: Any, home: Path, base: Model) -> Any:
    """The base's network in float32, to be compared with the model token by token.

    Raises:
        AnotherVocabulary: It has other tokens.
    """
    found = load(base.path, torch.float32)
    sizes = [heads_of(m).size for m in (plain(whole), found)]
    if sizes[0] != sizes[1] or tokens(home, added=False) != tokens(base.path, added=False):
        raise AnotherVocabulary(f"base {base.uri!r}", *sizes)
    return found
