"""Models, tokenizers, data and a workspace that are as small as they can be."""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lfm.networks import ImageNetwork, Network
from operators.artifact import Dataset, Model
from operators.data.batches import IGNORED, Rows
from operators.data.images import Images, write_images
from operators.models import networks
from operators.pretraining import train_tokenizer
from operators.resources import Resources

VOCABULARY = 300
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "it", "while", "rain", "fell", "over"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def config(kind: str, **changes: Any) -> Any:
    """The config of a tiny model of one of transformers' types."""
    import transformers

    if kind == "gpt2":  # it has names of its own
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    else:
        sizes = {**SIZES, **({"head_dim": 8} if kind.startswith("gemma") else {})}
        if kind == "opt":
            sizes |= {"word_embed_proj_dim": 16, "ffn_dim": 24}
    return transformers.AutoConfig.for_model(kind, **{**sizes, **changes})


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model whose weights are large enough that every part of it matters."""
    import transformers

    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(kind, **changes)).float()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS)], VOCABULARY)


def saved(folder: Path, kind: str = "llama", **changes: Any) -> Model:
    """A model and its tokenizer in a folder."""
    model(kind, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Model(str(folder), "d" * 64)


def encoder(folder: Path, kind: str = "bert", **changes: Any) -> Model:
    """An encoder without a head, and its tokenizer, in a folder."""
    import transformers

    torch.manual_seed(0)
    transformers.AutoModel.from_config(config(kind, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Model(str(folder), "e" * 64)


def classifier(
    folder: Path, labels: Sequence[str] = ("animal", "other", "place"), seed: int = 0, **changes: Any
) -> Model:
    """An encoder with a head for labels, and its tokenizer, in a folder."""
    import transformers

    torch.manual_seed(seed)
    made = transformers.AutoModelForSequenceClassification.from_config(
        config("bert", id2label=dict(enumerate(labels)), label2id={v: i for i, v in enumerate(labels)}, **changes)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Model(str(folder), "c" * 64)


def labelled(path: Path, number: int = 18, labels: Sequence[str] = ("animal", "other", "place")) -> Dataset:
    """Short texts of which the first word says the label."""
    draw = np.random.default_rng(2)
    telling = dict(zip(labels, ("cat", "rain", "mat"), strict=False))
    with path.open("w") as file:
        for i in range(number):
            label = labels[i % len(labels)]
            words = [telling[label], *draw.choice(["the", "on", "a", "it"], draw.integers(0, 5))]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return Dataset(str(path))


def images(path: Path, number: int = 24, side: int = 6, seed: int = 3) -> Dataset:
    """Grey images of which a bright row, column or corner says the label; the rest is noise."""
    draw = np.random.default_rng(seed)
    pixels = 0.3 * draw.random((number, 1, side, side), np.float32)
    labels = ("column", "corner", "row")
    for i, image in enumerate(pixels):
        where = [(slice(None), 2), (slice(0, 3), slice(0, 3)), (2, slice(None))][i % 3]
        image[0][where] += 0.6
    write_images(Images(pixels, tuple(labels[i % 3] for i in range(number))), path)
    return Dataset(str(path))


def network(folder: Path, labels: Sequence[str] = ("column", "corner", "row"), side: int = 6) -> Model:
    """A network for grey images, with batch normalisation, that has seen nothing."""
    torch.manual_seed(0)
    networks.save(ImageNetwork(Network(widths=(4, 4)), (1, side, side), len(labels)), {}, labels, folder)
    return Model(str(folder), "b" * 64)


def png(pixels: "np.ndarray[Any, Any]") -> bytes:
    """An encoded image: bytes of shape (height, width), grey, or (height, width, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(path: Path, number: int = 12) -> Dataset:
    """Prompts and answers of different lengths."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(number):
            said = [" ".join(draw.choice(WORDS, draw.integers(1, 8))) for _ in range(2)]
            file.write(json.dumps({"prompt": said[0], "completion": said[1]}) + "\n")
    return Dataset(str(path))


def texts(path: Path, number: int = 12) -> Dataset:
    draw = np.random.default_rng(1)
    with path.open("w") as file:
        for _ in range(number):
            file.write(json.dumps({"text": " ".join(draw.choice(WORDS, draw.integers(3, 12)))}) + "\n")
    return Dataset(str(path))


def rows(number: int = 10, length: int = 16, seed: int = 0) -> Rows:
    """Rows of one document each, with different numbers of loss tokens, from 1 to all."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(1, VOCABULARY, (number, length)).astype(np.int32)
    targets = np.full((number, length), IGNORED, np.int32)
    for i in range(number):
        learnt = draw.choice(length - 1, draw.integers(1, length), replace=False)
        targets[i, learnt] = ids[i, learnt + 1]
    return Rows(ids, np.tile(np.arange(length, dtype=np.int32), (number, 1)), targets)


class Work:
    """A `Workspace` that remembers what it was told."""

    def __init__(self, folder: Path, resources: Resources | None = None) -> None:
        self.folder, self.resources, self.seed = folder, resources or Resources(), 7
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True)
        self.told: list[dict[str, float]] = []
        self.checkpoints: list[Path] = []
        self.groups: list[int] = []
        self.goes_at = float("inf")  # after which step this machine is about to be taken away

    def progress(self, done: int, total: int, **measures: float) -> None:
        self.told.append({"done": done, "total": total, **measures})

    def keep(self, folder: Path) -> None:
        kept = self.folder / f"kept-{len(self.checkpoints)}"
        folder.rename(kept)
        self.checkpoints.append(kept)

    def kept(self) -> Path | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def leaving(self) -> bool:
        return len(self.told) >= self.goes_at

    def regrouped(self, workers: int, why: str) -> None:
        self.groups.append(workers)

    def save(self, kind: Any, path: Path, about: Mapping[str, object] | None = None) -> Any:
        return kind(str(path), "", dict(about or {}))

    def another(self) -> "Work":
        """A workspace for one step more."""
        return Work(Path(tempfile.mkdtemp(dir=self.folder)), self.resources)

    def curve(self, measure: str = "loss") -> Sequence[float]:
        return [line[measure] for line in self.told if measure in line]
