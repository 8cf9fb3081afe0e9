"""Folders that would have code run, kernels fetched or pickles opened where they are loaded, told by their configs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm.errors import LfmError
from lfm.weight_index import WeightsError, indexed

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # the ends of the keys; a slash means a repository


class ForeignCode(LfmError, ValueError):
    """A folder that cannot be loaded without running what somebody else wrote."""

    def __init__(self, folder: str, what: str, fix: str) -> None:
        super().__init__(folder, what, fix)
        self.folder, self.what, self.fix = folder, what, fix

    def __str__(self) -> str:
        return f"{self.folder!r} {self.what}. {self.fix}"


def refuse_foreign_code(folder: Path) -> None:
    """Raise `ForeignCode` where `foreign_code` finds something."""
    found = foreign_code(folder)
    if found is not None:
        raise ForeignCode(str(folder), *found)


def foreign_code(folder: Path) -> tuple[str, str] | None:
    """What must not be loaded in a model's or an adapter's folder, as a clause, and what to do about it."""
    return next(_found(folder), None)


def _found(folder: Path) -> Iterator[tuple[str, str]]:
    config, tokenizer, adapter = (
        _object(folder / name) for name in ("config.json", "tokenizer_config.json", "adapter_config.json")
    )
    for name, auto_map in (
        ("config.json", config.get("auto_map")),
        ("tokenizer_config.json", tokenizer.get("auto_map")),
    ):
        if auto_map and not _native(name, config, tokenizer):
            yield (
                f"names code of its own in {name} (auto_map {_first(auto_map)!r}), which is never run, expected a "
                "class that transformers has",
                "Convert it to one where you trust it, or give another.",
            )
    for key, value in _implementations(config):
        yield (
            f"names a kernel to fetch in config.json ({key} {value!r}), which is never run, expected an implementation "
            "that transformers has, such as 'sdpa'",
            "Remove it from the file.",
        )
    if adapter.get("megatron_config"):
        core = adapter.get("megatron_core")
        what = (
            f"names a module to import in adapter_config.json (megatron_core {core!r}), expected an adapter without it"
        )
        yield what, "Train the adapter without Megatron."
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            indexed(index)
        except WeightsError as error:
            yield f"holds a {index.name} that is none: {error.what}, expected {error.allowed}", "Save the folder again."
    names = sorted(p.name for p in folder.glob("*"))
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        yield only_pickles(pickles[0], "safetensors")


def only_pickles(name: str, wanted: str) -> tuple[str, str]:
    """The clause about weights that are there as pickles only, and what to do about it."""
    what = f"holds weights only as pickles ({name}), which are never opened, expected {wanted}"
    return what, "Load it where you trust it and save it again with save_pretrained."


def _object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; an empty one where it is not there or is something else, which others refuse."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _native(name: str, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Whether transformers has a class of its own for what a config's `auto_map` names; then it takes that one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    kind = config.get("model_type")
    if name == "config.json":
        return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    named = str(tokenizer.get("tokenizer_class") or "")
    return kind in TOKENIZER_MAPPING_NAMES or bool(named and tokenizer_class_from_name(named))


def _first(auto_map: Any) -> str:
    """The first class that an `auto_map` names."""
    values = list(auto_map.values()) if isinstance(auto_map, dict) else auto_map
    while isinstance(values, list) and values:
        values = next((v for v in values if v), "")
    return str(values)


def _implementations(config: Any) -> Iterator[tuple[str, str]]:
    """Every implementation, at any depth of a config, that is a repository's."""
    for key, value in config.items():
        if key.endswith(IMPLEMENTATIONS):
            named = value.values() if isinstance(value, dict) else [value]
            yield from ((key, one) for one in named if isinstance(one, str) and "/" in one)
        elif isinstance(value, dict):
            yield from _implementations(value)
