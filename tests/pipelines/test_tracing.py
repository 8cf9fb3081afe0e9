"""Pipelines written in Python: what can be wrong with them, and the line of the call."""

import pytest

from pipelines.files import opened
from pipelines.problems import SpecError

BEGIN = """from operators.artifact import Dataset, Model
from operators.base import Resources
from operators.merging import merge
from operators.pretraining import pretrain
from operators.tuning import tune
from lfm.merging.ties import TIES
from lfm.tuning.lora import LoRA

def p(text=Dataset("python://text")):
    base = pretrain("base", data=text, layers=2)
"""


def problems_of(folder, end, begin=BEGIN, **files):
    for name, content in {"p": f"{begin}{end}", **files}.items():
        (folder / f"{name}.py").write_text(content)
    try:
        return opened(str(folder / "p.py")).problems
    except SpecError as error:
        return error.problems


def test_a_pipeline_is_the_graph_that_its_function_returns(tmp_path):
    end = "    return tune('t', model=base, data=text, held_out=None, method=LoRA(rank=2))\n"
    assert problems_of(tmp_path, end) == ()
    spec = opened(str(tmp_path / "p.py")).spec
    assert list(spec.steps) == ["base", "t"]
    assert spec.steps["t"].inputs == {"model": "base", "data": "text"}


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("return pretrain('a', data=text, layrs=2)", "11 step 'a': 'pretrain' has no parameter 'layrs'. Did you mean"),
        (
            "return pretrain('a',\n        data=text, layers=0)",
            "11 step 'a': pretrain: layers=0, expected layers >= 1.",
        ),
        ("return pretrain('a', data=text, layers=len)", "11 step 'a': pretrain: layers=<built-in function len>, exp"),
        ("return pretrain('a')", "11 step 'a': 'pretrain' needs the input 'data'."),
        ("return pretrain('a', data=base)", "11 step 'a': data='base' is a model, expected a dataset."),
        ("return pretrain('a', data='text')", "11 step 'a': data='text', expected a step or an input of the pipeline."),
        (
            "return pretrain('a', data=Dataset('/x'))",
            "11 step 'a': data=Dataset('/x'), expected a step or an input of the pipeline. Make it the default of one",
        ),
        ("return pretrain('1 a', data=text)", "11 step '1 a': the name '1 a', expected letters, digits, '_' and '-'"),
        ("return pretrain('text', data=text)", "11 step 'text': an input has this name too, expected one for each."),
        (
            "return tune('t', model=base, data=text)",
            "11 step 't': no method, expected {name: ...} with one of bo",
        ),
        ("return tune('t', model=base, data=text, method=LoRA)", "11 step 't': method: the class LoRA, expected one "),
        ("return tune('t', model=base, data=text, method='lora')", "11 step 't': method: 'lora', expected {name: ...}"),
        ("return tune('t', model=base, data=text, method=TIES())", "11 step 't': No tuning method is called 'ties'."),
        ("return tune('t', model=base, data=text, method=LoRA(rank=0))", "11: LoRA: rank=0, expected rank >= 1."),
        ("return tune('t', model=base, data=text, method=LoRA(rnk=0))", "11: TypeError: LoRA.__init__() got an unexp"),
        ("return pretrain('a', data=text, resources={'worker': 2})", "11 step 'a': resources has no field 'worker'."),
        ("return pretrain('a', data=text, resources=Resources(workers=0))", "11: resources: workers=0, expected work"),
        ("return pretrain(data=text)", "11: TypeError: "),
        ("return baze", "11: NameError: name 'baze' is not defined."),
        ("raise ValueError('boom')", "11: ValueError: boom. Correct it."),
        ("return ((", "11: no Python, '(' was never closed. Correct it."),
        ("base", "9: returns None, expected its last step. Return that."),
        ("return text", "9: returns Dataset('python://text'), expected its last step. Return that."),
        (
            "other = pretrain('base', data=text)\n    return merge('m', base=base, experts=[other], method=TIES())",
            "11 step 'base': another step has this name, in p.py:10, expected one. Rename one of them.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_the_line_of_the_call(tmp_path, end, said):
    (sentence,) = problems_of(tmp_path, f"    {end}\n")
    assert sentence.startswith(f"p.py:{said}")


def test_several_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    end = (
        "    one = tune('one', model=text, data=text, method=LoRA())\n"
        "    two = tune('two', model=base, data=text, method=LoRA(), learning_rate='fast')\n"
        "    return merge('m', base=base, experts=[two, one], method=TIES(), dtype='int')\n"
    )
    assert [s.partition(":")[2].partition(",")[0] for s in problems_of(tmp_path, end)] == [
        "11 step 'one': model='text' is a dataset",
        "12 step 'two': tune: learning_rate='fast'",
        "13 step 'm': merge: dtype='int'",
    ]


def test_a_step_that_another_file_of_the_users_makes_has_its_place_there(tmp_path):
    parts = (
        "from operators.pretraining import pretrain\n\ndef small(text):\n    return pretrain('a', data=text, layrs=1)\n"
    )
    begin = "from operators.artifact import Dataset\nimport parts\n\ndef p(text=Dataset('python://text')):\n"
    (sentence,) = problems_of(tmp_path, "    return parts.small(text)\n", begin, parts=parts)
    assert sentence.startswith("parts.py:4 step 'a': 'pretrain' has no parameter 'layrs'.")


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (
            "def p(text, size=3):\n    return text\n",
            (
                "p.py:1 input 'text': no default, expected one such as Model('hf:",
                "p.py:1 input 'size': the default 3, expected one such as Model('",
            ),
        ),
        (
            "def q():\n    return 1\n",
            ("p.py: no function 'p', expected one that returns the last step. Write def p(...).",),
        ),
        ("p = 3\n", ("p.py: no function 'p', expected one that returns the last step. Write def p(...).",)),
        (
            "from operators.tuning import tunes\n",
            ("p.py:1: ImportError: cannot import name 'tunes' from 'operators.tun",),
        ),
    ],
)
def test_a_file_without_a_pipeline_says_what_it_lacks(tmp_path, begin, said):
    found = problems_of(tmp_path, "", begin)
    assert len(found) == len(said)
    assert all(sentence.startswith(start) for sentence, start in zip(found, said, strict=True))


def test_two_calls_that_make_the_same_step_are_one_step(tmp_path):
    same = "    same = pretrain('base', data=text, layers=2)\n"
    assert problems_of(tmp_path, f"{same}    return merge('m', base=base, experts=[same], method=TIES())\n") == ()
    assert list(opened(str(tmp_path / "p.py")).spec.steps) == ["base", "m"]


def test_a_file_with_a_dash_holds_a_function_with_an_underscore(tmp_path):
    (tmp_path / "my_run.py").write_text(BEGIN.replace("def p(", "def my_run(") + "    return base\n")
    (tmp_path / "my_run.py").rename(tmp_path / "my-run.py")
    assert opened(str(tmp_path / "my-run.py")).spec.name == "my-run"
