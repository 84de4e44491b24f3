"""Buckets of Google's and Amazon's stores, as fsspec, Orbax and TensorStore reach them; one sentence for what fails.

In use from the first path on that begins with gs:// or s3:// (dit_jax.paths). Credentials and endpoints come from
where the stores' own tools read them: Google's application default credentials and STORAGE_EMULATOR_HOST,
Amazon's AWS_* variables and ~/.aws.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from dit_jax.config import ConfigError

HELP = "expected gcsfs, s3fs and universal_pathlib (pip install 'dit_jax[bucket]')"
SCHEMES = ("gs://", "s3://")


class BucketError(OSError):
    """A store does not answer, or refuses, after it was asked again for half a minute and more."""


def _retold(error: Exception, where: str) -> Exception:
    """What a library of a store raised, as an OSError in one sentence; the usual kinds stay as they are."""
    if isinstance(error, (FileNotFoundError, FileExistsError, BucketError, TypeError, ValueError, KeyError)):
        return error
    code = getattr(error, "code", None)  # of gcsfs' errors, whose text may be empty
    said = f"HTTP {code}" if code else " ".join(str(error).split()) or type(error).__name__
    return BucketError(f"{where}: the store refuses or does not answer ({said[:300]})")


def register() -> None:
    """Make fsspec, and Orbax by it, use the two file systems below. Raises ConfigError where a library is missing."""
    # Its other file system asks a second service, at every path, what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        from gcsfs.core import GCSFileSystem
        from s3fs import S3FileSystem
    except ImportError as error:
        raise ConfigError(f"paths in buckets need {error.name}, which is not installed; {HELP}") from None
    # They narrate errors that are raised too.
    for name in ("gcsfs", "s3fs", "fsspec.prefetcher", "aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class GoogleBuckets(GCSFileSystem):
        """Google Cloud Storage."""

        async def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super()._call(method, path, *args, **kwargs)
            except Exception as error:
                raise _retold(error, f"gs://{'/'.join(map(str, args))}" if args else path) from None

    class AmazonBuckets(S3FileSystem):
        """Amazon S3, and what speaks like it."""

        async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super()._call_s3(method, *args, **kwargs)
            except Exception as error:
                where = f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', '')}"
                if "IfNoneMatch" in kwargs and "pre-condition" in str(error):
                    raise FileExistsError(where) from None
                raise _retold(error, where) from None

    for scheme, kind in (("gs", GoogleBuckets), ("gcs", GoogleBuckets), ("s3", AmazonBuckets)):
        fsspec.register_implementation(scheme, kind, clobber=True)
        # What another process has written is to be seen; and an upload is compared with what the store has taken.
        options: dict[str, Any] = {"use_listings_cache": False}
        if kind is GoogleBuckets:
            options["consistency"] = "md5"
            if os.environ.get("STORAGE_EMULATOR_HOST"):  # no credentials, which are not looked for
                options["token"] = "anon"
                os.environ.setdefault("NO_GCE_CHECK", "true")
        fsspec.config.conf[scheme] = options


def kvstore(path: str) -> dict[str, Any]:
    """TensorStore's name for a folder in a bucket."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    found: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket, "path": key}
    if scheme == "s3" and (
        endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    ):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        found |= {"endpoint": endpoint, "aws_region": region}
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks around, and says so
        found["aws_credentials"] = {"type": "environment"}
    return found
