from dataclasses import replace

import numpy as np
import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.hidden import Hidden
from lfm.hooks import Blocks, streams_of
from operators.data.batches import IGNORED, on_device
from operators.distillation import _job, distill, problems
from operators.learning.loop import Place
from operators.models.language_models import load, num_layers
from operators.resources import Resources
from operators.training import Training
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(batch_size=4, length=40, learning_rate=1e-2, schedule="constant", warmup=0.0, max_steps=6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def pairs(home):
    return small.pairs(home / "pairs.jsonl")


@pytest.fixture(scope="module")
def teacher(home):
    return small.saved(home / "teacher", seed=1, hidden_size=24, num_attention_heads=3, num_hidden_layers=4)


@pytest.fixture(scope="module")
def student(home):
    return small.saved(home / "student", seed=2)


def given(teacher, student, data, **more):
    fields = {"held_out": None, "top_k": None, "hard_weight": 0.0, "max_answer": 8, "training": TRAINING, **more}
    return {"teacher": teacher, "student": student, "data": data, **fields}


def loss_of(work, *models, **more):
    """Of all rows at once, and what was asked."""
    job = _job(Place(), **given(*models, **more), scratch=work.scratch)
    return job, job.objective(on_device(job.rows, np.arange(len(job.rows)), torch.device("cpu")))


def depths(model, ids):
    """What transformers itself says flows: the last layer's, which it puts through the final norm, apart."""
    flows = model(input_ids=ids, output_hidden_states=True).hidden_states
    return list(flows[:-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "opt"])
def test_what_flows_is_what_transformers_calls_hidden_states(kind):
    model = small.model(kind).eval()
    ids = torch.arange(5, 12)[None]
    with streams_of(Blocks(model), (0, 1, 2)) as seen:
        flows = depths(model, ids)
    for depth, flow in enumerate(flows):
        torch.testing.assert_close(seen[depth], flow)
    assert seen[2].shape == flows[0].shape


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_that_of_a_loop_over_rows(workspace, teacher, student, pairs, packing):
    method = Hidden(mapping=((0, 1), (1, 3)), logits_share=0.0)
    training = replace(TRAINING, packing=packing)
    job, loss = loss_of(workspace, teacher, student, pairs, method=method, training=training)
    projections = [p.weight.detach() for p in job.objective.features.projections]
    mine, theirs = load(student.path), load(teacher.path)
    total = 0.0
    for ids, positions, targets in zip(job.rows.ids, job.rows.positions, job.rows.targets, strict=True):
        starts = np.flatnonzero(positions == 0)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            document = torch.tensor(ids[start:end].astype(np.int64))[None]
            with torch.no_grad():
                s, t = (depths(m, document) for m in (mine, theirs))
            for at in np.flatnonzero(targets[start:end] != IGNORED):
                for (m, n), project in zip(method.mapping, projections, strict=True):
                    total += (project @ s[m][0, at] - t[n][0, at]).square().mean().item()
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_student_that_is_its_teacher_has_no_loss(workspace, teacher, pairs):
    _, loss = loss_of(workspace, teacher, teacher, pairs, method=Hidden())
    assert loss.item() == pytest.approx(0, abs=1e-3)


def test_the_gradient_reaches_the_tapped_layer_and_those_below(workspace, teacher, student, pairs):
    method = Hidden(mapping=((1, 2),), logits_share=0.0)
    job, loss = loss_of(workspace, teacher, student, pairs, method=method)
    loss.backward()
    reached = {n for n, p in job.objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all("layers.1." not in n and "lm_head" not in n and "model.norm" not in n for n in reached)
    assert "features.projections.0.weight" in reached
    assert "model.model.embed_tokens.weight" in reached
    layer = {n for n, _ in job.objective.named_parameters() if "layers.0." in n}
    assert layer <= reached
    assert not any(p.requires_grad for p in job.objective.teacher.model.parameters())


def test_the_logits_alone_are_the_forward_kl(workspace, teacher, student, pairs):
    _, alone = loss_of(workspace, teacher, student, pairs, method=Hidden(logits_share=1.0, temperature=2.0))
    _, forward = loss_of(workspace, teacher, student, pairs, method=ForwardKL(temperature=2.0))
    torch.testing.assert_close(alone, forward)


def test_hard_labels_weigh_what_the_features_leave(workspace, teacher, student, pairs):
    parts = [
        loss_of(workspace, teacher, student, pairs, method=Hidden(), hard_weight=w)[1].item() for w in (0.0, 0.25, 1.0)
    ]
    assert parts[1] == pytest.approx(0.75 * parts[0] + 0.25 * parts[2], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "gradient_checkpointing": True}])
def test_a_student_comes_nearer_and_keeps_no_projection(workspace, teacher, student, pairs, settings):
    training = replace(TRAINING, max_steps=25, **settings)
    after = distill.body(
        workspace, **given(teacher, student, pairs, method=Hidden(logits_share=0.2), training=training)
    )
    losses = workspace.curve()
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert {n for n, _ in load(after.path).named_parameters()} == {n for n, _ in load(student.path).named_parameters()}


def test_projections_go_on_after_a_checkpoint(workspace, teacher, student, pairs):
    training = replace(TRAINING, checkpoint_every=3)
    arguments = given(teacher, student, pairs, method=Hidden(), training=training)
    distill.body(workspace, **arguments)
    again = workspace.another()
    again.checkpoints = workspace.checkpoints[:1]
    distill.body(again, **arguments)
    assert again.curve() == pytest.approx(workspace.curve()[3:], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": Hidden(mapping=((3, 1),))}, "expected depths up to 2 of the student and 4 of the teacher"),
        ({"method": Hidden(), "top_k": 5}, "top_k=5 with Hidden, expected none, as only likely tokens are remembered."),
        (
            {"method": Hidden(), "resources": Resources(workers=2, strategy="zero3")},
            "Hidden: strategy='zero3', expected one of single, ddp, zero1, zero2.",
        ),
        ({"method": Hidden(), "teacher": None}, "teacher: none is given, expected one for Hidden, which looks at more"),
    ],
)
def test_what_cannot_be_is_refused(teacher, student, pairs, more, said):
    arguments = {**given(teacher, student, pairs), "resources": Resources(), **more}
    clauses = list(problems(**arguments))
    assert len(clauses) == 1
    assert said in clauses[0]


def test_a_config_says_how_many_layers_there_are(tmp_path, teacher):
    small.saved(tmp_path / "gpt2", "gpt2")
    assert (num_layers(teacher.path), num_layers(tmp_path / "gpt2"), num_layers(tmp_path)) == (4, 2, None)
