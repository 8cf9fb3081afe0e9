"""Inputs from the Hugging Face hub: ``hf://name[@revision]``, pinned to a commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from operators.artifact import Artifact, Dataset
from pipelines.credentials import masked
from pipelines.inputs.model_files import headed, lacking, needed
from pipelines.inputs.outlines import outline
from pipelines.plan import InputProblem

SCHEME = "hf://"
ASK_S = 30
PARTIAL = 206  # HTTP's word for a range, as it was asked for

A = TypeVar("A", bound=Artifact)


def check(artifact: A) -> A | None:
    """The same with a local folder that holds the headers of its files, where these can be told from a part of them.

    Raises:
        InputProblem: As `pin`.
    """
    info = _looked_up(artifact, sizes=True)
    name, _, kind = _parts(artifact)
    sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or ()}
    with _answered(artifact):
        folder = outline(
            f"hf/{kind}s/{name}@{info.sha}",
            {n: sizes[n] for n in headed(type(artifact), list(sizes))},
            partial(_part, name, str(info.sha), kind),
        )
    return None if folder is None else replace(artifact, uri=str(folder))


def pin(artifact: A) -> A:
    """The commit that the name stands for now.

    Raises:
        InputProblem: The hub has no such thing, does not let us read it, or it is no model or adapter in safetensors.
    """
    sha = _looked_up(artifact).sha
    return replace(artifact, uri=f"{SCHEME}{_parts(artifact)[0]}@{sha}", digest=str(sha))


def _looked_up(artifact: Artifact, *, sizes: bool = False) -> Any:
    """What the hub says of a repository that we may read and that holds what it should."""
    import huggingface_hub

    name, revision, kind = _parts(artifact)
    with _answered(artifact):
        hub = huggingface_hub.HfApi()
        info: Any = hub.repo_info(name, revision=revision or None, repo_type=kind, timeout=ASK_S, files_metadata=sizes)
        if info.gated:
            hub.auth_check(name, repo_type=kind)
    problem = lacking(type(artifact), [s.rfilename for s in info.siblings or ()])
    if problem is not None:
        raise InputProblem(artifact.uri, *problem)
    return info


def _part(name: str, sha: str, kind: str, file: str, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` up to before `stop`."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    if start >= stop:
        return b""
    url = huggingface_hub.hf_hub_url(name, file, repo_type=kind, revision=sha)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with huggingface_hub.get_session().stream("GET", url, headers=headers, timeout=ASK_S, follow_redirects=True) as got:
        hf_raise_for_status(got)
        ahead = start if got.status_code == PARTIAL else 0
        data = bytearray()
        for chunk in got.iter_bytes():
            data += chunk
            if ahead + len(data) >= stop:  # who does not know of ranges sends all
                break
    return bytes(data[start - ahead : stop - ahead])


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
        what = f"could not be looked up ({masked(str(error)).strip().partition(chr(10))[0]})"  # a link may be signed
        raise InputProblem(artifact.uri, what, "Check the name, the network and HF_ENDPOINT.") from error
