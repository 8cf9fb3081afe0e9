"""The verb `pretrain`."""

from dataclasses import replace

import pytest
import torch
import transformers

from lfm.errors import HyperparameterError
from operators.base import Resources
from operators.pretraining import Architecture, new_model, pretrain, train_tokenizer
from operators.training import Training
from tests.operators import small

ARCHITECTURE = Architecture(layers=2, width=16, heads=2, key_value_heads=1, vocabulary=320, context=32)
TRAINING = Training(max_steps=8, batch_size=6, length=16, learning_rate=3e-2, seed=2)


def pretrained(tmp_path, name="work", training=TRAINING, **changes):
    given = {"tokenizer": None, "held_out": None, "data": small.texts(tmp_path / "texts.jsonl"), **changes}
    work = small.Work(tmp_path / name)
    return pretrain.body(work, architecture=ARCHITECTURE, training=training, **given), work


def test_a_decoder_and_its_tokenizer_come_out_of_text(tmp_path):
    made, work = pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.path)
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    assert tokenizer.chat_template
    assert model.config.vocab_size == len(tokenizer) <= 320
    assert model.config.num_hidden_layers == 2
    assert work.curve()[-1] < work.curve()[0] - 0.5


def test_with_no_steps_it_stays_random_and_the_seed_decides(tmp_path):
    made = [pretrained(tmp_path, f"work-{s}", replace(TRAINING, max_steps=0, seed=s))[0] for s in (1, 2)]
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(m.path).state_dict() for m in made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0].path)
    torch.manual_seed(1)
    wanted = new_model(ARCHITECTURE, tokenizer).state_dict()
    assert all(torch.equal(first[n], wanted[n]) for n in wanted)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_a_student_takes_its_teachers_tokenizer_over(tmp_path):
    teacher, _ = pretrained(tmp_path, "teacher")
    student, _ = pretrained(tmp_path, "student", replace(TRAINING, max_steps=0), tokenizer=teacher)
    assert (student.path / "tokenizer.json").read_bytes() == (teacher.path / "tokenizer.json").read_bytes()


def test_the_tokenizer_is_the_same_each_time_and_says_turns_as_tokens():
    texts = ["the cat sat on the mat"] * 3 + ["a dog"]
    one, other = (train_tokenizer(texts, 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    messages = [{"role": "user", "content": "hi"}]
    ids = one.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert one.convert_ids_to_tokens(ids) == ["<|user|>", "h", "i", "<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 0), ("heads", 0), ("width", 18), ("key_value_heads", 3), ("feed_forward", 0), ("vocabulary", 299)],
)
def test_a_size_that_cannot_be_is_named(field, value):
    with pytest.raises(HyperparameterError, match=f"architecture: {field}={value}, expected"):
        Architecture(**{"heads": 4, "width": 16, field: value})


def test_what_is_wrong_is_said_before_anything_runs(tmp_path):
    given = {"tokenizer": None, "held_out": None, "architecture": ARCHITECTURE, "resources": Resources()}
    assert list(pretrain.problems(data=small.texts(tmp_path / "a.jsonl"), training=TRAINING, **given)) == []
    pairs = small.pairs(tmp_path / "b.jsonl")
    wrong = replace(TRAINING, length=33, precision="float16")
    clauses = list(pretrain.problems(data=pairs, training=wrong, **given))
    assert [c.split(",")[0] for c in clauses] == [
        "precision='float16' on a CPU",
        f"data: {pairs.uri} holds 'prompt_completion' rows",
        "length=33",
    ]
