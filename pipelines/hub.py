"""Inputs from the Hugging Face hub: ``hf://name[@revision]``, pinned to a commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from operators.artifact import Artifact, Dataset
from pipelines.model_files import lacking, needed
from pipelines.plan import InputProblem

SCHEME = "hf://"
ASK_S = 30

A = TypeVar("A", bound=Artifact)


def pin(artifact: A) -> A:
    """The commit that the name stands for now.

    Raises:
        InputProblem: The hub has no such thing, does not let us read it, or it is no model or adapter in safetensors.
    """
    import huggingface_hub

    name, revision, kind = _parts(artifact)
    with _answered(artifact):
        hub = huggingface_hub.HfApi()
        info: Any = hub.repo_info(name, revision=revision or None, repo_type=kind, timeout=ASK_S)
        if info.gated:
            hub.auth_check(name, repo_type=kind)
    problem = lacking(type(artifact), [s.rfilename for s in info.siblings or ()])
    if problem is not None:
        raise InputProblem(artifact.uri, *problem)
    return replace(artifact, uri=f"{SCHEME}{name}@{info.sha}", digest=str(info.sha))


def fetch(artifact: A) -> A:
    """The same with a local folder, in the hub's own cache.

    Raises:
        InputProblem: The hub does not give it to us.
    """
    import huggingface_hub

    name, revision, kind = _parts(artifact)
    with _answered(artifact):
        names = huggingface_hub.HfApi().list_repo_files(name, revision=revision or None, repo_type=kind)
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, repo_type=kind, allow_patterns=needed(type(artifact), names)
        )
    return replace(artifact, uri=folder)


def _parts(artifact: Artifact) -> tuple[str, str, str]:
    """Name, revision and kind of repository."""
    name, _, revision = artifact.uri.removeprefix(SCHEME).partition("@")
    return name, revision, "dataset" if isinstance(artifact, Dataset) else "model"


@contextmanager
def _answered(artifact: Artifact) -> Iterator[None]:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the client that the library uses
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        fix = "Ask for access on its page, then set HF_TOKEN to a token of that account."
        raise InputProblem(artifact.uri, "is gated, and the hub does not let this account read it", fix) from error
    except RepositoryNotFoundError as error:
        fix = "Check the name; for a private or gated one set HF_TOKEN."
        raise InputProblem(artifact.uri, "is not on the hub, or is private", fix) from error
    except RevisionNotFoundError as error:
        raise InputProblem(artifact.uri, "has no such revision", "Check what follows the @.") from error
    except (HTTPError, HFValidationError, OSError) as error:
        what = f"could not be looked up ({str(error).strip().partition(chr(10))[0]})"
        raise InputProblem(artifact.uri, what, "Check the name, the network and HF_ENDPOINT.") from error
