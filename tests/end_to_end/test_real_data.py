"""`make results` with models and data as small as they can be: that each configuration comes to its rows."""

import contextlib
import itertools
import json
import zipfile

import numpy as np
import pytest

from operators.artifact import Metrics
from pipelines.__main__ import main
from tests.operators import small

TEMPLATES = (
    "The capital of {} is [MASK] .",
    "[MASK] is the capital of {}.",
    "{}'s capital city, [MASK].",
    "{}'s capital city is [MASK].",
    "{}, which has the capital city [MASK].",
)
DOMAINS = ("banking", "travel", "work", "home")
PARTS = {"train": 6, "val": 2, "test": 2}  # questions of each intent


@pytest.fixture
def benchmarks(script):
    return script("real_data"), script("results")


@pytest.fixture
def data(tmp_path):
    """A folder of what the real data look like."""
    folder = tmp_path / "data"
    (folder / "facts").mkdir(parents=True)
    facts = [
        {
            "relation": "P36(capital)",
            "object": f"Town {i}",
            "prompts": [t.replace("{}", f"Land {i}") for t in TEMPLATES],
        }
        for i in range(48)
    ]
    (folder / "facts/capitals.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    intents = {domain: [f"{domain} {i}" for i in range(2)] for domain in DOMAINS}
    every = [intent for some in intents.values() for intent in some]
    questions = {part: [[f"{w} {n}", n] for n in every for w in small.WORDS[:k]] for part, k in PARTS.items()}
    (folder / "clinc150").mkdir()
    (folder / "clinc150/domains.json").write_text(json.dumps(intents))
    (folder / "clinc150/data_full.json").write_text(json.dumps(questions))
    (folder / "omniglot").mkdir()
    with zipfile.ZipFile(folder / "omniglot/images_background_small1.zip", "w") as archive:
        for alphabet, character in itertools.product(("Greek", "Latin", "Korean"), range(3)):
            for number in range(16):
                name = f"images_background_small1/{alphabet}/character{character:02}/{number:04}.png"
                ink = np.random.default_rng(number).integers(0, 2, (28, 28), np.uint8) * 255
                archive.writestr(name, small.png(ink))
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_each_configuration_comes_to_its_rows(benchmarks, data, tmp_path, ray_local, monkeypatch):
    real_data, results = benchmarks
    monkeypatch.setattr("pipelines.commands.run.opened", lambda *_: ray_local())
    inputs, figures = tmp_path / "inputs", tmp_path / "figures"
    inputs.mkdir()
    small.encoder(inputs / "all_minilm_l6_v2")  # in the place of what would be downloaded

    def lfm(words, folder):
        with contextlib.chdir(folder):
            return main(list(words))

    words = [str(data), "--quick", "--seeds", "1", "--store", str(tmp_path / "store")]
    real_data.main([*words, "--folder", str(inputs), "--figures", str(figures)], lfm)
    kept = {path.stem: json.loads(path.read_text()) for path in figures.glob("*.json")}
    page = results.page("# Results\n\n## another\n\nstays\n", kept)
    assert "## another\n\nstays\n" in page
    assert results.page(page, {}) == page
    for experiment in real_data.EXPERIMENTS:
        assert f"## real_data.{experiment.configuration}" in page
        for row in experiment.rows:
            assert f"| {row.method} | {row.what} | **" in page


def test_a_seed_changes_what_does_not_say_its_own(benchmarks):
    real_data, _ = benchmarks
    changes = real_data.seeded(real_data.CONFIGURATIONS / "knn_lm.yaml", 2)
    assert changes == ["student.params.seed=2", "distilled.params.seed=2"]
    changes = real_data.seeded(real_data.CONFIGURATIONS / "capitals.yaml", 2)
    assert "edits=capitals/seed_2/edits.jsonl" in changes


def test_a_folder_without_the_data_is_refused(benchmarks, tmp_path):
    real_data, _ = benchmarks
    with pytest.raises(SystemExit, match=r"it has no clinc150/data_full\.json, no clinc150/domains\.json, no facts/"):
        real_data.main([str(tmp_path)])


def test_a_row_is_the_mean_and_the_spread_over_seeds(benchmarks):
    real_data, results = benchmarks
    row = real_data.Row(
        method="M", what="loss", measured=real_data.Figure(places=("s.a", "s.b"), measure="loss"),
        baseline="none", beside=real_data.Figure(places=("t.a",), measure="loss"), better="lower", why="So.",
    )  # fmt: skip
    found = real_data.Found(row=row, values=[1.0, 2.0, 3.0], beside=[2.0, 2.0, 4.0])
    assert results.row(found.told()) == ("M", "loss", "**2 ± 1**", "none: 2.667 ± 1.2", "2 of 3", "So.")


def test_a_figure_is_the_mean_over_its_places(benchmarks, tmp_path):
    real_data, _ = benchmarks
    (tmp_path / "metrics.json").write_text(json.dumps({"sets": {"a": {"loss": 1.0}, "b": {"loss": 4.0}}}))
    figure = real_data.Figure(places=("s.a", "s.b"), measure="loss")
    assert real_data.number(figure, {"s": Metrics(str(tmp_path))}) == 2.5
