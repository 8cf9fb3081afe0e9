import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm.errors import UnknownName
from operators.artifact import Dataset
from operators.data.row_files import DatasetError
from operators.data.rows import Form, columns_of, form_of, problems_of, read_rows

HELLO = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]

# What is written, and what has to come back.
KINDS = {
    "text": ({"text": "some text"}, {"text": "some text"}),
    "pairs": ({"prompt": "2+2", "completion": "4"}, {"prompt": "2+2", "completion": "4"}),
    "conversational pairs": (
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
    ),
    "messages": ({"messages": HELLO}, {"messages": HELLO}),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"prompt": "Add.\n\n2 and 2", "completion": "4"},
    ),
    "alpaca without input": (
        {"instruction": "Say 4.", "input": "", "output": "4"},
        {"prompt": "Say 4.", "completion": "4"},
    ),
}


def lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return Dataset(str(path))


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return Dataset(str(path))


def written(folder, rows, ending):
    path = folder / f"rows{ending}"
    match ending:
        case ".parquet":
            parquet(path, rows)
        case ".jsonl":
            lines(path, rows)
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return Dataset(str(path))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_form_come_from_every_kind_of_file(tmp_path, kind, ending):
    row, expected = KINDS[kind]
    dataset = written(tmp_path, [row, row, row], ending)
    assert read_rows(dataset).to_pylist() == [expected] * 3
    assert set(columns_of(dataset.uri)) == set(row)
    assert list(problems_of(dataset)) == []


def test_the_form_is_told_by_columns_and_conversations_come_first():
    assert form_of(["id", "text"]) is Form.TEXT
    assert form_of(["text", "output", "instruction"]) is Form.PROMPT_COMPLETION
    assert form_of(["prompt", "prompt_id", "messages"]) is Form.CONVERSATION
    with pytest.raises(DatasetError, match="train: has the columns 'question', 'answer', expected 'messages', or"):
        form_of(["question", "answer"], "train")


def test_other_columns_are_strings_and_only_there_when_asked_for_but_source(tmp_path):
    rows = [{"text": "a", "source": "x", "id": 7, "more": {"b": 1, "a": [None]}}, {"text": "b", "source": None}]
    dataset = lines(tmp_path / "a.jsonl", rows)
    assert read_rows(dataset).to_pylist() == [{"text": "a", "source": "x"}, {"text": "b", "source": None}]
    assert read_rows(dataset, ["more", "id", "text"]).to_pylist()[0] == {
        "text": "a",
        "source": "x",
        "more": '{"a": [null], "b": 1}',
        "id": "7",
    }


def test_many_rows_come_in_order_over_files_and_batches(tmp_path):
    for name, numbers in (("b", range(5000, 9000)), ("a", range(5000)), (".hidden", range(3))):
        lines(tmp_path / f"{name}.jsonl", [{"text": str(i)} for i in numbers])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert read_rows(Dataset(str(tmp_path)))["text"].to_pylist() == [str(i) for i in range(9000)]


def test_a_mark_at_the_start_windows_line_ends_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa4"}\r\n\r\n{"text": "b\\u2028c"}\r\n')
    assert read_rows(Dataset(str(path)))["text"].to_pylist() == ["ä", "b\u2028c"]


BAD = {
    "no JSON": ('{"text": "a"', r":2: is no JSON \(.* at column \d+\), expected one object per line"),
    "a list": ('["a"]', ":2: is a list, expected an object"),
    "a number": ({"text": 3}, ":2: 'text' is 3, expected a string. Correct the row"),
    "nothing": ({"text": None}, ":2: 'text' is None, expected a string"),
    "missing": ({"txt": "a"}, ":2: 'text' is missing, expected a string"),
    "half a character": ('{"text": "\\ud800"}', ":2: 'text' holds half a character"),
    "nested too deeply": ("[" * 100_000, ":2: is nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, case):
    row, expected = BAD[case]
    dataset = lines(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DatasetError, match=f"^{tmp_path}/a.jsonl{expected}"):
        read_rows(dataset)


MESSAGES = {
    "empty": [],
    "no content": [{"role": "user"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "tool calls": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
    "not learnt": [{"role": "assistant", "content": "a", "weight": 0}],
    "text": "hello",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_that_would_lose_their_meaning_are_refused(tmp_path, case):
    dataset = lines(tmp_path / "a.jsonl", [{"messages": HELLO}, {"messages": MESSAGES[case]}])
    with pytest.raises(DatasetError, match=r"a.jsonl:2: 'messages' is .*, expected a list of messages"):
        read_rows(dataset)


def test_messages_keep_role_and_content_only(tmp_path):
    said = [{**HELLO[0], "name": "Ada"}, {**HELLO[1], "tool_calls": None, "weight": 1}]
    assert read_rows(lines(tmp_path / "a.jsonl", [{"messages": said}]))["messages"].to_pylist() == [HELLO]


def test_a_prompt_is_what_the_first_row_has(tmp_path):
    dataset = lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": HELLO, "completion": "b"}])
    with pytest.raises(DatasetError, match=r"a.jsonl:2: 'prompt' is \[\{.*\.\.\., expected a string"):
        read_rows(dataset)


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path):
    dataset = parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(DatasetError, match=r"a.parquet row 2: 'text' is None, expected a string"):
        read_rows(dataset)
    dataset = parquet(tmp_path / "b.parquet", [{"text": b"a"}])
    with pytest.raises(DatasetError, match=r"b.parquet row 1: 'text' is b'a', expected a string"):
        read_rows(dataset)


def test_a_row_of_an_array_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[{"text": "a"},\n {"text": 1}]')
    with pytest.raises(DatasetError, match=r"a.json row 2: 'text' is 1"):
        read_rows(Dataset(str(path)))
    path.write_text('\n[{"text": "a"},\n {"text": 1]')
    with pytest.raises(DatasetError, match=r"a.json:3: is no JSON"):
        read_rows(Dataset(str(path)))
    path.write_text('{\n "text": "a"\n}')
    with pytest.raises(DatasetError, match=r"a.json:1: is no JSON .*expected one object per line, or one array"):
        read_rows(Dataset(str(path)))


def broken(folder):
    whole = gzip.compress(b'{"text": "' + bytes(range(35, 91)) * 50 + b'"}\n')
    for name, content, expected in (
        ("cut.jsonl.gz", whole[:-12], "cannot be read"),
        ("no.jsonl.gz", b"text", "cannot be read .*, expected JSON"),
        ("no.parquet", b"PAR1" * 10, "cannot be read .*, expected Parquet"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"\.jsonl:1: is no UTF-8 \(.* at byte 1\)"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', r"\.jsonl:2: is no UTF-8 \(.* at byte 11\)"),
        ("blank.jsonl", b"\n \n", "has no rows, expected at least one"),
        ("table.csv", b"text\na\n", "ends in '.csv', expected .parquet, .jsonl"),
    ):
        (folder / name).write_bytes(content)
        yield Dataset(str(folder / name)), expected
    yield Dataset(str(folder / "none.jsonl")), "is not there, expected a file or folder of rows"
    (folder / "empty").mkdir()
    yield Dataset(str(folder / "empty")), "holds no file of rows"
    yield parquet(folder / "empty.parquet", pa.table({"text": pa.array([], pa.string())}).to_pylist()), "has no rows"


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path):
    for dataset, expected in broken(tmp_path):
        with pytest.raises(DatasetError, match=expected) as caught:
            read_rows(dataset)
        assert str(caught.value).startswith(dataset.uri)
        assert "\n" not in str(caught.value)


def test_problems_are_what_reading_would_say_where_headers_tell(tmp_path):
    seen = {d.uri: list(problems_of(d)) for d, _ in broken(tmp_path)}
    without_header = {str(tmp_path / name) for name in ("latin.jsonl",)}
    assert {uri for uri, found in seen.items() if not found} == without_header
    dataset = lines(tmp_path / "a.jsonl", [{"text": "a", "module": "m"}])
    assert list(problems_of(dataset, ["module"])) == []
    assert list(problems_of(dataset, ["modul"])) == [
        f"No column of {dataset.uri!r} is called 'modul'. Did you mean 'module'?"
    ]
    assert list(problems_of(None, ["anything"])) == []
    with pytest.raises(UnknownName, match=r"is called 'modul'\. Did you mean 'module'"):
        read_rows(dataset, ["modul"])


def test_headers_are_all_that_columns_need(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "id": 1}\nno JSON\n\xff\n')
    assert columns_of(path) == ("text", "id")


def test_files_of_different_forms_in_one_folder_are_refused(tmp_path):
    lines(tmp_path / "a.jsonl", [{"text": "a"}])
    lines(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    folder = Dataset(str(tmp_path))
    with pytest.raises(DatasetError, match=r"b.jsonl: holds rows of the form 'prompt_completion', expected 'text'"):
        read_rows(folder)
    assert len(list(problems_of(folder))) == 1
    assert read_rows(folder, files="b*").num_rows == 1


# Folders as the hub has them, and what is left to choose from in each.
LAYOUTS = {
    "one split": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], []),
    "splits": (
        ["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/test", "data/train"],
    ),
    "configurations": (["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"], ["main", "soc"]),
    "named splits": (
        ["data/train_gen-00000-of-00001-0a1b2c3d.parquet", "data/train_sft-00000-of-00001-0a1b2c3d.parquet"],
        ["data/train_gen", "data/train_sft"],
    ),
    "files": (["dev.parquet", "train.parquet"], ["dev", "train"]),
    "folders": (["train/a.parquet", "train/b.parquet", "test/a.parquet"], ["test", "train"]),
    "split and others": (["extra.parquet", "train.parquet"], ["other files", "train"]),
    "numbered": (["train1.parquet", "train_2.parquet"], []),
    "no splits": (["2023/part-0.parquet", "2024/part-0.parquet"], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_and_configurations_are_never_mixed_silently(tmp_path, layout):
    names, parts = LAYOUTS[layout]
    for name in names:
        parquet(tmp_path / name, [{"text": name}])
    folder = Dataset(str(tmp_path))
    if not parts:
        assert read_rows(folder)["text"].to_pylist() == sorted(names)
        return
    with pytest.raises(DatasetError, match=r"expected one of them\. Choose with prepare's files, such as") as caught:
        read_rows(folder)
    assert all(f"'{part}" in str(caught.value) for part in parts)
    assert list(problems_of(folder)) == [str(caught.value)]
    pattern = str(caught.value).rpartition("files: '")[2].removesuffix("'.")  # the advice has to work
    chosen = read_rows(folder, files=pattern)["text"].to_pylist()
    assert chosen == [n for n in sorted(names) if n.startswith(pattern.removesuffix("*"))]
    assert 0 < len(chosen) < len(names)
    assert read_rows(folder, files="*").num_rows == len(names)  # who says so mixes them


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(tmp_path):
    snapshot = tmp_path / ".cache/hub/datasets--a--b/snapshots/0a1b/data"
    parquet(tmp_path / ".cache/hub/datasets--a--b/blobs/0123", [{"text": "a"}])
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.parquet").symlink_to("../../../blobs/0123")
    (snapshot.parent / "README.md").write_text("about")
    (snapshot.parent / ".gitattributes").write_text("")
    assert read_rows(Dataset(str(snapshot.parent))).to_pylist() == [{"text": "a"}]


def test_a_pattern_has_to_choose_something(tmp_path):
    parquet(tmp_path / "data/train-00000-of-00001.parquet", [{"text": "a"}])
    with pytest.raises(DatasetError, match=r"no file that matches files='test\*', expected one of 'data/train-00000"):
        read_rows(Dataset(str(tmp_path)), files="test*")
    with pytest.raises(DatasetError, match="is a file, expected a folder to choose files='a' from"):
        read_rows(Dataset(str(tmp_path / "data/train-00000-of-00001.parquet")), files="a")
    with pytest.raises(DatasetError, match="has no files, expected a folder"):
        read_rows(Dataset("python://text"), files="a")


def test_a_corpus_of_python_is_rows_too():
    assert columns_of("python://names") == ("prompt", "completion", "source")
    with pytest.raises(UnknownName, match=r"No corpus of Python is called 'name'\. Did you mean 'names'"):
        read_rows(Dataset("python://name"))
    assert list(problems_of(Dataset("python://texts"))) == [
        "No corpus of Python is called 'texts'. Did you mean 'text'?"
    ]


def test_an_error_comes_back_from_another_process_as_itself():
    error = DatasetError("a.jsonl:3", "is a list, expected an object", "Correct it.")
    assert str(DatasetError(*error.args)) == str(error) == "a.jsonl:3: is a list, expected an object. Correct it."
