"""What an edit costs beside fine-tuning the one matrix that it changes, with the same steps on the same prompts.

The network is a Llama with random weights and the statistics are of random keys: neither decides how long it takes.
"""

import time
from collections.abc import Callable

import torch
import transformers
from rounds import command_line, compared, interleaved, said

from lfm.editing.base import TOKENS, Fact, Prompt
from lfm.editing.rome import ROME
from lfm.hooks import Blocks

EDIT, TUNED = "rome", "fine-tuning the same matrix"
VOCABULARY, SUBJECT, ASKED, ANSWER = 4096, 3, 8, 3


def network(layers: int, width: int) -> torch.nn.Module:
    """A Llama without a tokenizer."""
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, **sizes)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def fact(contexts: int, draw: torch.Generator) -> Fact:
    """A prompt of its own and behind other texts, half of them of 5 tokens and half of 10."""

    def prompt(before: int) -> Prompt:
        ids = torch.cat([torch.randint(VOCABULARY, (before,), generator=draw), asked])
        return Prompt(ids, (before + 1, before + 1 + SUBJECT))

    asked = torch.randint(VOCABULARY, (ASKED,), generator=draw)
    lengths = [0, *(5 if i % 2 else 10 for i in range(contexts))]
    return Fact(
        [prompt(n) for n in lengths], torch.randint(VOCABULARY, (ANSWER,), generator=draw), Prompt(asked[:6], (1, 4))
    )


def measured(blocks: Blocks, name: str, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Statistics as of ordinary text."""
    width = blocks.weight(name).shape[1]
    keys = torch.randn(20 * width, width, generator=draw)
    return {f"gram/{name}": keys.T @ keys, TOKENS: torch.tensor(float(len(keys)))}


def tuned(model: torch.nn.Module, weight: torch.nn.Parameter, one: Fact, steps: int) -> None:
    """Adam on one matrix alone, each prompt padded as the edit's are; the matrix is put back."""
    rows = [torch.cat([p.ids, one.target]) for p in one.prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - ANSWER : len(row)] = one.target
    before = weight.detach().clone()
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    weight.grad = None
    weight.requires_grad_(False).copy_(before)


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--contexts", type=int, default=20, help="texts that the prompt is put behind")
    asked = parser.parse_args()
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model, one, method = network(asked.layers, asked.width), fact(asked.contexts, draw), ROME(layer=asked.layers // 3)
    blocks = Blocks(model)
    name = blocks[asked.layers // 3].mlp_out
    statistics = measured(blocks, name, draw)

    def seconds(act: Callable[[], object]) -> Callable[[int], float]:
        def once(_: int) -> float:
            began = time.perf_counter()
            act()
            return time.perf_counter() - began

        act()  # what is allocated at first is no part of it
        return once

    rivals = {
        TUNED: seconds(lambda: tuned(model, blocks.weight(name), one, method.steps)),
        EDIT: seconds(lambda: method.solve(model, blocks, [one], statistics=statistics, editor=None)),
    }
    label = (
        f"an edit of {asked.layers} layers of width {asked.width} with {asked.contexts} contexts, {method.steps} steps"
    )
    said([compared(interleaved(rivals, asked.rounds), EDIT, TUNED, unit="s", label=label)], asked)


if __name__ == "__main__":
    main()
