"""Documents of any profile are what their schemas and our rules ask for."""

import gzip
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from cluster.manifests.job import named
from cluster.manifests.rendering import BrokenDocument, documents, lacking
from cluster.manifests.rules import broken
from cluster.manifests.schemas import launcher_schema, misfits, of_kubernetes, serve_misfits, strict
from cluster.profile import CLOUDS, Group, Head, Profile
from tests.cluster.profiles import HIDDEN, jobs, profiles
from tests.cluster.test_rules import FIELDS, GONE, JOB, SOUND, changed

FILES = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def kubernetes(kind):
    """The strict schema of a kind of resource."""
    file = Path(__file__).parent / "kuberay" / f"{FILES[kind]}.v1.schema.json.gz"
    return of_kubernetes(json.loads(gzip.decompress(file.read_bytes())))


SCHEMAS = {**{kind: kubernetes(kind) for kind in FILES}, "launcher": launcher_schema()}
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@st.composite
def rendered(draw):
    """A profile with its documents, some of them with a job."""
    profile = draw(profiles())
    job = draw(st.one_of(st.none(), jobs(profile)))
    return profile, documents(profile, job)


def check(profile, found):
    """A profile can be rendered, its documents survive being written, fit their schemas and break no rule."""
    assert not list(lacking(profile))
    for kind, document in found.items():
        assert yaml.safe_load(yaml.safe_dump(document, sort_keys=False)) == document
        assert kind == "serve" or not misfits(document, SCHEMAS[kind])
        assert not broken(document)


@pytest.mark.slow
@settings(max_examples=100, **QUIET)
@given(rendered())
def test_documents_of_any_profile_fit_their_schemas_and_break_no_rule(made):
    check(*made)


@pytest.mark.soak
@settings(max_examples=1000, **QUIET)
@given(rendered())
def test_documents_of_many_profiles_do(made):
    check(*made)


@pytest.mark.ray
@settings(max_examples=15, **QUIET)
@given(st.data())
def test_what_is_served_is_what_ray_serve_reads(data):
    profile = data.draw(profiles())
    made = documents(profile, data.draw(jobs(profile).filter(lambda j: j.endpoint is not None)))
    config = made["serve"] if "serve" in made else yaml.safe_load(made["RayService"]["spec"]["serveConfigV2"])
    assert not serve_misfits(config)


@pytest.mark.ray
@settings(max_examples=15, **QUIET)
@given(profiles(places=("kuberay",)))
def test_the_autoscaler_reads_of_a_cluster_what_the_profile_says(profile):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    if not profile.groups:
        return
    read = _derive_autoscaling_config_from_ray_cr(documents(profile)["RayCluster"])["available_node_types"]
    assert {*read} == {"headgroup", *profile.groups}
    for name, group in profile.groups.items():
        kinds = {"GPU": group.gpus, f"accelerator_type:{group.accelerator}": 1} if group.gpus else {}
        assert read[name]["resources"] == {"CPU": group.cpus, "memory": int(group.memory), **kinds}
        assert (read[name]["min_workers"], read[name]["max_workers"]) == (group.min_nodes, group.max_nodes)
        assert read[name]["labels"]["ray.io/market-type"] == group.market


@pytest.mark.ray
@settings(max_examples=15, **QUIET)
@given(profiles(places=CLOUDS))
def test_the_launcher_takes_its_document(profile):
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(documents(profile)["launcher"])
    validate_config(made)
    assert made["setup_commands"] == []
    assert {*made["available_node_types"]} == {"head", *profile.groups}


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("RayCluster", "spec.enableInTreeAutoscalling", True),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplica", 1),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", "1"),
        ("RayCluster", "spec.headGroupSpec.template.spec.restartPolicies", "Never"),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.resources.limit", {}),
        ("RayCluster", "spec.headGroupSpec.template.spec.tolerations", [{"keys": "nvidia.com/gpu"}]),
        ("RayCluster", "spec.autoscalerOptions.version", "v3"),
        ("RayCluster", "spec.headGroupSpec.template", GONE),
        ("RayCluster", "metadata", GONE),
        ("RayJob", "spec.backoffLimits", 1),
        ("RayJob", "spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("RayJob", "spec.ttlSecondsAfterFinished", None),
        ("RayService", "spec.rayClusterSpec", {}),
        ("RayService", "spec.serveConfigV2", {"applications": []}),
        ("launcher", "available_node_types.cpu.max_worker", 1),
        ("launcher", "available_node_types.cpu.resources.CPU", 1.5),
        ("launcher", "min_workers", 1),
        ("launcher", "provider", GONE),
    ],
)
def test_a_schema_refuses_what_it_does_not_know(kind, place, value):
    assert not misfits(SOUND[kind], SCHEMAS[kind])
    assert misfits(changed(SOUND[kind], {place: value}), SCHEMAS[kind])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("proxy_locations", "EveryNode"),
        ("http_options.ports", 8000),
        ("applications.0.route", "/"),
        ("applications.0.deployments.0.num_replica", 1),
        ("applications.0.deployments.0.ray_actor_options.num_gpu", 1),
        ("applications.0.deployments.0.num_replicas", -1),
        ("applications.0.import_path", "endpoints"),
        ("applications.0.runtime_env", {"working_dir": "."}),
    ],
)
def test_ray_serve_does_not_read_what_is_misspelt(place, value):
    assert not serve_misfits(SOUND["serve"])
    found = serve_misfits(changed(SOUND["serve"], {place: value}))
    assert any(place in f.where or f.where in place for f in found)


def test_a_schema_of_kubernetes_is_made_strict():
    text = {"type": "string", "nullable": True}
    amount = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = {"type": "object", "properties": {"a": text}, "x-kubernetes-preserve-unknown-fields": True}
    made = strict({"type": "object", "properties": {"text": text, "amount": amount, "free": free}})
    assert not misfits({"text": None, "amount": 1, "free": {"a": "b", "c": 1}}, made)
    assert not misfits({"amount": "1Gi"}, made)
    assert [f.where for f in misfits({"amount": 1.5, "free": {"a": 1}}, made)] == ["amount", "amount", "free.a"]
    assert misfits({"texts": "x"}, made)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"place": "local"}, "profile: place='local', expected kuberay, aws or gcp"),
        ({"place": "address", "address": "ray:6379"}, "profile: place='address', expected kuberay, aws or gcp"),
        ({"image": ""}, "profile: image='', expected the container that everything runs in."),
        ({"storage": ""}, "profile: storage='', expected s3://BUCKET/PREFIX"),
        ({"storage": "/tmp/lfm"}, "profile: storage='/tmp/lfm', expected s3://BUCKET/PREFIX, or a folder below"),
        ({"shared": ("/",)}, "profile: shared=('/',), expected folders below '/'"),
        ({"head": Head(cpus=0.5, memory_gib=1)}, "profile: head.cpus=0.5, expected a whole number"),
        ({"groups": {"cpu": Group(cpus=2.5, memory_gib=1)}}, "profile: groups.cpu.cpus=2.5, expected a whole number"),
        ({"place": "gcp", "region": "europe-west4", "project": "p"}, "profile: zone='', expected the zone"),
        ({"place": "aws", "region": "eu-west-1", "token": "env:T"}, "profile: token='env:T', expected file:PATH"),
        (
            {"environment": {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "9"}},
            "profile: environment.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S='9', expected none: it follows from the rest",
        ),
        ({"environment": {"a b": "x"}}, "profile: environment='a b', expected names of letters, digits and '_'."),
        ({"environment": {"HF_TOKEN": HIDDEN}}, "profile: environment.HF_TOKEN='...', expected no secret"),
        ({"place": "aws", "region": "eu-west-1", "secrets": ("s",)}, "profile: secrets=('s',), expected none outside"),
        (
            {"place": "aws", "region": "eu-west-1", "head": replace(FIELDS["head"], node_selector={"a": "b"})},
            "profile: head.node_selector={'a': 'b'}, expected none outside of Kubernetes.",
        ),
    ],
)  # fmt: skip
def test_what_keeps_a_profile_from_being_rendered_is_named(fields, said):
    (only,) = lacking(Profile(**{"place": "kuberay", **FIELDS, **fields}))
    assert str(only).startswith(said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"environment": {"HF_TOKEN": HIDDEN}}, "HF_TOKEN with a value, expected no secret in a document."),
        ({"environment": {"DB": f"mysql://me:{HIDDEN}@db"}}, "a password in a URI, expected none in a document."),
        ({"environment": {"RAY_AUTH_TOKEN": HIDDEN}}, "RAY_AUTH_TOKEN with a value, expected no secret in a document."),
    ],
)
def test_what_a_profile_must_not_say_is_refused_without_repeating_it(fields, said):
    for place in ({"place": "kuberay"}, {"place": "aws", "region": "eu-west-1"}):
        profile = Profile(**{**FIELDS, **fields}, **place)
        with pytest.raises(BrokenDocument) as refused:
            documents(profile)
        assert HIDDEN not in str(refused.value)
        assert said in str(refused.value)


def test_a_token_is_only_ever_referred_to(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN", HIDDEN)
    (tmp_path / "token").write_text(HIDDEN)
    places = {"kuberay": {}, "aws": {"region": "eu-west-1"}}
    for place, token in (("kuberay", "env:TOKEN"), ("kuberay", "secret:ray"), ("aws", f"file:{tmp_path}/token")):
        made = documents(Profile(**{**FIELDS, "place": place, "token": token, **places[place]}), JOB)
        assert HIDDEN not in yaml.safe_dump_all(made.values())


def test_a_label_that_no_label_can_be_is_refused_by_name():
    group = replace(FIELDS["groups"]["cpu"], labels={"team": "research and more"})
    with pytest.raises(BrokenDocument) as refused:
        documents(Profile(**{**FIELDS, "groups": {"cpu": group}}, place="kuberay"))
    where = "RayCluster spec.workerGroupSpecs.0.labels"
    assert str(refused.value) == f"{where}: 'team': 'research and more', expected what Kubernetes takes as a label."


def test_which_documents_there_are():
    assert {*documents(Profile(place="kuberay", **FIELDS))} == {"RayCluster"}
    assert {*documents(Profile(place="kuberay", **FIELDS), JOB)} == {"RayJob", "RayService"}
    assert {*documents(Profile(place="kuberay", **FIELDS), replace(JOB, endpoint=None))} == {"RayJob"}
    assert {*documents(Profile(place="aws", region="eu-west-1", **FIELDS), JOB)} == {"launcher", "serve"}


def test_a_job_says_its_words_and_its_code_once():
    spec = SOUND["RayJob"]["spec"]
    assert tuple(shlex.split(spec["entrypoint"])) == JOB.words
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"working_dir": JOB.package}
    (application,) = SOUND["serve"]["applications"]
    assert application["runtime_env"] == {"working_dir": JOB.package}
    assert application["args"] == {"store": "s3://bucket/lfm", "name": "helper", "model": "lfm://small-expert-1/merged"}


def test_nobody_steps_on_the_head_unless_it_says_so():
    def cpus(profile):
        return documents(profile)["RayCluster"]["spec"]["headGroupSpec"]["resources"]["CPU"]

    whole = Profile(place="kuberay", **FIELDS)
    assert cpus(whole) == "0"
    assert cpus(replace(whole, head=Head(cpus=4, memory_gib=16, steps=True))) == "4"
    assert cpus(replace(whole, groups={})) == "4"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("small-expert", "small-expert"),
        ("20261128-120000-small", "run-20261128-120000-small-"),
        ("A model of mine", "a-model-of-mine-"),
        ("x" * 60, "x" * 38 + "-"),
        ("模型", "run-"),
    ],
)
def test_any_text_becomes_a_name_that_no_other_text_does(text, name):
    made = named(text, at_most=47)
    assert made.startswith(name)
    assert len(made) <= 47
    assert made != named(f"{text}!", at_most=47)
