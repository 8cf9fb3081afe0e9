"""Rows of text -> tokens -> packed rows -> micro-batches."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from operators.data.batches import (
    IGNORED,
    ChatFormatError,
    Document,
    NoLossToken,
    conversation,
    documents,
    global_batch,
    on_device,
    opening,
    packed,
    share,
)
from operators.models.language_models import UnsupportedModel, check
from operators.models.objectives import NextToken
from tests.operators import small

PACKED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "gpt2", "gpt_neox")
ALONE = ("opt", "bloom", "mamba")


@pytest.fixture(scope="module")
def tokenizer():
    return small.tokenizer()


def drawn(number, longest, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        n = int(draw.integers(2, longest + 1))
        found.append(Document(draw.integers(1, small.VOCABULARY, n).tolist(), (draw.random(n) < 0.6).tolist()))
    return found


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_documents_have_the_loss_and_the_gradient_that_each_has_alone(kind):
    model = small.model(kind)
    check(model, packed=True)
    found = drawn(9, 10)
    rows = packed(iter(found), length=24, padding=0, packing=True, where="test")
    assert len(rows) < len(found), "nothing was packed"
    objective = NextToken(model, packed=True)
    loss = objective(on_device(rows, np.arange(len(rows)), torch.device("cpu")))
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    alone = 0.0
    for document in found:
        logits = model(input_ids=torch.tensor([document.ids])).logits[0].float()
        for place in range(len(document.ids) - 1):
            if document.answer[place + 1]:
                alone = alone - logits[place].log_softmax(-1)[document.ids[place + 1]]
    alone.backward()
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ALONE)
def test_a_model_in_which_packed_documents_would_see_each_other_is_refused_by_name(kind):
    model = small.model(kind)
    check(model, packed=False)
    with pytest.raises(UnsupportedModel, match=f"{kind}.*see each other.*packing to false"):
        check(model, packed=True)


def test_packing_keeps_every_token_of_every_document_once():
    found = drawn(40, 12)
    rows = packed(iter(found), length=16, padding=0, packing=True, where="test")
    kept = []
    for ids, positions in zip(rows.ids, rows.positions, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        kept += [tuple(ids[a:b]) for a, b in itertools.pairwise(starts)]
    wanted = [tuple(d.ids) for d in found if any(d.answer[1:])]
    padding = [piece for piece in kept if set(piece) == {0}]
    assert sorted(kept) == sorted(wanted + padding)
    assert rows.loss_tokens == sum(sum(d.answer[1:]) for d in found)
    assert rows.left_out == sum(not any(d.answer[1:]) for d in found) > 0


def test_targets_never_reach_from_one_document_into_the_next():
    rows = packed(
        iter([Document([1, 2, 3], [True] * 3), Document([4, 5], [True] * 2)]),
        length=6,
        padding=0,
        packing=True,
        where="test",
    )
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert rows.targets.tolist() == [[2, 3, IGNORED, 5, IGNORED, IGNORED]]


def test_a_document_longer_than_a_row_is_cut_and_counted():
    rows = packed(
        iter([Document(list(range(1, 8)), [False] * 4 + [True] * 3)]), length=3, padding=0, packing=False, where="test"
    )
    assert rows.ids.tolist() == [[4, 5, 6]]  # the first piece has no answer, the last nothing before its answer
    assert rows.targets.tolist() == [[5, 6, IGNORED]]
    assert (rows.cut, rows.left_out) == (1, 0)


def test_data_without_an_answer_token_are_an_error():
    with pytest.raises(NoLossToken, match=r"chats\.jsonl.*at least one"):
        packed(iter([Document([1, 2, 3], [False] * 3)]), length=4, padding=0, packing=True, where="chats.jsonl")


def test_text_is_learnt_whole_with_its_end(tokenizer):
    (document,) = documents({"text": ["the cat"]}, tokenizer)
    assert tokenizer.decode(document.ids) == "the cat<|end|>"
    assert all(document.answer)


def test_what_a_tokenizer_puts_before_a_text_begins_every_document_and_is_not_learnt():
    beginning = small.tokenizer()
    beginning.chat_template = None
    start = beginning.convert_tokens_to_ids("<|user|>")
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", start), ("<|end|>", beginning.eos_token_id)]
    )
    assert opening(beginning) == [start]
    assert opening(small.tokenizer()) == []
    for columns, said in (
        ({"text": ["the cat"]}, "the cat<|end|>"),
        ({"prompt": ["the "], "completion": ["cat"]}, "cat<|end|>"),
    ):
        (document,) = documents(columns, beginning)
        assert beginning.decode(document.ids) == "<|user|>the cat<|end|>"
        assert learnt(document, beginning) == said


def test_a_pair_of_which_a_half_is_messages_needs_a_chat_template():
    bare = small.tokenizer()
    bare.chat_template = None
    answer = [{"role": "assistant", "content": "sat"}]
    with pytest.raises(ChatFormatError, match="the tokenizer has none"):
        list(documents({"prompt": ["the cat"], "completion": [answer]}, bare))


def learnt(document, tokenizer):
    return tokenizer.decode([i for i, answer in zip(document.ids, document.answer, strict=True) if answer])


def test_only_answers_are_learnt_of_a_conversation(tokenizer):
    turns = [
        ("system", "be kind"),
        ("user", "a cat"),
        ("assistant", "sat "),
        ("user", "\na dog"),
        ("assistant", "\n ran"),
    ]
    document = conversation([{"role": r, "content": c} for r, c in turns], tokenizer)
    assert tokenizer.decode(document.ids) == "".join(f"<|{r}|>{c}<|end|>" for r, c in turns)
    assert learnt(document, tokenizer) == "sat <|end|>\n ran<|end|>"


def test_a_prompt_and_its_completion_go_through_the_chat_template(tokenizer):
    rows = {"prompt": ["a cat"], "completion": ["sat"]}
    turns = {
        "prompt": [[{"role": "user", "content": "a cat"}]],
        "completion": [[{"role": "assistant", "content": "sat"}]],
    }
    for columns in (rows, turns):
        (document,) = documents(columns, tokenizer)
        assert tokenizer.decode(document.ids) == "<|user|>a cat<|end|><|assistant|>sat<|end|>"
        assert learnt(document, tokenizer) == "sat<|end|>"


def test_answers_inside_a_prompt_are_not_learnt(tokenizer):
    prompt = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "cat"), ("user", "the"))]
    (document,) = documents({"prompt": [prompt], "completion": ["dog"]}, tokenizer)
    assert learnt(document, tokenizer) == "dog<|end|>"


def test_without_a_chat_template_a_pair_is_joined_as_it_is():
    bare = small.tokenizer()
    bare.chat_template = None
    (document,) = documents({"prompt": ["the cat "], "completion": ["sat"]}, bare)
    assert bare.decode(document.ids) == "the cat sat<|end|>"
    assert learnt(document, bare) == "sat<|end|>"
    with pytest.raises(ChatFormatError, match="none"):
        list(documents({"messages": [[{"role": "user", "content": "a"}]]}, bare))


def test_an_answer_is_told_from_a_prompt_that_shares_a_token_with_it():
    joined = small.tokenizer()  # " cat" is one token, of which the template's prompt holds the space
    joined.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    asked = joined.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    document = conversation(messages, joined)
    begin = document.answer.index(True)
    assert document.ids[:begin] == joined(asked)["input_ids"], "the model would be asked with other tokens"
    assert learnt(document, joined) == "cat\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = small.tokenizer()
    forgetful.chat_template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    with pytest.raises(ChatFormatError, match="rewrites earlier turns"):
        conversation(turns, forgetful)


@pytest.mark.parametrize(("rows", "size"), [(7, 3), (5, 5), (3, 8)])
def test_batches_take_every_row_once_an_epoch(rows, size):
    taken = np.concatenate([global_batch(rows, step, size, seed=3) for step in range(rows)])
    epochs = taken.reshape(size, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs.tolist())
    if size > 1 and rows > 3:
        assert any(epochs[0].tolist() != e for e in epochs[1:].tolist()), "every epoch has the same order"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_workers_share_a_batch_without_loss_in_equally_many_parts(world, micro):
    batch = np.arange(100, 111)
    parts = [share(batch, rank, world, micro) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1
    assert np.concatenate([m for p in parts for m in p]).tolist() == batch.tolist()
    assert all(len(m) <= (micro or 11) for p in parts for m in p)


def test_columns_that_are_padding_in_all_rows_are_cut_off():
    rows = packed(
        iter([Document([1, 2, 3], [True] * 3), Document([4, 5], [True] * 2)]),
        length=50,
        padding=0,
        packing=False,
        where="test",
    )
    batch = on_device(rows, np.array([1, 0]), torch.device("cpu"))
    assert batch.ids.tolist() == [[4, 5], [1, 2]]  # of the last token nothing follows
    assert batch.targets.tolist() == [[5, IGNORED], [2, 3]]


def test_a_worker_without_rows_gets_one_without_a_loss_token():
    batch = on_device(small.rows(), np.array([], int), torch.device("cpu"))
    assert batch.ids.shape == (1, 1)
    assert batch.loss_tokens == 0
    assert NextToken(small.model(), packed=False)(batch).item() == 0
