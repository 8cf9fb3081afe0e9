"""The verb `meta_train`, and `evaluate` in episodes."""

from dataclasses import replace
from functools import partial

import peft
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import operators.meta_training as meta_training
from lfm.errors import HyperparameterError
from lfm.meta.base import Examples
from lfm.meta.maml import MAML
from lfm.meta.proto_net import ProtoNet
from lfm.networks import statistics_of
from lfm.significance import NotComparable
from lfm.tuning.lora import LoRA
from operators.artifact import Adapter, Metrics, Model
from operators.base import Resources
from operators.data.batches import on_device
from operators.data.episodes import FewShot
from operators.data.images import read_images
from operators.evaluation import evaluate
from operators.gating import Requirement, compared
from operators.learning.loop import Place
from operators.measures.measure import DOCUMENTS
from operators.meta_training import meta_train
from operators.models import networks
from operators.models.few_shot import tasks_of
from operators.models.language_models import UnsupportedModel, load
from operators.training import Training
from pipelines.spec import SpecError, load as spec
from tests.operators import small

pytestmark = pytest.mark.slow

FEW = FewShot(ways=2, shots=2, queries=3)
OF_TEXTS = FewShot(ways=1, shots=2, queries=2)
MANY = MAML(learning_rate=0.1, steps=2, evaluation_steps=3)
TRAINING = Training(max_steps=5, batch_size=4, learning_rate=1e-2, length=32, seed=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("meta")


@pytest.fixture(scope="module")
def images(home):
    return small.images(home / "images", 24)


@pytest.fixture(scope="module")
def blank(home):
    """A network for three labels, which has seen nothing."""
    return small.network(home / "blank")


@pytest.fixture(scope="module")
def texts(home):
    return small.labelled(home / "labelled.jsonl", 18)


@pytest.fixture(scope="module")
def decoder(home):
    return small.saved(home / "decoder")


def trained(folder, model, data, method=MANY, training=TRAINING, *, held_out=None, lora=None, few_shot=FEW):
    work = small.Work(folder)
    given = {"held_out": held_out, "method": method, "lora": lora, "few_shot": few_shot, "training": training}
    return meta_train.body(work, model=model, data=data, **given), work


def measured(folder, model, data, method=MANY, *, few_shot=FEW, episodes=4, **others):
    given = {"method": method, "few_shot": few_shot, "episodes": episodes, "length": 32, **others}
    made = evaluate.body(small.Work(folder), model=model, data={"these": data}, **given)
    return made, made.about["sets"]["these"], pq.read_table(made.path / DOCUMENTS).to_pydict()


def test_a_step_costs_what_its_episodes_cost_one_after_another(tmp_path, blank, images):
    _, work = trained(tmp_path, blank, images, training=replace(TRAINING, max_steps=1))
    torch.manual_seed(TRAINING.seed)
    model = networks.load(blank.path)
    model.head = torch.nn.Linear(model.head.in_features, 2)
    pixels = read_images(images).pixels
    tasks = tasks_of(model, blank.path, images, FEW, 32)
    parameters = dict(model.named_parameters())
    total = 0.0
    for i in range(TRAINING.batch_size):
        drawn = tasks.deck.draw(TRAINING.seed, 0, i)
        parts = []
        for rows in (drawn.support, drawn.query):
            seen = [torch.from_numpy(pixels[n]) for row in rows for n in row]
            parts.append(Examples(torch.stack(seen), torch.tensor([c for c, row in enumerate(rows) for _ in row])))
        adapted = MANY.adapt(model, parameters, parts[0], training=True)
        total += MANY.outer(model, adapted, parts[1]).item()
    assert work.curve() == [pytest.approx(total / (TRAINING.batch_size * 2 * 3))]


@pytest.mark.parametrize("method", [MANY, MAML(learning_rate=0.1, anil=True), ProtoNet()], ids=lambda m: str(m)[:12])
def test_a_network_comes_back_with_as_many_classes_and_what_normalisation_has_seen(tmp_path, blank, images, method):
    made, _ = trained(tmp_path, blank, images, method)
    assert type(made) is Model
    assert (made.about["steps"], made.about["rows"], made.about["loss_tokens"]) == (5, 24, 5 * 4 * 2 * 3)
    before, after = networks.load(blank.path), networks.load(made.path)
    assert networks.labels_of(made.path) == ("0", "1")
    assert after.head.out_features == 2
    assert not torch.equal(before.layers[0].weights.weight, after.layers[0].weights.weight)
    seen = statistics_of(after)
    assert len(seen) == 6
    assert all(torch.equal(value, seen[name]) for name, value in statistics_of(before).items())


def test_how_a_batch_is_split_changes_nothing_though_there_is_batch_normalisation(tmp_path, blank, images):
    # A bias before batch normalisation has a gradient of 0, of whose rounding AdamW would make steps.
    training = replace(TRAINING, epsilon=1e-3)
    whole, first = trained(tmp_path / "whole", blank, images, training=training)
    split, other = trained(tmp_path / "split", blank, images, training=replace(training, micro_batch_size=1))
    assert other.curve() == pytest.approx(first.curve(), rel=1e-5)
    one, two = (networks.load(made.path).state_dict() for made in (whole, split))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_held_out_episodes_are_the_same_at_every_look(tmp_path, monkeypatch, blank, images):
    monkeypatch.setattr(meta_training, "LOOKED_AT", 3)
    still = replace(TRAINING, learning_rate=1e-12, max_steps=2, validate_every=1)
    _, work = trained(tmp_path, blank, images, training=still, held_out=images)
    first, second = work.curve("held_out_loss")
    assert first == pytest.approx(second, rel=1e-6)


def test_what_is_meta_learnt_adapts_better_to_other_images(tmp_path, blank, images):
    others = small.images(tmp_path / "others", 24, seed=8)
    made, _ = trained(tmp_path / "made", blank, images, training=replace(TRAINING, max_steps=25))
    before, after = (
        measured(tmp_path / str(i), model, others, episodes=30)[1] for i, model in enumerate((blank, made))
    )
    assert after["digest"] == before["digest"]
    assert after["loss"] < 0.5 * before["loss"]


def test_a_decoders_adapter_learns_to_learn_texts_of_a_label(tmp_path, decoder, texts):
    training = replace(TRAINING, max_steps=8)
    given = {"lora": LoRA(rank=2), "few_shot": OF_TEXTS}
    made, _ = trained(tmp_path / "made", decoder, texts, training=training, **given)
    start, _ = trained(tmp_path / "start", decoder, texts, training=replace(TRAINING, max_steps=0), **given)
    assert type(made) is Adapter
    assert made.about["base"] == decoder.digest
    assert {p.name for p in made.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    before, after = (
        measured(tmp_path / str(i), one, texts, few_shot=OF_TEXTS, base=decoder) for i, one in enumerate((start, made))
    )
    assert before[1]["digest"] == after[1]["digest"]
    assert after[1]["loss"] < before[1]["loss"]
    # The first episode, with PEFT's model and an optimizer of torch's.
    model = peft.PeftModel.from_pretrained(load(decoder.path, torch.float32), made.path, is_trainable=True).eval()
    tasks = tasks_of(model, decoder.path, texts, OF_TEXTS, 32)
    drawn = tasks.deck.draw(0, 0)
    support, query = (on_device(tasks.rows, numbers[0], CPU) for numbers in (drawn.support, drawn.query))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=MANY.learning_rate)

    def cost(batch):
        logits = model(input_ids=batch.ids).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=-100)

    for _ in range(MANY.evaluation_steps):
        optimizer.zero_grad()
        (cost(support) / support.loss_tokens).backward()
        optimizer.step()
    assert after[2]["loss"][0] == pytest.approx(cost(query).item(), rel=1e-4)
    assert after[2]["tokens"][0] == query.loss_tokens


def test_the_default_attention_has_no_second_derivative(tmp_path, monkeypatch, decoder, texts):
    monkeypatch.setattr(meta_training, "TWICE", "sdpa")
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward"):
        trained(tmp_path, decoder, texts, lora=LoRA(rank=2), few_shot=OF_TEXTS)


def test_the_second_derivative_of_a_decoder_is_what_finite_differences_say(decoder, texts):
    job = meta_training._job(
        Place(), model=decoder, data=texts, held_out=None, method=MANY, lora=LoRA(rank=2), few_shot=OF_TEXTS,
        training=replace(TRAINING, packing=False),
    )  # fmt: skip
    objective = job.objective.double().eval()
    objective.train()
    for parameter in objective.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    rows, where = job.rewrite(0, range(1))
    batch = on_device(rows, where, CPU)
    objective(batch).backward()
    name, parameter = [(n, p) for n, p in objective.named_parameters() if "lora_A" in n][1]
    costs = []
    for change in (1e-4, -1e-4):
        with torch.no_grad():
            parameter[0, 3] += change
            costs.append(objective(batch).item())
            parameter[0, 3] -= change
    assert parameter.grad[0, 3].item() == pytest.approx((costs[0] - costs[1]) / 2e-4, rel=1e-4), name


def test_an_episode_is_a_document_and_the_interval_is_that_of_the_mean(tmp_path, blank, images):
    made, means, documents = measured(tmp_path / "one", blank, images, episodes=9)
    assert type(made) is Metrics
    assert means["documents"] == len(documents["accuracy"]) == 9
    assert set(documents["set"]) == {"these"}
    assert documents["tokens"] == [6] * 9
    accuracy = documents["accuracy"]
    mean = sum(accuracy) / 9
    deviation = (sum((a - mean) ** 2 for a in accuracy) / 8) ** 0.5
    assert means["accuracy"] == pytest.approx(mean)
    assert means["accuracy_half_width"] == pytest.approx(1.96 * deviation / 3)
    assert means["loss"] == pytest.approx(sum(documents["loss"]) / 54)
    again = measured(tmp_path / "two", blank, images, episodes=9)
    assert (again[1], again[2]) == (means, documents)
    assert measured(tmp_path / "three", blank, images, episodes=9, seed=1)[1]["digest"] != means["digest"]


def test_a_network_is_right_where_the_nearest_mean_of_its_features_is(tmp_path, blank, images):
    _, _, documents = measured(tmp_path, blank, images, ProtoNet())
    model = networks.load(blank.path)
    tasks = tasks_of(model, blank.path, images, FEW, 32)
    for i, found in enumerate(documents["accuracy"]):
        episode = tasks.episode(tasks.deck.draw(0, i), CPU)
        model.train()  # the statistics of the examples at hand
        with torch.no_grad():
            near, asked = (model.features(part.inputs) for part in (episode.support, episode.query))
        means = [near[2 * c : 2 * c + 2].mean(dim=0) for c in range(2)]
        said = [min(range(2), key=lambda c, f=f: (f - means[c]).square().sum().item()) for f in asked]
        right = [s == t for s, t in zip(said, episode.query.targets.tolist(), strict=True)]
        assert found == pytest.approx(sum(right) / len(right))


def test_models_are_compared_episode_by_episode(tmp_path, blank, images):
    one, other, elsewhere = (
        measured(tmp_path / name, blank, images, method, seed=seed, episodes=12)[0]
        for name, seed, method in (("a", 0, MANY), ("b", 0, ProtoNet()), ("c", 1, MANY))
    )
    asks = Requirement(better="one", than="other", on="these", measure="accuracy")
    found = compared(asks, {"one": one, "other": other})
    gap = one.about["sets"]["these"]["accuracy"] - other.about["sets"]["these"]["accuracy"]
    assert found.mean == pytest.approx(gap)
    with pytest.raises(NotComparable, match="different documents"):
        compared(asks, {"one": one, "other": elsewhere})


def foreseen(model, data, method=MANY, *, lora=None, few_shot=FEW, training=TRAINING, resources=None):
    given = {"held_out": None, "method": method, "lora": lora, "few_shot": few_shot, "training": training}
    return list(meta_train.problems(model=model, data=data, resources=resources or Resources(), **given))


def test_what_does_not_fit_is_said_before_anything_runs(tmp_path, home, blank, images, decoder, texts):
    lora = LoRA(rank=2)
    text = partial(foreseen, decoder, texts, lora=lora, few_shot=OF_TEXTS)
    assert foreseen(blank, images) == foreseen(None, images) == text() == []
    assert foreseen(blank, images, resources=Resources(workers=2, strategy="ddp")) == []
    classifier = small.classifier(tmp_path / "classifier")
    for said, start in (
        (foreseen(blank, images, resources=Resources(workers=2, strategy="zero2")), "MAML: strategy='zero2', expected"),
        (foreseen(blank, images, training=replace(TRAINING, max_steps=None)), "max_steps=None, expected a number"),
        (foreseen(blank, images, training=replace(TRAINING, precision="bfloat16")), "precision='bfloat16', expected"),
        (
            foreseen(blank, images, training=replace(TRAINING, gradient_checkpointing=True)),
            "gradient_checkpointing=True",
        ),
        (foreseen(blank, images, few_shot=FewShot(ways=1)), "ways=1, expected at least 2 for a network"),
        (foreseen(blank, texts), f"data: {texts.uri} holds 'labelled' rows, expected the columns 'image' and 'label'"),
        (foreseen(decoder, images), "lora: none with a causal language model"),
        (foreseen(blank, texts, lora=lora, few_shot=OF_TEXTS), "lora: given with a network"),
        (foreseen(classifier, images), f"model: '{classifier.uri}' is a classifier, expected a network"),
        (text(ProtoNet()), "ProtoNet: 'decoder' under model, expected 'network'"),
        (text(MAML(anil=True)), "MAML: anil=True, expected false where no head is learnt"),
        (text(few_shot=FEW), "ways=2, expected 1 for a causal language model"),
        (text(lora=LoRA(dropout=0.1)), "lora: dropout=0.1, expected 0"),
    ):
        assert len(said) == 1, said
        assert said[0].startswith(start), said


def test_what_cannot_be_measured_in_episodes_is_said_before_anything_runs(tmp_path, blank, images, decoder, texts):
    def said(model, data, method=MANY, **others):
        given = {"few_shot": FEW, "episodes": 4, "length": 32, **others}
        sets = {"data": {"d": data}, "kinds": {"model": (type(model),)}}
        return list(evaluate.problems(model=model, base=None, method=method, **sets, **given))

    assert said(blank, images) == []
    assert said(blank, images, None, episodes=0, few_shot=FewShot()) == []
    for clauses, start in (
        (said(blank, images, episodes=1), "evaluate: episodes=1, expected episodes >= 2 with a method"),
        (said(blank, images, None, few_shot=FewShot()), "evaluate: episodes=4, expected episodes >= 2 with a method"),
        (said(blank, images, None, episodes=0), "ways, shots, queries or seed: given without a method"),
        (said(blank, images, None, episodes=0, few_shot=FewShot(), seed=1), "ways, shots, queries or seed: given"),
        (said(blank, images, max_documents=3), "max_documents: given with episodes"),
        (said(blank, images, generate=3), "generate: given with episodes"),
        (said(blank, texts), f"data 'd': {texts.uri} holds 'labelled' rows"),
        (said(blank, images, few_shot=FewShot(ways=1)), "ways=1, expected at least 2"),
        (said(decoder, texts, few_shot=OF_TEXTS), "model: a causal language model without an adapter"),
    ):
        assert len(clauses) == 1, clauses
        assert clauses[0].startswith(start), clauses
    with pytest.raises(UnsupportedModel, match="nothing of it adapts, expected LoRA on it"):
        measured(tmp_path / "decoder", decoder, texts, few_shot=OF_TEXTS)
    with pytest.raises(HyperparameterError, match="episodes=0"):
        measured(tmp_path / "none", blank, images, episodes=0)


PIPELINE = """
name: meta
inputs: {model: {model: m}, images: {dataset: d}}
steps:
  whole: {operator: meta_train, inputs: {model: model, data: images}, method: {name: maml}, params: {max_steps: 1}}
  added:
    operator: meta_train
    inputs: {model: model, data: images}
    method: {name: maml}
    params: {max_steps: 1, ways: 1, lora: {rank: 2}}
  plain: {operator: evaluate, inputs: {model: whole, data: [images]}}
  in_episodes:
    operator: evaluate
    inputs: {model: whole, data: [images]}
    method: {name: proto_net}
    params: {episodes: 5}
  beside:
    operator: evaluate
    inputs: {model: added, base: BASE, data: [images]}
    method: {name: maml}
    params: {ways: 1, episodes: 5}
"""


def test_what_is_made_is_known_from_lora_and_a_method_may_be_left_out():
    made = spec(PIPELINE.replace("BASE", "whole"), source="p.yaml")
    assert (made.steps["plain"].method, made.steps["in_episodes"].method) == (None, ProtoNet())
    with pytest.raises(SpecError, match="base='added' is a adapter, expected a model"):
        spec(PIPELINE.replace("BASE", "added"), source="p.yaml")
    with pytest.raises(SpecError, match=r"no method, expected .* one of maml, proto_net"):
        spec(PIPELINE.replace("BASE", "whole").replace("method: {name: maml}, ", ""), source="p.yaml")
