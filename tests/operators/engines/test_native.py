import math
from collections import Counter

import pytest
import torch

from operators.engines.native import Native, Sampling, SamplingError, choose
from tests.operators import small

KINDS = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"scale_attn_weights": True},
    "gemma2": {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "granite": {"logits_scaling": 3.0},
    "opt": {},
    "bloom": {},
}
LONG = 14  # tokens of an answer: with the prompts more than twice the sliding windows above


@pytest.fixture(scope="module")
def tokenizer():
    return small.tokenizer()


def lively(kind, **changes):
    """A model that does not say the same token over and over, so that a wrong place or mask shows."""
    model = small.model(kind, **{"tie_word_embeddings": False, **changes}).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def prompts_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, small.VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def one_by_one(model, prompt, number):
    """The likeliest next token of all that is there, again and again, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(number):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(model, prompt, number):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=number)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate_alone_and_side_by_side(kind, tokenizer):
    model = lively(kind, **KINDS[kind])
    model.generation_config.eos_token_id = None
    engine = Native(model, tokenizer)
    engine.ends = set()  # what ends an answer has a test of its own
    prompts = prompts_of([5, 1, 12, 9])
    expected = [one_by_one(model, p, LONG) for p in prompts]
    assert [generated(model, p, LONG) for p in prompts] == expected
    assert len({token for answer in expected for token in answer}) > 8
    sampling = Sampling(max_tokens=LONG)
    assert [engine.complete([p], sampling)[0] for p in prompts] == expected
    assert engine.complete(prompts, sampling) == expected


def test_an_answer_ends_before_a_token_that_ends_it_whoever_names_it(tokenizer):
    model = lively("llama")
    prompts = prompts_of([4, 7, 3])
    whole = [one_by_one(model, p, LONG) for p in prompts]
    model.generation_config.eos_token_id = [whole[0][5], whole[1][0]]
    engine = Native(model, tokenizer)
    assert engine.ends == {whole[0][5], whole[1][0], tokenizer.eos_token_id}
    cut = [answer[: next((i for i, t in enumerate(answer) if t in engine.ends), LONG)] for answer in whole]
    assert len(cut[0]) <= 5
    assert cut[1] == []
    assert len(cut[2]) > len(cut[0])  # goes on when the others have ended
    assert engine.complete(prompts, Sampling(max_tokens=LONG)) == cut
    steps = list(engine.decode(prompts, Sampling(max_tokens=LONG)))
    assert [[t for t in answer if t is not None] for answer in zip(*steps, strict=True)] == cut
    assert all(any(t is not None for t in step) for step in steps)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_answer_ends_where_it_fills_the_context(kind, tokenizer):
    model = lively(kind, max_position_embeddings=16) if kind == "llama" else lively(kind, n_positions=16)
    engine = Native(model, tokenizer)
    engine.ends = set()
    assert engine.context == 16
    prompts = prompts_of([15, 4, 10])
    said = engine.complete(prompts, Sampling(max_tokens=11))
    assert [len(answer) for answer in said] == [1, 11, 6]
    assert said == [one_by_one(model, p, len(answer)) for p, answer in zip(prompts, said, strict=True)]
    assert [len(answer) for answer in engine.complete(prompts[:1], Sampling(max_tokens=11))] == [1]
    for wrong in ([], prompts_of([16])[0]):
        with pytest.raises(SamplingError, match=r"expected at least 1 and fewer than the model's context of 16"):
            engine.complete([prompts[1], wrong], Sampling(max_tokens=1))


def test_logits_are_the_models_after_each_token(tokenizer):
    model = lively("gemma2", **KINDS["gemma2"])
    (ids,) = prompts_of([9])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Native(model, tokenizer).logits(ids), expected)


def shares_of(logits, temperature, top_p):
    """The probability of each token, by the definition."""
    weights = [math.exp(x / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept, total = set(), 0.0
    for token in sorted(range(len(shares)), key=lambda t: -shares[t]):
        if total < top_p:
            kept.add(token)
            total += shares[token]
    return [s / sum(shares[t] for t in kept) if t in kept else 0.0 for t, s in enumerate(shares)]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.01])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature, top_p):
    logits = [0.3, -1.0, 1.7, 0.9, -4.0]
    number = 20_000
    sampling = Sampling(temperature=temperature, top_p=top_p)
    drawn = choose(torch.tensor([logits]).expand(number, -1), sampling, torch.Generator().manual_seed(5))
    seen, shares = Counter(drawn.tolist()), shares_of(logits, temperature, top_p)
    assert set(seen) <= {t for t, share in enumerate(shares) if share}
    squares = sum((seen[t] - number * s) ** 2 / (number * s) for t, s in enumerate(shares) if s)
    assert squares < 23.5  # chi-square of 4 degrees of freedom: exceeded by chance once in ten thousand


def test_a_share_that_is_reached_exactly_needs_no_further_token():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    drawn = choose(logits.expand(4000, -1), Sampling(temperature=1.0, top_p=0.5), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0}
    drawn = choose(logits.expand(4000, -1), Sampling(temperature=1.0, top_p=0.75), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}


def test_a_temperature_near_zero_is_greedy_and_no_error():
    logits = torch.tensor([[3.0, 3.5, -1e4], [88.0, -5.0, 89.0]])
    for temperature in (0.0, 1e-6, 1e-30, 5e-324):
        drawn = choose(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
        assert drawn.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])  # the latter two do something to their logits
def test_the_second_token_is_drawn_given_the_first(kind, tokenizer):
    shaping = {"gemma2": {"final_logit_softcapping": 0.3}, "granite": {"logits_scaling": 0.3}}.get(kind, {})
    engine = Native(small.model(kind, vocab_size=6, tie_word_embeddings=False, **shaping), tokenizer)
    engine.ends = set()
    prompt, number = [3, 1, 4], 4000
    seen = Counter(map(tuple, engine.complete([prompt] * number, Sampling(max_tokens=2, temperature=0.4, top_p=0.9))))
    expected = {}
    first = shares_of(engine.logits(prompt)[-1].tolist(), 0.4, 0.9)
    for one in (t for t, share in enumerate(first) if share):
        then = shares_of(engine.logits([*prompt, one])[-1].tolist(), 0.4, 0.9)
        expected |= {(one, other): first[one] * share for other, share in enumerate(then) if share}
    assert set(seen) <= set(expected)
    assert len(expected) > 9
    assert min(expected.values()) * number > 5
    squares = sum((seen[cell] - number * share) ** 2 / (number * share) for cell, share in expected.items())
    assert squares < len(expected) + 4 * math.sqrt(2 * len(expected))  # four standard deviations above its mean


def test_a_seed_decides_the_answer(tokenizer):
    engine = Native(lively("llama"), tokenizer)
    prompts = prompts_of([3, 6])
    one, again, other = (
        engine.complete(prompts, Sampling(max_tokens=12, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_what_cannot_be_sampled_is_refused(field, value):
    with pytest.raises(SamplingError, match=rf"{field}={value}, expected .*{field}") as caught:
        Sampling(**{field: value})
    assert str(SamplingError(*caught.value.args)) == str(caught.value)
