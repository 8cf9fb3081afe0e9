"""Ancestry -> model card: what a model is made of, for people and, in its front matter, for the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from lfm.errors import UnknownName
from operators.artifact import Metrics, kind_of
from operators.catalog import Catalog
from pipelines.ancestry import Ancestor, ancestor_line, results, sources
from pipelines.findings import cells, columns, evaluation
from pipelines.inputs import hub
from pipelines.store import Result, Store

WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
ADAPTED = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")"""
REWRITTEN = """from pathlib import Path

from operators.models.language_models import adapted, load

base = Path("BASE")  # a folder
model = adapted(load(base), Path("."))"""
SEVERAL = """from pathlib import Path

from operators.models.ensembles import load_any

model = load_any(Path("."))"""


def model_card(store: Store, found: Sequence[Ancestor], *, name: str, base: str = "", own: bool = False) -> str:
    """A README.md for the first of `found`, which is followed by all that it came from.

    Args:
        store: Where evaluations of it are.
        found: What `ancestry` gives.
        name: The title.
        base: Where an adapter's base is; empty for a whole model.
        own: Whether it is this project's own, so that neither transformers nor PEFT knows it.
    """
    library = "learn-from-model" if own else "peft" if base else "transformers"
    front = yaml.safe_dump(_front_matter(found, library), sort_keys=False)
    parts = [
        f"---\n{front}---\n\n# {name}\n\n{_about(found[0])}",
        f"## Load it\n\n{_loading(base, own)}",
        "## Lineage\n\nEach line is followed by what it was made from.\n\n"
        + _fenced("text", "\n".join(ancestor_line(a) for a in found)),
        _section("Methods", _methods(found)),
        _section("Data and models from outside", _outside(found)),
        _section("Measured", _measured(store, found)),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _front_matter(found: Sequence[Ancestor], library: str) -> dict[str, Any]:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards."""
    models = [_hub_name(a) for a in found if a.kind == "model" and a.uri.startswith(hub.SCHEME)]
    datasets = [_hub_name(a) for a in found if a.kind == "dataset" and a.uri.startswith(hub.SCHEME)]
    methods = [a.made_by.components["method"][0] for a in found if a.made_by and a.made_by.components["method"]]
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["learn-from-model", *methods])),
    }
    if models:
        front["base_model"] = list(dict.fromkeys(models))
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    return front


def _hub_name(one: Ancestor) -> str:
    return one.uri.removeprefix(hub.SCHEME).partition("@")[0]


def _about(one: Ancestor) -> str:
    kind = {"model": "A model", "adapter": "An adapter"}[one.kind]
    maker = f" made by step `{one.made_by.step}` of run `{one.made_by.run}`" if one.made_by is not None else ""
    return f"{kind}{maker}, digest `{one.digest}`."


def _loading(base: str, own: bool) -> str:
    if not base:
        return _fenced("python", SEVERAL if own else WHOLE)
    if own:
        return _fenced("python", REWRITTEN.replace("BASE", base))
    note = f"Its base is `{base}`. Where that moves, change `base_model_name_or_path` in `adapter_config.json`."
    return f"{_fenced('python', ADAPTED)}\n\n{note}"


def _methods(found: Sequence[Ancestor]) -> Iterator[str]:
    steps = {a.made_by.fingerprint: a.made_by for a in found if a.made_by is not None}
    for step in reversed(steps.values()):
        line = f"- `{step.step}`: {step.components['operator']}"
        if step.components["method"]:
            name, fields = step.components["method"]
            line += f" with {name}{_reference(step)}: {_settings(fields)}"
        params = step.components.get("params")
        yield f"{line}. Parameters: {_settings(params)}." if params else f"{line}."


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in values.items()) or "no settings"


def _reference(step: Result) -> str:
    """Where the method is written down; nobody but its author knows that of a user's own."""
    catalog = Catalog()
    try:
        family, method = catalog.operator(step.components["operator"]).family, step.components["method"]
        written = catalog.method(family, method[0]).reference if family and method else ""
    except UnknownName:
        return ""
    number = written.removeprefix("arXiv:")
    return f" ([{written}](https://arxiv.org/abs/{number}))" if number != written else f" ({written})" * bool(written)


def _outside(found: Sequence[Ancestor]) -> Iterator[str]:
    for one in {a.digest: a for a in found if a.made_by is None}.values():
        yield f"- {one.kind} `{one.uri or 'unknown'}`, digest `{one.digest}`"


def _measured(store: Store, found: Sequence[Ancestor]) -> Iterator[str]:
    digest = found[0].digest

    def of_it(step: Result) -> bool:
        return any(role == "model" and one["digest"] == digest for role, one, _ in sources(step))

    steps = [r for r in results(store) if r.kind == kind_of(Metrics) and of_it(r)]
    rows = [(step.step, one) for step in steps for one in evaluation(step.about)]
    shown = columns(one for _, one in rows)
    if rows:
        yield f"| step | on | documents | {' | '.join(shown)} |\n|{' --- |' * (len(shown) + 3)}"
        yield from (f"| {' | '.join((step, *cells(one, shown)))} |" for step, one in rows)
    noted = [one for a in found if a.digest == digest and a.made_by for one in a.made_by.about.get("gate", ())]
    said = dict.fromkeys(one["said"] for one in noted)
    if said:
        yield ("\n" if rows else "") + "\n".join(f"- {one}" for one in said)


def _section(title: str, lines: Iterator[str]) -> str:
    text = "\n".join(lines)
    return f"## {title}\n\n{text}" if text else ""


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
