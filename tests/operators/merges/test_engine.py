"""A merge streams: the same bytes whoever does it, within a budget, and from where it was left."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm import deltas
from lfm.merging.base import Merge
from lfm.merging.linear import Linear
from lfm.merging.passthrough import Passthrough
from lfm.merging.slerp import SLERP
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.merging.ties import TIES
from lfm.method import Needs
from operators.artifact import Delta, Model, Statistics
from operators.merges import plan as merge_plan
from operators.merges.experts import MergeError
from operators.merges.plan import bundles, layers_of, pieces, stacked_config, targets
from operators.merging import Streaming, merge, problems
from operators.resources import Resources
from operators.sharing import pace
from operators.sharing.crew import Tally, Threads, _Budget
from operators.sharing.notices import FolderNotShared, Preempted
from tests.operators import small

pytestmark = pytest.mark.slow

SMALL = Streaming(shard_bytes=3000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts of it, as folders, in bfloat16."""
    home = tmp_path_factory.mktemp("models")
    made = []
    for seed in range(3):
        small.model(seed=seed).bfloat16().save_pretrained(home / str(seed))
        made.append(Model(str(home / str(seed)), str(seed) * 8))
    return made


def files_of(model):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(model.path.iterdir())}


def weights_of(model):
    found = {}
    for path in sorted(model.path.glob("*.safetensors")):
        found |= load_file(path)
    return found


def merged(tmp_path, name, models, method, resources=None, streaming=SMALL, experts=None):
    work = small.Work(tmp_path / name, resources or Resources())
    experts = models[1:] if experts is None else experts
    return merge.body(work, base=models[0], experts=experts, method=method, streaming=streaming)


def delta_of(model, folder, *, base=""):
    """A delta that changes one matrix by few rows' worth and one vector as a whole."""
    draw = torch.Generator().manual_seed(3)
    shapes = {n: v.shape for n, v in weights_of(model).items()}
    matrix = next(n for n in shapes if n.endswith("q_proj.weight"))
    changes = {
        matrix: deltas.LowRank(
            torch.randn(shapes[matrix][0], 2, generator=draw), torch.randn(2, shapes[matrix][1], generator=draw)
        ),
        "model.norm.weight": deltas.Dense(torch.randn(shapes["model.norm.weight"], generator=draw)),
    }
    folder.mkdir()
    deltas.write(changes, folder)
    (folder / "delta.json").write_text(json.dumps({"base": base}))
    return Delta(str(folder)), {n: c.whole() for n, c in changes.items()}


METHODS = [TIES(density=0.3), SLERP(t=0.3), TIES(convention="mergekit"), TaskArithmetic()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_and_stretches_change_no_byte(models, tmp_path, method, monkeypatch):
    one = files_of(merged(tmp_path, "one", models, method))
    assert len(one) > 5, "several files of weights"
    assert files_of(merged(tmp_path, "three", models, method, Resources(cpus_per_worker=3))) == one
    assert files_of(merged(tmp_path, "budget", models, method, streaming=replace(SMALL, memory_budget=10**6))) == one
    monkeypatch.setattr(merge_plan, "MERGED", 50)
    monkeypatch.setattr(merge_plan, "SCANNED", 90)
    monkeypatch.setattr(merge_plan, "PIECE", 200)
    stretched = merged(tmp_path, "stretched", models, method, Resources(cpus_per_worker=2))
    if method.elementwise:
        assert files_of(stretched) == one


@pytest.mark.ray
def test_any_number_of_ray_tasks_writes_the_same_bytes(models, tmp_path, one_ray):
    experts = [models[1], delta_of(models[0], tmp_path / "delta")[0]]
    for method in (TIES(density=0.3, convention="fusion_bench"), SLERP(t=0.3)):
        alone = files_of(merged(tmp_path, f"{method}-1", models, method, experts=experts))
        for workers in (2, 3):
            asks = Resources(workers=workers, cpus_per_worker=0.5)
            assert files_of(merged(tmp_path, f"{method}-{workers}", models, method, asks, experts=experts)) == alone


@pytest.mark.ray
def test_what_a_ray_task_raises_comes_as_itself(models, tmp_path, one_ray):
    asks = Resources(workers=2, cpus_per_worker=0.5)
    with pytest.raises(MergeError, match="infinite or not a number as bfloat16, expected finite values"):
        merged(tmp_path, "work", models, TaskArithmetic(scale=1e39), asks)


def test_a_task_that_does_not_see_the_folder_says_so(tmp_path):
    from operators.code import Code
    from operators.sharing.crew import _bundle

    with pytest.raises(FolderNotShared, match="worker 1: cannot see"):
        _bundle(b"", Code(), str(tmp_path / "elsewhere"), 1, 1, 1, "merge", [], {})


OWN = '''
from lfm.merging.linear import Linear


class Halved(Linear):
    """Half of the mean.

    As in the paper. https://arxiv.org/abs/2203.05482
    """

    def merge(self, name, base, experts, found):
        return super().merge(name, base, experts, found) / 2
'''


@pytest.mark.ray
def test_ray_tasks_know_the_users_own_methods(models, tmp_path, one_ray):
    from operators.code import Code, bring

    (own,) = bring(Code(("own_merging.py",), (("own_merging.py", OWN),)))
    try:
        asks = Resources(workers=2, cpus_per_worker=0.5)
        halved = weights_of(merged(tmp_path, "own", models, own.Halved(), asks))
    finally:
        bring(Code())
    whole = weights_of(merged(tmp_path, "whole", models, Linear()))
    assert all(torch.equal(halved[n], v / 2) for n, v in whole.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaking(TIES):
    """TIES that fails at the parameter of a name."""

    at: str = ""

    def merge(self, name, base, experts, found):
        if name == self.at:
            raise ArithmeticError(name)
        return super(Breaking, self).merge(name, base, experts, found)


def test_an_attempt_goes_on_from_the_files_and_findings_of_the_last_one(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "INTERVAL_S", 0.0)
    monkeypatch.setattr(pace, "PATIENCE", 0)
    whole = merged(tmp_path, "whole", models, TIES(density=0.3))
    last = list(json.loads((whole.path / "model.safetensors.index.json").read_text())["weight_map"])[-1]
    work = small.Work(tmp_path / "work")
    given = {"base": models[0], "experts": models[1:], "streaming": SMALL}
    with pytest.raises(ArithmeticError):
        merge.body(work, **given, method=Breaking(density=0.3, at=last))
    kept = work.kept()
    assert json.loads((kept / "manifest.json").read_text())["passes"] == 2
    finished = {p.name: p.stat().st_ino for p in kept.glob("model-*.safetensors")}
    again = work.another()
    again.checkpoints.append(kept)
    resumed = merge.body(again, **given, method=TIES(density=0.3))
    assert finished
    assert files_of(resumed) == files_of(whole)
    assert {n: (resumed.path / n).stat().st_ino for n in finished} == finished, "linked, not written again"
    assert len(again.told) < len(weights_of(whole))
    assert again.told[-1]["done"] == again.told[-1]["total"]


def test_a_machine_that_is_taken_away_leaves_what_is_finished(models, tmp_path):
    whole = merged(tmp_path, "whole", models, TIES(density=0.3))
    work = small.Work(tmp_path / "work")
    work.goes_at = len(weights_of(whole)) + 3
    given = {"base": models[0], "experts": models[1:], "streaming": SMALL, "method": TIES(density=0.3)}
    with pytest.raises(Preempted, match="is kept"):
        merge.body(work, **given)
    assert json.loads((work.kept() / "manifest.json").read_text())["passes"] == 1
    again = work.another()
    again.checkpoints.append(work.kept())
    assert files_of(merge.body(again, **given)) == files_of(whole)


def test_a_budget_that_cannot_hold_one_parameter_is_refused_with_what_it_needs(models):
    def foreseen(method, budget):
        streaming = Streaming(memory_budget=budget)
        return list(problems(base=models[0], experts=models[1:], method=method, streaming=streaming))

    (said,) = foreseen(SLERP(), 1000)
    assert said.startswith("memory_budget=1000, expected at least ")
    assert said.endswith("bytes for the largest parameter. Raise it, or choose a method that takes parameters apart.")
    needed = int(said.split("at least ")[1].split()[0])
    assert foreseen(SLERP(), needed) == []
    assert len(foreseen(SLERP(), needed - 1)) == 1
    assert foreseen(Linear(), needed) == []
    assert Streaming.noise == {"memory_budget"}


def test_pieces_under_way_never_take_more_than_the_budget():
    class Counting:
        def __init__(self):
            self.held, self.most, self.lock = 0, 0, threading.Lock()

        def bytes(self, act, number):
            return 10 + number % 7

        def do(self, act, number, found):
            with self.lock:
                self.held += self.bytes(act, number)
                self.most = max(self.most, self.held)
            with self.lock:
                self.held -= self.bytes(act, number)
            return torch.tensor(number)

    worker, tally = Counting(), Tally()
    for _, part, _ in Threads(worker, threads=8, budget=40).each("merge", range(300), {}):
        tally.take(part)
    assert int(tally.total()) == sum(range(300))
    assert worker.most <= 40


def test_what_needs_more_than_the_budget_is_done_alone():
    budget = _Budget(10)
    with budget.lent(99):
        waiting = threading.Thread(target=lambda: budget.lent(1).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_sum_of_fractions_does_not_depend_on_who_comes_first():
    parts = [torch.tensor(x) for x in (1e8, 1.0, -1e8, 1.0)]
    one, other = Tally(), Tally()
    for number in (0, 1, 2, 3):
        one.add(number, parts[number])
    late = Tally()
    late.add(1, parts[1])
    for number in (3, 0, 2):
        other.add(number, parts[number])
    other.take(late)
    assert torch.equal(one.total(), other.total())


@pytest.mark.parametrize("base", ["", "0" * 8], ids=["unknown", "named"])
def test_a_delta_stands_for_what_it_makes_of_the_base(models, tmp_path, base):
    delta, changes = delta_of(models[0], tmp_path / "delta", base=base)
    start = weights_of(models[0])
    value = weights_of(merged(tmp_path, "work", models, TaskArithmetic(scale=0.5), experts=[delta]))
    for name, before in start.items():
        change = changes.get(name, torch.zeros(()))
        torch.testing.assert_close(value[name], (before.float() + 0.5 * change).to(before.dtype), msg=name)
    assert any(not torch.equal(value[n], start[n]) for n in changes)


def test_a_delta_of_another_base_or_of_what_it_does_not_have_is_refused_by_name(models, tmp_path):
    delta, _ = delta_of(models[0], tmp_path / "delta", base="9" * 8)
    with pytest.raises(
        MergeError, match=r"experts\[0\] .*: a delta of '99999999', expected one of the base '00000000'"
    ):
        merged(tmp_path, "one", models, Linear(), experts=[delta])
    strange = tmp_path / "strange"
    strange.mkdir()
    deltas.write({"nowhere.weight": deltas.Dense(torch.zeros(2))}, strange)
    with pytest.raises(MergeError, match=r"a change of 'nowhere.weight', expected changes of what the base has"):
        merged(tmp_path, "two", models, Linear(), experts=[Delta(str(strange))])


def test_stacked_layers_load_in_transformers_and_compute_what_stacked_layers_do(models, tmp_path):
    import transformers

    method = Passthrough(slices=((0, 0, 2), (1, 1, 2)), scale=(1.0, 0.5), scaled=("down_proj",))
    stacked = merged(tmp_path, "work", models, method)
    loaded, notes = transformers.AutoModelForCausalLM.from_pretrained(stacked.uri, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 3
    base, one, two = (transformers.AutoModelForCausalLM.from_pretrained(m.uri) for m in models)
    with torch.no_grad():
        two.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    base.model.layers = torch.nn.ModuleList([*one.model.layers, two.model.layers[1]])
    base.config.num_hidden_layers = 3
    for place, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = place
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, base(ids, use_cache=False).logits)


def test_layers_that_are_not_there_are_refused_before_anything_runs(models):
    def foreseen(method, base=models[0]):
        return list(problems(base=base, experts=models[1:], method=method))

    said = "Passthrough: slices=((0, 0, 9),), expected layers from 0 to 2, the end."
    assert foreseen(Passthrough(slices=((0, 0, 9),))) == [said]
    assert foreseen(Passthrough(slices=((2, 0, 1),)))[0].endswith("expected experts from 0 to 1.")


def test_layers_are_found_by_the_outermost_number_of_a_name():
    names = [f"model.layers.{i}.mlp.experts.{e}.w" for i in range(3) for e in range(8)]
    assert layers_of(names) == ("model.layers", 3)
    seeing = [*names, *(f"vision.blocks.{i}.w" for i in range(5))]
    assert layers_of(seeing) == ("vision.blocks", 5)
    assert layers_of(seeing, 3) == ("model.layers", 3)
    assert layers_of(["a.weight", "b.1.weight"]) == ("", 0)


def test_a_config_of_stacked_layers_says_of_each_what_it_said():
    layers = Passthrough(slices=((0, 0, 2), (0, 1, 2))).layers(1, 2)
    config = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "eos_token_id": [1, 2]}
    changed = {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "sliding"], "eos_token_id": [1, 2]}
    assert stacked_config(config, layers) == changed
    assert stacked_config({"text_config": config, "a": 1}, layers) == {"text_config": changed, "a": 1}
    assert stacked_config({"n_layer": 2}, layers) == {"n_layer": 3}


def test_pieces_follow_from_the_parameter_alone_and_hold_whole_rows(models, monkeypatch):
    monkeypatch.setattr(merge_plan, "PIECE", 60)
    header = merge_plan.Header((10, 7), torch.float32)
    (target,) = targets({"w": header}, Linear(), 2, dtype=None).values()
    found = list(pieces("w", target, elementwise=True, at_once=20))
    assert [(p.first, p.end) for p in found] == [(0, 56), (56, 70)]
    assert [s for p in found for s in p.stretches()] == [(0, 14), (14, 28), (28, 42), (42, 56), (56, 70)]
    assert [(p.first, p.end) for p in pieces("w", target, elementwise=False, at_once=20)] == [(0, 70)]
    shares = bundles(found * 4, 3)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert len(shares) == 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed(Merge):
    """The mean weighed with what was measured; as a whole, or in stretches."""

    needs = Needs(access="weights", data="none", models=(1, None), statistics=("fisher",))
    apart: bool = True

    @property
    def elementwise(self) -> bool:
        return self.apart

    def merge(self, name, base, experts, found: Mapping[str, torch.Tensor]):
        fisher = found.get("fisher", torch.ones_like(experts))
        assert fisher.shape == experts.shape
        return (experts * fisher).sum(0) / fisher.sum(0)


def measured(models, home, *, of=None):
    """Statistics of each expert; of all parameters but the last norm."""
    found = []
    for i, model in enumerate(models):
        folder = home / f"statistics{i}"
        folder.mkdir(parents=True)
        draw = torch.Generator().manual_seed(i)
        values = {
            f"fisher/{n}": torch.rand(v.shape, generator=draw)
            for n, v in weights_of(model).items()
            if n != "model.norm.weight"
        }
        save_file(values, folder / "statistics.safetensors")
        about = {"model": of or model.digest, "kinds": ["fisher"], "rows": 1, "tokens": 1}
        (folder / "statistics.json").write_text(json.dumps(about))
        found.append(Statistics(str(folder)))
    return found


@pytest.mark.parametrize("apart", [True, False])
def test_a_method_is_told_what_was_measured_of_the_parameter_in_each_expert(models, tmp_path, apart, monkeypatch):
    monkeypatch.setattr(merge_plan, "MERGED", 50)
    statistics = measured(models[1:], tmp_path)
    work = small.Work(tmp_path / "work")
    given = {"base": models[0], "experts": models[1:], "statistics": statistics}
    value = weights_of(merge.body(work, **given, method=Weighed(apart=apart)))
    (one, two), fishers = (
        map(weights_of, models[1:]),
        [load_file(s.path / "statistics.safetensors") for s in statistics],
    )
    for name, got in value.items():
        a, b = (f.get(f"fisher/{name}", torch.ones(())) for f in fishers)
        expected = (one[name].float() * a + two[name].float() * b) / (a + b)
        torch.testing.assert_close(got, expected.to(got.dtype), msg=name)


def test_statistics_that_are_not_those_of_the_experts_are_refused_by_name(models, tmp_path):
    def foreseen(statistics, method):
        return list(problems(base=models[0], experts=models[1:], statistics=statistics, method=method))

    good = measured(models[1:], tmp_path / "good")
    assert foreseen(good, Weighed()) == []
    assert foreseen([None, None], Weighed()) == []
    assert foreseen((), Weighed())[0].startswith("Weighed: no 'fisher' of the experts, expected what was measured")
    assert foreseen(good, Linear()) == ["statistics: 2 are given and Linear needs none. Leave them out."]
    assert foreseen(good[:1], Weighed())[0].startswith("statistics: 1 for 2 experts, expected one of each.")
    (said, _) = foreseen(good[::-1], Weighed())
    assert "measured of '22222222', expected experts[0], '11111111'" in said
    (good[0].path / "statistics.safetensors").unlink()
    assert "no weights, expected statistics.safetensors" in foreseen(good, Weighed())[0]


def test_what_is_finished_goes_through_a_store_and_back(models, tmp_path, store, monkeypatch):
    from types import SimpleNamespace

    from pipelines.execute import _Workspace
    from pipelines.printing import Unwritten
    from pipelines.storage.digests import Digests

    monkeypatch.setattr(pace, "INTERVAL_S", 0.0)
    monkeypatch.setattr(pace, "PATIENCE", 0)
    alone = merged(tmp_path, "alone", models, TIES(density=1.0))
    told = {"fingerprint": "f" * 64, "run": "r", "step": "s", "measures": "m", "groups": "g", "earlier": ()}
    task = SimpleNamespace(**told, resources=Resources())
    last = list(json.loads((alone.path / "model.safetensors.index.json").read_text())["weight_map"])[-1]
    given = {"base": models[0], "experts": models[1:], "streaming": SMALL}

    def attempt(method):
        work = _Workspace(store.storage.scratch(), task, store.storage, Unwritten())
        return work, merge.body(work, **given, method=method)

    with pytest.raises(ArithmeticError):
        attempt(Breaking(density=1.0, at=last))
    work, resumed = attempt(Breaking(density=1.0, at=""))
    kept = work.kept()
    assert any((resumed.path / p.name).samefile(p) for p in kept.glob("model-*.safetensors"))
    digest = store.put(resumed.path, "model", {})
    work.forget()
    assert (
        files_of(Model(str(store.verified(digest, Digests(tmp_path / "digests")).path))).items()
        >= files_of(alone).items()
    )


def test_a_plan_lets_a_merge_have_workers(models, tmp_path, store):
    from operators.catalog import Catalog
    from pipelines.inputs.inspector import Looks
    from pipelines.plan import survey
    from pipelines.spec import parsed
    from pipelines.text import Text

    text = f"""inputs:
  base: {{model: {models[0].uri}}}
  expert: {{model: {models[1].uri}}}
steps:
  merged:
    operator: merge
    inputs: {{base: base, experts: [expert]}}
    method: {{name: linear}}
    params: {{memory_budget: 1000000, shard_bytes: 3000}}
    resources: {{workers: 2}}
"""
    draft = parsed(Text(text, "p.yaml"))
    assert draft.problems == ()
    assert survey(draft.spec, Looks(tmp_path / "inputs.sqlite", store), Catalog()) == []
