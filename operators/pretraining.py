"""The verb `pretrain`: a small model from nothing: a language model with a tokenizer of its own, or a network."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm.networks import ImageNetwork, Network
from operators.artifact import Dataset, Model
from operators.base import Settings, operator
from operators.data.batches import Rows
from operators.data.classes import distinct
from operators.data.images import read_images
from operators.data.rows import Form, read_rows
from operators.footprint import Footprint
from operators.learning.image_job import image_job
from operators.learning.loop import Job, Place
from operators.learning.memory import trained
from operators.learning.trainer import fit, refused
from operators.models.language_models import check, head_size, load_tokenizer, save
from operators.models.networks import unsplittable
from operators.models.objectives import NextToken
from operators.models.texts import packed_rows, unfit
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture(Settings):
    """The size of a Llama-like decoder.

    Attributes:
        layers: How many blocks.
        width: Of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        key_value_heads: Of which so many have keys and values of their own; None gives each its own.
        feed_forward: Inner width of the feed-forward part; None takes 8/3 of `width`, rounded up to 16.
        vocabulary: Tokens of the tokenizer that is trained, at least 300; not used where one is given.
        context: The longest row it is made for, in tokens.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    key_value_heads: int | None = None
    feed_forward: int | None = None
    vocabulary: int = 4096
    context: int = 1024

    def __post_init__(self) -> None:
        self.require(self.layers >= 1, "layers", "layers >= 1")
        self.require(self.heads >= 1, "heads", "heads >= 1")
        even = self.width >= 2 and self.width % (2 * self.heads) == 0
        self.require(even, "width", "a multiple of 2 * heads")  # rotary embeddings turn pairs
        fits = self.key_value_heads is None or (self.key_value_heads >= 1 and self.heads % self.key_value_heads == 0)
        self.require(fits, "key_value_heads", "a divisor of heads")
        self.require(self.feed_forward is None or self.feed_forward >= 1, "feed_forward", "feed_forward >= 1")
        self.require(self.vocabulary >= 300, "vocabulary", "vocabulary >= 300: 256 bytes and a few special tokens")
        self.require(self.context >= 2, "context", "context >= 2")


def _foreseen(
    *,
    data: Dataset | None,
    tokenizer: Model | None,
    held_out: Dataset | None,
    network: Network | None = None,
    architecture: Architecture,
    training: Training,
    resources: Resources,
    kinds: Mapping[str, object] | None = None,
    **_: object,
) -> Iterator[str]:
    yield from refused(training, resources)
    if network is not None:
        yield from unsplittable(network, training, resources)
        yield from unfit(training, None, {"data": data, "held_out": held_out}, (Form.IMAGE,))
        if "tokenizer" in (kinds or {}):
            yield "tokenizer: given with a network for images, which reads no text. Leave it out."
        if architecture != Architecture():
            yield "network: given with the size of a decoder, expected the one or the other. Leave one out."
        return
    yield from unfit(training, None, {"data": data, "held_out": held_out}, (Form.TEXT,))
    if training.length > architecture.context:
        yield f"length={training.length}, expected at most context={architecture.context}. Lower it or raise context."


def _config(
    *,
    tokenizer: Model | None,
    network: Network | None = None,
    architecture: Architecture,
    kinds: Mapping[str, object],
    **_: object,
) -> Mapping[str, Any] | None:
    """What the config will be, at most; None of a network, and where the vocabulary is not known yet."""
    size = architecture.vocabulary if "tokenizer" not in kinds else tokenizer and head_size(tokenizer.path)
    if network is not None or not size:
        return None
    return {**_config_of(architecture, size).to_dict(), "architectures": ["LlamaForCausalLM"]}


def _footprint(*, training: Training, resources: Resources, **given: Any) -> Footprint | None:
    """What it takes; None of a network, and where the vocabulary is not known yet."""
    import transformers

    said = _config(**given)
    if said is None:
        return None

    def make(layers: int) -> Sequence[nn.Module]:
        config = transformers.LlamaConfig(**{**said, "num_hidden_layers": layers})
        model = transformers.LlamaForCausalLM(config)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return (NextToken(model, packed=training.packing),)

    return trained(make, [said], training, resources)


@operator(problems=_foreseen, takes_ensembles=("tokenizer",), footprint=_footprint, config=_config)
def pretrain(
    work: Workspace,
    *,
    data: Dataset,
    tokenizer: Model | None = None,
    held_out: Dataset | None = None,
    network: Network | None = None,
    architecture: Architecture,
    training: Training,
) -> Model:
    """Train a decoder on all tokens of `data`, or a network on images; with `max_steps` 0 either stays random.

    Args:
        work: The step's workspace.
        data: Text to learn from, which is also what the tokenizer is trained on; for a network images, whose labels,
            sorted, are what it tells, and by whose mean and deviation it scales what it sees.
        tokenizer: A model whose tokenizer is taken over instead, as a student takes its teacher's.
        held_out: What to look at while training.
        network: A network for images, in place of a decoder.
        architecture: A decoder's size.
        training: How it is trained.
    """
    if network is not None:
        given = {"network": network, "data": data, "held_out": held_out, "training": training}
        folder, measures = fit(work, _job_of_images, given, training)
        return work.save(Model, folder, measures)
    home = work.scratch / "tokenizer"
    if tokenizer is None:
        train_tokenizer(read_rows(data)["text"].to_pylist(), architecture.vocabulary).save_pretrained(home)
    arguments = {
        "tokenizer": home if tokenizer is None else tokenizer.path,
        "data": data,
        "held_out": held_out,
        "architecture": architecture,
        "training": training,
    }
    folder, measures = fit(work, _job, arguments, training)
    return work.save(Model, folder, measures)


def _job(
    place: Place,
    *,
    tokenizer: Path,
    data: Dataset,
    held_out: Dataset | None,
    architecture: Architecture,
    training: Training,
) -> Job:
    tokens = load_tokenizer(tokenizer)
    torch.manual_seed(training.seed)
    model = new_model(architecture, tokens)
    check(model, packed=training.packing)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def rows(dataset: Dataset) -> Rows:
        return packed_rows(dataset, tokens, training)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("model."): w for n, w in weights.items()}
        save(model, named, folder, tokenizer=tokenizer, dtype=torch.float32)

    return Job(
        objective=NextToken(model, packed=training.packing),
        rows=rows(data),
        held_out=None if held_out is None else rows(held_out),
        export=export,
    )


def _job_of_images(
    place: Place, *, network: Network, data: Dataset, held_out: Dataset | None, training: Training
) -> Job:
    images = read_images(data)
    labels = distinct(images.labels, data.uri)
    torch.manual_seed(training.seed)
    deviation = images.pixels.std(axis=(0, 2, 3))
    model = ImageNetwork(
        network,
        images.shape,
        len(labels),
        mean=images.pixels.mean(axis=(0, 2, 3)).tolist(),
        deviation=np.where(deviation > 0, deviation, 1.0).tolist(),  # a channel may be the same everywhere
    )
    return image_job(model, labels, data, held_out)


def new_model(architecture: Architecture, tokenizer: Any) -> Any:
    """A decoder with random weights; the output head is the input embedding."""
    import transformers

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return transformers.LlamaForCausalLM(_config_of(architecture, len(tokenizer), **ends))


def _config_of(architecture: Architecture, vocabulary: int, **ends: int | None) -> Any:
    import transformers

    wide = architecture.feed_forward or -(-architecture.width * 8 // 3 // 16) * 16
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=architecture.width,
        intermediate_size=wide,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.key_value_heads or architecture.heads,
        max_position_embeddings=architecture.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ends,
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with a chat template."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, *ROLES],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    made.chat_template = CHAT
    return made
