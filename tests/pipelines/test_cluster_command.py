"""`lfm cluster`: a profile to begin with, and the documents of one."""

import json
import re
import shlex

import pytest
import yaml

from cluster.machines import HalfUp
from cluster.manifests.rules import broken
from cluster.profile import ACCELERATOR_LABEL as KIND, PLACES
from pipelines.__main__ import COMMANDS, main
from pipelines.commands.clusters import _places, up
from pipelines.profiles import read_profile, unreadable

PIPELINE = """\
name: small
inputs:
  text: {dataset: "python://text"}
steps:
  base:
    operator: pretrain
    inputs: {data: text}
    params: {layers: 2, width: 64, max_steps: 4, batch_size: 8, length: 128}
  better:
    operator: tune
    inputs: {model: base, data: text}
    method: {name: full}
    params: {max_steps: 4, batch_size: 8, length: 128}
  endpoint:
    operator: serve
    inputs: {model: better, base: base}
    params: {name: helper, port: 8001}
    resources: {gpus_per_worker: 1, accelerator: L4, cpus_per_worker: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A user's folder, with a profile whose store every machine sees, and a pipeline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["cluster", "init"]) == 0
    text = capsys.readouterr().out.replace("s3://my-bucket/lfm", f"{tmp_path}/nfs/lfm")
    (tmp_path / "p.yaml").write_text(f"{text}\nshared: [{tmp_path}/nfs]\n")
    (tmp_path / "small.yaml").write_text(PIPELINE)
    return tmp_path


@pytest.fixture
def render(capsys):
    """Renders, and gives the documents."""

    def render_(*words):
        assert main(["cluster", "render", *words]) == 0
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return render_


@pytest.fixture
def refused(capsys):
    """Renders in vain, and gives the sentences."""

    def refused_(*words):
        assert main(["cluster", "render", *words]) == 2
        return capsys.readouterr().err.splitlines()

    return refused_


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
    assert "p.yaml': file exists, expected a new file in a folder that is there." in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["cluster", "init", str(tmp_path / "none" / "p.yaml")]) == 2
    assert "p.yaml': no such file or directory, expected a new file" in capsys.readouterr().err


@pytest.mark.parametrize(("place", "kind"), [("kuberay", "RayCluster"), ("aws", None), ("gcp", None)])
def test_the_profile_to_begin_with_can_be_rendered(place, kind, tmp_path, render, capsys):
    file = str(tmp_path / "p.yaml")
    assert main(["cluster", "init", file, "--place", place]) == 0
    capsys.readouterr()
    (document,) = render(file)
    assert document.get("kind") == kind
    assert not broken(document)


@pytest.mark.parametrize("place", ["local", "address"])
def test_other_places_have_no_documents(place, tmp_path, refused, capsys):
    file = str(tmp_path / "p.yaml")
    assert main(["cluster", "init", file, "--place", place]) == 0
    (line,) = refused(file)
    assert line == f"profile: place={place!r}, expected kuberay, aws or gcp: of no other there are documents."


def test_all_that_a_document_lacks_is_said_at_once(folder, refused):
    text = (folder / "p.yaml").read_text()
    (folder / "q.yaml").write_text(re.sub(r"^(image|storage): .*$", "", text, flags=re.MULTILINE))
    assert refused("q.yaml") == [
        "profile: image='', expected the container that everything runs in.",
        "profile: storage='', expected s3://BUCKET/PREFIX, or a folder below 'shared'.",
    ]
    (folder / "q.yaml").write_text(f"{text}\nmlflow: http://me:word@mlflow\n")
    (line,) = refused("q.yaml")
    assert "holds a password or a token" in line
    assert "word@" not in line
    assert refused() == ["lfm cluster render: no profile, expected its .yaml file. 'lfm cluster init' writes one."]


def test_a_pipeline_becomes_a_job_that_goes_on_and_a_service_of_what_it_makes(folder, render):
    job, service = render("p.yaml", "small.yaml", "--set", "base.max_steps=5", "--label", "team=research")
    assert (job["kind"], service["kind"]) == ("RayJob", "RayService")
    words = shlex.split(job["spec"]["entrypoint"])
    run = words[words.index("--as") + 1]
    assert words[:5] == ["python", "-m", "pipelines", "run", "own/small.yaml"]
    assert words[words.index("--set") + 1] == "base.max_steps=5"
    assert words[words.index("--store") + 1] == f"{folder}/nfs/lfm"
    assert job["spec"]["metadata"] == {"run": run}
    assert job["metadata"]["labels"]["team"] == "research"

    code = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"]
    assert (folder / code.removeprefix(f"file://{folder}/")).is_file(), "the package is where the document says"
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["runtime_env"] == {"working_dir": code}
    parts = {"model": f"lfm://{run}/better", "base": f"lfm://{run}/base"}
    assert application["args"] == {"store": f"{folder}/nfs/lfm", "name": "helper", **parts}
    (deployment,) = application["deployments"]
    assert deployment["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1, "label_selector": {KIND: "L4"}}

    ports = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": 8001} in ports

    again, _ = render("p.yaml", "small.yaml", "--set", "base.max_steps=5", "--label", "team=research")
    assert again == job, "the same run, whoever renders it"
    (other,) = render("p.yaml", "small.yaml", "--kind", "RayJob")
    assert other["metadata"]["name"] != job["metadata"]["name"]


def test_documents_come_one_by_one_and_as_data(folder, refused, capsys):
    assert main(["cluster", "render", "p.yaml", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["kind"] == "RayCluster"
    (line,) = refused("p.yaml", "--kind", "RayJobs")
    assert line == "--kind: 'RayJobs', expected a document that there is here. Known: RayCluster."


def test_a_pipeline_that_could_not_run_there_is_not_rendered(folder, refused):
    lines = refused("p.yaml", "small.yaml", "--set", "endpoint.resources.accelerator=H100")
    assert any("H100" in line for line in lines)


def test_what_was_started_of_a_cluster_whose_start_was_interrupted_is_not_kept_quiet(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def half(profile, _):
        raise HalfUp(profile.name)

    profile = str(tmp_path / "p.yaml")
    assert main(["cluster", "init", profile, "--place", "local"]) == 0
    name = read_profile(profile).name
    capsys.readouterr()
    monkeypatch.setattr(up, "up", interrupted)
    assert main(["cluster", "up", profile]) == 130
    ways = f"lfm cluster up {profile} goes on, lfm cluster down {profile} ends it."
    assert capsys.readouterr().out == f"cluster {name} is not up yet: {ways}\n"
    monkeypatch.setattr(_places, "located", half)
    assert main(["cluster", "status", profile]) == 1
    assert f"cluster {name} is not up, but for what was started of it" in capsys.readouterr().out
