"""Two LoRA experts and an edit are merged; the result learns on its own answers, gets a datastore and is served."""

from typing import Any

from lfm.distillation.jsd import JSD
from lfm.editing.rome import ROME
from lfm.merging.ties import TIES
from lfm.retrieval.knn_lm import KNNLM
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Deployment
from operators.base import Step
from operators.distillation import distill
from operators.editing import edit
from operators.evaluation import evaluate
from operators.gating import Requirement, gate
from operators.indexing import index
from operators.measuring import measure
from operators.merging import merge
from operators.preparation import prepare
from operators.pretraining import pretrain
from operators.registration import register
from operators.serving import serve
from operators.tuning import tune

PAIRS: dict[str, Any] = {"batch_size": 4, "length": 256}
MEASURED: dict[str, Any] = {"length": 256, "max_documents": 200}
FACTS = "carried facts"
KEPT = [
    Requirement(better="merged", than="base", on="summaries"),
    Requirement(better="merged", than="base", on="names"),
    Requirement(better="merged", than=1, on=FACTS, measure="efficacy_exact"),
]
PASSED = [
    Requirement(better="distilled", than="merged", on="names"),
    Requirement(better="served", than="distilled", on="text"),
    Requirement(better="distilled", than=0.5, on=FACTS, measure="efficacy_exact"),
]


def edit_merge_distill_serve(
    text: Dataset = Dataset("python://text"),
    summaries: Dataset = Dataset("python://summaries"),
    names: Dataset = Dataset("python://names"),
    facts: Dataset = Dataset("python://opposites"),
) -> Step[Deployment]:
    """The graph of `edit_merge_distill_serve.yaml`, which says why its numbers are what they are."""
    text_train, text_held_out = _parts("text", text)
    summaries_train, summaries_held_out = _parts("summaries", summaries)
    names_train, names_held_out = _parts("names", names)
    pairs = {"summaries": summaries_held_out, "names": names_held_out}

    base = pretrain(
        "base", data=text_train, layers=4, width=96, heads=4, vocabulary=2048,
        max_steps=800, batch_size=2, length=256, learning_rate=2e-3, weight_decay=0.1,
    )  # fmt: skip
    lora = LoRA(rank=16, alpha=32, targets=("q_proj", "v_proj"))
    describer = tune(
        "describer", model=base, data=summaries_train, method=lora, max_steps=200, learning_rate=5e-3, **PAIRS
    )
    namer = tune("namer", model=base, data=names_train, method=lora, max_steps=60, learning_rate=2e-3, **PAIRS)
    keys = measure("keys", model=base, data=text_held_out, statistics=("gram",), max_rows=100, length=256)
    delta = edit(
        "delta", model=base, facts=facts, statistics=keys, method=ROME(layer=0, weight_decay=0, clamp=40, ridge=0.1)
    )
    merged = merge("merged", base=base, experts=[describer, namer, delta], method=TIES(density=0.5))

    base_measured = evaluate("base_measured", model=base, data={**pairs, "facts": facts}, **MEASURED)
    merged_measured = evaluate("merged_measured", model=merged, base=base, data=pairs, **MEASURED)
    kept = gate("kept", model=merged, results={"base": base_measured, "merged": merged_measured}, require=KEPT)

    teacher = tune("teacher", model=base, data=names_train, method=Full(), max_steps=150, learning_rate=2e-3, **PAIRS)
    distilled = distill(
        "distilled", teacher=teacher, student=kept, data=names_train,
        method=JSD(student_share=0.5), max_answer=16, max_steps=50, learning_rate=1e-4, **PAIRS,
    )  # fmt: skip
    datastore = index(
        "datastore",
        model=distilled,
        data=text_train,
        method=KNNLM(k=256, temperature=10),
        length=256,
        max_tokens=50_000,
    )
    measured = {
        "merged": merged_measured,
        "distilled": evaluate(
            "distilled_measured", model=distilled, base=base, data={"text": text_held_out, **pairs}, **MEASURED
        ),
        "served": evaluate(
            "served_measured", model=distilled, base=base, datastore=datastore, data={"text": text_held_out}, **MEASURED
        ),
    }
    passed = gate("passed", model=distilled, results=measured, require=PASSED)
    registered = register("registered", model=passed, name="python-editor")
    return serve("endpoint", model=registered, base=base, datastore=datastore, name="python-editor")


def _parts(name: str, data: Dataset) -> tuple[Step[Dataset], Step[Dataset]]:
    return (
        prepare(f"{name}_train", data=data, part="train"),
        prepare(f"{name}_held_out", data=data, part="held_out"),
    )
