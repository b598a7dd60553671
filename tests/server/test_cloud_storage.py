"""A checkpoint's folder in Cloud Storage, read by Google's library from an emulator on this machine."""

import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

from lowbit_core.errors import ConfigError
from lowbit_core.server_process import free_port
from lowbit_server.cloud_storage import download, files_below

pytest.importorskip("google.cloud.storage")
FILES = {
    "models/demo/config.json": b"{}",
    "models/demo/model.safetensors": bytes(range(256)) * 5000,
    "models/demo/1_Pooling/config.json": b'{"a": 1}',
    "models/demo-2/config.json": b"another model",
}


@pytest.fixture(scope="module")
def storage() -> Iterator[Any]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
    try:
        from google.cloud import storage as library

        bucket = library.Client().bucket("bucket")
        for name, data in FILES.items():
            bucket.blob(name).upload_from_string(data)
        yield bucket
    finally:
        server.stop()
        del os.environ["STORAGE_EMULATOR_HOST"]


@pytest.mark.parametrize("uri", ["gs://bucket/models/demo", "gs://bucket/models/demo/"])
def test_a_folder_is_downloaded_whole_and_nothing_beside_it(storage: Any, uri: str) -> None:
    into = download(uri)
    found = {
        path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()
    }
    assert found == {
        name.removeprefix("models/demo/"): data
        for name, data in FILES.items()
        if name.startswith("models/demo/")
    }


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/models/none", "is empty: name the folder that `lowbit quantize` wrote"),
        ("gs://elsewhere/models", "cannot be listed"),
        ("gs://", "give gs://BUCKET/FOLDER"),
        ("s3://bucket/models/demo", "give gs://BUCKET/FOLDER"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(storage: Any, uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        download(uri)
    assert uri in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["m/../../config.json", "m//etc/config.json", "m/a/../config.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="which leads out of the folder"):
        files_below("gs://b/m", "m/", ["m/config.json", name])


def test_folders_are_no_files() -> None:
    names = ["m/", "m/a/", "m/a/b.json"]
    assert files_below("gs://b/m", "m/", names) == {"m/a/b.json": PurePosixPath("a/b.json")}
