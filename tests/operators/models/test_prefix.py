"""Prefixes through `tune`, `evaluate` and the native engine."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lfm.tuning.prefix import Prefix
from operators.base import Resources
from operators.engines.native import Native, Sampling
from operators.evaluation import evaluate
from operators.learning.loop import Place
from operators.models.language_models import adapted, load
from operators.training import Training
from operators.tuning import _job, tune
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(
    max_steps=6, batch_size=4, micro_batch_size=2, length=32, packing=False, learning_rate=3e-2, seed=1
)  # fmt: skip
METHOD = Prefix(length=4, hidden=8)
WINDOWS = {"gemma2": {"sliding_window": 4}, "llama": {}, "gpt2": {}}
LONG = 9


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    home = tmp_path_factory.mktemp("given")
    return {"model": small.saved(home / "model"), "data": small.pairs(home / "pairs.jsonl"), "held_out": None}


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """What `tune` gives, and how it went."""
    work = small.Work(tmp_path_factory.mktemp("made"))
    return tune.body(work, method=METHOD, training=TRAINING, **given), work


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=torch.tensor([ids])).logits


def test_it_learns_and_keeps_the_keys_and_values_alone(given, made):
    adapter, work = made
    assert work.curve()[-1] < work.curve()[0]
    assert {p.name for p in adapter.path.iterdir()} == {"adapter_model.safetensors", "lfm.json"}
    kept = load_file(adapter.path / "adapter_model.safetensors")
    names = {f"model.prefix.virtual.{kind}.{layer}" for kind in ("keys", "values") for layer in (0, 1)}
    assert {n: tuple(t.shape) for n, t in kept.items()} == dict.fromkeys(names, (1, 4, 8))


def test_what_is_loaded_says_what_the_trained_model_said(given, tmp_path):
    job = _job(Place(), **given, method=METHOD, training=TRAINING)
    learnt = {n: p.detach() for n, p in job.objective.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for tensor in learnt.values():
            tensor.add_(0.5)
    job.export(learnt, tmp_path / "adapter")
    loaded = adapted(load(given["model"].path), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, [5, 17, 203]), logits(job.objective.model, [5, 17, 203]))


@pytest.mark.parametrize("kind", WINDOWS)
def test_answers_are_those_of_a_forward_for_each_token_alone_and_side_by_side(kind):
    model = small.model(kind, tie_word_embeddings=False, **WINDOWS[kind]).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    model.generation_config.eos_token_id = None
    model.requires_grad_(False)
    plain = Native(model, small.tokenizer())
    plain.ends = set()
    prompts = [torch.randint(1, small.VOCABULARY, (n,), generator=draw).tolist() for n in (5, 1, 8)]
    sampling = Sampling(max_tokens=LONG)
    without = plain.complete(prompts, sampling)
    METHOD.attach(model, lambda kind, **fields: None)
    with torch.no_grad():
        model.get_decoder().prefix.virtual.table.mul_(5)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(LONG):
            ids.append(int(logits(model, ids)[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert [plain.complete([p], sampling)[0] for p in prompts] == expected
    assert plain.complete(prompts, sampling) == expected != without


def test_it_is_measured_and_helps_on_what_it_has_learnt(given, made, tmp_path):
    losses = []
    for name, what in (("plain", {"model": given["model"]}), ("own", {"model": made[0], "base": given["model"]})):
        found = evaluate.body(small.Work(tmp_path / name), data={"pairs": given["data"]}, length=32, generate=3, **what)
        losses.append(found.about["sets"]["pairs"]["loss"])
    assert losses[1] < losses[0]


def test_a_base_of_half_precision_learns_as_well(given, made, tmp_path):
    work = small.Work(tmp_path / "work")
    tune.body(work, method=METHOD, training=replace(TRAINING, precision="bfloat16"), **given)
    assert work.curve() == pytest.approx(made[1].curve(), rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packing": True}, "Prefix: packing=True, expected false. Documents of one row would share a cache."),
        ({"gradient_checkpointing": True}, "Prefix: gradient_checkpointing=True, expected false. Recomputed layers"),
    ],
)
def test_what_takes_the_cache_away_is_refused_before_anything_runs(given, changes, said):
    (clause,) = tune.problems(**given, method=METHOD, training=replace(TRAINING, **changes), resources=Resources())
    assert clause.startswith(said)
    assert not list(tune.problems(**given, method=METHOD, training=TRAINING, resources=Resources()))
