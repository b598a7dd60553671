"""A checkpoint's folder in Google's Cloud Storage, downloaded: Vertex AI gives a container its address and no files.

Credentials are the container's own service account, by Google's library; STORAGE_EMULATOR_HOST is another server.
"""

import shutil
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger

SCHEME = "gs://"
AT_ONCE = 8
TELL_S = 10.0

log = get_logger("serve")


def download(uri: str) -> Path:
    """Download `gs://BUCKET/FOLDER` into a new directory; raises ConfigError where that cannot be done."""
    bucket_name, _, folder = uri.removeprefix(SCHEME).strip("/").partition("/")
    if not uri.startswith(SCHEME) or not bucket_name:
        raise ConfigError(f"AIP_STORAGE_URI={uri}: give gs://BUCKET/FOLDER")
    blobs = _blobs(uri, bucket_name, f"{folder}/" if folder else "")
    size = sum(blob.size for blob in blobs.values())
    into = Path(tempfile.mkdtemp(prefix="lowbit-model-"))
    if size > (free := shutil.disk_usage(into).free):
        into.rmdir()
        raise ConfigError(
            f"{uri} has {size:,} bytes and {into.parent} {free:,} free; give TMPDIR a larger disk"
        )
    log.info("downloading %d files of %s, %s bytes", len(blobs), uri, f"{size:,}")
    began = time.monotonic()
    _fetch(uri, blobs, into, size)
    log.info("downloaded %s bytes in %.0f s into %s", f"{size:,}", time.monotonic() - began, into)
    return into


def _blobs(uri: str, bucket_name: str, prefix: str) -> dict[PurePosixPath, Any]:
    """The objects below a prefix, by their path from there."""
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ModuleNotFoundError as error:
        raise ConfigError(f"{uri} is read by google-cloud-storage; pip install 'lowbit[vertex]'") from error
    try:
        listed = list(storage.Client().list_blobs(bucket_name, prefix=prefix))
    except (GoogleAPIError, GoogleAuthError, OSError) as error:
        raise ConfigError(f"{uri} cannot be listed: {_one_line(error)}") from error
    named = {blob.name: blob for blob in listed}
    return {path: named[name] for name, path in files_below(uri, prefix, list(named)).items()}


def files_below(uri: str, prefix: str, names: list[str]) -> dict[str, PurePosixPath]:
    """By name, the paths below a prefix of those that are files; raises ConfigError where one leads out or none is."""
    paths = {name: PurePosixPath(name.removeprefix(prefix)) for name in names if not name.endswith("/")}
    if not paths:
        raise ConfigError(f"{uri} is empty: name the folder that `lowbit quantize` wrote")
    if outside := next((path for path in paths.values() if path.is_absolute() or ".." in path.parts), None):
        raise ConfigError(f"{uri} holds {outside}, which leads out of the folder")
    return paths


def _fetch(uri: str, blobs: dict[PurePosixPath, Any], into: Path, size: int) -> None:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    for path in blobs:
        (into / path).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {
            pool.submit(blob.download_to_filename, str(into / path)): blob for path, blob in blobs.items()
        }
        done, told = 0, time.monotonic()
        for one in as_completed(running):
            if error := one.exception():
                pool.shutdown(cancel_futures=True)
                raise ConfigError(f"{uri}: {running[one].name} cannot be read: {_one_line(error)}") from error
            done += running[one].size
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                log.info("downloaded %s of %s bytes", f"{done:,}", f"{size:,}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
