"""Hypothesis draws profiles of any place, and jobs for them, all of which can be rendered."""

import string

from hypothesis import strategies as st

from cluster.entrypoint import Entrypoint
from cluster.manifests.job import Job, Served
from cluster.profile import MAX_NAME, Group, Head, Profile

LETTERS, DIGITS = string.ascii_lowercase, string.digits
ACCELERATORS = ("L4", "A100", "H100", "RTX-PRO-6000")
HIDDEN = "hunter2-must-not-appear"
"""A value that no document may hold."""

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
label_values = st.text(string.ascii_letters + DIGITS, max_size=63)
label_keys = st.tuples(st.sampled_from(["", "team/", "cloud.example.com/"]), st.text(LETTERS, min_size=1, max_size=63))
labels = st.dictionaries(label_keys.map("".join), label_values, max_size=3)


@st.composite
def names(draw, most=MAX_NAME):
    """Names as profiles take them."""
    inner = draw(st.text(LETTERS + DIGITS + "-", max_size=most - 2))
    return draw(st.sampled_from(LETTERS)) + inner + draw(st.sampled_from(LETTERS + DIGITS))


@st.composite
def machines(draw, place):
    """The fields of any machine."""
    made = {
        "cpus": draw(st.integers(1, 256)),
        "memory_gib": draw(st.one_of(st.integers(1, 2048), st.floats(0.5, 64))),
        "disk_gib": draw(st.sampled_from([0, 100, 0.5])),
        "labels": draw(labels),
        "price_per_hour": draw(st.floats(0, 40)),
        "type": "" if place == "kuberay" else draw(st.sampled_from(["m7i.xlarge", "n2-standard-4"])),
    }
    if place == "kuberay" and draw(st.booleans()):
        made["node_selector"] = draw(labels)
    return made


@st.composite
def groups(draw, place):
    """Groups by name; each spot one may have a fallback that holds as much."""
    made: dict[str, Group] = {}
    for name in draw(st.lists(names().filter(lambda n: n != "head"), unique=True, max_size=4)):
        fields = draw(machines(place))
        if draw(st.booleans()):
            fields |= {"gpus": draw(st.integers(1, 8)), "accelerator": draw(st.sampled_from(ACCELERATORS))}
        most = draw(st.integers(1, 1000))
        fields |= {"max_nodes": most, "min_nodes": draw(st.sampled_from([0, 0, most])),
                   "idle_timeout_s": draw(st.floats(0.5, 7200))}  # fmt: skip
        made[name] = Group(**fields)
        spot = f"{name[: MAX_NAME - 5]}-spot"
        if len(made) < 6 and spot not in made and draw(st.booleans()):
            back = draw(st.sampled_from(["", name]))
            made[spot] = Group(**fields, market="spot", fallback=back)
    return made


@st.composite
def profiles(draw, places=("kuberay", "aws", "gcp")):
    """Profiles of which documents can be made."""
    place = draw(st.sampled_from(places))
    shared = draw(st.sampled_from([(), ("/nfs",), ("/nfs", "/data/hub")]))
    head = draw(machines(place))
    if draw(st.booleans()):
        head |= {"steps": True}
        if draw(st.booleans()):
            head |= {"gpus": 1, "accelerator": "L4"}
    kuberay = place == "kuberay"
    return Profile(
        name=draw(names()),
        place=place,
        head=Head(**head),
        groups=draw(groups(place)),
        storage=draw(st.sampled_from(["s3://bucket/lfm", *(f"{s}/lfm" for s in shared)])),
        mlflow=draw(st.sampled_from(["", "own", "http://mlflow:5000"])),
        shared=shared,
        image=draw(st.sampled_from(["registry.example.com/lfm:1", "lfm@sha256:" + "0" * 64])),
        pip=draw(st.sampled_from([(), ("sacremoses==0.1",)])),
        environment=draw(st.dictionaries(st.sampled_from(["HF_HOME", "TMPDIR", "LC_ALL"]), texts, max_size=2)),
        secrets=draw(st.sampled_from([(), ("lfm-storage",)])) if kuberay else (),
        token=draw(st.sampled_from(["file:~/.ray/auth_token", *(("", "secret:ray", "env:TOKEN") if kuberay else ())])),
        namespace=draw(names(20)),
        service_account=draw(st.sampled_from(["", "lfm"])),
        region="" if kuberay else "eu-west-1",
        zone="europe-west4-a" if place == "gcp" else "",
        project="p" if place == "gcp" else "",
        drain_s=draw(st.floats(10, 3600)),
    )


@st.composite
def jobs(draw, profile):
    """Jobs for a profile."""
    run = draw(st.one_of(names(60), texts.filter(str.strip)))
    package = draw(st.sampled_from(["", f"s3://bucket/lfm/packages/{'0123456789abcdef' * 4}.zip"]))
    words = Entrypoint(pipeline="own/p.yaml", run=run, store=profile.storage, until=draw(names())).words
    endpoint = Served(
        name=draw(st.one_of(names(60), texts.filter(str.strip))),
        inputs={"model": f"lfm://{run}/merged", **draw(st.sampled_from([{}, {"base": "hf://x/y"}]))},
        cpus=draw(st.sampled_from([0.5, 1, 4])),
        gpus=draw(st.sampled_from([0, 0.5, 1])),
        labels=draw(st.sampled_from([{}, {"ray.io/accelerator-type": "H100"}, {"ray.io/accelerator-type": "!in(L4)"}])),
        memory=draw(st.sampled_from([0, 1 << 30])),
        port=draw(st.integers(20000, 65535)),
    )
    return Job(run=run, words=words, package=package, endpoint=draw(st.sampled_from([None, endpoint])),
               labels=draw(labels))  # fmt: skip
