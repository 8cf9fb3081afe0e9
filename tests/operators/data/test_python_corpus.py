import hashlib
import json
import os
import subprocess
import sys

import pytest

from lfm.errors import UnknownName
from operators.data.python_corpus import CORPORA, corpus
from operators.preparation import is_held_out

pytestmark = pytest.mark.slow

HELD_OUT = 0.1
SPLIT = tuple(name for name, columns in CORPORA.items() if "source" in columns)
GRAM = 13  # words in a row that are no coincidence
WHOLE = f"""
import hashlib, json
from operators.data.python_corpus import CORPORA, corpus

print(hashlib.sha256(json.dumps([corpus(name) for name in {tuple(CORPORA)}]).encode()).hexdigest())
"""


def rows_of(name):
    columns = corpus(name)
    return list(zip(*(columns[c] for c in CORPORA[name]), strict=True))


@pytest.fixture(scope="module")
def split():
    """Of each corpus what is trained on and what is held out, by source as `prepare` does it."""
    parts = {}
    for name in SPLIT:
        rows = rows_of(name)
        held_out = [is_held_out(row[-1], HELD_OUT) for row in rows]
        parts[name] = [[row for row, out in zip(rows, held_out, strict=True) if out == side] for side in (False, True)]
    return parts


def all_of(split, name):
    train, held_out = split[name]
    return train + held_out


def said(rows):
    return [text for row in rows for text in row[:-1]]


def same(text):
    return " ".join(text.casefold().split()).rstrip(".")


def test_the_corpora_are_as_large_as_a_small_pipeline_needs(split):
    characters = {name: sum(map(len, said(train + out))) for name, (train, out) in split.items()}
    assert characters["text"] > 1_800_000
    assert sum(len(train) + len(out) for train, out in (split["summaries"], split["names"])) > 6_000
    for train, out in split.values():
        assert 0.05 < sum(map(len, said(out))) / sum(map(len, said(train + out))) < 0.15
        assert len(out) > 200  # documents enough to tell models apart
        assert len({row[-1] for row in out}) > 10


def test_every_row_says_something_and_no_row_comes_twice(split):
    for train, out in split.values():
        rows = train + out
        assert all(text.strip() == text != "" for text in said(rows))
        assert len({same(" ".join(row[:-1])) for row in rows}) == len(rows)


def test_pairs_are_what_their_names_say(split):
    for prompt, completion, source in all_of(split, "summaries"):
        task, where, signature = prompt.split("\n")[0], *prompt.split("\n")[2:]
        assert task == "Say what this function does."
        assert where.removeprefix("# ").split(".")[0] == source
        assert signature.startswith(("def ", "async def "))
        assert signature.endswith(":")
        assert "\n" not in completion
        assert len(completion) <= 160
    for prompt, completion, _ in all_of(split, "names"):
        assert prompt.startswith("Name the function that does this.\n\n")
        assert completion.isidentifier()


def test_known_functions_topics_and_code_are_there(split):
    summaries, names, text = (all_of(split, name) for name in ("summaries", "names", "text"))
    summary = "Remove any common leading whitespace from every line in `text`."
    assert ("Say what this function does.\n\n# textwrap\ndef dedent(text):", summary, "textwrap") in summaries
    assert (f"Name the function that does this.\n\n{summary}", "dedent", "textwrap") in names
    (topic,) = (said for said, source in text if source == "topics/assert")
    assert 'The "assert" statement' in topic
    assert any(said.startswith("def ") for said, _ in text)


def test_sources_are_on_one_side_in_all_corpora(split):
    trained_on = {row[-1] for train, _ in split.values() for row in train}
    assert not trained_on & {row[-1] for _, out in split.values() for row in out}


def test_nothing_held_out_is_trained_on_in_any_corpus(split):
    trained_on = {same(text) for train, _ in split.values() for text in said(train)}
    summaries = {same(row[0].partition("\n\n")[2]) for row in split["names"][0]}
    summaries |= {same(row[1]) for row in split["summaries"][0]}
    for row in split["text"][1]:
        assert same(row[0]) not in trained_on
    for row in split["summaries"][1]:
        assert same(row[1]) not in trained_on | summaries
    for row in split["names"][1]:
        assert same(row[0].partition("\n\n")[2]) not in trained_on | summaries
        assert row[1] not in {completion for _, completion, _ in split["names"][0]}


def grams(texts):
    for text in texts:
        words = text.casefold().split()
        yield from (tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def test_next_to_no_run_of_words_is_on_both_sides(split):
    trained_on = set(grams(text for train, _ in split.values() for text in said(train)))
    held_out = list(grams(text for _, out in split.values() for text in said(out)))
    assert len(held_out) > 10_000
    assert sum(gram in trained_on for gram in held_out) < 0.01 * len(held_out)


def test_another_process_with_other_hashes_makes_the_same_corpora():
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", WHOLE], env=environment, capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    here = hashlib.sha256(json.dumps([corpus(name) for name in CORPORA]).encode()).hexdigest()
    assert done.stdout.strip() == here


def test_an_unknown_corpus_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match=r"No corpus of Python is called 'summary'\. Did you mean 'summaries'"):
        corpus("summary")
