"""`benchmarks/scale.py` with runs as small as they can be, and that nothing which it counts grows faster than a run."""

from dataclasses import replace

import pytest


@pytest.fixture
def scale(script):
    return script("scale")


class Looked(dict):
    """Steps, of which it is counted how often one was looked at."""

    looks = 0

    def __getitem__(self, name):
        self.looks += 1
        return super().__getitem__(name)

    def __iter__(self):
        self.looks += len(self)
        return super().__iter__()

    def items(self):
        self.looks += len(self)
        return super().items()

    def values(self):
        self.looks += len(self)
        return super().values()


@pytest.mark.parametrize("shape", ["chain", "fan-out", "layers"])
def test_a_decision_looks_at_as_many_steps_in_a_long_run_as_in_a_short_one(scale, shape):
    def looks(steps):
        plan = scale.planned(scale.SHAPES[shape](steps))
        looked = replace(plan, steps=Looked(plan.steps))
        kept = scale.played(looked, scale.machines(5), anew=0).kept
        assert len(kept) == steps + 1
        return looked.steps.looks / steps

    assert looks(600) <= 1.1 * looks(200)


def test_a_step_asks_as_much_of_storage_in_a_long_run_as_in_a_short_one(scale, tmp_path):
    def asked(steps):
        plan = scale.planned(scale.chain(steps), scale.ASKS[:1])
        found = scale.driven(plan, scale.machines(5), tmp_path / str(steps))
        return {what: count / steps for what, count in found.items() if not what.endswith(", s")}

    short, long = asked(30), asked(300)
    for what, count in long.items():
        assert count <= 1.2 * short[what], what
    assert long["the driver, its steps' bytes included, calls"] < 12
    assert long["the journal, objects"] < 1.1


def test_it_comes_to_its_figures(scale, tmp_path, monkeypatch, capsys):
    words = ["scale.py", "--rounds", "1", "--steps", "10", "30", "--machines", "2", "10"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(tmp_path / "scale.json")])
    scale.main()
    said = capsys.readouterr().out
    for what in ("fit", "chain", "fan-out", "layers", "the driver", "the journal", "lfm show", "lfm ps", "lfm gc"):
        assert what in said
    assert (tmp_path / "scale.json").is_file()
