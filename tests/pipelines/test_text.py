"""What is plain YAML, and what is not."""

import pytest

from pipelines.text import MAX_VALUES, Text


def test_values_are_what_yaml_says_and_every_key_has_its_line():
    text = Text("a: 1\nb:\n  c: [x, 2.5]\n  d: {e: yes}\n", "p.yaml")
    assert text.raw == {"a": 1, "b": {"c": ["x", 2.5], "d": {"e": True}}}
    assert text.problems == []
    assert text.places.of(("b", "d", "e")).text == "p.yaml:4"
    assert text.places.of(("b", "d", "unknown")).text == "p.yaml:4"
    assert text.places.of(("b", "c", "1")).text == "p.yaml:3"
    assert text.places.of(("z",)).text == "p.yaml:1"


def test_aliases_are_copies_and_merged_keys_give_way_to_those_beside_them():
    text = Text("a: &a {x: 1, y: 2}\nb: *a\nc:\n  y: 3\n  <<: *a\nd: {<<: [{x: 4}, *a]}\n", "p.yaml")
    assert text.problems == []
    assert (text.raw["b"], text.raw["c"], text.raw["d"]) == ({"x": 1, "y": 2}, {"x": 1, "y": 3}, {"x": 4, "y": 2})
    assert text.raw["b"] is not text.raw["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: [1\nb: 2\n",
            "2: not YAML: did not find expected ',' or ']' while parsing a flow sequence that begins in ",
        ),
        ("a:\n\tb: 1\n", "2: not YAML: a tab, expected spaces. Indent with spaces."),
        ("a: 1\nb: \x07\n", "2: not YAML: the character #x0007, expected text. Take it out."),
        ("a: *x\n", "1: not YAML: found undefined alias. Correct it."),
        ("a: 1\n---\nb: 2\n", "2: not YAML: a second document, expected one pipeline in a file."),
        ("a: 1\n b: 2\n", "2: not YAML: mapping values are not allowed in this context."),
        ("a: 1\nb: !!int two\n", "2: 'two' is no int, expected plain YAML. Put quotes around it."),
        ("a: 2020-13-45\n", "1: '2020-13-45' is no timestamp, expected plain YAML. Put quotes around it."),
        ("a: !own {b: 1}\n", "1: the tag '!own', expected plain YAML. Take it out."),
        ("a: !!python/object:os.system x\n", "1: the tag 'tag:yaml.org,2002:python/object:os.system', expected plain"),
        ("a: 1\na: 2\n", "2: the key 'a' stands twice, first in line 1, expected once. Take one of them out."),
        ("? [a]\n: 1\n", "1: a key that is itself a list or a mapping, expected a name. Write one."),
        ("a: &a\n  b: *a\n", "1: nested deeper than 50 levels, expected a pipeline."),
        ("- " * 60 + "x", "1: nested deeper than 50 levels, expected a pipeline."),
    ],
)
def test_what_is_not_plain_yaml_is_named_with_its_line(text, said):
    read = Text(text, "p.yaml")
    (sentence,) = read.places.sentences(read.problems)
    assert sentence.startswith(f"p.yaml:{said}")


def test_aliases_of_aliases_do_not_unfold_without_end():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(8)]
    read = Text("\n".join(lines), "p.yaml")
    (sentence,) = read.places.sentences(read.problems)
    assert sentence.startswith(f"p.yaml:1: unfolds to more than {MAX_VALUES} values, expected a pipeline.")
