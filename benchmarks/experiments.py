"""What is asked of the papers' methods on real data: a pipeline, what it takes, and what of its evaluations is a row.

One more is a pipeline in `configurations` and an `Experiment` here. What differs between seeds:

- Each step that has a `seed` gets that of the run, unless the configuration sets it: what does so is made once.
- An input in a folder ``seed_0`` is taken from ``seed_1``, ``seed_2`` and so on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import capitals
import clinc150
import digits
import minilm
import omniglot

Writer = Callable[[Path, Path, Iterable[int]], None]
"""Writes inputs: out of the folder of real data, into a folder, for some seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number of a run: the mean of one measure over some sets.

    Attributes:
        places: Sets as ``step.set``: an `evaluate` step, and what it calls one of its data.
        measure: What of each, as `evaluate` calls it.
    """

    places: tuple[str, ...]
    measure: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        method: As its paper spells it.
        what: What was measured.
        measured: With the method.
        baseline: What it is compared with, in words.
        beside: The same measured there; nothing where there is no such thing.
        better: Which direction is; ``same`` where nothing should change.
        why: A word on a row that may surprise.
    """

    method: str
    what: str
    measured: Figure
    baseline: str = ""
    beside: Figure | None = None
    better: Literal["higher", "lower", "same"] = "higher"
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """A pipeline and its rows.

    Attributes:
        configuration: Its file in `configurations`, without the ending.
        setting: What models and data these are, a sentence without its stop.
        data: Who writes which folder that its inputs are in.
        needs: Files of the folder of real data that they read.
        rows: What becomes of it.
        quick: Changes as of `lfm run` with which it only shows that it runs.
    """

    configuration: str
    setting: str
    data: Mapping[str, Writer] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    rows: tuple[Row, ...]
    quick: tuple[str, ...]


NOT_THERE = (
    "of the others no change at the subject's last token makes the new answer the likelier one, with five times the "
    "steps neither (seed 0; layers 1 and 2 write fewer): so small a model looks a subject up by its other tokens too"
)
SURE = (
    "one expert of seed 2 is so sure of itself that its Fisher information is a thousandth of the others': the floor "
    "of its released code, divided by that norm, then outweighs all of theirs (0.47; 0.83 and 0.85 with other seeds)"
)
DOMAINS = ("banking", "travel", "work", "home")


def accuracy(step: str) -> Figure:
    """On the four domains' test questions."""
    return Figure(places=tuple(f"{step}.{domain}" for domain in DOMAINS), measure="accuracy")


def of_edits(measure: str, *steps: str) -> Figure:
    """On the facts that were written: the mean over the steps that measured some of them."""
    return Figure(places=tuple(f"{step}.edits" for step in steps), measure=measure)


def against_average(method: str, what: str, step: str, why: str = "") -> Row:
    """A merged model beside the plain average of the same experts."""
    return Row(
        method=method,
        what=what,
        measured=accuracy(step),
        baseline="the plain average",
        beside=accuracy("average_measured"),
        why=why,
    )


def written(what: str, measure: str, better: Literal["higher", "same"] = "higher", why: str = "") -> Row:
    """What editing each fact alone has done, beside the same questions asked before."""
    return Row(
        method="ROME",
        what=what,
        measured=of_edits(measure, *(f"measured_{number}" for number in range(capitals.EDITS))),
        baseline="before",
        beside=of_edits(measure, "before"),
        better=better,
        why=why,
    )


def few_shot(method: str, what: str, step: str) -> Row:
    """A way to learn from few examples, beside learning from nothing but these."""
    return Row(
        method=method,
        what=f"accuracy on two held-out alphabets, {what}",
        measured=Figure(places=(f"{step}.held_out",), measure="accuracy"),
        baseline="the same network from random weights, 30 steps",
        beside=Figure(places=("scratch_measured.held_out",), measure="accuracy"),
    )


def data_free(method: str, what: str) -> Row:
    """A student that saw none of the digits, beside one that saw noise."""
    return Row(
        method=method,
        what=f"accuracy of a student on held-out digits, {what}",
        measured=Figure(places=("student_metrics.digits",), measure="accuracy"),
        baseline="a student that noise teaches",
        beside=Figure(places=("on_noise_metrics.digits",), measure="accuracy"),
    )


TEACHER = Row(
    method="none",
    what="accuracy of the teacher",
    measured=Figure(places=("teacher_metrics.digits",), measure="accuracy"),
)

EXPERIMENTS = (
    Experiment(
        configuration="capitals",
        setting="A decoder that has learnt 348 capitals (ParaRel)",
        data={"capitals": capitals.write},
        needs=(capitals.FILE,),
        rows=(
            Row(
                method="none",
                what="share of 87 facts that it says, asked as it was taught",
                measured=Figure(places=("knows.known",), measure="efficacy_exact"),
            ),
            Row(
                method="none",
                what="the same, asked in the held-back templates",
                measured=Figure(places=("knows.known",), measure="paraphrase_exact"),
            ),
            written("efficacy success of 10 edits, each alone (ES)", "efficacy_success", why=NOT_THERE),
            written("paraphrase success in the held-back templates (PS)", "paraphrase_success"),
            written("neighbourhood success (NS)", "neighbour_success", "same"),
            Row(
                method="ROME",
                what="efficacy success of the same 10, one after the other in one matrix",
                measured=of_edits("efficacy_success", "measured"),
                baseline="each alone",
                beside=of_edits("efficacy_success", *(f"measured_{number}" for number in range(capitals.EDITS))),
            ),
        ),
        quick=(
            "reader.layers=2", "reader.width=16", "reader.heads=2", "reader.vocabulary=400", "reader.max_steps=2",
            "reader.cpus_per_worker=1", "reader.batch_size=2", "keys.max_rows=400", "delta.steps=1",
            *(f"delta_{number}.steps=1" for number in range(capitals.EDITS)),
        ),
    ),
    Experiment(
        configuration="knn_lm",
        setting="The demo's distilled student, on Python's documentation and docstrings",
        rows=(
            Row(
                method="kNN-LM",
                what="perplexity of held-out text",
                measured=Figure(places=("mixed.text",), measure="perplexity"),
                baseline="the student alone",
                beside=Figure(places=("alone.text",), measure="perplexity"),
                better="lower",
            ),
        ),
        quick=(
            "text_train.max_rows=60", "text_held_out.max_rows=8", "datastore.workers=1", "distilled.cpus_per_worker=1",
            *(f"{step}.{size}" for step in ("teacher", "student") for size in ("layers=1", "width=16", "heads=2")),
            "teacher.vocabulary=400", "teacher.cpus_per_worker=1",
            *(f"{step}.max_steps=2" for step in ("teacher", "distilled")),
        ),
    ),
    Experiment(
        configuration="fisher_ada_merging",
        setting="Experts on four domains of CLINC150, one encoder (all-MiniLM-L6-v2) with a head for all 150 intents",
        data={"clinc150": clinc150.write, "all_minilm_l6_v2": minilm.write},
        needs=(clinc150.QUESTIONS, clinc150.DOMAINS),
        rows=(
            Row(
                method="none",
                what="accuracy of each expert on its own domain, mean of four",
                measured=Figure(places=tuple(f"{d}_measured.{d}" for d in DOMAINS), measure="accuracy"),
                baseline="the head alone trained",
                beside=accuracy("probe_measured"),
            ),
            Row(
                method="none",
                what="accuracy of the plain average, mean of four domains",
                measured=accuracy("average_measured"),
                baseline="the head alone trained",
                beside=accuracy("probe_measured"),
            ),
            against_average("Task arithmetic", "accuracy, mean of four domains, scale 0.3", "arithmetic_measured"),
            against_average("Fisher", "accuracy, mean of four domains", "fisher_measured", why=SURE),
            against_average("AdaMerging", "accuracy, mean of four domains, task-wise", "ada_task_measured"),
            against_average("AdaMerging", "accuracy, mean of four domains, layer-wise", "ada_layer_measured"),
        ),
        quick=(
            *(f"{step}.max_steps=1" for step in ("probe", *DOMAINS)),
            *(f"{domain}_fisher.max_rows=4" for domain in DOMAINS),
            "ada_task.steps=1", "ada_layer.steps=1",
        ),
    ),
    Experiment(
        configuration="maml",
        setting="A small convolutional network on Omniglot (3 alphabets to learn from), 5-way 1-shot, 200 episodes",
        data={"omniglot": omniglot.write},
        needs=(omniglot.ARCHIVE,),
        rows=(
            few_shot("MAML", "3 steps from where it learnt to begin", "maml_measured"),
            few_shot("ProtoNet", "nearest class mean", "prototypical_measured"),
        ),
        quick=(
            "learnt.max_steps=1", "learnt.batch_size=1", "prototypical.max_steps=1", "prototypical.batch_size=1",
            "prototypical.ways=2", "scratch_measured.evaluation_steps=1",
            *(f"{step}_measured.episodes=2" for step in ("maml", "scratch", "prototypical")),
        ),
    ),
    Experiment(
        configuration="deep_inversion",
        setting="A convolutional network that knows scikit-learn's digits, and a smaller one that learns from it alone",
        data={"digits": digits.write},
        rows=(TEACHER, data_free("DeepInversion", "512 images, as many of noise")),
        quick=(
            "teacher.max_steps=2", "images.num_images=256", "images.steps=1", "noise.num_images=256",
            "student.max_steps=1", "on_noise.max_steps=1",
        ),
    ),
    Experiment(
        configuration="dfme",
        setting="A convolutional network that knows scikit-learn's digits and only answers, and one that copies it",
        data={"digits": digits.write},
        rows=(TEACHER, data_free("DFME", "250,000 questions")),
        quick=(
            "teacher.max_steps=2", "student.budget=448", "noise.num_images=256", "on_noise.max_steps=1",
        ),
    ),
)  # fmt: skip
"""In the order of the table."""
