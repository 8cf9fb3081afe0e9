import pytest
import torch

from lfm.chunks import chunk_size, chunked, chunked_cross_entropy

TOKENS, WIDTH, VOCABULARY = 23, 6, 11


def inputs(dtype=torch.float32, *, tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY):
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draws).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draws).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=draws).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=draws)
    return hidden, weight, bias, targets


def capped(logits):
    return 5 * torch.tanh(logits / 5)


def dense(hidden, weight, bias, targets, shaped):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.nn.functional.cross_entropy(shaped(logits) if shaped else logits, targets, reduction="sum")


def gradients(value, *leaves):
    return torch.autograd.grad(value * 0.7, leaves)


@pytest.mark.parametrize("chunk", [None, 1, 5, TOKENS, 100])
@pytest.mark.parametrize("shaped", [None, capped])
def test_value_and_gradients_are_those_of_the_whole(chunk, shaped):
    hidden, weight, bias, targets = inputs()
    got = chunked_cross_entropy(hidden, weight, targets, bias=bias, shaped=shaped, chunk=chunk)
    wanted = dense(hidden, weight, bias, targets, shaped)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients(got, hidden, weight, bias), gradients(wanted, hidden, weight, bias))


def test_a_head_without_a_bias_has_one_gradient_less():
    hidden, weight, _, targets = inputs()
    got = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    wanted = dense(hidden, weight, None, targets, None)
    torch.testing.assert_close(gradients(got, hidden, weight), gradients(wanted, hidden, weight))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    got = chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk=4)
    torch.testing.assert_close(gradients(got, hidden), gradients(dense(hidden, weight, bias, targets, None), hidden))


def test_in_bfloat16_gradients_have_the_inputs_dtype_and_are_near_those_of_float32():
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    got = gradients(chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk=4), hidden, weight, bias)
    whole = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    wanted = gradients(dense(*whole, targets, None), *whole)
    assert {g.dtype for g in got} == {torch.bfloat16}
    for one, other in zip(got, wanted, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_under_autocast_it_computes_what_the_whole_computes_there():
    hidden, weight, bias, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk=4)
        wanted = dense(hidden, weight, bias, targets, None)
    torch.testing.assert_close(got, wanted)
    pairs = zip(gradients(got, hidden, weight, bias), gradients(wanted, hidden, weight, bias), strict=True)
    for one, other in pairs:
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_no_tokens_give_zero_and_gradients_of_zero():
    hidden, weight, bias, targets = inputs(tokens=0)
    got = chunked_cross_entropy(hidden, weight, targets, bias=bias)
    assert got == 0
    assert [float(g.abs().sum()) for g in gradients(got, hidden, weight, bias)] == [0, 0, 0]


def test_nothing_is_as_large_as_all_logits(largest_tensor):
    tokens, vocabulary = 96, 64
    for chunk in (4, 8):
        hidden, weight, bias, targets = inputs(tokens=tokens, vocabulary=vocabulary)
        with largest_tensor() as largest:
            chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk).backward()
        assert largest.numel <= max(chunk * vocabulary, tokens * WIDTH, vocabulary * WIDTH)
    with largest_tensor() as largest:
        dense(*inputs(tokens=tokens, vocabulary=vocabulary), None).backward()
    assert largest.numel == tokens * vocabulary


def test_without_gradients_none_is_computed():
    hidden, weight, _, _ = inputs()
    seen = []

    def loss(logits, where):
        seen.append(logits.requires_grad)
        return logits.sum()

    with torch.no_grad():
        chunked(hidden, weight, None, loss, chunk=8)
    chunked(hidden, weight, None, loss, chunk=12)
    assert seen == [False] * 3 + [True] * 2


def test_a_chunk_has_at_least_one_token():
    assert chunk_size(10**9) == 1
