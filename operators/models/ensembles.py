"""Models that are made of several: their folders, and the network that these make when they are loaded."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lfm.ensembling.base import Build, Combine, Ensemble
from lfm.errors import LfmError
from lfm.hooks import cache_name
from operators.models import classifiers, language_models, networks
from operators.models.ensemble_files import EXPERTS, LEARNT, is_ensemble, member
from operators.models.language_models import Heads, architecture_of, copy_settings, trunk_of
from operators.models.rewrites import FIX, RewriteError, fill, methods_in, say
from operators.models.texts import longest_row

Load = Callable[[Path, torch.dtype | None], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensembled:
    """What `lfm.json` says of a model that is made of several.

    Attributes:
        method: What makes it of them.
        models: How many they are.
    """

    method: Ensemble
    models: int


def read(folder: Path) -> Ensembled:
    """How the model of a folder is made.

    Raises:
        RewriteError: Its `lfm.json` does not say that, or says it of a number of models that it cannot be made of.
    """
    methods, found = methods_in(folder, Ensemble)
    number = found.get("models")
    if not isinstance(number, int) or number < 1:
        raise RewriteError(str(folder), f"says models={number!r} in its lfm.json", "how many it is made of")
    methods[0].check(number)
    return Ensembled(method=methods[0], models=number)


def asks_several(folder: Path) -> bool:
    """Whether a model's folder holds several models that are all asked.

    Raises:
        RewriteError: It does not say what it holds.
    """
    return is_ensemble(folder) and isinstance(read(folder).method, Combine)


def unreadable(folder: Path) -> tuple[str, str] | None:
    """What keeps `read` from reading a folder, as a clause, and what to do about it."""
    try:
        read(folder)
    except RewriteError as problem:
        return f"{problem.what}, expected {problem.allowed}", FIX
    except LfmError as problem:
        return f"says in its lfm.json what cannot be: {problem}", FIX
    return None


def load_decoder(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model in a folder as `language_models.load` gives it, or what several such models make."""
    return _loaded(folder, dtype, language_models.load)


def load_classifier(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The same of a classifier."""
    return _loaded(folder, dtype, classifiers.load)


def load_any(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The decoder or the classifier in a folder, one model or several; or a network for images, always in float32."""
    what = architecture_of(folder)
    if what == "network":
        return networks.load(folder)
    return (load_decoder if what == "decoder" else load_classifier)(folder, dtype)


def _loaded(folder: Path, dtype: torch.dtype | None, load: Load) -> Any:
    if not is_ensemble(folder):
        return load(folder, dtype)
    found = read(folder)
    if isinstance(found.method, Combine):
        return Committee(found.method, [load(member(folder, i), dtype) for i in range(found.models)]).eval()
    return built(folder, found, dtype, (EXPERTS, LEARNT))


def built(folder: Path, found: Ensembled, dtype: torch.dtype | None, stems: Sequence[str]) -> Any:
    """The one network that is built of a base and experts, in evaluation mode.

    What no file gives a value is as it starts, drawn from torch's generator.

    Args:
        folder: Of the model.
        found: What it says.
        dtype: Of its weights; None takes the one in which they are stored.
        stems: What the names of the files begin with that give values to what is new in the network.

    Raises:
        RewriteError: Something new has no tensor in these files, or a tensor is of nothing in the network.
    """
    assert isinstance(found.method, Build)
    inside = member(folder, 0)
    causal = architecture_of(inside) == "decoder"
    network = (language_models.load if causal else classifiers.load)(inside, dtype)
    before = {n for n, _ in network.named_parameters()}
    kept = found.method.build(network, found.models, causal=causal)
    new = {n for n, _ in network.named_parameters()} - before
    fill(network, folder, stems, new if LEARNT in stems else set(kept.values()))
    return network.eval()


def write_committee(folder: Path, method: Combine, members: Sequence[Path]) -> None:
    """Write a model that asks all of `members`, which are copied; its settings are those of the shortest context."""
    home = min(members, key=lambda path: longest_row(path) or float("inf"))
    folder.mkdir()
    copy_settings(home, folder)
    for number, path in enumerate(members):
        target = member(folder, number)
        target.mkdir(parents=True)
        copy_settings(path, target)
        for file in sorted(path.glob("model*.safetensors*")):
            shutil.copyfile(file, target / file.name)
    say(folder, method, models=len(members))


class Committee(nn.Module):
    """Several models that answer together, called as one of transformers' models is.

    Attributes:
        method: How what they say is combined.
        members: The models.
    """

    def __init__(self, method: Combine, members: Sequence[Any]) -> None:
        super().__init__()
        self.method = method
        self.members = nn.ModuleList(members)
        self.config = min((m.config for m in members), key=_context)
        self.generation_config = getattr(members[0], "generation_config", None)

    def forward(self, **given: Any) -> SimpleNamespace:
        """Log-probabilities as ``logits``."""
        said = [m(**given).logits.float().log_softmax(dim=-1) for m in self.members]
        return SimpleNamespace(logits=self.method.combine(torch.stack(said)))

    def get_input_embeddings(self) -> Any:
        """Those of the first model: all read the same tokens."""
        first: Any = self.members[0]
        return first.get_input_embeddings()

    def get_output_embeddings(self) -> Heads:
        """All heads."""
        return Heads([language_models.head_of(m) for m in self.members], self.method.combine)

    def get_decoder(self) -> "Trunks":
        """All of each model but its head."""
        return Trunks([trunk_of(m) for m in self.members])


class Trunks(nn.Module):
    """What several models make of tokens before their heads, one after another; no module of its own holds them."""

    def __init__(self, trunks: Sequence[Any]) -> None:
        super().__init__()
        self.trunks = tuple(trunks)

    def forward(self, past_key_values: Sequence[Any] | None = None, **given: Any) -> SimpleNamespace:
        """Hidden states as ``last_hidden_state``; `past_key_values` is what `new_cache` gives."""
        caches = past_key_values or (None,) * len(self.trunks)
        read = [
            trunk(**given, **({} if cache is None else {cache_name(trunk): cache}))
            for trunk, cache in zip(self.trunks, caches, strict=True)
        ]
        return SimpleNamespace(last_hidden_state=torch.cat([out.last_hidden_state for out in read], dim=-1))


def new_cache(model: Any) -> Any:
    """An empty cache of keys and values; of several models one for each."""
    import transformers

    if isinstance(model, Committee):
        return tuple(new_cache(m) for m in model.members)
    return transformers.DynamicCache(config=model.config)


def _context(config: Any) -> float:
    return float(getattr(config.get_text_config(), "max_position_embeddings", 0) or float("inf"))
