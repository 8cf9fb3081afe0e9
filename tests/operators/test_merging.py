import json
import os
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lfm.merging.linear import Linear
from lfm.merging.passthrough import Passthrough
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.merging.ties import TIES
from lfm.weights import Weights
from operators.artifact import Adapter, Model
from operators.catalog import Catalog
from operators.merges.experts import MergeError
from operators.merging import merge, problems
from operators.models.adapters import UnsupportedAdapter, read_adapter
from operators.models.networks import load as load_network
from pipelines.inputs.inspector import Looks
from pipelines.plan import survey
from pipelines.spec import parsed
from pipelines.text import Text
from tests.operators import digits

F4 = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()


def tiny(seed, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return Model(str(folder))


@pytest.fixture
def base(tmp_path):
    return saved(tiny(0), tmp_path / "base")


@pytest.fixture
def experts(tmp_path):
    return [saved(tiny(seed), tmp_path / f"expert{seed}") for seed in (1, 2)]


def weights_of(model):
    found = {}
    for path in sorted(Path(model.uri).glob("*.safetensors")):
        found |= load_file(path)
    return found


def adapter_of(base, folder, *, seed=0, digest="", **fields):
    """An adapter that changes something, with the model that it makes of its base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.uri, dtype=torch.float32)
    changed = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields})
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    changed.save_pretrained(folder)
    adapter = Adapter(str(folder), about={"base": digest} if digest else {})
    whole = changed.merge_and_unload()
    return adapter, saved(whole, folder.with_name(f"{folder.name}-whole"))


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda m, name=name: f"{name}: {m}")


def test_merge_gives_a_model_that_transformers_loads_with_the_mean_of_the_experts(workspace, base, experts):
    merged = merge.body(workspace, base=base, experts=experts, method=Linear())
    one, two = map(weights_of, experts)
    close(weights_of(merged), {n: (one[n] + two[n]) / 2 for n in one})
    loaded, notes = transformers.AutoModelForCausalLM.from_pretrained(merged.uri, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(("method", "read"), [(Linear(), 2), (TaskArithmetic(), 3)])
def test_a_base_that_has_no_part_in_the_result_is_not_read(workspace, base, experts, method, read, monkeypatch):
    count, preadv = [0], os.preadv

    def counted(*asked):
        count[0] += (got := preadv(*asked))
        return got

    monkeypatch.setattr("os.preadv", counted)
    merge.body(workspace, base=base, experts=experts, method=method)
    assert count[0] == read * sum(h.bytes for h in Weights(base.path).headers.values())


def test_merge_adds_task_vectors_to_the_base(workspace, base, experts):
    merged = weights_of(merge.body(workspace, base=base, experts=experts, method=TaskArithmetic(scale=(1.0, -0.5))))
    start, one, two = weights_of(base), *map(weights_of, experts)
    close(merged, {n: b + (one[n] - b) - 0.5 * (two[n] - b) for n, b in start.items()})


def test_merge_trims_over_the_whole_model_as_sorting_all_of_it_does(workspace, base, experts):
    merged = weights_of(merge.body(workspace, base=base, experts=experts[:1], method=TIES(density=0.3)))
    start, expert = weights_of(base), weights_of(experts[0])
    flat = torch.cat([(expert[n] - start[n]).reshape(-1) for n in start])
    kept = flat.abs().sort(descending=True).values[round(0.3 * len(flat)) - 1]
    for name, value in start.items():
        delta = expert[name] - value
        torch.testing.assert_close(merged[name], value + delta * (delta.abs() >= kept))


def test_merge_says_how_far_it_is_over_passes_and_parameters(workspace, base, experts):
    merge.body(workspace, base=base, experts=experts, method=TIES())
    number = len(weights_of(base))
    assert workspace.told == [{"done": i + 1, "total": 3 * number} for i in range(3 * number)]


def test_merge_does_not_care_how_models_are_split_into_files(workspace, base, experts, tmp_path):
    split = [saved(tiny(seed), tmp_path / f"split{seed}", max_shard_size="4KB") for seed in (1, 2)]
    assert len(list(Path(split[0].uri).glob("*.safetensors"))) > 1
    merged = merge.body(workspace, base=base, experts=split, method=Linear())
    one, two = map(weights_of, experts)
    close(weights_of(merged), {n: (one[n] + two[n]) / 2 for n in one})


def test_merge_copies_config_and_tokenizer_from_the_base(workspace, base, experts):
    (base.path / "tokenizer.json").write_text("{}")
    (base.path / "notes.bin").write_text("not a part of the model")
    (experts[0].path / "vocab.txt").write_text("of an expert")
    merged = merge.body(workspace, base=base, experts=experts, method=Linear())
    assert (merged.path / "config.json").read_bytes() == (base.path / "config.json").read_bytes()
    present = {p.name for p in merged.path.iterdir()}
    assert present == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("dtype", "stored"), [("base", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_merge_computes_in_float32_and_stores_what_was_asked_for(workspace, tmp_path, dtype, stored):
    base, expert = (saved(tiny(i).bfloat16(), tmp_path / f"half{i}") for i in range(2))
    merged = merge.body(workspace, base=base, experts=[expert], method=TaskArithmetic(scale=0.3), dtype=dtype)
    start, changed = weights_of(base), weights_of(expert)
    for name, value in weights_of(merged).items():
        exact = start[name].float() + 0.3 * (changed[name].float() - start[name].float())
        torch.testing.assert_close(value, exact.to(stored))
    word = str(stored).removeprefix("torch.")
    assert json.loads((merged.path / "config.json").read_text())["dtype"] == word
    assert transformers.AutoModelForCausalLM.from_pretrained(merged.uri, dtype="auto").dtype == stored


LORAS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 3},
        "alpha_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 5},
    },
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("method", [TaskArithmetic(scale=0.7), TIES(density=0.4)], ids=["task_arithmetic", "ties"])
def test_a_merge_of_adapters_equals_the_merge_of_what_they_do_to_the_base(workspace, base, tmp_path, fields, method):
    pairs = [adapter_of(base, tmp_path / f"adapter{seed}", seed=seed, **fields) for seed in (1, 2)]
    adapters, wholes = zip(*pairs, strict=True)
    merged = weights_of(merge.body(workspace, base=base, experts=adapters, method=method))
    shutil.rmtree(workspace.scratch / "merged")
    close(merged, weights_of(merge.body(workspace, base=base, experts=wholes, method=method)))
    assert any(not torch.equal(merged[n], value) for n, value in weights_of(base).items())


def test_a_merge_of_an_adapter_and_a_model_takes_both(workspace, base, experts, tmp_path):
    adapter, whole = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = weights_of(merge.body(workspace, base=base, experts=[adapter, experts[0]], method=Linear()))
    one, two = weights_of(whole), weights_of(experts[0])
    close(merged, {n: (one[n] + two[n]) / 2 for n in one})


def test_an_adapter_of_layers_that_are_stored_the_other_way_round_is_turned(workspace, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    base = saved(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    fields = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    adapter, whole = adapter_of(base, tmp_path / "adapter", **fields)
    merged = merge.body(workspace, base=base, experts=[adapter], method=Linear())
    close(weights_of(merged), weights_of(whole))


def test_an_adapter_with_trained_biases_replaces_them(workspace, tmp_path):
    base = saved(tiny(0, attention_bias=True), tmp_path / "biased")
    adapter, whole = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"], bias="all")
    merged = merge.body(workspace, base=base, experts=[adapter], method=Linear())
    close(weights_of(merged), weights_of(whole))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_dora": True}, "use_dora=True, expected LoRA without it. Merge it into its base with PEFT first."),
        ({"lora_bias": True}, "lora_bias=True, expected LoRA without it."),
        ({"a_field_of_next_year": 1}, "a_field_of_next_year=1, expected LoRA without it."),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', expected one of True, False, 'gaussian'"),
        ({"peft_type": "IA3"}, "peft_type='IA3', expected 'LORA'."),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_by_name(base, tmp_path, fields, sentence):
    adapter, _ = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UnsupportedAdapter) as raised:
        read_adapter(adapter.path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"base_model.model.a.lora_A.weight": (2, 3)}, "'a.weight' with lora_A, expected a pair"),
        ({"base_model.model.a.lora_A.weight": (2, 3, 1), "base_model.model.a.lora_B.weight": (4, 2)}, "linear layers"),
        ({"base_model.model.a.lora_magnitude_vector": (3,)}, "'base_model.model.a.lora_magnitude_vector'"),
        ({"elsewhere.weight": (3,)}, "'elsewhere.weight', expected lora_A, lora_B or a whole parameter"),
    ],
)
def test_an_adapter_with_tensors_that_are_not_understood_is_refused_by_name(tmp_path, tensors, sentence):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    save_file({n: torch.zeros(s) for n, s in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapter) as raised:
        read_adapter(tmp_path)
    assert sentence in str(raised.value)


def test_merge_refuses_an_adapter_of_another_base(workspace, base, tmp_path):
    adapter, _ = adapter_of(base, tmp_path / "adapter", digest="aaaa", target_modules=["q_proj"])
    method = Linear()
    merge.body(workspace, base=base, experts=[adapter], method=method)  # the base's digest is not known
    shutil.rmtree(workspace.scratch / "merged")
    merge.body(workspace, base=Model(base.uri, "aaaa"), experts=[adapter], method=method)
    with pytest.raises(MergeError, match="an adapter of 'aaaa', expected one of the base 'bbbb'"):
        merge.body(workspace, base=Model(base.uri, "bbbb"), experts=[adapter], method=method)


def test_merge_refuses_an_adapter_that_changes_what_the_base_does_not_have(workspace, base, tmp_path):
    adapter, _ = adapter_of(base, tmp_path / "adapter", target_modules=["lm_head"])
    tied = saved(tiny(0, tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(MergeError, match=r"a change of 'lm_head\.weight', expected changes of what the base has"):
        merge.body(workspace, base=tied, experts=[adapter], method=Linear())


def test_merge_refuses_an_adapter_of_other_shapes(workspace, base, tmp_path):
    wide = saved(tiny(0, intermediate_size=32), tmp_path / "wide")
    adapter, _ = adapter_of(wide, tmp_path / "adapter", target_modules=["up_proj"])
    with pytest.raises(MergeError, match=r"up_proj\.weight' \(and 1 more\) has shape \(32, 16\), expected \(24, 16\)"):
        merge.body(workspace, base=base, experts=[adapter], method=Linear())


def test_merge_refuses_an_expert_of_another_shape(workspace, base, tmp_path):
    longer = saved(tiny(1, vocab_size=65), tmp_path / "longer")
    with pytest.raises(MergeError, match=r"experts\[0\] .* has shape \(65, 16\), expected \(64, 16\)"):
        merge.body(workspace, base=base, experts=[longer], method=Linear())


def test_merge_refuses_an_expert_with_fewer_or_more_parameters(workspace, base, tmp_path):
    deeper = saved(tiny(1, num_hidden_layers=3), tmp_path / "deeper")
    with pytest.raises(MergeError, match=r"parameter 'model\.layers\.2\.\S+' \(and 8 more\) beside the base's"):
        merge.body(workspace, base=base, experts=[deeper], method=Linear())
    with pytest.raises(
        MergeError, match=r"no parameter 'model\.layers\.2\.\S+' \(and 8 more\), expected all that the base has"
    ):
        merge.body(workspace, base=deeper, experts=[base], method=Linear())


def test_merge_refuses_to_merge_nothing(workspace, base):
    with pytest.raises(MergeError, match="Linear: 0 experts, expected at least 1"):
        merge.body(workspace, base=base, experts=[], method=Linear())


def test_merge_refuses_quantized_weights(workspace, base, experts):
    path = experts[1].path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"bits": 4}}))
    with pytest.raises(MergeError, match=r"experts\[1\] .*: quantized weights, expected plain ones"):
        merge.body(workspace, base=base, experts=experts, method=Linear())


def test_merge_refuses_values_that_the_dtype_cannot_hold(workspace, base, experts):
    with pytest.raises(MergeError, match="infinite or not a number as float16, expected finite values"):
        merge.body(workspace, base=base, experts=experts, method=TaskArithmetic(scale=1e7), dtype="float16")


def tied_pair(tmp_path, seed):
    """One tied model as two folders: without the output head, and with it."""
    model = tiny(seed, tie_word_embeddings=True)
    short = saved(model, tmp_path / f"short{seed}")
    long = Model(str(shutil.copytree(short.uri, tmp_path / f"long{seed}")))
    weights = weights_of(short)
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, long.path / "model.safetensors", metadata={"format": "pt"})
    return short, long


def test_merge_follows_the_base_where_folders_differ_in_a_tied_output_head(workspace, tmp_path):
    (short0, long0), (short1, long1) = (tied_pair(tmp_path, seed) for seed in (0, 1))
    merged = {}
    for key, base, expert in (("short", short0, long1), ("long", long0, short1)):
        merged[key] = weights_of(merge.body(workspace, base=base, experts=[expert], method=TaskArithmetic(scale=0.5)))
        shutil.rmtree(workspace.scratch / "merged")
    assert torch.equal(merged["long"].pop("lm_head.weight"), merged["long"]["model.embed_tokens.weight"])
    close(merged["short"], merged["long"])


def test_merge_refuses_an_output_head_of_its_own_where_the_base_has_none(workspace, tmp_path, experts):
    base = saved(tiny(0, tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(MergeError, match=r"parameter 'lm_head\.weight' beside the base's"):
        merge.body(workspace, base=base, experts=experts, method=Linear())


def test_an_adapter_of_the_embedding_changes_a_tied_head_that_the_base_stores(workspace, tmp_path):
    short, long = tied_pair(tmp_path, 0)
    adapter, _ = adapter_of(short, tmp_path / "adapter", target_modules=["embed_tokens"])
    merged = weights_of(merge.body(workspace, base=long, experts=[adapter], method=Linear()))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], weights_of(long)["lm_head.weight"])


def test_merge_keeps_integers_that_agree_and_refuses_those_that_do_not(workspace, base, experts):
    for model in (base, *experts):
        weights = {**weights_of(model), "steps": torch.tensor([3, 4])}
        save_file(weights, model.path / "model.safetensors", metadata={"format": "pt"})
    merged = merge.body(workspace, base=base, experts=experts, method=Linear())
    assert torch.equal(weights_of(merged)["steps"], torch.tensor([3, 4]))
    weights = {**weights_of(base), "steps": torch.tensor([5, 4])}
    save_file(weights, experts[0].path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="'steps' differs from the base's, expected the same integers"):
        merge.body(workspace, base=base, experts=experts, method=Linear())


def foreseen(base, experts, method=None):
    """What `lfm plan` hears of a merge."""
    return list(problems(base=base, experts=experts, method=method or Linear(), dtype="base", resources=None))


def test_what_headers_tell_is_known_before_anything_runs_with_the_same_words(workspace, base, experts, tmp_path):
    longer = saved(tiny(1, vocab_size=65), tmp_path / "longer")
    deeper = saved(tiny(1, num_hidden_layers=3), tmp_path / "deeper")
    (adapter, _) = adapter_of(deeper, tmp_path / "adapter", target_modules=["q_proj"])
    wrong = [longer, experts[0], deeper, adapter]
    found = foreseen(base, wrong, TaskArithmetic(scale=(1.0, 0.5)))
    assert [clause.partition(" '")[0] for clause in found] == [
        "TaskArithmetic: scale=(1.0, 0.5), expected one number for each of the 4 experts.",
        "experts[0]",
        "experts[2]",
        "experts[3]",
    ]
    assert "'lm_head.weight' (and 1 more) has shape (65, 16), expected (64, 16)" in found[1]
    with pytest.raises(MergeError) as raised:
        merge.body(workspace, base=base, experts=wrong, method=TaskArithmetic(scale=(1.0, 0.5)))
    assert raised.value.clauses == tuple(found)


def test_no_weights_are_read_to_foresee_a_problem(base, experts, tmp_path, monkeypatch):
    def read(self, name):
        raise AssertionError(name)

    adapter, _ = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr(Weights, "read", read)
    monkeypatch.setattr(Weights, "opened", read)
    assert foreseen(base, [*experts, adapter]) == []


@pytest.mark.parametrize(
    ("method", "numbers", "said"),
    [
        (Linear(weights=(1.0, 2.0)), 2, "Linear: weights=(1.0, 2.0)"),
        (TaskArithmetic(scale=(1.0,)), 1, "TaskArithmetic: scale=(1.0,)"),
        (TIES(convention="peft", weights=(1.0,) * 4), 4, "TIES: weights=(1.0, 1.0, 1.0, 1.0)"),
    ],
)
def test_a_number_for_each_expert_is_counted_while_all_of_them_are_still_to_be_made(method, numbers, said):
    assert foreseen(None, [None] * numbers, method) == []
    assert foreseen(None, [None] * 3, method) == [f"{said}, expected one number for each of the 3 experts."]


def change_config(model, **fields):
    path = model.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_expert_whose_parameters_mean_something_else_is_refused(base, experts):
    change_config(experts[0], num_attention_heads=4)
    change_config(experts[1], model_type="mistral")
    one, two = foreseen(base, experts)
    assert "num_attention_heads=4 in its config, expected 2 as in the base's" in one
    assert "model_type='mistral' in its config, expected 'llama' as in the base's" in two


def test_an_expert_with_other_tokens_of_the_same_number_is_refused(base, experts):
    def tokenizer(vocabulary, added):
        return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2, "content": added}]})

    (base.path / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}, "<reserved>"))
    (experts[0].path / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}, "<named anew>"))
    (experts[1].path / "tokenizer.json").write_text(tokenizer({"b": 0, "a": 1}, "<reserved>"))
    (found,) = foreseen(base, experts)
    assert found.startswith("experts[1] ")
    assert "token 0 is 'b' in its tokenizer, expected 'a' as in the base's" in found


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"[]", "config.json: unreadable, expected a JSON object"),
        ("config.json", b'{"quantization_config": {"bits": 4}}', "quantized weights, expected plain ones"),
        ("model.safetensors", b"\xff" * 16, "16 bytes, expected a whole safetensors file"),
        (
            "model.safetensors",
            len(F4).to_bytes(8, "little") + F4,
            "'w' of dtype F4, expected one of F64, F32, F16, BF16",
        ),
    ],
)
def test_a_damaged_model_is_named_whether_it_is_the_base_or_an_expert(base, experts, file, content, said):
    (base.path / file).write_bytes(content)
    for found in (foreseen(base, [None]), foreseen(None, [experts[0], base]), foreseen(base, experts)):
        (clause,) = found
        assert said in clause


def test_numbers_stored_as_integers_are_no_weights(base, experts):
    weights = weights_of(experts[0])
    name = "model.norm.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, experts[0].path / "model.safetensors")
    (found,) = foreseen(base, experts)
    assert f"{name!r} stored as torch.int8, expected torch.float32 as in the base" in found


def test_an_adapter_of_another_stored_base_is_known_before_anything_runs(base, tmp_path):
    adapter, _ = adapter_of(base, tmp_path / "adapter", digest="aaaa", target_modules=["q_proj"])
    (found,) = foreseen(Model(base.uri, "bbbb"), [adapter])
    assert "an adapter of 'aaaa', expected one of the base 'bbbb'" in found
    assert foreseen(base, [adapter]) == []


def test_errors_of_merging_cross_processes():
    for error in (MergeError(("a: b, expected c. Do d.",)), UnsupportedAdapter("a", "b", "c")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_plan_of_a_merge_names_every_expert_that_does_not_fit_with_file_and_line(base, experts, tmp_path, store):
    saved(tiny(1, vocab_size=65), tmp_path / "longer")
    text = f"""inputs:
  base: {{model: {base.uri}}}
  fits: {{model: {experts[0].uri}}}
  longer: {{model: {tmp_path}/longer}}
steps:
  merged:
    operator: merge
    inputs: {{base: base, experts: [fits, longer]}}
    method: {{name: linear}}
  weighed:
    operator: merge
    inputs: {{base: merged, experts: [merged, fits]}}
    method: {{name: linear, weights: [1.0]}}
"""
    draft = parsed(Text(text, "p.yaml"))
    assert draft.problems == ()
    looks = Looks(tmp_path / "inputs.sqlite", store)
    one, two = draft.places.sentences(survey(draft.spec, looks, Catalog()))
    assert one.startswith(f"p.yaml:8 step 'merged': experts[1] '{tmp_path}/longer' 'lm_head.weight' (and 1 more) has")
    assert two == "p.yaml:13 step 'weighed': Linear: weights=(1.0,), expected one number for each of the 2 experts."


def test_networks_for_images_are_averaged_with_what_their_normalisation_has_seen(workspace, tmp_path):
    base, other = (digits.start(tmp_path / f"network{seed}", seed=seed) for seed in (0, 1))
    counted = weights_of(other) | {"layers.0.norm.num_batches_tracked": torch.tensor(9)}
    save_file(counted, other.path / "model.safetensors")
    assert not [*problems(base=base, experts=[other], method=Linear())]
    merged = merge.body(workspace, base=base, experts=[base, other], method=Linear())
    one, two = weights_of(base), weights_of(other)
    close(weights_of(merged), {n: (v + two[n]) / 2 if v.is_floating_point() else v for n, v in one.items()})
    assert load_network(merged.path).network == load_network(base.path).network
    assert (merged.path / "lfm.json").read_bytes() == (base.path / "lfm.json").read_bytes()


def test_networks_of_other_labels_or_sizes_are_not_merged_nor_their_layers_stacked(workspace, tmp_path):
    base = digits.start(tmp_path / "base")
    for changes, sentence in (
        ({"labels": ("row", "corner", "column")}, "label 0 is 'row' in its config, expected 'column' as in the base's"),
        (
            {"kind": "mlp"},
            r"network={.*'mlp'.*} in its lfm.json, expected {.*'cnn'.*} as in the base's. Merge",
        ),
    ):
        other = digits.start(tmp_path / f"other {len(changes)} {len(sentence)}", **changes)
        with pytest.raises(MergeError, match=sentence):
            merge.body(workspace, base=base, experts=[other], method=Linear())
    (clause,) = problems(base=base, experts=[base], method=Passthrough(slices=((0, 0, 1), (0, 0, 1))))
    assert "base: a network for images, whose layers are of widths of their own, expected a model of layers" in clause
