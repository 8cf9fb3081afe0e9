"""What must hold of what a document runs: a job, or endpoints."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.manifests.finding import Rules, Said, at, strings, whole
from cluster.manifests.pods import RUN

REMOTE = r"(s3|gs|abfss|azure|https|file|local)://.+"
"""What Ray takes as the place of a package."""
PACKAGE = r"[0-9a-f]{12,64}"
"""In a package's URI: what it holds, so that nothing else can come to lie there."""
CREDENTIALS = r"://[^/?#\s]*:[^/?#\s]*@"

Document = Mapping[str, Any]


def _entrypoint(job: Document) -> Said:
    """Whoever starts it again has to go on with the run, and not begin another."""
    words = shlex.split(str(at(job, "spec.entrypoint", "")))
    for option in ("--as", "--store"):
        if option not in words[:-1]:
            yield "spec.entrypoint", f"no {option}, expected a command that goes on with its run"


def _driver(job: Document) -> Said:
    """The driver stays on the head, which gives no CPU away."""
    asked = {k for k in at(job, "spec", {}) if k.startswith("entrypointNum") or k == "entrypointResources"}
    for key in sorted(asked):
        yield f"spec.{key}", "a driver that asks for resources, expected none: it runs on the head"


def _end(job: Document) -> Said:
    """A finished job leaves no cluster behind."""
    spec = at(job, "spec", {})
    shut, rules = spec.get("shutdownAfterJobFinishes") is True, at(spec, "deletionStrategy.deletionRules") or []
    if shut == bool(rules):
        yield "spec.shutdownAfterJobFinishes", f"{shut} and {len(rules)} deletion rules, expected one of the two ways"
    if not whole(spec.get("ttlSecondsAfterFinished", 0)):
        yield "spec.ttlSecondsAfterFinished", "no whole number, expected seconds, 0 or more"
    elif spec.get("ttlSecondsAfterFinished") and not shut:
        yield "spec.ttlSecondsAfterFinished", "without shutdownAfterJobFinishes, expected it with that alone"
    if spec.get("suspend") and not shut:
        yield "spec.suspend", "without shutdownAfterJobFinishes, expected it with that alone"
    for number, rule in enumerate(rules):
        said = at(rule, "condition", {})
        if ("jobStatus" in said) == ("jobDeploymentStatus" in said):
            where = f"spec.deletionStrategy.deletionRules.{number}"
            yield where, "both statuses or none, expected jobStatus or jobDeploymentStatus"


def _retries(job: Document) -> Said:
    spec = at(job, "spec", {})
    again = spec.get("backoffLimit")
    if not whole(again):
        yield "spec.backoffLimit", f"{again!r}, expected how many clusters it is tried on again"
    elif again and (spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"):
        yield "spec.backoffLimit", f"{again} with clusterSelector or InteractiveMode, expected 0"


def _submission(job: Document) -> Said:
    spec = at(job, "spec", {})
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield "spec", "both rayClusterSpec and clusterSelector or none, expected one of them"
    if spec.get("clusterSelector") and (spec.get("suspend") or spec.get("submissionMode") == "SidecarMode"):
        yield "spec.clusterSelector", "with suspend or SidecarMode, expected neither"
    own = {"submitterPodTemplate", "submitterConfig"} & {*spec}
    if spec.get("submissionMode") == "SidecarMode" and own:
        yield f"spec.{sorted(own)[0]}", "with SidecarMode, expected none"


def _deadlines(job: Document) -> Said:
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        said = at(job, f"spec.{key}", 1)
        if not whole(said) or said == 0:
            yield f"spec.{key}", f"{said!r}, expected seconds, 1 or more"


def _environment(job: Document) -> Said:
    yield from _package("spec.runtimeEnvYAML", _read(at(job, "spec.runtimeEnvYAML", "")))


def _package(where: str, environment: Any) -> Said:
    if environment is None:
        return
    if not isinstance(environment, Mapping):
        yield where, "no mapping, expected a runtime environment"
        return
    uri = str(environment.get("working_dir", ""))
    if uri and not (re.fullmatch(REMOTE, uri) and re.search(PACKAGE, uri)):
        yield (
            where,
            f"working_dir={uri!r}, expected a URI that is named by what it holds, such as s3://BUCKET/DIGEST.zip",
        )
    if environment.get("env_vars"):
        yield where, "env_vars, expected none: everybody who may see a job sees them"


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _written(document: Document) -> Said:
    """What whoever reads a document would learn."""
    for where, text in strings(document, "document"):
        if re.search(CREDENTIALS, text):
            yield where.removeprefix("document."), "a password in a URI, expected none in a document"
    if document.get("kind") == "Secret":
        yield "kind", "a secret, expected its name alone"


def _endpoints(service: Document) -> Said:
    config = _read(at(service, "spec.serveConfigV2", ""))
    if not isinstance(config, Mapping):
        yield "spec.serveConfigV2", "no mapping, expected a config of Ray Serve as text"
        return
    for where, sentence in served(config):
        yield f"spec.serveConfigV2.{where}", sentence


def _renewed(service: Document) -> Said:
    """What serves another run is another cluster: in place, the old replica would go before the new one answers."""
    config = _read(at(service, "spec.serveConfigV2", ""))
    annotations = "spec.rayClusterConfig.headGroupSpec.template.metadata.annotations"
    said = at(service, annotations, {}).get(RUN)
    for where, text in strings(config, "args"):
        named = re.fullmatch(r"lfm://(.+)/[^/]+", text)
        if named and named[1] != said:
            yield annotations, f"{RUN}={said!r}, expected {named[1]!r} as in its {where.rpartition('.')[2]}"


def _port(service: Document) -> Said:
    """Kubernetes sends requests to the head's port that is called ``serve``."""
    wanted = at(_read(at(service, "spec.serveConfigV2", "")), "http_options.port", 8000)
    containers = at(service, "spec.rayClusterConfig.headGroupSpec.template.spec.containers") or [{}]
    ports = {p.get("name"): p.get("containerPort") for p in containers[0].get("ports", [])}
    said = ports.get("serve")
    if said != wanted:
        yield "spec.rayClusterConfig.headGroupSpec.template", f"port serve={said}, expected {wanted} as in its config"
    elif list(ports.values()).count(said) > 1:
        yield "spec.serveConfigV2.http_options.port", f"{said}, expected one on which nothing of Ray listens"


def served(config: Document) -> Iterator[tuple[str, str]]:
    """What must hold of a config of Ray Serve."""
    applications = config.get("applications") or []
    if not applications:
        yield "applications", "none, expected what is served"
    for key in ("name", "route_prefix"):
        said = [a.get(key) for a in applications]
        for value in sorted({str(s) for s in said if said.count(s) > 1 or s is None}):
            yield "applications", f"{key}={value!r}, expected one of its own for each"
    for number, application in enumerate(applications):
        if not re.fullmatch(r"[\w.]+:\w+", str(application.get("import_path", ""))):
            yield f"applications.{number}.import_path", "none, expected module:function"
        yield from _package(f"applications.{number}.runtime_env", application.get("runtime_env"))


JOB_RULES: Rules = {
    "entrypoint": _entrypoint,
    "driver": _driver,
    "end": _end,
    "retries": _retries,
    "submission": _submission,
    "deadlines": _deadlines,
    "package": _environment,
}
SERVICE_RULES: Rules = {"endpoints": _endpoints, "renewed": _renewed, "port": _port}
SERVE_RULES: Rules = {"endpoints": served}
ANY_RULES: Rules = {"written-secrets": _written}
