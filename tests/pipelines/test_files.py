"""What can be wrong with a pipeline's file and with the files that it brings."""

import pytest

from pipelines.files import opened
from pipelines.problems import SpecError

STEPS = """inputs: {text: {dataset: "python://text"}}
steps:
  base: {operator: pretrain, inputs: {data: text}}
"""


def problems_of(folder, uses, **files):
    text = f"uses: {uses}\n{STEPS}"
    for name, content in {"p.yaml": text, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return opened(str(folder / "p.yaml")).problems


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "'my.py' is not there, expected a Python file beside the pipeline. Check the name."),
        ({"my.py/x": ""}, "'my.py' is not there, expected a Python file beside the pipeline. Check the name."),
        ({"my.py": "x = 1\ndef f(:\n"}, "my.py:2: no Python, invalid syntax. Correct it."),
        ({"my.py": b"x = 1\ny = '\xff'\n"}, "my.py:2: no UTF-8, expected text in it. Correct it."),
        ({"my.py": b"x = 1\x00\n"}, "my.py:1: no Python, source code string cannot contain null bytes. Correct it."),
        ({"my.py": "x = 1\nraise RuntimeError('boom')\n"}, "my.py:2: RuntimeError: boom. Correct it."),
        ({"my.py": "import sys\nsys.exit(3)\n"}, "my.py:2: SystemExit: 3. Correct it."),
        ({"my.py": "import no_such_thing\n"}, "my.py:1: ModuleNotFoundError: No module named 'no_such_thing'."),
        ({"my.py": "import sib\n", "sib.py": "x = 1\n1 / 0\n"}, "sib.py:2: ZeroDivisionError: division by zero."),
        ({"my.py": "import sib\n", "sib.py": "x = = 2\n"}, "sib.py:1: no Python, invalid syntax. Correct it."),
        (
            {"my.py": "import random\n", "random.py": "x = 1\n"},
            "'random.py' would be imported as 'random', which is Python's own already, expected a name that nothing",
        ),
        ({"my.py": "import torch\n", "torch.py": "x = 1\n"}, "'torch.py' would be imported as 'torch', which is /"),
        (
            {"my.py": "from operators import merging\n", "operators/merging.py": "x = 1\n"},
            "'operators/merging.py' would be imported as 'operators.merging', which is LFM's own already",
        ),
        (
            {"my.py": "from operators.base import operator\n\n@operator()\ndef f(a: int) -> int: ...\n"},
            "my.py:3: Operator 'f': returns <class 'int'>, expected an Artifact type as return annotation.",
        ),
    ],
)
def test_a_file_of_the_users_that_cannot_be_had_is_one_sentence_with_its_line(tmp_path, files, said):
    (sentence,) = problems_of(tmp_path, "[my.py]", **files)
    assert sentence.startswith(f"p.yaml:1: uses: {said}")


def test_every_file_that_is_missing_is_named_in_its_line_and_the_rest_is_checked_too(tmp_path):
    uses = "\n  - here.py\n  - gone.py\n  - /gone/too.py\n  - lost.py"
    found = problems_of(tmp_path, f"{uses}\nsize: 3", **{"here.py": "x = 1\n"})
    assert [s.partition(", expected")[0] for s in found] == [
        "p.yaml:3: uses: 'gone.py' is not there",
        "p.yaml:4: uses: '/gone/too.py'",
        "p.yaml:5: uses: 'lost.py' is not there",
        "p.yaml:6: unknown key 'size'",
    ]


def test_names_that_a_missing_file_may_define_are_no_problem_but_near_names_are(tmp_path):
    (tmp_path / "p.yaml").write_text(f"""uses: [gone.py]
{STEPS}
  mine: {{operator: crochet, inputs: {{splines: text}}}}
  near: {{operator: pretrian, inputs: {{data: text}}}}
  half: {{operator: tune, inputs: {{model: base, data: text}}, method: {{name: my_way}}}}
""")
    one, two = opened(str(tmp_path / "p.yaml")).problems
    assert one.startswith("p.yaml:1: uses: 'gone.py' is not there")
    assert two == "p.yaml:7 step 'near': No operator is called 'pretrian'. Did you mean 'pretrain'?"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\nsteps: caf\xe9\n", "p.yaml:2: the byte 0xe9 is no UTF-8, expected text in it. Convert the file."),
        (b"\xff\xfe\x00", "p.yaml:1: the byte 0xff is no UTF-8, expected text in it. Convert the file."),
    ],
)
def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path, content, said):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        opened(str(tmp_path / "p.yaml"))
    assert caught.value.problems == (said,)


def test_a_mark_at_the_begin_of_a_file_is_no_part_of_it(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"\xef\xbb\xbf" + STEPS.encode())
    assert opened(str(tmp_path / "p.yaml")).problems == ()


def test_a_file_that_is_not_there_has_a_near_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(STEPS)
    with pytest.raises(SpecError, match=r"pipeline 'smal.yaml': no such file, .* Did you mean 'small.yaml'\?"):
        opened("smal.yaml")
    with pytest.raises(SpecError, match=r"pipeline 'distil_lora_merge': expected a .yaml or .py file or a recipe"):
        opened("distil_lora_merge")
