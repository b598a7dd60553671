"""The page's files as they are sent: who gets them, with which headers, and that they are whole in the wheel."""

import hashlib
import json
import re
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from lowbit_server.app import with_page
from lowbit_server.config import ServeConfig
from lowbit_server.http.entrance import Entrance
from lowbit_server.page.page import FILES, STATIC, Page

ROOT = Path(__file__).parents[3]
VENDOR = STATIC / "vendor"
RECORDS = json.loads((VENDOR / "vendor.json").read_text())


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    """What answers wherever the page does not."""
    await send({"type": "http.response.start", "status": 401, "headers": []})
    await send({"type": "http.response.body", "body": b"behind"})


def client_of(page: Page, root_path: str = "") -> httpx.AsyncClient:
    entrance = Entrance(page.before(behind), root_path, 1 << 20)
    return httpx.AsyncClient(transport=httpx.ASGITransport(entrance), base_url="http://test")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(Page()) as client:
        yield client


async def test_every_file_is_open_typed_and_under_the_strict_policy(client: httpx.AsyncClient) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in sorted(Page().paths):
        answer = await client.get(path)
        suffix = ".html" if path == "/" else Path(path).suffix
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] == kinds.get(
            suffix, answer.headers["content-type"].split(";")[0]
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert int(answer.headers["content-length"]) == len(answer.content)


async def test_the_policy_lets_in_this_servers_own_files_and_nothing_else(client: httpx.AsyncClient) -> None:
    text = (await client.get("/")).headers["content-security-policy"]
    policy = {name: values for name, *values in (part.split() for part in text.split(";"))}
    assert policy["default-src"] == ["'none'"]
    assert {values[0] for name, values in policy.items() if name.endswith("-src")} == {"'none'", "'self'"}
    assert all(len(values) == 1 for values in policy.values())
    assert policy["frame-ancestors"] == policy["form-action"] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]


def test_the_files_name_no_other_host_and_no_inline_script_or_style() -> None:
    ours = [path for path in STATIC.iterdir() if path.is_file()]
    for path in ours:
        text = path.read_text().replace("http://www.w3.org/", "")
        assert not re.search(r"https?://[a-z]", text), path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        )
        assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", text), path.name
    index = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", index)


def test_every_file_that_the_page_names_is_there_and_every_other_one_is_named() -> None:
    named = {"index.html"}
    for path in (one for one in STATIC.iterdir() if one.suffix in (".html", ".js")):
        text = path.read_text()
        named |= set(re.findall(r'(?:src|href)="lowbit/page/([^"]+)"', text))
        named |= {one.removeprefix("./") for one in re.findall(r'from "(\./[^"]+)"', text)}
    there = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    licences = {f"vendor/{record['licence_file']}" for record in RECORDS}
    assert there == named | licences | {"vendor/vendor.json"}


@pytest.mark.parametrize("record", RECORDS, ids=[record["package"] for record in RECORDS])
def test_a_library_is_the_published_file_of_its_version_with_its_licence(record: dict[str, str]) -> None:
    body = (VENDOR / record["file"]).read_bytes()
    assert hashlib.sha256(body).hexdigest() == record["sha256"]
    assert record["version"].encode() in body[:300]
    words = record["licence"].split()[0].split("-")[0]  # MIT, or MPL
    assert (
        words in (VENDOR / record["licence_file"]).read_text()
        or "Apache License" in (VENDOR / record["licence_file"]).read_text()
    )
    assert record["package_integrity"].startswith("sha512-")


async def test_whoever_has_a_file_is_told_that_it_is_the_same(client: httpx.AsyncClient) -> None:
    path = FILES + "app.js"
    etag = (await client.get(path)).headers["etag"]
    again = await client.get(path, headers={"if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"), ("GET", "/v1/models"), ("GET", "/lowbit/page"), ("GET", "/lowbit/page/../page.py"),
        ("GET", "/lowbit/page/%2e%2e/page.py"), ("GET", "/lowbit/page/none.js"), ("GET", "/lowbit/page/index.html"),
        ("GET", "/lowbit/page//etc/passwd"), ("DELETE", "/lowbit/page/app.js"),
    ],
)  # fmt: skip
async def test_everything_else_goes_on_to_the_gateway(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await client.request(method, path)).content == b"behind"


async def test_head_has_no_surprises(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 200


@pytest.mark.parametrize("path", ["/llm", "/llm/", "/"])
async def test_behind_a_prefix_addresses_are_below_it(path: str) -> None:
    async with client_of(Page("/llm"), "/llm") as client:
        assert '<base href="/llm/">' in (await client.get(path)).text
    async with client_of(Page()) as client:
        assert "<base" not in (await client.get("/")).text


@pytest.mark.parametrize("keys", [True, False])
async def test_the_page_knows_whether_a_key_is_needed_and_not_which(keys: bool) -> None:
    async with client_of(Page(keys=keys)) as client:
        assert f"data-keys={'yes' if keys else 'no'}" in (await client.get("/")).text


@pytest.mark.parametrize("keys", [None, Path("keys.yaml")])
async def test_without_the_page_everything_is_the_gateways_as_before(keys: Path | None) -> None:
    off, on = (ServeConfig(Path("unused"), api_keys=keys, no_page=no_page) for no_page in (True, False))
    assert with_page(off)(behind) is behind
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(with_page(on)(behind)), base_url="http://test"
    ) as client:
        assert f"data-keys={'yes' if keys else 'no'}" in (await client.get("/")).text


def test_the_wheel_has_every_file_of_the_page(tmp_path: Path) -> None:
    """What the image installs is this wheel: the Dockerfile builds it from the same folders."""
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (built,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        for path in STATIC.rglob("*"):
            if path.is_file():
                name = f"lowbit_server/page/static/{path.relative_to(STATIC).as_posix()}"
                assert name in names
                assert wheel.read(name) == path.read_bytes()
