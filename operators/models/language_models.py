"""Folders <-> causal language models of transformers and PEFT, and how these are put together."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.errors import LfmError
from lfm.networks import ImageNetwork
from lfm.weights import parsed
from operators.models.ensemble_files import INSTEAD, is_ensemble
from operators.models.foreign_code import refuse_foreign_code
from operators.models.networks import is_network
from operators.models.rewrites import is_rewrites, rewritten
from operators.models.soft_prompts import is_soft_prompt, prompted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Architecture = Literal["decoder", "encoder", "classifier", "network"]
CALLED: Mapping[Architecture, str] = {
    "decoder": "a causal language model",
    "encoder": "an encoder",
    "classifier": "a classifier",
    "network": "a network for images",
}
LOADED_AS: Mapping[Architecture, str] = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
}


class UnsupportedModel(LfmError, ValueError):
    """A model that cannot be trained here as it was asked."""

    def __init__(self, architecture: str, what: str, fix: str) -> None:
        super().__init__(architecture, what, fix)
        self.architecture, self.what, self.fix = architecture, what, fix

    def __str__(self) -> str:
        return f"model of type {self.architecture!r}: {self.what}. {self.fix}"


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model in a folder, on the CPU, in evaluation mode; in its stored dtype where none is given.

    No code of the folder's own runs, and nothing is unpickled.

    Raises:
        ForeignCode: It cannot be loaded without that.
        UnsupportedModel: It is something else, or made of several models.
    """
    import transformers

    refuse_foreign_code(folder)
    refuse_ensembles(folder)
    if (what := architecture_of(folder)) != "decoder":
        fix = "Give a model that writes text."
        kind = str(config_of(folder).get("model_type"))
        raise UnsupportedModel(kind, f"it is {CALLED[what]}, expected {CALLED['decoder']}", fix)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def refuse_ensembles(folder: Path) -> None:
    """Raise `UnsupportedModel` for a folder that `operators.models.ensembles` alone can load."""
    if is_ensemble(folder):
        kind = str(config_of(folder).get("model_type"))
        raise UnsupportedModel(kind, "it is an ensemble, expected one plain model", INSTEAD)


def other_names(folder: Path, lacking: str) -> UnsupportedModel:
    """What is said where a model's files do not hold a parameter under the name that it has in the model."""
    what = f"its files hold no {lacking!r}, expected its parameters by their names"
    return UnsupportedModel(
        str(config_of(folder).get("model_type")), what, "Load it with transformers and save it again."
    )


def outline(folder: Path) -> Any:
    """The model that a folder's config describes, without memory for its weights."""
    with torch.device("meta"):
        return sketch(folder)


def sketch(folder: Path, dtype: torch.dtype | None = None, *, layers: int | None = None, labels: int = 0) -> Any:
    """A model as a folder's config describes it, with weights that mean nothing.

    Args:
        folder: The model's.
        dtype: Of its weights; None takes the one in which they are stored.
        layers: How many it has; None takes as many as the config says.
        labels: What a new head of an encoder tells.
    """
    import transformers

    refuse_foreign_code(folder)
    made: dict[str, Any] = {"num_labels": labels} if labels else {}
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **made)
    if layers is not None:
        said = config.get_text_config()
        said.num_hidden_layers = layers
        if getattr(said, "layer_types", None):  # of a model whose layers are of several kinds
            said.layer_types = said.layer_types[:layers]
    kind = LOADED_AS["classifier" if labels else architecture_of(folder)]
    return getattr(transformers, kind).from_config(config, **({} if dtype is None else {"dtype": dtype}))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; padding gets the end-of-text token where it has none of its own."""
    import transformers

    refuse_foreign_code(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UnsupportedModel(folder.name, "its tokenizer has no end-of-text token", "Set eos_token in its config.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapted(model: Any, adapter: Path) -> Any:
    """A model with an adapter on it: PEFT's, or what this project puts in itself.

    Raises:
        RewriteError: It is the latter, and does not fit the model.
    """
    import peft

    refuse_foreign_code(adapter)
    if is_rewrites(adapter):
        return rewritten(model, adapter)
    if is_soft_prompt(adapter):  # PEFT puts it before a whole model only, not before the part that is called here
        return prompted(model, adapter)
    return peft.PeftModel.from_pretrained(model, adapter, local_files_only=True)


def inject(model: Any, kind: str, fields: Mapping[str, Any], task: str = "CAUSAL_LM") -> Any:
    """A `PeftModel` around `model`, which it changes in place; `task` is PEFT's word for what the model does."""
    import peft

    settings = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    return peft.get_peft_model(model, settings(task_type=task, **fields))


def save(model: Any, weights: Mapping[str, Tensor], folder: Path, *, tokenizer: Path, dtype: torch.dtype) -> None:
    """Write a model in `dtype` with these weights and a tokenizer, or, of a `PeftModel`, its adapter in float32.

    Args:
        model: What was trained.
        weights: Those that were, by name; of an adapter all of them.
        folder: Where to.
        tokenizer: The folder whose tokenizer goes with it.
        dtype: Of a whole model's weights.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder, state_dict=dict(weights), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, all of it blank
        path = folder / "adapter_config.json"
        # Neither where the base lies on this machine nor a set's order in this process is part of what was learnt.
        sets = {k: sorted(v) for k, v in model.active_peft_config.to_dict().items() if isinstance(v, set)}
        _write(path, {**parsed(path, path.read_bytes()), **sets, "base_model_name_or_path": None})
        return
    tied = getattr(model, "all_tied_weights_keys", {})
    whole = {k: v for k, v in {**model.state_dict(), **weights}.items() if k not in tied}
    whole = {k: v.to(dtype) if v.is_floating_point() else v for k, v in whole.items()}
    model.save_pretrained(folder, state_dict=whole, safe_serialization=True)
    # transformers writes the dtype that the model trained in
    word = next(word for word, of in DTYPES.items() if of == dtype)
    _write(folder / "config.json", {**config_of(folder), "dtype": word})
    copy_tokenizer(tokenizer, folder)


def _write(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_of(folder: Path) -> dict[str, Any]:
    """A model's `config.json`; nothing where it has none.

    Raises:
        WeightsError: It is no JSON object.
    """
    path = folder / "config.json"
    return parsed(path, path.read_bytes()) if path.is_file() else {}


def architecture_of(folder: Path) -> Architecture:
    """What a model is by its config: what that names, else what transformers has for its type.

    An encoder sees a text from both ends and has no labels; a classifier has a head that tells them. A network of
    this project has no config of transformers' at all.
    """
    config = config_of(folder)
    if not config and is_network(folder):
        return "network"
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "classifier"
    if not config or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "decoder"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as FILLS_GAPS,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIES,
    )

    kind = config.get("model_type")
    return "encoder" if kind in FILLS_GAPS and kind in CLASSIFIES else "decoder"


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model's config says its weights have."""
    config = config_of(folder)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder into another, as it is."""
    _copy(TOKENIZER_FILES, source, target)


def copy_settings(source: Path, target: Path) -> None:
    """Write all of a model's folder but its weights into another, as it is."""
    _copy((*CONFIGS, *TOKENIZER_FILES), source, target)


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


CONFIGS = ("config.json", "lfm.json", "preprocessor_config.json", "processor_config.json")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: a linear map, then a factor and a soft cap where the model has them.

    Attributes:
        linear: The output embedding.
        scale: Multiplies its output.
        cap: `cap * tanh(x / cap)` where there is one.
    """

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the linear map alone."""
        return self.scale == 1.0 and self.cap is None

    def shaped(self, logits: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens vocab"]:
        """What follows the linear map."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.cap * torch.tanh(logits / self.cap) if self.cap is not None else logits

    @property
    def size(self) -> int:
        """How many tokens it tells, of which the last may be padding."""
        return self.linear.out_features

    def logits(self, hidden: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens vocab"]:
        """What is told after each token, in float32."""
        return self.shaped(self.linear(hidden)).float()


class Heads(nn.Module):
    """The heads of several models that answer together: what goes in are their hidden states, one after another.

    Attributes:
        heads: One for each.
        combine: Makes of what each says, of shape (models, ..., vocab), what all say; log-probabilities both.
    """

    def __init__(self, heads: Sequence[Head], combine: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.combine = tuple(heads), combine

    @property
    def size(self) -> int:
        """How many tokens they tell."""
        return self.heads[0].size

    def parts(self, hidden: Float[Tensor, "*tokens widths"]) -> Sequence[Float[Tensor, "*tokens width"]]:
        """What goes into each head."""
        return torch.split(hidden, [head.linear.in_features for head in self.heads], dim=-1)

    def logits(self, hidden: Float[Tensor, "*tokens widths"]) -> Float[Tensor, "*tokens vocab"]:
        """What is told after each token, as log-probabilities in float32."""
        each = zip(self.heads, self.parts(hidden), strict=True)
        return self.combine(torch.stack([head.logits(part).log_softmax(dim=-1) for head, part in each]))


def heads_of(model: Any) -> Head | Heads:
    """What turns hidden states into logits, for who only asks: of one model, or of several that answer together.

    Raises:
        UnsupportedModel: It has no head, or a part was put around it.
    """
    together = None if isinstance(model, ImageNetwork) else model.get_output_embeddings()
    return together if isinstance(together, Heads) else head_of(model)


def head_of(model: Any) -> Head:
    """The head of a causal language model, or of a network for images.

    Raises:
        UnsupportedModel: It has none, or a part was put around it.
    """
    if isinstance(model, ImageNetwork):
        return Head(model.head)
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        fix = "Leave the output head out of the adapter's targets."
        raise UnsupportedModel(config.model_type, f"its output head is {type(linear).__name__}, not linear", fix)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


def head_size(folder: Path) -> int | None:
    """How many entries a model says its head has, of which the last may be padding."""
    return size_of_head(config_of(folder))


def size_of_head(config: Mapping[str, Any]) -> int | None:
    """The same of a config."""
    size: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size


def num_layers(folder: Path) -> int | None:
    """How many layers a model says it has."""
    return number_of_layers(config_of(folder))


def number_of_layers(config: Mapping[str, Any]) -> int | None:
    """The same of a config."""
    said = [each.get(key) for each in (config, config.get("text_config") or {}) for key in LAYERS]
    return next((int(number) for number in said if number), None)


LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # what configs call it


def trunk_of(model: Any) -> Any:
    """All of a causal language model but its head."""
    return model.get_decoder()


def hidden_states(model: Any, ids: Tensor, positions: Tensor, *, packed: bool) -> Float[Tensor, "rows length width"]:
    """What goes into the head; with `packed` a position of 0 starts a document that sees nothing before it."""
    extra = {"position_ids": positions} if packed else {}
    out = trunk_of(model)(input_ids=ids, use_cache=False, **extra)
    return out.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def check(model: Any, *, packed: bool) -> None:
    """Ask a few tokens of the model, so that what the trainer assumes of it is known to hold.

    Raises:
        UnsupportedModel: Its logits are not its head's on its hidden states, or packed documents see each other.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(8, device=device) * 7 + 3).remainder(vocabulary)[None]
    positions = torch.arange(4, device=device).repeat(2)[None]
    training, name = model.training, model.config.model_type
    model.eval()
    try:
        head = heads_of(model)
        alone = hidden_states(model, ids[:, 4:], positions[:, 4:], packed=False)
        logits = model(input_ids=ids[:, 4:], use_cache=False).logits.float()
        if not same(head.logits(alone), logits):
            raise UnsupportedModel(name, "its logits are more than its head's on its hidden states", "Tune another.")
        if packed and not same(hidden_states(model, ids, positions, packed=True)[:, 4:], alone):
            raise UnsupportedModel(name, "documents in one row see each other in it", "Set packing to false.")
    finally:
        model.train(training)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two ways to compute the same differ by no more than rounding does."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 5e-2
    return bool((one - other).float().norm() <= tolerance * other.float().norm())
