"""Profile -> all of its documents, or what keeps it from having any."""

import re
from collections.abc import Iterator
from typing import Any

from cluster.manifests.job import Job, runtime_env
from cluster.manifests.kuberay import ray_cluster, ray_job, ray_service
from cluster.manifests.launcher import launcher
from cluster.manifests.pod_rules import OURS, VARIABLE, secret
from cluster.manifests.pods import DRAIN
from cluster.manifests.rules import broken
from cluster.manifests.serve import serve_config
from cluster.profile import CLOUDS, STORES, Profile, ProfileError, part_of
from lfm.errors import LfmError

KINDS = ("RayCluster", "RayJob", "RayService", "launcher", "serve")


class BrokenDocument(LfmError, ValueError):
    """A document that would not do what it should: every rule that it breaks, each a sentence."""

    def __init__(self, kind: str, sentences: tuple[str, ...]) -> None:
        super().__init__(kind, sentences)
        self.kind, self.sentences = kind, sentences

    def __str__(self) -> str:
        return "\n".join(f"{self.kind} {sentence}." for sentence in self.sentences)


def documents(profile: Profile, job: Job | None = None) -> dict[str, dict[str, Any]]:
    """What makes a cluster of a profile, by kind.

    Without a job a cluster for any; with one what runs it, and what serves what it makes.

    Raises:
        BrokenDocument: What a profile says breaks a rule, as a label does that no label can be.
    """
    made: dict[str, dict[str, Any]] = {}
    if profile.place in CLOUDS:
        made["launcher"] = launcher(profile)
        if job is not None and job.endpoint is not None:
            environment = runtime_env(job.package, profile.pip)
            made["serve"] = serve_config(job.endpoint, store=profile.storage, environment=environment)
    elif job is None:
        made["RayCluster"] = ray_cluster(profile)
    else:
        made["RayJob"] = ray_job(profile, job)
        if job.endpoint is not None:
            made["RayService"] = ray_service(profile, job)
    for kind, document in made.items():
        if found := broken(document):
            raise BrokenDocument(kind, tuple(map(str, found)))
    return made


def lacking(profile: Profile) -> Iterator[ProfileError]:
    """Everything that a profile's documents could not do without."""
    if profile.place not in (*CLOUDS, "kuberay"):
        yield ProfileError("profile", "place", profile.place, "kuberay, aws or gcp: of no other there are documents")
        return
    if not profile.image:
        yield ProfileError("profile", "image", "", "the container that everything runs in")
    if not profile.storage:
        yield ProfileError("profile", "storage", "", "s3://BUCKET/PREFIX, or a folder below 'shared'")
    elif not profile.readable(profile.storage):
        yield ProfileError("profile", "storage", profile.storage, STORES)
    if any(not path.strip("/") or ":" in path for path in profile.shared):
        yield ProfileError("profile", "shared", profile.shared, "folders below '/', which a container can mount")
    yield from _variables(profile)
    if profile.place == "gcp" and not profile.zone:
        yield ProfileError("profile", "zone", "", "the zone, such as europe-west4-a, for place: gcp")
    if profile.place in CLOUDS and not profile.token.startswith("file:"):
        yield ProfileError("profile", "token", profile.token, "file:PATH, which is copied to the machines")
    if profile.place in CLOUDS and profile.secrets:
        yield ProfileError("profile", "secrets", profile.secrets, "none outside of Kubernetes")
    for group, machine in profile.machines.items():
        name = part_of(group)
        if machine.cpus != int(machine.cpus):
            allowed = "a whole number: Ray counts a node's CPUs so"
            yield ProfileError("profile", f"{name}.cpus", machine.cpus, allowed)
        if profile.place in CLOUDS and machine.node_selector:
            yield ProfileError("profile", f"{name}.node_selector", machine.node_selector, "none outside of Kubernetes")


def _variables(profile: Profile) -> Iterator[ProfileError]:
    for name, value in profile.environment.items():
        if not re.fullmatch(VARIABLE, name):
            yield ProfileError("profile", "environment", name, "names of letters, digits and '_'")
        elif secret(name):  # so that its value is not repeated
            allowed = "no secret, but the name of a Kubernetes secret that holds it, under 'secrets'"
            yield ProfileError("profile", f"environment.{name}", "...", allowed)
        elif name in (DRAIN, *OURS):
            yield ProfileError("profile", f"environment.{name}", value, "none: it follows from the rest of the profile")
