"""A teacher is distilled, two LoRA experts of the student are merged, the result is gated, registered and served."""

from lfm.distillation.forward_kl import ForwardKL
from lfm.merging.ties import TIES
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Deployment
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


def distill_lora_merge_serve(
    text: Dataset = Dataset("python://text"),
    summaries: Dataset = Dataset("python://summaries"),
    names: Dataset = Dataset("python://names"),
) -> Step[Deployment]:
    """The graph of `distill_lora_merge_serve.yaml`."""
    text_train = prepare("text_train", data=text, part="train")
    text_held_out = prepare("text_held_out", data=text, part="held_out")
    summaries_train = prepare("summaries_train", data=summaries, part="train")
    summaries_held_out = prepare("summaries_held_out", data=summaries, part="held_out")
    names_train = prepare("names_train", data=names, part="train")
    names_held_out = prepare("names_held_out", data=names, part="held_out")
