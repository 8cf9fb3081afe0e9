"""Location -> the storage behind it."""

from pathlib import Path

from pipelines.credentials import check_uri
from pipelines.storage.base import Storage, StorageFailed, UnsupportedStorage, UnusableStore
from pipelines.storage.local import LocalStorage


def open_storage(uri: str) -> Storage:
    """The storage behind a location.

    Raises:
        SecretInUri: It holds a password.
        UnsupportedStorage: The scheme cannot write conditionally here.
        UnusableStore: It cannot be written to.
    """
    check_uri("store", uri, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    try:
        if uri.startswith("s3://"):
            from pipelines.storage.s3 import S3Storage  # with boto3

            return S3Storage(uri)
        if "://" in uri:
            raise UnsupportedStorage(uri)
        return LocalStorage(Path(uri))
    except StorageFailed as error:
        raise UnusableStore(error.where, error.what) from error
