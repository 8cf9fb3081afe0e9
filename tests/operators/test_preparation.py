import hashlib
import itertools
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from lfm.errors import HyperparameterError, UnknownName
from operators.artifact import Dataset
from operators.data.row_files import DatasetError
from operators.preparation import is_held_out, prepare

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}", "source": f"module{i % 40}"} for i in range(400)]
ELSEWHERE = """
import sys
from pathlib import Path
from operators.artifact import Dataset
from operators.preparation import prepare

class Work:
    scratch = Path(sys.argv[1])
    def save(self, kind, path, about=None):
        print(path)

prepare.body(Work(), data=Dataset(sys.argv[2]), part="train", max_rows=50)
"""


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Dataset(str(path))


@pytest.fixture
def data(tmp_path):
    return lines(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def made(workspace, tmp_path):
    """`prepare`, each time in a folder of its own: its rows, and what it noted."""
    count = 0

    def call(data, **params):
        nonlocal count
        count += 1
        workspace.scratch = tmp_path / f"scratch{count}"
        workspace.scratch.mkdir()
        result = prepare.body(workspace, data=data, **params)
        return pq.read_table(result.path / "data.parquet").to_pylist(), result

    return call


def test_both_parts_together_are_the_whole_and_no_module_is_in_both(made, data):
    train, _ = made(data, part="train", held_out=0.2)
    held_out, about = made(data, part="held_out", held_out=0.2)
    whole, _ = made(data)
    assert whole == ROWS
    assert sorted(map(str, train + held_out)) == sorted(map(str, ROWS))
    assert not {r["source"] for r in train} & {r["source"] for r in held_out}
    assert 0.05 < len(held_out) / len(ROWS) < 0.4
    assert held_out == [row for row in ROWS if is_held_out(row["source"], 0.2)]  # in the data's order
    assert about.about == {
        "form": "prompt_completion",
        "rows": len(held_out),
        "columns": ["prompt", "completion", "source"],
        "characters": sum(len(r["prompt"]) + len(r["completion"]) for r in held_out),
    }


def test_a_larger_share_holds_out_the_same_and_more(made, data):
    few, _ = made(data, part="held_out", held_out=0.1)
    more, _ = made(data, part="held_out", held_out=0.5)
    assert {r["source"] for r in few} < {r["source"] for r in more}


def test_the_parts_of_two_data_sets_fit_together(made, data, tmp_path):
    texts = lines(tmp_path / "texts.jsonl", [{"text": f"text {i}", "source": f"module{i}"} for i in range(0, 40, 3)])
    train, _ = made(data, part="train")
    held_out, _ = made(texts, part="held_out")
    assert held_out
    assert not {r["source"] for r in train} & {r["source"] for r in held_out}


def test_fewer_rows_are_a_subset_of_more_in_the_same_order(made, data):
    drawn = [made(data, part="train", max_rows=n)[0] for n in (1, 7, 50, 10_000)]
    assert [len(rows) for rows in drawn[:3]] == [1, 7, 50]
    assert drawn[3] == made(data, part="train")[0]
    for fewer, more in itertools.pairwise(drawn):
        assert [row for row in more if row in fewer] == fewer
    positions = [ROWS.index(row) for row in drawn[2]]
    assert positions == sorted(positions)
    assert positions[0] < 100  # from all over the data
    assert positions[-1] > 300


def test_without_a_source_rows_are_split_by_what_they_say(made, tmp_path):
    rows = [{"text": f"text {i % 50}"} for i in range(200)]
    data = lines(tmp_path / "a.jsonl", rows)
    train, _ = made(data, part="train", held_out=0.3)
    held_out, result = made(data, part="held_out", held_out=0.3)
    assert train
    assert held_out
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert result.about["columns"] == ["text"]


def test_any_column_can_be_split_by_and_is_left_out(made, tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": said, "topic": {"id": i % 20}, "prompt": "x"} for i in range(100)]
    data = lines(tmp_path / "a.jsonl", rows)
    held_out, result = made(data, part="held_out", by="topic", held_out=0.3)
    assert len(held_out) % 5 == 0
    assert result.about == {
        "form": "conversation",
        "rows": len(held_out),
        "columns": ["messages"],
        "characters": 2 * len(held_out),
    }
    with pytest.raises(DatasetError, match=r"none of its 100 rows is held_out when split by 'prompt', expected some"):
        made(data, part="held_out", by="prompt", held_out=1e-9)


def test_a_row_without_a_value_goes_by_what_it_says(made, tmp_path):
    rows = [{"text": f"text {i}", "source": None} for i in range(100)]
    held_out, _ = made(lines(tmp_path / "a.jsonl", rows), part="held_out", held_out=0.3)
    assert 5 < len(held_out) < 60
    assert {r["source"] for r in held_out} == {None}


def test_splits_of_the_data_themselves_are_chosen_by_files(made, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"text": "a"}])
    lines(folder / "test.jsonl", [{"text": "b"}])
    assert made(Dataset(str(folder)), files="*test*")[0] == [{"text": "b"}]
    with pytest.raises(DatasetError, match=r"holds 'test', 'train', expected one of them"):
        made(Dataset(str(folder)))


def test_another_process_with_other_hashes_writes_the_same_bytes(made, data, tmp_path):
    _, here = made(data, part="train", max_rows=50)
    there = tmp_path / "elsewhere"
    there.mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(there), data.uri], env=environment, check=True)
    digests = [
        hashlib.sha256(p.read_bytes()).hexdigest() for p in (here.path / "data.parquet", there / "rows/data.parquet")
    ]
    assert digests[0] == digests[1]


def test_how_rows_are_cut_into_files_does_not_show_in_the_bytes(made, data, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(4):
        lines(folder / f"{i}.jsonl", ROWS[i * 100 : i * 100 + 100])
    _, one = made(data)
    _, several = made(Dataset(str(folder)))
    assert (one.path / "data.parquet").read_bytes() == (several.path / "data.parquet").read_bytes()
    rows, again = made(Dataset(str(one.path)))
    assert rows == ROWS
    assert (again.path / "data.parquet").read_bytes() == (one.path / "data.parquet").read_bytes()


def test_what_cannot_be_is_refused(made, data):
    for params in ({"held_out": 0.0}, {"held_out": 1.0}, {"max_rows": 0}):
        with pytest.raises(HyperparameterError, match=f"prepare: {next(iter(params))}="):
            made(data, part="train", **params)
    with pytest.raises(UnknownName, match=r"is called 'modul'\. Known"):
        made(data, by="modul")


def test_a_plan_hears_of_everything_at_once(data, tmp_path):
    assert list(prepare.problems(data=data, part="train", by="source", resources=None)) == []
    assert list(prepare.problems(data=None, by="anything", resources=None)) == []
    found = list(prepare.problems(data=data, held_out=2, max_rows=0, by="sorce", resources=None))
    assert [sentence.split(",")[0] for sentence in found] == [
        "prepare: held_out=2",
        "prepare: max_rows=0",
        f"No column of {data.uri!r} is called 'sorce'. Did you mean 'source'?",
    ]
    assert "has the columns 'a', expected" in next(
        iter(prepare.problems(data=lines(tmp_path / "a.jsonl", [{"a": 1}]), resources=None))
    )
