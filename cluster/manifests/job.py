"""What documents say besides the profile: the run that they start, and what it serves."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One endpoint, as a step of a pipeline declares it.

    Attributes:
        name: What requests call the model.
        inputs: What it is made of, by the names of `serve`'s inputs: each where it is found, such as
            ``lfm://RUN/STEP``.
        cpus: CPUs of its replica.
        gpus: GPUs of it.
        labels: The labels in Ray that its node has to have, such as which GPU that has.
        memory: Bytes of host memory; 0 asks for none.
        port: Where it listens.
    """

    name: str
    inputs: Mapping[str, str]
    cpus: float = 1.0
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0
    port: int = 8000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a pipeline.

    Attributes:
        run: Its name; whoever starts it again under this name goes on with it.
        words: The command that drives it (`cluster.entrypoint`).
        package: Where its code is, as one URI that says what is in it; empty takes what the image holds.
        endpoint: What it serves; None serves nothing.
        labels: What its costs are told apart by.
    """

    run: str
    words: tuple[str, ...]
    package: str = ""
    endpoint: Served | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def named(text: str, *, at_most: int) -> str:
    """A name for Kubernetes out of any other: where it had to be changed, with a few letters that tell such apart."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = plain if re.match(r"[a-z]", plain) else f"run-{plain}".strip("-")
    if plain == text and len(plain) <= at_most:
        return plain
    letters = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{plain[: at_most - len(letters) - 1].rstrip('-')}-{letters}"


def runtime_env(package: str, pip: tuple[str, ...]) -> dict[str, Any]:
    """What Ray brings to every process of a job."""
    return {**({"working_dir": package} if package else {}), **({"pip": list(pip)} if pip else {})}
