"""One client for S3, paged listings, and errors as one sentence."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.credentials import masked
from pipelines.storage.base import StorageFailed


@dataclass(frozen=True, slots=True)
class Object:
    """What a listing says of an object; `etag` changes with its bytes."""

    key: str
    size: int
    etag: str
    modified: float


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key.strip("/")


def endpoint() -> str:
    """Where S3 is: empty for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def client(*, retries: int = 5) -> Any:
    """What talks to `endpoint`, with credentials as boto3 finds them.

    Args:
        retries: How often a request is sent in all. What must not happen twice asks for 1.
    """
    who = tuple(os.environ.get(k, "") for k in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_REGION"))
    return _client(endpoint(), who, retries)


@functools.cache
def _client(at: str, who: tuple[str, ...], retries: int) -> Any:
    """One for all threads of a process: making it takes longer than a request."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": retries},
        max_pool_connections=32,
        connect_timeout=10,
        read_timeout=60,
        # Away from Amazon a bucket is rarely a host name.
        s3={"addressing_style": "path" if at else "auto"},
    )
    return boto3.session.Session().client("s3", endpoint_url=at or None, config=config)


def listed(bucket: str, prefix: str, *, after: str = "") -> Iterator[Object]:
    """Every object whose key begins with `prefix`; with `after`, only those whose key sorts after it."""
    with answered(f"s3://{bucket}/{prefix}"):
        asked = {"Bucket": bucket, "Prefix": prefix, **({"StartAfter": after} if after else {})}
        for page in client().get_paginator("list_objects_v2").paginate(**asked):
            for found in page.get("Contents", ()):
                modified = found["LastModified"].timestamp()
                yield Object(found["Key"], int(found["Size"]), found["ETag"].strip('"'), modified)


def tag(bucket: str, key: str) -> str:
    """The object's `etag` now; empty where there is none."""
    from botocore.exceptions import ClientError

    with answered(f"s3://{bucket}/{key}"):
        try:
            found: str = client().head_object(Bucket=bucket, Key=key)["ETag"]
        except ClientError as error:
            if code(error) == "NoSuchKey":
                return ""
            raise
    return found.strip('"')


def download(bucket: str, key: str, to: Path) -> None:
    """Write an object's bytes to a file; transfers that break off are taken up again."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with answered(f"s3://{bucket}/{key}"):
        client().download_file(bucket, key, str(to))


def part(bucket: str, found: Object, start: int, stop: int) -> bytes:
    """An object's bytes from `start` up to before `stop`; of another version than the listed one none."""
    if start >= stop:
        return b""
    with answered(f"s3://{bucket}/{found.key}"):
        asked = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": found.etag}
        data: bytes = client().get_object(Bucket=bucket, Key=found.key, **asked)["Body"].read()
    return data


def code(error: Any) -> str:
    """What S3 calls an error; a request without a body in its answer has only a number."""
    named: str = error.response.get("Error", {}).get("Code", "")
    return {"404": "NoSuchKey", "412": "PreconditionFailed"}.get(named, named)


@contextmanager
def answered(where: str) -> Iterator[None]:
    """Turn boto3's errors, and those of the local disk, into one that says where it happened.

    Raises:
        StorageFailed: For any of them.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        what = f"{said.get('Message') or 'refused'} ({said.get('Code')})"
        raise StorageFailed(where, what[0].lower() + what[1:]) from error
    except (BotoCoreError, Boto3Error) as error:
        what = masked(str(error)).strip().rstrip(".")  # it names AWS_ENDPOINT_URL
        raise StorageFailed(where, what[0].lower() + what[1:]) from error
    except StorageFailed:
        raise
    except OSError as error:
        raise StorageFailed(where, (error.strerror or str(error)).lower()) from error
