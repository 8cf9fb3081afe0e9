"""Soft prompts: a few vectors before every text, in PEFT's files and in a decoder."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import LfmError, ShapeError
from lfm.weights import Weights, parsed

CONFIG, STEM, TENSOR = "adapter_config.json", "adapter_model", "prompt_embeddings"
KIND = "PROMPT_TUNING"
NAME = "soft_prompt"  # of the module in a model


class PackedPrompt(LfmError, ValueError):
    """Several documents in a row behind one soft prompt."""

    def __str__(self) -> str:
        return (
            "soft prompt: a row holds several documents, expected one, as all but the first would not see the prompt. "
            "Set packing to false."
        )


class SoftPrompt(nn.Module):
    """Puts vectors before each text that a decoder reads, and takes out again what comes of them.

    The prompt has the positions from 0 on and the text those that follow, as PEFT counts.

    Attributes:
        embeddings: The prompt, of shape (length, width).
    """

    embeddings: Tensor

    def __init__(self, trunk: Any, embeddings: Float[Tensor, "length width"]) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self._fresh = False  # whether the call under way begins a text
        self._names = tuple(inspect.signature(trunk.forward).parameters)
        trunk.register_forward_pre_hook(self._before, with_kwargs=True)
        trunk.register_forward_hook(self._after, with_kwargs=True)

    def __len__(self) -> int:
        return len(self.embeddings)

    def _before(self, trunk: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = {**dict(zip(self._names, args, strict=False)), **given}  # GPT-2's head names nothing
        cache = given.get("cache", given.get("past_key_values"))
        self._fresh = cache is None or not cache.get_seq_length()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is None and positions is not None:
            raise PackedPrompt
        ids = given["input_ids"]
        added: dict[str, Any] = {}
        if mask is not None:
            added["attention_mask"] = torch.cat([mask.new_ones(len(mask), len(self)), mask], dim=1)
        if positions is not None:
            positions = positions + len(self)
            if self._fresh:
                own = torch.arange(len(self), device=positions.device).expand(len(positions), -1)
                positions = torch.cat([own, positions], dim=1)
            added["position_ids"] = positions
        if self._fresh:
            words = trunk.get_input_embeddings()(ids)
            prompt = self.embeddings.to(words).expand(len(words), -1, -1)
            added |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, words], dim=1)}
        return (), {**given, **added}

    def _after(self, trunk: Any, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        if self._fresh:
            out.last_hidden_state = out.last_hidden_state[:, len(self) :]
        return out


def put_before(model: Any, embeddings: Float[Tensor, "length width"]) -> SoftPrompt:
    """Have a model read everything behind a soft prompt from now on."""
    prompt = SoftPrompt(model.get_decoder(), embeddings)
    model.add_module(NAME, prompt)
    return prompt


def length_of(model: Any) -> int:
    """How many virtual tokens a model reads before each text; 0 for most."""
    prompt = getattr(model, NAME, None)
    return 0 if prompt is None else len(prompt)


def is_soft_prompt(folder: Path) -> bool:
    """Whether an adapter is one."""
    path = folder / CONFIG
    return path.is_file() and parsed(path, path.read_bytes()).get("peft_type") == KIND


def prompted(model: Any, folder: Path) -> Any:
    """A model behind the soft prompt in a folder.

    Raises:
        ShapeError: The prompt is for a model of another width.
    """
    weights = Weights(folder, STEM)
    embeddings = weights.read(TENSOR)
    wanted = (len(embeddings), model.get_input_embeddings().embedding_dim)
    if tuple(embeddings.shape) != wanted:
        raise ShapeError(f"{folder} {TENSOR!r}", tuple(embeddings.shape), wanted, "Give the base that it was made for.")
    put_before(model, embeddings)
    return model


def write(folder: Path, embeddings: Float[Tensor, "length width"]) -> None:
    """Write a soft prompt as PEFT reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({TENSOR: embeddings.float().contiguous()}, folder / f"{STEM}.safetensors")
    config = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": embeddings.shape[0],
        "token_dim": embeddings.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
