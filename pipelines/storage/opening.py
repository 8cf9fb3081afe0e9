"""Location -> the storage behind it."""

from pathlib import Path

from cluster import processes
from pipelines.credentials import check_uri
from pipelines.storage.base import Storage, StorageFailed, UnsupportedStorage, UnusableStore, owner, remove
from pipelines.storage.local import LocalStorage


def open_storage(uri: str) -> Storage:
    """The storage behind a location; what processes of this machine that were killed left in its scratch goes.

    Raises:
        SecretInUri: It holds a password.
        UnsupportedStorage: The scheme cannot write conditionally here.
        UnusableStore: It cannot be written to.
    """
    check_uri("store", uri, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    storage = _behind(uri)
    for path in storage.scratches.glob("*"):
        if processes.alive(owner(path.name)) is False:
            path.unlink(missing_ok=True) if path.is_file() else remove(path)
    return storage


def _behind(uri: str) -> Storage:
    try:
        if uri.startswith("s3://"):
            from pipelines.storage.s3 import S3Storage  # with boto3

            return S3Storage(uri)
        if "://" in uri:
            raise UnsupportedStorage(uri)
        return LocalStorage(Path(uri))
    except StorageFailed as error:
        raise UnusableStore(error.where, error.what) from error
