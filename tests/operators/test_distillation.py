import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.jsd import JSD
from lfm.distillation.reverse_kl import ReverseKL
from lfm.soft_targets import likeliest
from operators.artifact import Dataset, Model
from operators.catalog import Catalog
from operators.data.batches import IGNORED, on_device
from operators.distillation import DistillationError, _job, distill, problems
from operators.learning.loop import Place, train
from operators.models.language_models import load, load_tokenizer
from operators.models.objectives import NextToken
from operators.pretraining import train_tokenizer
from operators.resources import Resources
from operators.teaching.student_text import Written
from operators.training import Training
from tests.operators import small

pytestmark = pytest.mark.slow

WORDS = ("red", "blue", "green", "cat", "dog", "sun")
TEXTS = [f"the {a} and the {b} saw a {c}." for a in WORDS for b in WORDS for c in WORDS]
SETTINGS = {
    "batch_size": 8,
    "length": 40,
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup": 0.0,
}


@pytest.fixture
def work(tmp_path):
    return small.Work(tmp_path / "work")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distillation")


@pytest.fixture(scope="module")
def tokenizer(folder):
    made = train_tokenizer(TEXTS, 300)
    made.save_pretrained(folder / "tokenizer")
    return made


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return len(tokenizer)


def decoder(folder, name, tokenizer, *, seed, layers=2, vocabulary=None, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,
        **changes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return Model(str(folder / name))


def rows_file(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(str(path))


@pytest.fixture(scope="module")
def texts(folder):
    return rows_file(folder, "texts", [{"text": t} for t in TEXTS[::3]])


@pytest.fixture(scope="module")
def few(folder):
    return rows_file(folder, "few", [{"text": t} for t in TEXTS[1::40]])


@pytest.fixture(scope="module")
def pairs(folder):
    rows = [{"prompt": t[: 8 + i % 5], "completion": t[8 + i % 5 :]} for i, t in enumerate(TEXTS[::9])]
    return rows_file(folder, "pairs", rows)


@pytest.fixture(scope="module")
def teacher(folder, tokenizer):
    return decoder(folder, "teacher", tokenizer, seed=1)


@pytest.fixture(scope="module")
def student(folder, tokenizer):
    return decoder(folder, "student", tokenizer, seed=2, layers=1)


def arguments(teacher, student, data, *, method=None, settings=None, **more):
    return {
        "teacher": teacher,
        "student": student,
        "data": data,
        "method": method or ForwardKL(),
        "training": Training(**{**SETTINGS, "max_steps": 12, **(settings or {})}),
        **more,
    }


def job_of(work, *given, **more):
    """What the verb trains, without training it."""
    defaults = {"held_out": None, "top_k": None, "hard_weight": 0.0, "max_answer": 4}
    return _job(Place(), **{**defaults, **arguments(*given, **more)}, scratch=work.scratch)


def models(*folders):
    return [load(m.path, torch.float32) for m in folders]


def documents(data, tokenizer):
    """(ids, how many of them are not learnt) of each row; pairs are said in the tokenizer's chat format."""
    end, found = tokenizer.eos_token, []
    for line in data.path.read_text().splitlines():
        row = json.loads(line)
        prompt = f"<|user|>{row['prompt']}{end}<|assistant|>" if "prompt" in row else ""
        asked, said = (tokenizer(t)["input_ids"] for t in (prompt, row.get("completion", row.get("text")) + end))
        found.append((asked + said, len(asked)))
    return found


def divergence(teacher, student, data, temperature=1.0):
    """The sum of KL(teacher || student) over the learnt tokens of documents that are not packed, and their number."""
    total, count = 0.0, 0
    for ids, first in documents(data, load_tokenizer(Path(student.name_or_path))):
        p, q = ((m(torch.tensor([ids])).logits[0] / temperature).softmax(-1) for m in (teacher, student))
        for at in range(max(1, first) - 1, len(ids) - 1):
            total = total + sum(p[at] * (p[at] / q[at]).log())
            count += 1
    return total, count


def test_a_distilled_student_is_nearer_to_its_teacher_on_text_it_has_not_seen(work, teacher, student, texts, few):
    given = arguments(teacher, student, texts, held_out=few, settings={"max_steps": 40, "validate_every": 20})
    after = distill.body(work, **given)
    assert (after.about["method"], after.about["steps"]) == ("ForwardKL", 40)
    with torch.no_grad():
        (before, count), (nearer, _) = (divergence(*models(teacher, s), few) for s in (student, after))
    assert nearer < 0.5 * before
    assert work.curve("held_out_loss")[-1] == pytest.approx(nearer.item() / count, rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_the_gradient_is_that_of_a_dense_loop_over_documents(work, teacher, student, pairs, packing):
    job = job_of(work, teacher, student, pairs, method=ForwardKL(temperature=2.0), settings={"packing": packing})
    everything = on_device(job.rows, np.arange(len(job.rows)), torch.device("cpu"))
    loss = job.objective(everything)
    loss.backward()
    speaker, learner = models(teacher, student)
    total, count = divergence(speaker, learner, pairs, temperature=2.0)
    (4 * total).backward()
    assert everything.loss_tokens == count
    assert loss.item() == pytest.approx(4 * total.item(), rel=1e-4)
    for name, parameter in learner.named_parameters():
        got = job.objective.get_parameter(f"model.{name}").grad
        torch.testing.assert_close(got, parameter.grad, atol=1e-3, rtol=1e-3)


def test_hard_labels_alone_are_plain_tuning(work, teacher, student, pairs):
    job = job_of(work, teacher, student, pairs, hard_weight=1.0)
    batch = on_device(job.rows, np.arange(len(job.rows)), torch.device("cpu"))
    plain = NextToken(job.objective.model, packed=True)
    torch.testing.assert_close(job.objective(batch), plain(batch))


def test_the_teacher_is_no_part_of_what_is_trained(work, teacher, student, texts):
    job = job_of(work, teacher, student, texts)
    assert {n.partition(".")[0] for n, _ in job.objective.named_parameters()} == {"model"}
    assert sum(p.numel() for p in job.objective.parameters()) == sum(p.numel() for p in models(student)[0].parameters())
    train(job, Training(**SETTINGS, max_steps=2), Place(), work, work.scratch)
    for mine, stored in zip(job.objective.teacher.model.parameters(), models(teacher)[0].parameters(), strict=True):
        assert mine.grad is None
        assert torch.equal(mine, stored)


def test_all_tokens_as_the_likeliest_teach_what_the_whole_vocabulary_does(
    tmp_path, teacher, student, texts, vocabulary
):
    curves = []
    for top_k in (None, vocabulary):
        work = small.Work(tmp_path / str(top_k))
        distill.body(work, **arguments(teacher, student, texts, top_k=top_k))
        curves.append(work.curve())
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)  # what is remembered is rounded to float16


def test_a_few_likeliest_tokens_are_enough_to_come_nearer(work, teacher, student, texts, few):
    after = distill.body(work, **arguments(teacher, student, texts, top_k=8, settings={"max_steps": 40}))
    with torch.no_grad():
        (before, _), (nearer, _) = (divergence(*models(teacher, s), few) for s in (student, after))
    assert nearer < 0.6 * before


def test_each_row_meets_the_teacher_once_however_many_epochs_there_are(work, teacher, student, texts, few):
    training = Training(**SETTINGS, epochs=4, micro_batch_size=3, validate_every=2)
    job = job_of(work, teacher, student, texts, top_k=5, held_out=few)
    listened = job.objective.teacher
    train(job, training, Place(), work, work.scratch)
    assert listened.asked == len(job.rows) + len(job.held_out)
    assert not any(work.scratch.iterdir()), "the memory has no name that could stay"

    again = job_of(work, teacher, student, texts, held_out=few)
    train(again, training, Place(), work, work.scratch)
    assert again.objective.teacher.asked >= 4 * len(job.rows)


def test_what_is_remembered_is_what_the_teacher_said(work, teacher, student, texts):
    job = job_of(work, teacher, student, texts, top_k=5)
    device = torch.device("cpu")
    everything = on_device(job.rows, np.arange(len(job.rows)), device)
    said = likeliest(job.objective.teacher.asked_of(everything), 5, len(load_tokenizer(student.path)))
    for where in ([2, 0], [1, 2, 2, 3], [0, 1]):  # some known, some not, one twice
        got = job.objective.teacher.says(on_device(job.rows, np.array(where), device))
        counts = (job.rows.targets != IGNORED).sum(axis=1)
        starts = np.concatenate([[0], counts.cumsum()])
        places = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in where])
        torch.testing.assert_close(got.tokens.long(), said.tokens[places])
        torch.testing.assert_close(got.shares.float(), said.shares[places], atol=0.01, rtol=1e-3)


def test_a_worker_without_rows_does_not_disturb_the_memory(work, teacher, student, texts):
    job = job_of(work, teacher, student, texts, top_k=5)
    nothing = on_device(job.rows, np.zeros(0, np.int64), torch.device("cpu"))
    assert job.objective(nothing).item() == 0
    assert not job.objective.teacher.memories[0].met.any()


def test_heads_may_differ_in_padding(tmp_path, folder, tokenizer, teacher, texts, few):
    padded = decoder(folder, "padded", tokenizer, seed=3, layers=1, vocabulary=len(tokenizer) + 12)
    given = arguments(teacher, padded, texts, held_out=few, settings={"validate_every": 6})
    losses = []
    for more in ({}, {"top_k": 8}):
        work = small.Work(tmp_path / f"work{len(more)}")
        distill.body(work, **given, **more)
        losses.append(work.curve("held_out_loss"))
    for first, last in losses:
        assert last < first


@pytest.mark.parametrize("method", [ReverseKL(student_share=0.0), JSD(student_share=0.0)])
def test_other_divergences_fall_too(work, teacher, student, texts, method):
    given = arguments(teacher, student, texts, method=method, settings={"max_steps": 30, "precision": "bfloat16"})
    distill.body(work, **given)
    losses = work.curve()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# Text that the student writes.


def greedy(model, prompt, room, end):
    """The likeliest token, one after another, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + room and ids[-1] != end:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("packing", [True, False])
def test_the_student_answers_each_prompt_of_the_batch(work, teacher, student, pairs, packing):
    settings = {"packing": packing}
    job = job_of(work, teacher, student, pairs, method=JSD(student_share=1.0), max_answer=6, settings=settings)
    learner = job.objective.model
    with torch.no_grad():  # so sure that drawing is taking the likeliest
        learner.lm_head.weight *= 1e4
    tokenizer = load_tokenizer(student.path)
    end = tokenizer.eos_token_id
    learner.train()
    rows, where = job.rewrite(3, np.arange(len(job.rows)))
    assert learner.training
    wanted = set()
    for ids, first in documents(pairs, tokenizer):
        whole = greedy(learner.eval(), ids[:first], min(6, 40 - first), end)
        wanted.add((tuple(whole), first))
    got = set()
    for row in where:
        starts = np.flatnonzero(rows.positions[row] == 0)
        for start, stop in zip(starts, [*starts[1:], 40], strict=True):
            learnt = np.flatnonzero(rows.targets[row, start:stop] != IGNORED)
            if len(learnt):
                assert (np.diff(learnt) == 1).all()
                ids = rows.ids[row, start : start + learnt[-1] + 2]
                assert (rows.targets[row, start + learnt] == ids[learnt + 1]).all()
                got.add((tuple(ids.tolist()), int(learnt[0]) + 1))
    assert got == wanted


def test_the_text_is_drawn_from_the_seed_and_the_step(work, teacher, student, pairs):
    job = job_of(work, teacher, student, pairs, method=JSD(student_share=1.0))
    where = np.arange(4)
    first, again, later = (job.rewrite(step, where)[0].ids.tolist() for step in (0, 0, 1))
    assert first == again
    assert first != later
    other = job_of(work, teacher, student, pairs, method=JSD(student_share=1.0), settings={"seed": 1})
    assert other.rewrite(0, where)[0].ids.tolist() != first


def test_the_student_writes_its_share_of_the_batches(work, teacher, student, pairs):
    job = job_of(work, teacher, student, pairs, method=JSD(student_share=0.3), max_answer=1)
    where = np.arange(1)
    written = [isinstance(job.rewrite(step, where)[0], Written) for step in range(200)]
    assert sum(written) == job.rewrite.batches
    assert 0.2 < sum(written) / 200 < 0.4
    assert job.rewrite(written.index(False), where) == (job.rows, where)


@pytest.mark.parametrize("top_k", [None, 5])
def test_loss_tokens_are_counted_after_the_student_has_written(work, teacher, student, pairs, top_k):
    method = JSD(student_share=0.5)
    job = job_of(work, teacher, student, pairs, method=method, top_k=top_k, hard_weight=0.1)
    rewrite, counted = job.rewrite, []

    def watched(step, where):
        rows, which = rewrite(step, where)
        counted.append(int((rows.targets[which] != IGNORED).sum()))
        return rows, which

    watching = dataclasses.replace(job, rewrite=watched)
    done = train(watching, Training(**SETTINGS, max_steps=8), Place(), work, work.scratch)
    assert 0 < rewrite.batches < 8
    assert done.loss_tokens == sum(counted)
    assert len(set(counted)) > 1


def test_what_the_student_wrote_is_compared_with_the_whole_vocabulary_and_is_no_label(work, teacher, student, pairs):
    jobs = [
        job_of(work, teacher, student, pairs, method=JSD(student_share=1.0), top_k=k, hard_weight=h)
        for k, h in ((None, 0.0), (5, 0.5))
    ]
    losses = []
    for job in jobs:
        rows, where = job.rewrite(0, np.arange(4))
        losses.append(job.objective(on_device(rows, where, torch.device("cpu"))))
    torch.testing.assert_close(*losses)


# What is wrong is said before anything runs.


def foreseen(*given, **more):
    defaults = {"held_out": None, "top_k": None, "hard_weight": 0.0, "max_answer": 4, "resources": Resources()}
    defaults["kinds"] = {"teacher": (Model,)}
    return list(problems(**{**defaults, **arguments(*given, **more)}))


def test_nothing_is_wrong_with_what_goes_together_or_is_not_there_yet(teacher, student, texts, pairs):
    assert foreseen(teacher, student, texts, top_k=5) == []
    assert foreseen(teacher, student, pairs, method=JSD()) == []
    assert foreseen(None, None, None, method=JSD(), top_k=10**6) == []


def test_another_tokenizer_is_refused(work, folder, teacher, texts):
    foreign = decoder(folder, "foreign", train_tokenizer(["zzz yyy xxx " * 9], 300), seed=4)
    (clause,) = foreseen(teacher, foreign, texts)
    assert clause.startswith("the tokenizer of the teacher 'teacher' is not that of the student 'foreign', expected")
    with pytest.raises(DistillationError, match="distill: the tokenizer of the teacher"):
        distill.body(work, **arguments(teacher, foreign, texts))
    (foreign.path / "tokenizer.json").rename(foreign.path / "kept.json")
    assert foreseen(teacher, foreign, texts) == []


def test_a_head_that_is_too_small_for_the_tokenizer_is_refused(folder, teacher, tokenizer, texts):
    small = decoder(folder, "small", tokenizer, seed=5, vocabulary=len(tokenizer) - 20)
    (clause,) = foreseen(teacher, small, texts)
    assert clause.startswith(f"a head of {len(tokenizer) - 20} entries for a tokenizer of {len(tokenizer)} tokens")


def test_what_is_wrong_with_either_model_or_the_data_is_said_too(tmp_path, teacher, student, texts):
    odd = rows_file(tmp_path, "odd", [{"question": "why"}])
    settings = {"length": 10**6, "precision": "float16"}
    said = foreseen(teacher, Model(str(tmp_path)), odd, method=JSD(), settings=settings)
    assert len(said) == 4
    for clause, begin in zip(
        said, ("precision='float16' on a CPU", "model: ", "data: ", "teacher: length="), strict=True
    ):
        assert clause.startswith(begin)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"top_k": 0}, "top_k=0, expected 1 <= top_k <= "),
        ({"top_k": 10**6}, "top_k=1000000, expected 1 <= top_k <= "),
        ({"hard_weight": 1.5}, "hard_weight=1.5, expected 0 <= hard_weight <= 1."),
        ({"max_answer": 0}, "max_answer=0, expected max_answer >= 1."),
        ({"method": ReverseKL()}, "student_share=1.0 on '"),
        ({"method": ReverseKL(), "hard_weight": 0.5}, "hard_weight=0.5 with student_share=1, expected 0."),
    ],
)
def test_what_cannot_be_meant_is_refused(work, teacher, student, texts, more, said):
    assert foreseen(teacher, student, texts, **more)[0].startswith(said)
    with pytest.raises(DistillationError) as caught:
        distill.body(work, **arguments(teacher, student, texts, **more))
    assert str(caught.value).startswith(f"distill: {said}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_verb_is_found_by_its_name():
    verb = Catalog().operator("distill")
    assert set(verb.edges) == {"teacher", "student", "data", "held_out"}
    assert verb.problems is problems
