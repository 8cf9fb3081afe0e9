"""What is measured of a classifier, against what plain loops over its texts find."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operators.data.row_files import DatasetError
from operators.measuring import _foreseen, measure
from operators.models import classifiers
from operators.models.language_models import load_tokenizer
from operators.resources import Resources
from tests.operators import small

pytestmark = pytest.mark.slow


def measured(artifact):
    return load_file(artifact.path / "statistics.safetensors")


def test_the_exact_fisher_of_a_classifier_goes_through_all_its_labels(workspace, tmp_path):
    given, rows = small.classifier(tmp_path / "classifier"), small.labelled(tmp_path / "rows.jsonl", 9)
    got = measured(measure.body(workspace, model=given, data=rows, labels="exact", length=32, statistics=("fisher",)))
    whole, tokenizer = classifiers.load(given.path, torch.float32), load_tokenizer(given.path)
    total = {n: torch.zeros_like(p) for n, p in whole.named_parameters()}
    texts = [json.loads(line)["text"] for line in Path(rows.uri).read_text().splitlines()]
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        shares = whole(input_ids=ids).logits[0].softmax(-1).tolist()
        for label, share in enumerate(shares):
            whole.zero_grad()
            whole(input_ids=ids).logits[0].log_softmax(-1)[label].backward()
            for name, parameter in whole.named_parameters():
                total[name] += share * parameter.grad**2 / len(texts)
    assert got.keys() == {f"fisher/{n}" for n in load_file(given.path / "model.safetensors")}
    for name, value in total.items():
        torch.testing.assert_close(got[f"fisher/{name}"], value, rtol=1e-3, atol=1e-7)


def test_a_classifier_needs_labels_only_where_they_are_the_datas(workspace, tmp_path):
    given, texts = small.classifier(tmp_path / "classifier"), small.texts(tmp_path / "texts.jsonl", 6)
    params = {"statistics": ("fisher", "gram"), "length": 32}
    drawn = measure.body(workspace, model=given, data=texts, **params)
    assert drawn.about["rows"] == 6
    assert "gram/bert.encoder.layer.1.output.dense" in measured(drawn)
    with pytest.raises(DatasetError, match="label"):
        measure.body(workspace.another(), model=given, data=texts, labels="data", **params)
    labelled = small.labelled(tmp_path / "rows.jsonl", 9)
    empirical = measured(measure.body(workspace.another(), model=given, data=labelled, labels="data", length=32))
    other = measured(measure.body(workspace.another(), model=given, data=labelled, length=32))
    assert not torch.equal(empirical["fisher/classifier.weight"], other["fisher/classifier.weight"])


def test_a_plan_refuses_an_encoder_without_labels_and_rows_that_no_classifier_reads(tmp_path):
    def said(model, data, **params):
        given = {"model": model, "base": None, "data": data, "kinds": {"model": ()}, "resources": Resources()}
        return "\n".join(_foreseen(**given, length=32, **params))

    texts, pairs = small.texts(tmp_path / "texts.jsonl"), small.pairs(tmp_path / "pairs.jsonl")
    telling = small.classifier(tmp_path / "classifier")
    assert said(telling, texts, labels="exact", statistics=("fisher", "gram")) == ""
    assert "holds 'prompt_completion' rows" in said(telling, pairs)
    assert "holds 'text' rows" in said(telling, texts, labels="data")
    assert "is an encoder: it has no labels yet" in said(small.encoder(tmp_path / "encoder"), texts)
