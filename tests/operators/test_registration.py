"""The verb `register` with a registry that only remembers."""

import pytest

from operators.artifact import Model
from operators.registration import BadRegisteredName, register


class Work:
    def __init__(self):
        self.registered = []

    def register(self, artifact, name, alias):
        self.registered.append((artifact.digest, name, alias))
        return len(self.registered)


def test_a_registered_model_is_the_same_model_that_knows_its_name():
    work = Work()
    given = Model("/somewhere", "d" * 64, {"steps": 3})
    made = register.body(work, model=given, name="helper", alias="candidate")
    assert work.registered == [("d" * 64, "helper", "candidate")]
    assert (made.uri, made.digest) == (given.uri, given.digest)
    assert made.about == {"steps": 3, "registered": {"name": "helper", "version": 1, "alias": "candidate"}}
    assert given.about == {"steps": 3}


def test_it_is_an_effect():
    assert register.effect


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "ä", "a@b", "a:1", "-a", "a\n"])
def test_a_bad_name_is_refused_before_and_when_it_runs(name):
    (said,) = register.problems(model=None, name=name, alias="champion", resources=None)
    assert said == f"register: name={name!r}, expected letters, digits, '.', '_' and '-', a letter or a digit first."
    work = Work()
    with pytest.raises(BadRegisteredName, match="name="):
        register.body(work, model=Model("/m", "d"), name=name, alias="champion")
    assert not work.registered


@pytest.mark.parametrize("alias", ["", "a.b", "a/b", "latest", "Latest", "v3", "3", "a b"])
def test_a_bad_alias_is_refused_before_and_when_it_runs(alias):
    (said,) = register.problems(model=None, name="helper", alias=alias, resources=None)
    assert said.startswith(f"register: alias={alias!r}, expected ")
    with pytest.raises(BadRegisteredName, match="alias="):
        register.body(Work(), model=Model("/m", "d"), name="helper", alias=alias)


def test_good_names_are_not_refused():
    for name in ("a", "7b", "Python-helper_2.5"):
        assert not list(register.problems(model=None, name=name, alias="champion-2_b", resources=None))
