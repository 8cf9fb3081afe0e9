"""A teacher is distilled, two LoRA experts of the student are merged, the result is gated, registered and served."""

from typing import Any

from lfm.distillation.forward_kl import ForwardKL
from lfm.merging.ties import TIES
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Deployment, Metrics
from operators.base import Resources, Step
from operators.distillation import distill
from operators.evaluation import evaluate
from operators.gating import Requirement, gate
from operators.merging import merge
from operators.preparation import prepare
from operators.pretraining import pretrain
from operators.registration import register
from operators.serving import serve
from operators.tuning import tune

SHAPE: dict[str, Any] = {"batch_size": 2, "length": 256, "weight_decay": 0.1}
EXPERT: dict[str, Any] = {"epochs": 3.0, "batch_size": 8, "length": 256}
BETTER = [
    Requirement(better="student", than="undistilled", on="text"),
    Requirement(better="describer", than="student", on="summaries"),
    Requirement(better="namer", than="student", on="names"),
    Requirement(better="merged", than="student", on="summaries"),
    Requirement(better="merged", than="student", on="names"),
]


def distill_lora_merge_serve(
    text: Dataset = Dataset("python://text"),
    summaries: Dataset = Dataset("python://summaries"),
    names: Dataset = Dataset("python://names"),
) -> tuple[Step[Metrics], Step[Deployment]]:
    """The graph of `distill_lora_merge_serve.yaml`."""
    text_train, text_held_out = _parts("text", text)
    summaries_train, summaries_held_out = _parts("summaries", summaries)
    names_train, names_held_out = _parts("names", names)
    pairs = {"summaries": summaries_held_out, "names": names_held_out}

    teacher = pretrain(
        "teacher", data=text_train, layers=6, width=192, heads=4, vocabulary=2048, max_steps=2300, learning_rate=1e-3,
        **SHAPE, resources=Resources(cpus_per_worker=2),
    )  # fmt: skip
    student = pretrain("student", data=text_train, tokenizer=teacher, layers=4, width=96, heads=4, max_steps=0)
    schedule: dict[str, Any] = {"max_steps": 1500, "learning_rate": 2e-3, **SHAPE}
    undistilled = tune("undistilled", model=student, data=text_train, method=Full(), **schedule)
    distilled = distill(
        "distilled", teacher=teacher, student=student, data=text_train,
        method=ForwardKL(), top_k=64, hard_weight=0.5, **schedule,
    )  # fmt: skip

    lora = LoRA(rank=16, alpha=32)
    describer = tune("describer", model=distilled, data=summaries_train, method=lora, learning_rate=2e-3, **EXPERT)
    namer = tune("namer", model=distilled, data=names_train, method=lora, learning_rate=1e-3, **EXPERT)
    merged = merge("merged", base=distilled, experts=[describer, namer], method=TIES(density=0.5))

    teacher_measured = evaluate("teacher_measured", model=teacher, data={"text": text_held_out}, length=256)
    measured = {
        "undistilled": evaluate("undistilled_measured", model=undistilled, data={"text": text_held_out}, length=256),
        "student": evaluate(
            "student_measured", model=distilled, data={"text": text_held_out, **pairs}, length=256, generate=24
        ),
        "describer": evaluate(
            "describer_measured", model=describer, base=distilled, data=pairs, length=256, generate=24
        ),
        "namer": evaluate("namer_measured", model=namer, base=distilled, data=pairs, length=256, generate=24),
        "merged": evaluate("merged_measured", model=merged, data=pairs, length=256, generate=24),
    }
    passed = gate("passed", model=merged, results=measured, require=BETTER)
    registered = register("registered", model=passed, name="python-helper")
    return teacher_measured, serve("endpoint", model=registered, base=distilled, name="python-helper")


def _parts(name: str, data: Dataset) -> tuple[Step[Dataset], Step[Dataset]]:
    return (
        prepare(f"{name}_train", data=data, part="train"),
        prepare(f"{name}_held_out", data=data, part="held_out"),
    )
