"""`lfm cluster render`: the documents that make a cluster of a profile, and run and serve a pipeline there."""

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.capacity import Capacity
from cluster.manifests.job import Job, Served
from cluster.manifests.rendering import documents, lacking
from cluster.package import uri_of
from cluster.profile import Profile
from lfm.errors import LfmError
from pipelines.beginning import described, inputs_of
from pipelines.commands._output import printed
from pipelines.commands._planned import read_plan
from pipelines.credentials import check_uri
from pipelines.placing import placed
from pipelines.plan import Plan
from pipelines.problems import SpecError, near
from pipelines.profiles import read_profile
from pipelines.submission import entrypoint, key_of, packed, run_of

ABOUT = {
    "RayCluster": "a cluster that stays until it is deleted",
    "RayJob": "runs {run} on a cluster that goes when it has ended",
    "RayService": "serves what {run} has made: apply it once that is done",
    "launcher": "for 'ray up'",
    "serve": "for 'serve deploy' once {run} is done",
}


class NoSuchDocument(LfmError, ValueError):
    """A kind of document that there is none of here."""

    def __init__(self, kind: str, known: tuple[str, ...]) -> None:
        super().__init__(kind, known)
        self.kind, self.known = kind, known

    def __str__(self) -> str:
        return f"--kind: {self.kind!r}, expected a document that there is here. {near(self.kind, self.known)}"


class _Readable(yaml.SafeDumper):
    """Texts of several lines, such as a config inside of a document, stay lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text.rstrip("\n") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)


def act(arguments: Namespace) -> int:
    """Print the documents of a profile, and of a pipeline on it."""
    if not arguments.profile:
        raise SpecError(("lfm cluster render: no profile, expected its .yaml file. 'lfm cluster init' writes one.",))
    profile = read_profile(arguments.profile)
    wrong = tuple(map(str, lacking(profile)))
    if wrong:
        raise SpecError(wrong)
    for field in ("storage", "mlflow"):
        check_uri(field, getattr(profile, field), "Put it into a secret, whose name 'secrets' takes.")
    job = _job(arguments, profile) if arguments.pipeline else None
    made = documents(profile, job)
    if arguments.kind:
        if arguments.kind not in made:
            raise NoSuchDocument(arguments.kind, tuple(made))
        made = {arguments.kind: made[arguments.kind]}
    if arguments.json:
        return printed(list(made.values()))
    print(written(made, job.run if job is not None else ""), end="")
    return 0


def written(made: Mapping[str, Mapping[str, Any]], run: str = "") -> str:
    """Documents as YAML, each with a line that says what it is for."""
    texts = []
    for kind, document in made.items():
        about = f"# {kind}: {ABOUT[kind].format(run=run)}\n"
        texts.append(about + yaml.dump(document, Dumper=_Readable, sort_keys=False, width=sys.maxsize))
    return "---\n".join(texts)


def _job(arguments: Namespace, profile: Profile) -> Job:
    """The run that `lfm submit` of the same pipeline would start, so that both go on with one another's."""
    made, storage = read_plan(arguments, profile=profile)
    run = run_of(storage, key_of({n: described(made, n) for n in made.steps}, inputs_of(made), profile), made.spec.name)
    package = packed(arguments.pipeline, arguments.profile, made)
    new = storage.put_if_absent(package.key, package.data)
    print(f"{package}: {'uploaded' if new else 'there already'}", file=sys.stderr)
    words = entrypoint(arguments, made, profile, storage, run)
    return Job(
        run=run,
        words=words.words,
        package=uri_of(storage.uri, package.key),
        endpoint=_endpoint(made, run, profile.capacity()),
        labels=words.labels,
    )


def _endpoint(made: Plan, run: str, there: Capacity) -> Served | None:
    """What a plan serves on such machines; a plan has one endpoint at most."""
    for step in made.steps.values():
        if step.operator != "serve":
            continue
        asks, params = step.resources, step.params
        return Served(
            name=str(params["name"]),
            inputs={
                k: f"lfm://{run}/{n}" if n in made.steps else made.inputs[str(n)].uri for k, n in step.inputs.items()
            },
            cpus=asks.cpus_per_worker,
            gpus=asks.gpus_per_worker,
            labels=placed(asks, there).labels,
            memory=asks.memory,
            port=int(str(params["port"])),
        )
    return None
