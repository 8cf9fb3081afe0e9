"""`lfm cluster`: a profile to begin with."""

import re

import pytest

from cluster.profile import PLACES
from pipelines.__main__ import COMMANDS, main
from pipelines.profiles import read_profile, unreadable


@pytest.mark.parametrize("place", PLACES)
def test_the_profile_to_begin_with_is_one(place, tmp_path, capsys):
    file = str(tmp_path / "p.yaml")
    assert main(["cluster", "init", file, "--place", place]) == 0
    assert f"a profile for {place}" in capsys.readouterr().out
    made = read_profile(file)
    assert made.place == place
    assert made.storage
    assert not list(unreadable(made, store=made.storage, mlflow="own"))


@pytest.mark.parametrize("place", PLACES)
def test_what_it_has_as_a_comment_can_be_said(place, tmp_path, capsys):
    assert main(["cluster", "init", "--place", place]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "p.yaml"
    file.write_text(re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", text, flags=re.MULTILINE))
    assert read_profile(str(file)).mlflow == "http://mlflow:5000"


def test_the_command_knows_every_place():
    options = dict(COMMANDS["cluster"][2])
    assert options["--place"]["choices"] == [*PLACES]


def test_no_file_is_overwritten(tmp_path, capsys):
    file = tmp_path / "p.yaml"
    file.write_text("mine")
    assert main(["cluster", "init", str(file)]) == 2
    assert "there is one already, expected a new file" in capsys.readouterr().err
    assert file.read_text() == "mine"
