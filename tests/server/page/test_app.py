"""The live page over HTTP: what is answered, what is refused, and the stream of news."""

import asyncio
import json

import httpx
import pytest

from core.checkpoint import sha256_file
from server.page.app import PageApp
from server.page.studies import Studies

TOKEN = "0123456789abcdef-token"
HOST = "http://127.0.0.1:9110"


def ask(app, path="/", *, method="GET", host=HOST, headers=None):
    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
            return await client.request(method, host + path, headers=headers)

    return asyncio.run(send())


def raw(app, path, *, query=b"", messages=1, seconds=20.0, leave=False):
    """Status and body chunks of a request whose path no client has tidied up."""
    status, chunks = [], []

    async def talk():
        gone, enough = asyncio.Event(), asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                status.append(message["status"])
            elif message["body"]:
                chunks.append(message["body"].decode())
            if len(chunks) >= messages or not message.get("more_body", True):
                enough.set()

        scope = {"type": "http", "method": "GET", "path": path, "query_string": query,
                 "headers": [(b"host", b"127.0.0.1")]}  # fmt: skip
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.wait_for(enough.wait(), seconds)
        if leave:
            gone.set()
            await asyncio.wait_for(task, 5)  # ends by itself when its reader is gone
        task.cancel()

    asyncio.run(talk())
    return status[0], chunks


def data(chunk):
    assert chunk.startswith("data: ")
    assert chunk.endswith("\n\n")
    assert chunk.count("\n") == 2  # one event, whatever its text
    return json.loads(chunk.removeprefix("data: "))


@pytest.fixture
def run(make_study):
    return make_study({"st-mary": ("ct",), "city": ("us",)}, rounds=3, planned=5)


@pytest.fixture
def app(run):
    return PageApp(Studies([run]), None)


def test_the_page_is_answered_and_nothing_is_changed(app, run):
    before = {file.name: sha256_file(file) for file in run.iterdir()}
    page = ask(app)
    assert page.status_code == 200
    assert "st-mary" in page.text
    assert "<title>tiny: stopped, 3 of 5</title>" in page.text
    assert ask(app, method="HEAD").status_code == 200
    assert ask(app, "/events", method="HEAD").status_code == 200
    for path, kind in (("/page.css", "text/css"), ("/page.js", "text/javascript"),
                       ("/icon.svg", "image/svg+xml")):  # fmt: skip
        reply = ask(app, path)
        assert (reply.status_code, reply.headers["content-type"].split(";")[0]) == (200, kind)
    assert {file.name: sha256_file(file) for file in run.iterdir()} == before


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/events", "/page.js", "/nowhere"])
def test_only_get_and_head_are_answered(app, method, path):
    assert ask(app, path, method=method).status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/recipe.json", "/study/../recipe.json", "/study/..", "/study/.", "//etc/passwd", "/study/",
     "/study//etc/passwd", "/../../etc/passwd", "/study/run\0", "/study/run/", "/study/run\\..",
     "/study/" + "a" * 100_000, "/page.css/../app.py", "/page.css\0.py", "/study/run/recipe.json",
     "/events/../../etc/passwd", "/page/run", "/EVENTS"],
)  # fmt: skip
def test_no_path_leads_out_of_the_table_of_pages(app, path):
    status, chunks = raw(app, path)
    assert (status, chunks) == (404, ["there is no such page\n"])


def test_encoded_paths_are_no_way_out_either(app):
    for path in ("/study/%2e%2e%2frecipe.json", "/study/..%2f..%2fetc%2fpasswd", "/%2e%2e/",
                 "/study/run%00", "/study/%252e%252e"):  # fmt: skip
        assert ask(app, path).status_code == 404


def test_a_foreign_host_name_and_a_wrong_token_see_nothing(app, run):
    assert ask(app, host="http://evil.example:9110").status_code == 403
    closed = PageApp(Studies([run]), TOKEN)
    for path in ("/", "/events", "/page.js", "/nowhere"):
        for shown in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
            reply = ask(closed, path, headers=shown)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"].startswith("Basic realm=")
            assert "st-mary" not in reply.text
    assert ask(closed, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    browser = httpx.BasicAuth("anybody", TOKEN)._auth_header
    reply = ask(closed, host="http://fl.example.org", headers={"Authorization": browser})
    assert reply.status_code == 200


def test_every_answer_forbids_inline_code_other_hosts_frames_and_other_sites_readers(app):
    for path in ("/", "/page.js", "/nowhere"):
        headers = ask(app, path, headers={"Origin": "https://evil.example"}).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert not [name for name in headers if name.startswith("access-control")]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"


def test_the_page_and_its_files_name_no_other_host(app):
    for path in ("/", "/page.css", "/page.js"):
        text = ask(app, path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert " style=" not in text
        assert "@import" not in text


def test_the_stream_holds_what_the_reader_does_not_have(app):
    _, [retry, first] = raw(app, "/events", messages=2)
    assert retry == "retry: 2000\n\n"
    parts = data(first)["parts"]
    assert list(parts) == ["head", "alarms", "sites", "modalities", "losses", "embeddings",
                           "updates", "seconds"]  # fmt: skip
    known = ",".join(part["digest"] for name, part in parts.items() if name != "sites")
    _, [_, second] = raw(app, "/events", query=f"have={known}".encode(), messages=2)
    assert list(data(second)["parts"]) == ["sites"]


def test_a_page_without_news_still_hears_that_there_is_none(app):
    _, [_, first] = raw(app, "/events", messages=2)
    known = ",".join(part["digest"] for part in data(first)["parts"].values())
    _, [_, beat] = raw(app, "/events", query=f"have={known}".encode(), messages=2, seconds=8)
    assert data(beat)["parts"] == {}


def test_a_stream_ends_when_its_reader_is_gone(app):
    raw(app, "/events", messages=2, leave=True)


def test_one_of_several_studies_has_a_page_and_a_stream_of_its_own(run, tmp_path):
    (run / "live.json").unlink(missing_ok=True)
    app = PageApp(Studies([run, run]), None)
    assert 'href="/study/run"' in ask(app).text
    assert 'data-events="/events/run"' in ask(app, "/study/run").text
    _, [_, first] = raw(app, "/events/run", messages=2)
    assert data(first)["title"] == "tiny: stopped, 3 of 5"
