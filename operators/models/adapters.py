"""What a LoRA adapter's folder, as PEFT writes it, does to each parameter of its base."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm.errors import LfmError, ShapeError
from lfm.weights import Weights, parsed
from operators.models.weight_changes import Change

HARMLESS = frozenset(  # fields that this file reads, or that say nothing about the finished adapter's arithmetic
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config"  # noqa: SIM905  28 lines otherwise
    " exclude_modules fan_in_fan_out"
    " inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout"
    " lora_ga_config megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision"
    " runtime_config target_modules task_type use_rslora".split()
)
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # all others change the base's own weights as well


class UnsupportedAdapter(LfmError, ValueError):
    """An adapter that is more, or something else, than low-rank changes and replaced parameters."""

    def __init__(self, where: str, what: str, allowed: str) -> None:
        super().__init__(where, what, allowed)
        self.where, self.what, self.allowed = where, what, allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}. Merge it into its base with PEFT first."


def read_adapter(folder: Path) -> dict[str, Change]:
    """Every parameter of the base that an adapter changes, by its name in the base; reads headers only.

    Raises:
        WeightsError: It is damaged.
        UnsupportedAdapter: It does something else than LoRA in its plain form, which is named.
        ShapeError: Its matrices do not fit together.
    """
    path = folder / "adapter_config.json"
    config = parsed(path, path.read_bytes())
    _check(str(folder), config)
    weights = Weights(folder, "adapter_model")
    parts: dict[str, dict[str, str]] = {}
    for key in weights.headers:
        name, part = _parsed(str(folder), key)
        parts.setdefault(name, {})[part] = key
    return {name: _change(str(folder), name, of, weights, config) for name, of in parts.items()}


def _check(where: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(where, f"peft_type={config.get('peft_type')!r}", "'LORA'")
    for field, value in config.items():
        if field not in HARMLESS and value:
            raise UnsupportedAdapter(where, f"{field}={value!r}", "LoRA without it")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        allowed = f"one of {', '.join(map(repr, STARTS))}, which leave the base as it is"
        raise UnsupportedAdapter(where, f"init_lora_weights={start!r}", allowed)


def _parsed(where: str, key: str) -> tuple[str, str]:
    """``base_model.model.a.q.lora_A.weight`` is the part ``lora_A`` of ``a.q.weight``."""
    name = key.removeprefix("base_model.model.")
    matrix = re.fullmatch(r"(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]))", name)
    if matrix:
        return f"{matrix[1]}.weight", matrix[2] or matrix[3]
    if name == key or re.search(r"\b(lora_|modules_to_save\b|token_adapter\b)", name):
        raise UnsupportedAdapter(where, f"{key!r}", "lora_A, lora_B or a whole parameter below 'base_model.model.'")
    return name.replace(".base_layer.", "."), "whole"


def _change(where: str, name: str, parts: Mapping[str, str], weights: Weights, config: Mapping[str, Any]) -> Change:
    whole = parts.get("whole", "")
    matrices = sorted(parts.keys() - {"whole"})
    if not matrices:
        return Change(weights, weights.headers[whole].shape, whole=whole)
    if matrices not in (["lora_A", "lora_B"], ["lora_embedding_A", "lora_embedding_B"]):
        raise UnsupportedAdapter(where, f"{name!r} with {' and '.join(matrices)}", "a pair of A and B")
    low, high = (parts[m] for m in matrices)
    lower, higher = weights.headers[low].shape, weights.headers[high].shape
    if len(lower) != 2 or len(higher) != 2:
        what = f"{name!r} with matrices of shape {lower} and {higher}"
        raise UnsupportedAdapter(where, what, "linear layers or embeddings")
    if lower[0] != higher[1]:
        raise ShapeError(f"{where} {high!r}", higher, (higher[0], lower[0]), "Train the adapter again.")
    transposed = matrices[0] == "lora_embedding_A" or bool(config.get("fan_in_fan_out"))
    shape = (lower[1], higher[0]) if transposed else (higher[0], lower[1])
    if whole and weights.headers[whole].shape != shape:
        raise ShapeError(f"{where} {whole!r}", weights.headers[whole].shape, shape, "Train the adapter again.")
    scale = _scale(name.removesuffix(".weight"), lower[0], config)
    return Change(weights, shape, whole=whole, low=low, high=high, scale=scale, transposed=transposed)


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches it; the first one counts
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
