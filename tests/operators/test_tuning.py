"""The verb `tune`."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers

from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Adapter, Dataset, Model
from operators.base import Resources
from operators.learning.loop import Place
from operators.models.language_models import UnsupportedModel
from operators.training import Training
from operators.tuning import learner, tune
from tests.operators import small

TRAINING = Training(max_steps=6, batch_size=4, micro_batch_size=2, length=32, learning_rate=1e-2, seed=1)


@pytest.fixture
def given(tmp_path):
    return {"model": small.saved(tmp_path / "model"), "data": small.pairs(tmp_path / "pairs.jsonl"), "held_out": None}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def test_full_tuning_gives_a_folder_that_transformers_loads_with_what_was_learnt(given, tmp_path):
    work = small.Work(tmp_path / "work")
    made = tune.body(work, method=Full(), training=TRAINING, **given)
    assert type(made) is Model
    assert work.curve()[-1] < work.curve()[0]
    before, after = loaded(given["model"].path).state_dict(), loaded(made.path).state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[n], after[n]) for n in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (made.path / name).read_bytes() == (given["model"].path / name).read_bytes()
    assert made.about["steps"] == 6
    assert (made.about["cut"], made.about["left_out"]) == (0, 0)


def test_a_model_is_written_in_the_dtype_that_it_had(given, tmp_path):
    small.model().to(torch.bfloat16).save_pretrained(given["model"].path)
    made = tune.body(small.Work(tmp_path / "work"), method=Full(), training=TRAINING, **given)
    with_stored = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")
    assert {p.dtype for p in with_stored.parameters()} == {torch.bfloat16}


def test_an_adapter_is_a_folder_that_peft_loads_with_the_logits_that_were_trained(given, tmp_path):
    method = LoRA(rank=2, alpha=6)
    work = small.Work(tmp_path / "work")
    made = tune.body(work, method=method, training=TRAINING, **given)
    assert type(made) is Adapter
    assert made.about["base"] == given["model"].digest
    names = {p.name for p in made.path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    base = loaded(given["model"].path)
    untouched = logits(base)
    found = logits(peft.PeftModel.from_pretrained(base, made.path))
    assert (found - untouched).abs().max() > 1e-3
    torch.testing.assert_close(found, with_products(given["model"].path, made.path, method.scale))


def with_products(folder, adapter, scale):
    """The logits of the base with `scale * B @ A` added to each of its weights."""
    from safetensors.torch import load_file

    parts = load_file(adapter / "adapter_model.safetensors")
    base = loaded(folder)
    weights = dict(base.named_parameters())
    for name in [n for n in parts if n.endswith("lora_A.weight")]:
        weight = weights[name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")]
        weight.data += scale * parts[name.replace("lora_A", "lora_B")] @ parts[name]
    return logits(base)


def test_an_adapters_config_says_nothing_of_the_machine_or_the_process_that_wrote_it(given, tmp_path):
    made = tune.body(small.Work(tmp_path / "work"), method=LoRA(rank=2), training=TRAINING, **given)
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert len(config["target_modules"]) > 2
    assert config["target_modules"] == sorted(config["target_modules"])


def test_what_comes_before_an_answer_is_not_learnt(given, tmp_path):
    """Two data sets that differ in what no answer follows have the same loss and the same result."""
    import json

    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "a dog")]
    messages = [{"role": r, "content": c} for r, c in turns]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(json.dumps({"messages": messages[:2]}) + "\n")
    other.write_text(json.dumps({"messages": messages}) + "\n")
    curves = []
    for path in (one, other):
        work = small.Work(tmp_path / f"work-{path.stem}")
        tune.body(work, method=Full(), training=TRAINING, **{**given, "data": Dataset(str(path))})
        curves.append(work.curve())
    assert curves[0] == curves[1]


def test_with_all_data_in_a_batch_packing_changes_no_loss_and_no_gradient(given, tmp_path):
    def first(packing):
        training = replace(TRAINING, packing=packing, max_steps=0)
        work = small.Work(tmp_path / f"counted-{packing}")
        rows = tune.body(work, method=Full(), training=training, **given).about["rows"]
        work = small.Work(tmp_path / f"work-{packing}")
        tune.body(work, method=Full(), training=replace(training, max_steps=1, batch_size=rows), **given)
        return rows, work.told[0]["loss"], work.told[0]["gradient_norm"]

    packed, alone = first(True), first(False)
    assert packed[0] < alone[0]
    assert packed[1:] == pytest.approx(alone[1:], rel=1e-5)


def test_gradient_checkpointing_and_an_adapter_go_together(given, tmp_path):
    curves = []
    for again in (False, True):
        work = small.Work(tmp_path / f"work-{again}")
        training = replace(TRAINING, gradient_checkpointing=again)
        tune.body(work, method=LoRA(rank=2), training=training, **given)
        curves.append(work.curve())
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_a_frozen_base_has_the_precision_and_what_learns_is_float32(given):
    model = learner(given["model"].path, LoRA(rank=2), replace(TRAINING, precision="bfloat16"), Place())
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_head_in_an_adapter_is_refused_by_name(given, tmp_path):
    with pytest.raises(UnsupportedModel, match=r"output head.*not linear.*Leave the output head out"):
        tune.body(small.Work(tmp_path / "w"), method=LoRA(targets=("lm_head",)), training=TRAINING, **given)


def problems(given, training=TRAINING, resources=None, **changes):
    return list(
        tune.problems(**{**given, **changes}, method=Full(), training=training, resources=resources or Resources())
    )


def test_nothing_is_wrong_with_what_can_run(given):
    assert problems(given) == []
    assert problems({"model": None, "data": None, "held_out": None}) == []


def test_float16_on_a_cpu_is_refused_before_anything_runs(given):
    half = replace(TRAINING, precision="float16")
    (clause,) = problems(given, half)
    assert clause.startswith("precision='float16' on a CPU, expected 'bfloat16' or 'float32'")
    assert problems(given, half, Resources(accelerator="gpu", gpus_per_worker=1)) == []


def test_rows_longer_than_the_model_is_made_for_are_refused_before_anything_runs(given):
    (clause,) = problems(given, replace(TRAINING, length=65))
    assert clause.startswith("length=65, expected at most the 64 tokens")


def test_conversations_for_a_model_without_a_chat_template_are_refused_before_anything_runs(given, tmp_path):
    bare = small.tokenizer()
    bare.chat_template = None
    for file in given["model"].path.glob("chat_template*"):
        file.unlink()
    bare.save_pretrained(given["model"].path)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    (clause,) = problems(given, data=Dataset(str(chats)))
    assert "no chat template" in clause
    assert problems(given) == []


def test_data_without_the_columns_are_refused_before_anything_runs(given, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"question": "a"}\n')
    (clause,) = problems(given, held_out=Dataset(str(odd)))
    assert clause.startswith("held_out: ")
    assert "'question'" in clause
