"""What `gpu.py` measures with: models of a size, what they compute for a token, and what a device is good for."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_rivals import waited

# Operations a second of matrix products in bfloat16, without sparsity, by what a driver calls the device.
DATA_SHEETS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


class NotRun(Exception):
    """Something that cannot be measured here, and why."""


class OtherWork(Exception):
    """Rivals that do not compute the same, so that nothing is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A decoder of Llama's architecture, whose head is its embeddings."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    @property
    def matrices(self) -> int:
        """Weights that each token is multiplied with: all but the norms', and the embeddings as the head."""
        kv_width = self.width // self.heads * self.kv_heads
        attention = 2 * self.width * self.width + 2 * self.width * kv_width
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocabulary * self.width

    def attended(self, length: int) -> int:
        """Operations of attention for a token, forward: each with all `length`, as is usual, though half are masked."""
        return 4 * self.layers * self.width * length

    def forward(self, length: int) -> int:
        """Operations for a token, forward: two for each weight, and attention's."""
        return 2 * self.matrices + self.attended(length)

    def trained(self, length: int) -> int:
        """Operations for a token where all weights learn: backward is twice forward."""
        return 3 * self.forward(length)

    def adapted(self, length: int, added: int) -> int:
        """Operations for a token where only `added` weights learn: the others need no gradient of their own."""
        return 4 * self.matrices + 3 * self.attended(length) + 6 * added


SIZES = {
    "0.5b": Size(name="0.5b", layers=24, width=896, heads=14, kv_heads=2, inner=4864, vocabulary=151_936),
    "1.5b": Size(name="1.5b", layers=28, width=1536, heads=12, kv_heads=2, inner=8960, vocabulary=151_936),
}
TINY = {
    "0.5b": Size(name="0.5b", layers=2, width=16, heads=2, kv_heads=1, inner=24, vocabulary=512),
    "1.5b": Size(name="1.5b", layers=2, width=32, heads=4, kv_heads=2, inner=48, vocabulary=512),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where and how something is measured.

    Attributes:
        device: What computes.
        tiny: Whether sizes are such that a CPU does everything in seconds: the same code, no figures to look at.
        rounds: How often each rival is measured, as long as there is time.
        home: A folder for models.
        until: When the last round should be over, by `time.monotonic`.
        data_sheet: Operations a second that are promised; None looks the device up.
    """

    device: torch.device
    tiny: bool
    rounds: int
    home: Path
    until: float
    data_sheet: float | None = None

    @property
    def sizes(self) -> dict[str, Size]:
        """Models by name."""
        return TINY if self.tiny else SIZES

    def either(self, full: Any, tiny: Any) -> Any:
        """One of two sizes of anything."""
        return tiny if self.tiny else full

    def clear(self) -> None:
        """Give back what nobody holds any more, and forget how much was held at most."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """The most that tensors took since `clear`; None where the device does not count."""
        return torch.cuda.max_memory_allocated(self.device) / (1 << 30) if self.device.type == "cuda" else None

    def promised(self) -> tuple[str, float]:
        """What the arithmetic is compared with, and its operations a second: a data sheet, else a matrix product."""
        if self.data_sheet is not None:
            return "the data sheet", self.data_sheet
        name = name_of(self.device)
        for part, rate in DATA_SHEETS.items():
            if part in name:
                return f"{part}'s data sheet", rate
        return "a large matrix product", product_rate(self.device, self.either(8192, 256))

    def folder(self, size: Size, seed: int = 0) -> Path:
        """A model with random weights, in bfloat16; made once."""
        folder = self.home / f"model-{size.name}-{seed}"
        if not folder.exists():
            made(size, self.device, context=self.either(4096, 64), seed=seed).save_pretrained(folder)
            self.clear()
        return folder


def made(size: Size, device: torch.device, *, context: int, seed: int = 0) -> Any:
    """A model with random weights, in bfloat16."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).bfloat16()


def name_of(device: torch.device) -> str:
    """What the driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def product_rate(device: torch.device, width: int) -> float:
    """Operations a second of a product of square matrices in bfloat16, the best of some."""
    one, other = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds(device, lambda: one @ other) for _ in range(10))
    return 2 * width**3 / best


def seconds(device: torch.device, act: Any) -> float:
    """How long the device takes for something."""
    waited(device)
    began = time.perf_counter()
    act()
    waited(device)
    return time.perf_counter() - began


def close(one: Sequence[float], other: Sequence[float], share: float) -> bool:
    """Whether two curves differ by no more than a share of what they are."""
    return all(abs(a - b) <= share * abs(b) for a, b in zip(one, other, strict=True))
