import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from lfm.distillation.forward_kl import ForwardKL
from lfm.errors import UnknownName
from lfm.merging.linear import Linear
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset
from operators.data.facts import (
    FactRow,
    Neighbour,
    asking,
    carried,
    carry,
    continued,
    holds_facts,
    read_facts,
    spoken,
    tokenized,
)
from operators.data.row_files import DatasetError
from operators.distillation import distill
from operators.merging import merge
from operators.training import Training
from operators.tuning import tune
from tests.operators import small

TEXT = "the capital of São Tomé is Łódź . Åland Åland Ålands huvudstad är 東京 while the cat sat on Łódź"


def byte_level():
    return small.tokenizer()


def llama_like():
    """As Llama's: a mark for each space and before the first word, bytes for what is unknown, an opening token."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    own.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=["▁"], limit_alphabet=40
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")  # no token reaches over words
    own.train_from_iterator([TEXT.replace("東京", "")] * 2, trainer)
    own.pre_tokenizer = None
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace():
    """As newer ones are: the mark is put before words, not into the text."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    own.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"])
    own.train_from_iterator([TEXT] * 2, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level, "llama_like": llama_like, "metaspace": metaspace}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def opening_of(tokenizer):
    return [tokenizer.bos_token_id] if tokenizer.bos_token == "<s>" else []


SUBJECTS = [
    ("the capital of São Tomé is", "São Tomé"),  # in the middle
    ("Åland is while", "Åland"),  # at the start
    ("the cat sat on Łódź", "Łódź"),  # at the end
    ("Åland while Åland sat", "Åland"),  # several times: the last one counts
    ("Ålands huvudstad", "Åland"),  # with more behind it in the same word
    ("on 東京 is", "東京"),  # what becomes several bytes a letter
    ("a", "a"),
]


@pytest.mark.parametrize(("prompt", "subject"), SUBJECTS)
def test_the_subjects_tokens_hold_all_of_it_and_end_with_it(tokenizer, prompt, subject):
    found = asking(prompt, subject, tokenizer)
    whole = tokenizer(prompt)["input_ids"]
    assert found.ids.tolist() == whole
    begin, end = found.subject
    assert begin >= len(opening_of(tokenizer))
    inside = tokenizer.decode(whole[begin:end])
    assert subject in inside
    assert len(inside.strip()) <= len(subject) + len("s huvudstad")
    assert subject not in tokenizer.decode(whole[begin : end - 1])
    # What stands behind the last of them holds nothing of this mention.
    rest = tokenizer.decode(whole[end:])
    assert prompt.endswith(rest.strip())
    assert subject not in rest


@pytest.mark.parametrize("answer", ["Łódź", "the cat", "東京", " Åland"])
def test_a_prompt_and_its_answer_together_are_the_texts_tokens(tokenizer, answer):
    asked, said = spoken("the capital of São Tomé is", answer, tokenizer)
    assert asked + said == tokenizer(f"the capital of São Tomé is {answer.strip()}")["input_ids"]
    assert asked == tokenizer("the capital of São Tomé is")["input_ids"]
    assert tokenizer.decode(said).strip() == answer.strip()
    assert spoken("the capital of São Tomé is ", answer.strip(), tokenizer) == (asked, said)


def test_a_prompt_that_ends_within_a_token_is_refused():
    tokenizer = metaspace()
    joined = next(t for t in tokenizer.get_vocab() if t.startswith("▁") and len(t) > 3 and t[1:] in TEXT)[1:]
    with pytest.raises(DatasetError, match="a token reaches over the end of the prompt, expected an edge there"):
        spoken("on\u2003", joined, _Whole())


class _Whole:
    """A tokenizer that sees a text as one token."""

    def __call__(self, text, **options):
        return {"input_ids": [len(text)], "offset_mapping": [(0, len(text))]}


def test_a_fact_is_asked_alone_and_behind_other_texts(tokenizer):
    row = FactRow(subject="São Tomé", prompt="the capital of São Tomé is", target="Łódź", true="東京")
    fact = tokenized(row, tokenizer, ["the cat sat", "São Tomé ."])
    texts = [row.prompt, f"the cat sat {row.prompt}", f"São Tomé . {row.prompt}"]
    for prompt, text in zip(fact.prompts, texts, strict=True):
        assert prompt.ids.tolist() == tokenizer(text)["input_ids"]
        before = tokenizer.decode(prompt.ids[len(opening_of(tokenizer)) : prompt.subject[0]])
        assert before.strip() == text[: text.rindex(row.subject)].strip()
        assert row.subject in tokenizer.decode(prompt.ids[slice(*prompt.subject)])
    whole = tokenizer("the capital of São Tomé is Łódź")["input_ids"]
    assert [*fact.prompts[0].ids.tolist(), *fact.target.tolist()] == whole
    assert fact.essence.ids.tolist() == tokenizer("São Tomé is a")["input_ids"]
    assert fact.essence.subject[0] == len(opening_of(tokenizer))


def test_words_are_joined_by_one_space():
    assert continued("a", "b") == continued("a ", "b") == continued("a", " b") == "a b"
    assert continued("a\n", "b") == "a\nb"


ROW = {"subject": "Åland", "prompt": "Åland is", "target": "here", "true": "there", "paraphrases": ["so Åland is"],
       "neighbours": ["the cat is", {"prompt": "a dog is", "answer": "black"}], "more": 3}  # fmt: skip
FACT = FactRow(
    subject="Åland", prompt="Åland is", target="here", true="there", paraphrases=("so Åland is",),
    neighbours=(Neighbour("the cat is"), Neighbour("a dog is", "black")),
)  # fmt: skip


def test_facts_are_read_from_lines_and_from_parquet(tmp_path):
    lines = tmp_path / "facts.jsonl"
    lines.write_text(json.dumps(ROW) + "\n" + json.dumps({"subject": "x", "prompt": "x is", "target": "y"}) + "\n")
    assert read_facts(Dataset(str(lines))) == [FACT, FactRow(subject="x", prompt="x is", target="y")]
    neighbours = [{"prompt": "the cat is", "answer": None}, {"prompt": "a dog is", "answer": "black"}]
    pq.write_table(pa.Table.from_pylist([{**ROW, "neighbours": neighbours}]), tmp_path / "facts.parquet")
    assert read_facts(Dataset(str(tmp_path / "facts.parquet"))) == [FACT]
    assert holds_facts(ROW)
    assert not holds_facts({"prompt", "completion"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": ""}, "'subject' is '', expected a string that is not empty"),
        ({"target": None}, "'target' is None, expected a string that is not empty"),
        ({"subject": "Oland"}, "its prompt 'Åland is' does not hold the subject 'Oland', expected it to"),
        ({"paraphrases": [""]}, "'paraphrases' is '', expected a string that is not empty"),
        ({"neighbours": [3]}, "'neighbours' holds 3, expected prompts, each with its answer"),
        ({"neighbours": [{"answer": "b"}]}, "'neighbours' is None, expected a string that is not empty"),
    ],
)
def test_a_row_that_is_no_fact_is_refused_where_it_stands(tmp_path, change, said):
    path = tmp_path / "facts.jsonl"
    path.write_text(
        json.dumps({"subject": "x", "prompt": "x is", "target": "y"}) + "\n" + json.dumps({**ROW, **change})
    )
    with pytest.raises(DatasetError) as caught:
        read_facts(Dataset(str(path)))
    assert said in str(caught.value)
    assert "facts.jsonl" in str(caught.value)


def test_facts_are_read_from_a_corpus_of_python_that_has_them():
    first, *others = read_facts(Dataset("python://opposites"))
    assert (first.subject, first.prompt, first.target) == ("first", "Opposites: first", "last")
    assert first.paraphrases == ("Words that exclude each other: first",)
    assert [n.prompt for n in first.neighbours] == ["Opposites: name", "Opposites: list", "Opposites: type"]
    assert [f.target for f in others] == ["right", "end", "close"]
    with pytest.raises(DatasetError, match="python://names: has the columns 'prompt', 'completion', 'source'"):
        read_facts(Dataset("python://names"))
    with pytest.raises(UnknownName, match="Did you mean 'opposites'"):
        read_facts(Dataset("python://opposite"))


def test_other_rows_are_refused_by_their_columns(tmp_path):
    data = small.pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(DatasetError, match="has the columns 'prompt', 'completion', expected 'subject', 'prompt' and"):
        read_facts(data)


def test_facts_travel_and_the_latest_of_one_prompt_stays(tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    for folder in (a, b, c, d):
        folder.mkdir()
    other = FactRow(subject="x", prompt="x is", target="y")
    again = FactRow(subject="x", prompt="x is", target="z")
    carry([], a, [FACT])
    carry([a], b, [other])
    carry([b, a], c, [again])
    assert carried(a) == [FACT]
    assert carried(b) == [FACT, other]
    assert carried(c) == [FACT, again]
    carry([d], d)
    assert carried(d) == []
    assert not list(d.iterdir())
    assert "Åland" in (a / "facts.jsonl").read_text()


def test_every_verb_that_makes_a_model_of_models_carries_their_facts(tmp_path):
    one, other = (FactRow(subject=s, prompt=f"{s} is", target="y") for s in "ab")
    models = {}
    for name, facts in (("base", []), ("one", [one]), ("other", [other])):
        models[name] = small.saved(tmp_path / name)
        carry([], models[name].path, facts)
    data, training = small.pairs(tmp_path / "pairs.jsonl"), Training(max_steps=1, length=32, batch_size=4)
    numbers = itertools.count()

    def made(verb, **arguments):
        return carried(verb.body(small.Work(tmp_path / f"work{next(numbers)}"), **arguments).path)

    learning = {"data": data, "training": training}
    assert made(tune, model=models["one"], method=LoRA(rank=2), **learning) == [one]
    assert made(tune, model=models["one"], method=Full(), **learning) == [one]
    assert made(tune, model=models["base"], method=Full(), **learning) == []
    found = made(distill, teacher=models["other"], student=models["one"], method=ForwardKL(), **learning)
    assert found == [other, one]
    experts = [models["one"], models["other"]]
    assert made(merge, base=models["base"], experts=experts, method=Linear()) == [one, other]
