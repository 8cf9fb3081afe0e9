"""Several models that answer as one: what `ensemble` writes, and everything that reads it."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.hidden import Hidden
from lfm.ensembling.output import Output
from lfm.ensembling.wemoe import WEMoE
from lfm.hooks import NoBlocks
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.tuning.full import Full
from operators.artifact import Adapter, Delta, Model
from operators.base import Resources
from operators.data.batches import IGNORED, on_device
from operators.distillation import distill
from operators.engines.consulting import engine_of
from operators.engines.native import Sampling
from operators.ensembling import EnsembleError, ensemble
from operators.evaluation import evaluate
from operators.learning.loop import Place
from operators.merging import merge
from operators.models.ensembles import load_any, load_decoder, read
from operators.models.language_models import UnsupportedModel, load
from operators.models.rewrites import RewriteError
from operators.sharing.notices import Preempted
from operators.teaching.features import Features
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.tuning import learner
from pipelines.inputs.model_files import damaged, lacking, needed
from tests.operators import small

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FEW = WEMoE(steps=12, learning_rate=0.02, batch_size=4)
IDS = torch.tensor([[5, 17, 203, 44, 8], [1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A base, two experts and a set of text for each."""
    home = tmp_path_factory.mktemp("classifiers")
    base, *members = (small.classifier(home / f"m{seed}", seed=seed) for seed in range(3))
    sets = {"a": small.labelled(home / "a.jsonl", 9), "b": small.labelled(home / "b.jsonl", 15)}
    return {"base": base, "members": members, "data": sets}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """The same of language models, whose head is the input embedding."""
    home = tmp_path_factory.mktemp("decoders")
    base, *members = (small.saved(home / f"d{seed}", seed=seed, tie_word_embeddings=True) for seed in range(3))
    return {"base": base, "members": members, "data": {"a": small.texts(home / "t.jsonl", 9)}}


def made(folder, given, method, **changes):
    work = small.Work(folder, changes.pop("resources", None))
    given = {**given, **changes}
    if isinstance(method, Output):
        given = {"members": given["members"]}
    return ensemble.body(work, method=method, length=16, **given), work


@pytest.fixture(scope="module")
def several(classifiers, decoders, tmp_path_factory):
    """One of each kind and method, by both."""
    home = tmp_path_factory.mktemp("several")
    given = {"classifiers": classifiers, "decoders": decoders}
    methods = {"output": Output(), "wemoe": FEW}
    return {(k, m): made(home / f"{k}-{m}", given[k], methods[m])[0] for k in given for m in methods}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def alone(folder):
    """What transformers itself loads."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder)


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_an_output_ensemble_says_the_mean_of_what_its_members_say(kind, several, request):
    members = request.getfixturevalue(kind)["members"]
    shares = [logits(alone(m.path)).softmax(dim=-1) for m in members]
    torch.testing.assert_close(logits(load_any(several[kind, "output"].path)).exp(), sum(shares) / len(shares))


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_a_mixture_that_learnt_nothing_is_task_arithmetic(kind, request, tmp_path):
    given = request.getfixturevalue(kind)
    found, _ = made(tmp_path / "moe", given, WEMoE(steps=0))
    work = small.Work(tmp_path / "merged")
    plain = merge.body(work, base=given["base"], experts=given["members"], method=TaskArithmetic(scale=0.3))
    torch.testing.assert_close(logits(load_any(found.path)), logits(load_any(plain.path)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_routers_alone_learn_and_what_is_told_gets_surer(kind, several, request, tmp_path):
    given = request.getfixturevalue(kind)
    found, work = made(tmp_path / "again", given, FEW)
    curve = work.curve()
    assert len(curve) == 12
    assert sum(curve[-3:]) < sum(curve[:3])
    untrained, _ = made(tmp_path / "untrained", given, replace(FEW, steps=0))
    names = {"experts.safetensors", "learnt.safetensors", "members/0/model.safetensors"}
    assert {p.relative_to(found.path).as_posix() for p in found.path.rglob("*.safetensors")} == names
    for name in names:
        same = (found.path / name).read_bytes() == (untrained.path / name).read_bytes()
        assert same == (name != "learnt.safetensors")
        assert (found.path / name).read_bytes() == (several[kind, "wemoe"].path / name).read_bytes()
    assert all(".router." in name for name in load_file(found.path / "learnt.safetensors"))
    deltas = load_file(found.path / "experts.safetensors")
    base, *experts = (load_file(m.path / "model.safetensors") for m in (given["base"], *given["members"]))
    for name, stack in deltas.items():
        plain = name.replace(".experts.", ".")
        for k, expert in enumerate(experts):
            assert torch.equal(stack[k], expert[plain] - base[plain])
    assert found.about["models"] == 2
    assert found.about["steps"] == 12


def test_a_new_process_loads_what_was_saved(several):
    code = (
        "import sys, torch, json; from pathlib import Path; from operators.models.ensembles import load_any; "
        "ids = torch.tensor(json.loads(sys.argv[1])); mask = torch.ones_like(ids); "
        "found = [load_any(Path(p))(input_ids=ids, attention_mask=mask).logits.tolist() for p in sys.argv[2:]]; "
        "print(json.dumps(found))"
    )
    arguments = [json.dumps(IDS.tolist()), *(m.uri for m in several.values())]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for model, there in zip(several.values(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        torch.testing.assert_close(logits(load_any(model.path)), torch.tensor(there), rtol=1e-6, atol=1e-7)


def measured(folder, model, given, **more):
    return evaluate.body(small.Work(folder), model=model, data=given["data"], length=16, **more).about["sets"]


def test_a_decoders_loss_is_that_of_the_mean_and_never_above_the_mean_loss(several, decoders, tmp_path):
    found = measured(tmp_path / "all", several["decoders", "output"], decoders)["a"]["loss"]
    each = [measured(tmp_path / f"{i}", m, decoders)["a"]["loss"] for i, m in enumerate(decoders["members"])]
    assert found < sum(each) / len(each)
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoders["base"].path)
    total = tokens = 0
    for line in decoders["data"]["a"].path.read_text().splitlines():
        ids = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id][:16]
        with torch.no_grad():
            shares = [alone(m.path)(torch.tensor([ids])).logits[0].softmax(-1) for m in decoders["members"]]
        for place, token in enumerate(ids[1:]):
            total -= math.log(sum(float(s[place, token]) for s in shares) / len(shares))
            tokens += 1
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_a_classifiers_labels_are_told_by_the_mean(several, classifiers, tmp_path):
    found = measured(tmp_path / "all", several["classifiers", "output"], classifiers)
    each = [measured(tmp_path / f"{i}", m, classifiers) for i, m in enumerate(classifiers["members"])]
    for name in classifiers["data"]:
        assert found[name]["loss"] <= sum(e[name]["loss"] for e in each) / len(each)
    mixed = measured(tmp_path / "mixed", several["classifiers", "wemoe"], classifiers)
    assert mixed["a"]["documents"] == 9


@pytest.mark.parametrize("method", ["output", "wemoe"])
def test_it_writes_token_by_token_what_it_would_say_at_once_beside_other_texts_too(several, method):
    engine = engine_of(several["decoders", method])
    prompts = [[5, 17, 203, 44], [7, 8]]
    for prompt, written in zip(prompts, engine.complete(prompts, Sampling(max_tokens=6)), strict=True):
        text = list(prompt)
        for token in written:
            assert int(engine.logits(text)[-1].argmax()) == token
            text.append(token)
        assert written


def test_as_a_teacher_it_says_the_mean_whole_or_its_likeliest_tokens(several, decoders, tmp_path):
    rows = small.rows(6)
    batch = on_device(rows, torch.arange(6).numpy(), torch.device("cpu"))
    teacher = Teacher(load_decoder(several["decoders", "output"].path), temperature=2.0, packed=False)
    said = teacher.says(batch).log_shares(slice(None))
    with torch.no_grad():
        shares = sum(alone(m.path)(batch.ids).logits.softmax(-1) for m in decoders["members"]) / 2
    learnt = batch.targets != IGNORED
    torch.testing.assert_close(said, (shares[learnt].log() / 2.0).log_softmax(-1), rtol=1e-4, atol=1e-5)
    teacher.remember(rows, 5, small.VOCABULARY, tmp_path)
    for _ in range(2):  # asked, and recalled
        kept = teacher.says(batch)
        assert (kept.tokens.long() == said.topk(5).indices).float().mean() > 0.99
        torch.testing.assert_close(kept.shares[:, :5].float(), said.topk(5).values, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["output", "wemoe"])
def test_a_student_learns_from_it(several, decoders, method, tmp_path):
    training = Training(max_steps=8, batch_size=9, length=16, learning_rate=1e-2, packing=False)
    work = small.Work(tmp_path)
    distill.body(
        work,
        teacher=several["decoders", method],
        student=decoders["base"],
        data=decoders["data"]["a"],
        method=ForwardKL(),
        training=training,
    )
    assert work.curve()[-1] < work.curve()[0]


def test_layers_are_not_looked_for_in_several_models_at_once(several, decoders):
    student, teacher = load(decoders["base"].path), load_decoder(several["decoders", "output"].path)
    with pytest.raises(NoBlocks):
        Features(Hidden(), student, teacher)
    arguments = {"student": decoders["base"], "data": None, "held_out": None, "training": Training(length=16)}
    more = {"top_k": None, "hard_weight": 0.0, "max_answer": 8, "resources": Resources(), "method": Hidden()}
    (clause,) = distill.problems(teacher=several["decoders", "output"], **arguments, **more)
    assert "answers with several models, expected one with layers for Hidden" in clause
    assert not list(distill.problems(teacher=several["decoders", "wemoe"], **arguments, **more))


def test_what_knows_plain_models_alone_refuses_it_by_name(several):
    for model in several.values():
        with pytest.raises(
            UnsupportedModel, match=r"it is an ensemble, expected one plain model. Give one of its models"
        ):
            load(model.path)
    with pytest.raises(UnsupportedModel, match="it is an ensemble"):
        learner(several["decoders", "wemoe"].path, Full(), Training(), Place())
    with pytest.raises(OSError, match=r"model.safetensors"):
        transformers.AutoModel.from_pretrained(several["decoders", "output"].path)


def test_what_was_broken_off_goes_on_to_the_same_bytes(several, classifiers, tmp_path):
    work = small.Work(tmp_path / "first")
    work.goes_at = 5
    with pytest.raises(Preempted):
        ensemble.body(work, method=FEW, length=16, **classifiers)
    again = small.Work(tmp_path / "again")
    again.checkpoints += work.checkpoints
    found = ensemble.body(again, method=FEW, length=16, **classifiers)
    assert len(again.curve()) == 12 - 6
    whole = several["classifiers", "wemoe"]
    for name in ("learnt.safetensors", "experts.safetensors", "members/0/model.safetensors"):
        assert (found.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.ray
def test_two_workers_learn_what_one_learns(classifiers, several, tmp_path, one_ray):
    both, _ = made(tmp_path / "both", classifiers, FEW, resources=Resources(workers=2))
    one = load_file(several["classifiers", "wemoe"].path / "learnt.safetensors")
    other = load_file(both.path / "learnt.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def refused(method, members, kinds=(Model, Model), **more):
    given = {"base": None, "data": {}, "resources": Resources(), **more}
    named = {"members": kinds, **({"base": (Model,)} if more.get("base") else {})}
    return list(ensemble.problems(method=method, members=members, length=16, kinds=named, **given))


@dataclass(frozen=True, kw_only=True, slots=True)
class Own(Output):
    """A user's own."""


def test_members_that_do_not_go_together_are_refused_before_anything_runs(classifiers, decoders, tmp_path):
    one = classifiers["members"][0]
    other = small.classifier(tmp_path / "turned", labels=("other", "animal", "place"))
    (clause,) = refused(Output(), [one, other])
    assert "labels other, animal, place, expected animal, other, place as the first one has" in clause
    (clause,) = refused(Output(), [one, decoders["base"]])
    assert "a causal language model, expected a classifier as the first one is" in clause
    (clause,) = refused(Output(), [small.encoder(tmp_path / "bare")], kinds=(Model,))
    assert "an encoder: it has no labels yet" in clause
    (clause,) = refused(Output(), [decoders["base"], small.saved(tmp_path / "padded", vocab_size=320)])
    assert "a head of 320 tokens, expected 300 as the first one has" in clause
    strange = small.saved(tmp_path / "strange")
    path = strange.path / "tokenizer.json"
    words = json.loads(path.read_text())
    words["added_tokens"][0]["content"] = "<other>"
    path.write_text(json.dumps(words))
    (clause,) = refused(Output(), [decoders["base"], strange])
    assert "another vocabulary, expected that of the first one" in clause
    (clause,) = refused(Output(weights=(0.2, 0.3, 0.5)), [one, one])
    assert clause.startswith("Output: weights=(0.2, 0.3, 0.5), expected one number for each of the 2 models")
    assert refused(Output(), [None, one]) == []


def test_what_a_method_does_not_take_is_refused(classifiers, decoders, tmp_path):
    one = decoders["members"][0]
    (clause,) = refused(Output(), [one], base=decoders["base"])
    assert clause.startswith("base: given with Output, expected none")
    (clause,) = refused(Output(), [one], resources=Resources(workers=2))
    assert clause.startswith("workers=2 with Output, which trains nothing, expected 1")
    (clause,) = refused(Output(), [None, one], kinds=(Adapter, Model))
    assert clause.startswith("members: 'adapter' with Output, expected whole models")
    (clause,) = refused(Output(), [one], data={"a": None})
    assert clause.startswith("Output: data is given, expected none")
    (clause,) = refused(Own(), [one])
    assert clause.startswith("method: Own is a pipeline's own, expected a method of this project")
    (clause,) = refused(FEW, [one], data={"a": None})
    assert clause.startswith("base: none is given, expected the model that the members were fine-tuned from, for WEMoE")
    given = {"base": decoders["base"], "data": decoders["data"]}
    assert refused(FEW, [one, None], kinds=(Model, Delta), **given) == []
    (clause,) = refused(FEW, [one], **{**given, "data": {}})
    assert clause.startswith("WEMoE: no data, expected unlabelled rows")
    clauses = refused(FEW, [classifiers["base"]], **given)
    assert any("model_type='bert' in its config" in clause for clause in clauses)
    clauses = refused(FEW, [one], **{**given, "base": small.encoder(tmp_path / "bare")})
    assert any("is an encoder: it has no labels yet" in clause for clause in clauses)
    with pytest.raises(EnsembleError, match="no data, expected unlabelled rows"):
        made(tmp_path / "work", decoders, FEW, data={})


def test_an_adapter_is_an_expert_as_what_it_does_to_the_base(decoders, tmp_path):
    import peft

    plain = transformers.AutoModelForCausalLM.from_pretrained(decoders["base"].path)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(plain, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    experts = [Adapter(str(tmp_path / "adapter")), Model(str(tmp_path / "whole"))]
    found = [made(tmp_path / f"work-{i}", decoders, WEMoE(steps=0), members=[e])[0].path for i, e in enumerate(experts)]
    for name in ("experts.safetensors", "members/0/model.safetensors"):
        one, other = (load_file(folder / name) for folder in found)
        assert one.keys() == other.keys()
        for parameter, tensor in one.items():
            torch.testing.assert_close(tensor, other[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said["rewrites"][0].update(method="ensembling/outptu"), "names the rewrite 'ensembling/outptu'"),
        (lambda said: said["rewrites"][0].update(method="tuning/prefix"), "names the rewrite 'tuning/prefix'"),
        (lambda said: said.update(models=0), "says models=0 in its lfm.json"),
        (lambda said: said["rewrites"][0]["fields"].update(weights=[0.5, 0.6]), "numbers of at least 0 that sum to 1"),
        (lambda said: said["rewrites"][0]["fields"].update(weights=[1.0]), "one number for each of the 2 models"),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_refused_at_plan(several, tmp_path, change, said):
    folder = copied(several["decoders", "output"], tmp_path / "other")
    told = json.loads((folder / "lfm.json").read_text())
    change(told)
    (folder / "lfm.json").write_text(json.dumps(told))
    what, _ = damaged(Model, folder)
    assert said in what


def copied(model, folder):
    for path in (p for p in model.path.rglob("*") if p.is_file()):
        target = folder / path.relative_to(model.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_such_a_folder_is_an_input_of_which_every_file_is_fetched(several, tmp_path):
    for model in several.values():
        names = sorted(p.relative_to(model.path).as_posix() for p in model.path.rglob("*") if p.is_file())
        assert lacking(Model, names) is None
        assert sorted(needed(Model, names)) == names
        assert damaged(Model, model.path) is None
    names.remove("members/0/model.safetensors")
    assert lacking(Model, names)[0].startswith("holds no weights")
    folder = copied(model, tmp_path / "lost")
    tensors = load_file(folder / "learnt.safetensors")
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "learnt.safetensors")
    with pytest.raises(RewriteError, match=f"has no tensor '{name}'"):
        load_any(folder)
    assert read(folder).method == FEW
