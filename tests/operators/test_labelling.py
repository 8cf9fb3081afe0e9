import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.jsd import JSD
from lfm.distillation.reverse_kl import ReverseKL
from lfm.distillation.sequence_level import SequenceLevel
from lfm.errors import HyperparameterError
from lfm.tuning.full import Full
from operators.artifact import Dataset, Model
from operators.catalog import Catalog
from operators.data.batches import NoLossToken, documents, on_device
from operators.data.row_files import DatasetError
from operators.data.rows import read_rows
from operators.distillation import DistillationError, _job, distill, problems as refused
from operators.labelling import label, problems
from operators.learning.loop import Place
from operators.models.language_models import load, load_tokenizer
from operators.pretraining import train_tokenizer
from operators.resources import Resources
from operators.sharing.notices import Preempted
from operators.teaching.labels import Labelling, LabelsError, labelling_of
from operators.training import Training
from operators.tuning import tune
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(batch_size=4, length=48, learning_rate=1e-2, schedule="constant", warmup=0.0, max_steps=6)
PACKED = (TRAINING, replace(TRAINING, packing=False), replace(TRAINING, length=60))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("labelling")


@pytest.fixture(scope="module")
def pairs(home):
    return small.pairs(home / "pairs.jsonl")


@pytest.fixture(scope="module")
def texts(home):
    return small.texts(home / "texts.jsonl")


@pytest.fixture(scope="module")
def teacher(home, pairs):
    """One that has learnt how to answer, and when to end."""
    start = small.saved(home / "start", hidden_size=32, num_key_value_heads=2)
    settings = replace(TRAINING, max_steps=80, batch_size=12, packing=False)
    return replace(tune.body(work_in(home), model=start, data=pairs, method=Full(), training=settings), digest="t" * 64)


@pytest.fixture(scope="module")
def student(home):
    return small.saved(home / "student", seed=3, num_hidden_layers=1)


@pytest.fixture(scope="module")
def labelled(home, teacher, pairs):
    return label.body(
        work_in(home), teacher=teacher, data=pairs, what="probabilities", top_k=5, length=64, batch_size=5
    )


def work_in(home, resources=None):
    work_in.count += 1
    return small.Work(home / f"work-{work_in.count}", resources)


work_in.count = 0


def job_of(work, **given):
    defaults = {"held_out": None, "top_k": None, "hard_weight": 0.0, "max_answer": 8, "method": ForwardKL()}
    return _job(Place(), **{**defaults, "training": TRAINING, **given}, scratch=work.scratch)


def loss_of(job):
    """Of all rows at once."""
    return job.objective(on_device(job.rows, np.arange(len(job.rows)), torch.device("cpu")))


# Probabilities.


def test_labels_are_what_the_teacher_says_of_each_token(labelled, teacher, pairs):
    """A loop over documents, without chunks or rows."""
    table = pq.read_table(labelled.path / "data.parquet").to_pylist()
    model, rows = load(teacher.path), read_rows(pairs).to_pydict()
    for row, document in zip(table, documents(rows, load_tokenizer(teacher.path)), strict=True):
        tokens = np.frombuffer(row["label_tokens"], "<u2").reshape(-1, 5)
        shares = np.frombuffer(row["label_shares"], "<f2").reshape(-1, 6)
        said = model(torch.tensor([document.ids])).logits[0].softmax(-1)
        places = [i for i, learnt in enumerate(document.answer) if learnt]
        assert len(tokens) == len(places)
        for place, named, share in zip(places, tokens, shares, strict=True):
            ranked = sorted(range(small.VOCABULARY), key=lambda t: -said[place - 1, t])[:5]
            assert named.tolist() == ranked
            wanted = [said[place - 1, t].item() for t in ranked]
            wanted.append(1 - sum(wanted))
            np.testing.assert_allclose(np.exp(share.astype(np.float64)), wanted, rtol=5e-3, atol=2e-5)


def test_the_rows_stay_what_they_were_and_the_file_has_the_stated_bytes(labelled, pairs):
    assert read_rows(labelled).equals(read_rows(pairs))
    about = labelled.about
    assert (about["bytes_per_token"], about["top_k"], about["form"]) == (4 * 5 + 2, 5, "prompt_completion")
    assert about["teacher"] == "t" * 64
    group = pq.read_metadata(labelled.path / "data.parquet").row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    sizes = {column.path_in_schema: column.total_compressed_size for column in columns}
    table = pq.read_table(labelled.path / "data.parquet")
    first = table.slice(0, group.num_rows)
    tokens = sum(len(t.as_py()) for t in first["label_tokens"]) // 10
    stored = sizes["label_tokens"] + sizes["label_shares"]
    assert 0 <= stored - 22 * tokens <= 2 * (4 * group.num_rows + 64), "a length for each document, and a page's head"
    assert about["loss_tokens"] == sum(len(t.as_py()) for t in table["label_tokens"]) // 10


def test_more_tokens_than_16_bits_can_number_take_two_bytes_more():
    wide = Labelling(top_k=50, vocabulary=70_000, temperature=1.0, length=8, longest=8, tokens="")
    assert wide.bytes_per_token == 6 * 50 + 2
    assert replace(wide, vocabulary=1 << 16).bytes_per_token == 4 * 50 + 2
    assert replace(wide, vocabulary=50).bytes_per_token == 4 * 50, "no others"


@pytest.mark.parametrize("method", [ForwardKL(), ReverseKL(student_share=0.0), JSD(student_share=0.0)])
@pytest.mark.parametrize("training", PACKED)
def test_labels_teach_what_the_teacher_does(workspace, teacher, student, pairs, labelled, method, training):
    given = {"student": student, "method": method, "training": training}
    stored = job_of(workspace, teacher=None, data=labelled, **given)
    asked = job_of(workspace, teacher=teacher, data=pairs, top_k=5, **given)
    losses = [loss_of(job) for job in (stored, asked)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    for (name, one), (_, other) in zip(*(j.objective.named_parameters() for j in (stored, asked)), strict=True):
        assert (one.grad - other.grad).norm() <= 0.03 * other.grad.norm(), name


def test_a_temperature_and_documents_that_were_cut(workspace, teacher, student, texts):
    method, training = ForwardKL(temperature=2.0), replace(TRAINING, length=7)
    many = {"teacher": teacher, "what": "probabilities", "top_k": 4, "temperature": 2.0}
    made = label.body(workspace, data=texts, length=7, batch_size=4, **many)
    assert made.about["longest"] > 7
    given = {"student": student, "method": method, "training": training}
    stored = loss_of(job_of(workspace, teacher=None, data=made, **given))
    asked = loss_of(job_of(workspace, teacher=teacher, data=texts, top_k=4, **given))
    assert stored.item() == pytest.approx(asked.item(), rel=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_fewer_labels_than_there_are(workspace, teacher, student, pairs, labelled, k):
    stored = loss_of(job_of(workspace, teacher=None, student=student, data=labelled, top_k=k))
    asked = loss_of(job_of(workspace, teacher=teacher, student=student, data=pairs, top_k=k))
    assert stored.item() == pytest.approx(asked.item(), rel=2e-3)


def test_a_student_learns_without_the_teacher(workspace, student, labelled):
    training = replace(TRAINING, max_steps=30, validate_every=15)
    after = distill.body(
        workspace, student=student, data=labelled, held_out=labelled, method=ForwardKL(), training=training
    )
    assert after.about["steps"] == 30
    assert workspace.curve("held_out_loss")[-1] < 0.5 * workspace.curve()[0]


def test_any_number_of_rows_at_once_says_the_same(workspace, teacher, pairs, labelled):
    again = label.body(workspace, teacher=teacher, data=pairs, what="probabilities", top_k=5, length=64, batch_size=12)
    one, other = (pq.read_table(d.path / "data.parquet") for d in (labelled, again))
    assert one["label_document"].equals(other["label_document"])
    one, other = (np.frombuffer(b"".join(t["label_shares"].to_pylist()), "<f2") for t in (one, other))
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_a_worker_without_rows_has_no_labels_to_learn(workspace, student, labelled):
    job = job_of(workspace, teacher=None, student=student, data=labelled)
    nothing = on_device(job.rows, np.zeros(0, np.int64), torch.device("cpu"))
    assert job.objective(nothing).item() == 0


def test_other_tokens_than_were_labelled_are_refused(tmp_path, workspace, student, labelled):
    table = pq.read_table(labelled.path / "data.parquet")
    prompts = ["the cat", *table["prompt"].to_pylist()[1:]]
    changed = table.set_column(table.column_names.index("prompt"), "prompt", [prompts])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "changed.parquet")
    with pytest.raises(LabelsError, match="row 1: its tokens are others, expected the document that was labelled"):
        job_of(workspace, teacher=None, student=student, data=Dataset(str(tmp_path / "changed.parquet")))


def foreseen(**given):
    defaults = {"held_out": None, "top_k": None, "hard_weight": 0.0, "max_answer": 8, "method": ForwardKL()}
    return list(refused(**{**defaults, "training": TRAINING, "resources": Resources(), "teacher": None, **given}))


def test_labels_that_fit_are_not_refused(student, labelled):
    assert foreseen(student=student, data=labelled, held_out=labelled) == []
    assert foreseen(student=student, data=labelled, top_k=5, hard_weight=0.5) == []
    assert foreseen(student=None, data=None) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": JSD()}, "student_share=0.5 without a teacher, expected 0"),
        ({"method": ForwardKL(temperature=2.0)}, "labelled at temperature=1.0, expected the method's, 2.0."),
        ({"top_k": 6}, "top_k=6, expected at most the 5 tokens that labels name."),
        ({"training": replace(TRAINING, length=8)}, "was labelled at length=64, expected length=64 or"),
        ({"method": SequenceLevel()}, "teacher: none is given, expected one for SequenceLevel."),
    ],
)
def test_labels_that_do_not_fit_are_refused(workspace, student, labelled, given, said):
    clauses = foreseen(student=student, data=labelled, **given)
    assert any(said in clause for clause in clauses)
    with pytest.raises(DistillationError) as caught:
        distill.body(
            workspace, student=student, data=labelled, **{"method": ForwardKL(), "training": TRAINING, **given}
        )
    assert said in str(caught.value)


def test_rows_without_labels_and_another_tokenizer_are_refused(tmp_path, student, labelled, pairs):
    (clause,) = foreseen(student=student, data=labelled, held_out=pairs)
    assert clause.startswith(f"held_out: {pairs.uri!r} holds no labels and no teacher is given")
    other = small.saved(tmp_path / "other")
    train_tokenizer(["zzz yyy xxx " * 9], small.VOCABULARY).save_pretrained(other.path)
    (clause,) = foreseen(student=other, data=labelled)
    assert "was labelled with another tokenizer than the student's" in clause
    small.model(vocab_size=280).save_pretrained(tmp_path / "short")
    small.tokenizer().save_pretrained(tmp_path / "short")
    size = labelling_of(labelled).vocabulary
    (clause,) = foreseen(student=Model(str(tmp_path / "short")), data=labelled)
    assert f"a head of 280 entries for the {size} tokens of" in clause


# Text.


def greedy(model, tokenizer, prompt, room):
    """The likeliest token, one after another, without a cache; None where it does not end."""
    ids = tokenizer(f"<|user|>{prompt}{tokenizer.eos_token}<|assistant|>")["input_ids"]
    said = []
    while len(said) < room:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(said)
        said.append(token)
    return None


def test_the_teacher_answers_each_prompt(workspace, teacher, pairs):
    made = label.body(workspace, teacher=teacher, data=pairs, max_answer=7)
    model, tokenizer = load(teacher.path), load_tokenizer(teacher.path)
    prompts = read_rows(pairs)["prompt"].to_pylist()
    wanted = [(p, greedy(model, tokenizer, p, 7)) for p in prompts]
    ended = [{"prompt": p, "completion": said} for p, said in wanted if said is not None]
    assert read_rows(made).to_pylist() == ended
    assert 0 < len(ended) < len(prompts), "the test is of both"
    assert (made.about["rows"], made.about["cut"]) == (len(ended), len(prompts) - len(ended))


def test_of_a_conversation_the_last_answer_is_written_anew(tmp_path, workspace, teacher):
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "a dog"), ("assistant", "ran"), ("user", "left")]
    turns = [{"role": r, "content": c} for r, c in turns]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns, "source": "here"}) + "\n")
    made = label.body(workspace, teacher=teacher, data=Dataset(str(tmp_path / "talk.jsonl")), max_answer=30)
    (row,) = read_rows(made).to_pylist()
    assert (row["prompt"], row["source"]) == (turns[:3], "here")
    assert isinstance(row["completion"], str)


def test_answers_that_never_end_are_an_error(workspace, teacher, pairs):
    with pytest.raises(DatasetError, match="came to no end within max_answer=1 in any of 12 answers"):
        label.body(workspace, teacher=teacher, data=pairs, max_answer=1)


def test_a_prompt_without_room_is_named(tmp_path, workspace, teacher):
    rows = [{"prompt": "the", "completion": ""}, {"prompt": "the cat " * 40, "completion": ""}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DatasetError, match=r"row 2: asks with \d+ tokens, expected fewer than the teacher's context"):
        label.body(workspace, teacher=teacher, data=Dataset(str(tmp_path / "long.jsonl")))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": 0}, "top_k=0, expected top_k >= 1"),
        ({"temperature": 0.0}, "temperature=0.0, expected temperature > 0"),
        ({"length": 1}, "length=1, expected length >= 2"),
        ({"max_answer": 0}, "max_answer=0, expected max_answer >= 1"),
        ({"batch_size": 0}, "batch_size=0, expected batch_size >= 1"),
        ({"what": "probabilities", "top_k": 10**6}, "top_k=1000000, expected top_k <= "),
    ],
)
def test_what_cannot_be_meant_is_refused(workspace, teacher, pairs, given, said):
    clauses = list(problems(teacher=teacher, data=pairs, **given))
    assert any(said in clause for clause in clauses)
    with pytest.raises(HyperparameterError, match=said.replace("(", r"\(")):
        label.body(workspace, teacher=teacher, data=pairs, **given)


def test_the_plan_knows_what_a_teacher_can_answer(tmp_path, teacher, texts, pairs):
    assert list(problems(teacher=teacher, data=texts, what="probabilities", length=64)) == []
    with_labels = small.labelled(tmp_path / "labelled.jsonl")
    assert list(problems(teacher=teacher, data=with_labels, what="probabilities", length=64)) == []
    (clause,) = problems(teacher=teacher, data=texts)
    assert "holds 'text' rows, expected the columns" in clause
    (clause,) = problems(teacher=teacher, data=pairs, what="probabilities", length=512)
    assert "length=512, expected at most the 64 tokens" in clause
    assert list(problems(teacher=None, data=None)) == []


def test_there_has_to_be_something_to_label(tmp_path, workspace, teacher):
    turns = [{"role": "user", "content": "the cat"}]
    (tmp_path / "silent.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(NoLossToken):
        label.body(
            workspace, teacher=teacher, data=Dataset(str(tmp_path / "silent.jsonl")), what="probabilities", length=64
        )


# Parts: kept, gone on from, and shared.


def test_what_was_done_is_kept_when_the_machine_leaves(workspace, teacher, pairs):
    given = {"teacher": teacher, "data": pairs, "what": "probabilities", "top_k": 3, "length": 64, "batch_size": 3}
    workspace.goes_at = 2
    with pytest.raises(Preempted):
        label.body(workspace, **given)
    assert [line["done"] for line in workspace.told] == [1, 2]
    again = workspace.another()
    again.checkpoints = workspace.checkpoints
    made = label.body(again, **given)
    assert [line["done"] for line in again.told] == [3, 4]
    whole = label.body(workspace.another(), **given)
    assert (made.path / "data.parquet").read_bytes() == (whole.path / "data.parquet").read_bytes()


@pytest.mark.ray
@pytest.mark.parametrize("given", [{"what": "probabilities", "top_k": 3, "length": 64}, {"max_answer": 8}])
def test_workers_write_the_same_bytes(home, ray_local, teacher, given):
    found = []
    pairs = small.pairs(home / "many.jsonl", 70)  # answers are written in two parts, labels in more
    with ray_local():
        for workers in (1, 2):
            work = work_in(home, Resources(workers=workers, cpus_per_worker=0.5))
            made = label.body(work, teacher=teacher, data=pairs, batch_size=20, **given)
            found.append((made.path / "data.parquet").read_bytes())
            assert work.told[-1]["done"] == work.told[-1]["total"]
    assert found[0] == found[1]


@pytest.mark.ray
def test_what_a_worker_raises_comes_as_it_is(tmp_path, home, ray_local, teacher):
    rows = [{"prompt": "the", "completion": ""}, {"prompt": "the cat " * 40, "completion": ""}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    work = work_in(home, Resources(workers=2, cpus_per_worker=0.5))
    with ray_local(), pytest.raises(DatasetError, match="row 2: asks with"):
        label.body(work, teacher=teacher, data=Dataset(str(tmp_path / "long.jsonl")))


# A student that learns the teacher's answers.


def test_a_student_with_another_tokenizer_learns_the_teachers_answers(tmp_path, workspace, teacher, pairs):
    other = small.saved(tmp_path / "other", seed=5, vocab_size=320)
    train_tokenizer([" ".join(small.WORDS[::2])], 310).save_pretrained(other.path)
    training = replace(TRAINING, max_steps=20, validate_every=10)
    given = {"teacher": teacher, "data": pairs, "held_out": pairs, "max_answer": 7}
    after = distill.body(workspace, student=other, method=SequenceLevel(), training=training, **given)
    written = label.body(workspace.another(), teacher=teacher, data=pairs, max_answer=7)
    tuned = workspace.another()
    tune.body(tuned, model=other, data=written, held_out=written, method=Full(), training=training)
    trained = [line for line in workspace.told if "loss" in line]
    assert [line["loss"] for line in trained] == pytest.approx(tuned.curve(), rel=1e-5)
    assert workspace.curve("held_out_loss") == pytest.approx(tuned.curve("held_out_loss"), rel=1e-5)
    assert after.about["cut_answers"] == 2 * written.about["cut"]
    assert after.about["steps"] == 20


def test_a_resumed_student_goes_on_from_the_answers_that_were_written(workspace, monkeypatch, teacher, student, pairs):
    training = replace(TRAINING, max_steps=6, checkpoint_every=3)
    given = {"teacher": teacher, "student": student, "data": pairs, "max_answer": 8, "method": SequenceLevel()}
    whole = workspace.another()
    distill.body(whole, training=training, **given)
    workspace.goes_at = 4  # it is told of one part of writing and three steps
    with pytest.raises(Preempted):
        distill.body(workspace, training=training, **given)
    again = workspace.another()
    again.checkpoints = workspace.checkpoints
    monkeypatch.setattr("operators.teaching.teacher_text.write_answers", None)  # nobody writes again
    distill.body(again, training=training, **given)
    assert again.curve() == pytest.approx(whole.curve()[len(workspace.curve()) :], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": 5}, "top_k=5 with SequenceLevel, expected none, as only text is asked of the teacher."),
        ({"hard_weight": 0.5}, "hard_weight=0.5 with SequenceLevel, expected 0, as its labels are the teacher's."),
    ],
)
def test_what_only_probabilities_could_give_is_refused(teacher, student, pairs, given, said):
    (clause,) = foreseen(teacher=teacher, student=student, data=pairs, method=SequenceLevel(), **given)
    assert clause.startswith(said)


def test_text_without_prompts_cannot_be_answered(teacher, student, texts):
    (clause,) = foreseen(teacher=teacher, student=student, data=texts, method=SequenceLevel())
    assert clause.startswith("data: ")
    assert "holds plain text, expected prompts for the teacher" in clause


def test_the_verb_is_found_by_its_name():
    verb = Catalog().operator("label")
    assert set(verb.edges) == {"teacher", "data"}
    assert verb.shares_work
