"""Document -> what is wrong with it: what no schema says, of KubeRay, of Ray's launcher, of Ray Serve, and of ours.

A rule is a function with a name. What KubeRay itself would refuse only once the document is there is refused here.
"""

from collections.abc import Iterator

from cluster.manifests.cluster_rules import CLUSTER_RULES, Cluster
from cluster.manifests.finding import Document, Finding, Rules, at
from cluster.manifests.job_rules import ANY_RULES, JOB_RULES, SERVE_RULES, SERVICE_RULES
from cluster.manifests.launcher_rules import LAUNCHER_RULES
from cluster.manifests.pod_rules import POD_RULES

CLUSTERS = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}
"""Where documents of each kind describe a cluster."""


def broken(document: Document) -> tuple[Finding, ...]:
    """Every rule that a document breaks, with the place where it does."""
    return tuple(_broken(document))


def kind_of(document: Document) -> str:
    """``RayCluster``, ``RayJob``, ``RayService``, ``launcher`` or ``serve``; anything else as its own ``kind`` says."""
    if "cluster_name" in document:
        return "launcher"
    return "serve" if "applications" in document else str(document.get("kind", ""))


def _broken(document: Document) -> Iterator[Finding]:
    kind = kind_of(document)
    yield from _of(ANY_RULES, document)
    yield from _of({"launcher": LAUNCHER_RULES, "serve": SERVE_RULES}.get(kind, {}), document)
    yield from _of({"RayJob": JOB_RULES, "RayService": SERVICE_RULES}.get(kind, {}), document)
    where = CLUSTERS.get(kind)
    if where is None or at(document, where) is None:
        return
    cluster = Cluster(kind, where, at(document, where), document)
    yield from _of(CLUSTER_RULES, cluster)
    for group in cluster.groups:
        yield from _of(POD_RULES, group)


def _of(rules: Rules, subject: object) -> Iterator[Finding]:
    for name, rule in rules.items():
        yield from (Finding(name, where, sentence) for where, sentence in rule(subject))
