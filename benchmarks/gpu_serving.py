"""Parts of `gpu.py`: tokens a second of what answers, the native engine against a loop by hand, and vLLM against it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from gpu_models import Bench, NotRun, Size, seconds
from rounds import Figure, compared, interleaved

from lfm.hooks import cache_name
from operators.engines.native import Native, Sampling
from operators.models.ensembles import new_cache
from operators.models.language_models import load

NATIVE, BARE, VLLM = "native engine", "bare PyTorch loop", "vLLM"
Answers = Callable[[], Any]

NO_WORDS = SimpleNamespace(eos_token_id=None, bos_token_id=0, pad_token_id=0)
"""All that the engine asks of a tokenizer when it gets tokens."""


def native(name: str, bench: Bench) -> Iterator[Figure | str]:
    """The engine at one request and at many."""
    size = bench.sizes[name]
    model = load(bench.folder(size)).to(bench.device)
    engine = Native(model, NO_WORDS)
    new = bench.either(128, 4)
    for rows in bench.either((1, 32), (1, 4)):
        prompts = asked(bench, size, rows)
        rivals = {
            NATIVE: partial(engine.complete, prompts, Sampling(max_tokens=new)),
            BARE: partial(by_hand, model, prompts, new),
        }
        yield rates(bench, rivals, BARE, tokens=rows * new, label=f"serving {name}, {rows} at once")


def rates(bench: Bench, rivals: Mapping[str, Answers], baseline: str, *, tokens: int, label: str) -> Figure:
    """Tokens a second of the native engine; each rival answers once before."""

    def rate(answers: Answers, number: int) -> float:
        return tokens / seconds(bench.device, answers)

    for answers in rivals.values():
        answers()
    found = interleaved({n: partial(rate, a) for n, a in rivals.items()}, bench.rounds, until=bench.until)
    return compared(found, NATIVE, baseline, unit="tokens/s", label=label)


@torch.inference_mode()
def by_hand(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The likeliest token after each prompt, again and again, with transformers' cache; prompts are equally long."""
    ids = torch.tensor(prompts, device=model.device)
    cache, said = {cache_name(model): new_cache(model)}, []
    for _ in range(new):
        ids = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache).logits[:, -1:].argmax(dim=-1)
        said.append(ids)
    return torch.cat(said, dim=1).tolist()


def vllm(bench: Bench) -> Iterator[Figure | str]:
    """vLLM, which has kernels of its own, where there is one."""
    if bench.device.type != "cuda":
        raise NotRun("it serves from a GPU")
    from vllm import LLM, SamplingParams

    size, new, rows = bench.sizes["0.5b"], bench.either(128, 4), bench.either(32, 4)
    prompts = asked(bench, size, rows)
    served = LLM(model=str(bench.folder(size)), skip_tokenizer_init=True, gpu_memory_utilization=0.4)
    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    wishes = [{"prompt_token_ids": prompt} for prompt in prompts]
    engine = Native(load(bench.folder(size)).to(bench.device), NO_WORDS)
    rivals = {
        NATIVE: partial(engine.complete, prompts, Sampling(max_tokens=new)),
        VLLM: partial(served.generate, wishes, greedy, use_tqdm=False),
    }
    yield rates(bench, rivals, VLLM, tokens=rows * new, label=f"serving 0.5b, {rows} at once")


def asked(bench: Bench, size: Size, rows: int) -> list[list[int]]:
    """Prompts of random tokens, equally long."""
    length = bench.either(128, 8)
    draws = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(1, size.vocabulary, (rows, length), generator=draws).tolist()
    return found
