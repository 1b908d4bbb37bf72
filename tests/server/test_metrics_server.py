import asyncio

import httpx
import pytest

from core.checkpoint import sha256_file
from core.errors import UserError
from server.metrics_server import MetricsApp, serve_metrics

TOKEN = "0123456789abcdef-token"


def ask(run, path="/metrics", *, method="GET", token=None, host="127.0.0.1:9109", headers=None):
    async def send():
        transport = httpx.ASGITransport(app=MetricsApp(run, token))
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.request(method, f"http://{host}{path}", headers=headers)

    return asyncio.run(send())


@pytest.fixture
def run(make_study):
    return make_study({"st-mary": ("ct",)})


def test_only_reading_metrics_is_answered(run):
    before = {file.name: sha256_file(file) for file in run.iterdir()}
    page = ask(run)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain; version=")
    assert "fedmermed_rounds_done 2.0" in page.text
    assert ask(run, method="HEAD").text == ""
    for path in ("/", "/metrics/", "/metrics/../recipe.json", "/..%2frecipe.json", "//metrics"):
        assert ask(run, path).status_code == 404, path
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(run, method=method).status_code == 405
    assert {file.name: sha256_file(file) for file in run.iterdir()} == before


@pytest.mark.parametrize("listen", ["0.0.0.0:9109", "[::]:9109", "10.0.0.1:9109", "server:9109"])
def test_beyond_the_loopback_a_token_is_needed(run, listen):
    with pytest.raises(UserError, match="give --token-file FILE, or listen on 127"):
        serve_metrics(run, listen, None)


@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x"],
)
def test_a_wrong_token_is_refused_wherever_it_comes_from(run, shown):
    headers = {} if shown is None else {"Authorization": shown}
    for path in ("/metrics", "/other"):
        reply = ask(run, path, token=TOKEN, headers=headers)
        assert reply.status_code == 401
        assert "fedmermed" not in reply.text
        assert reply.headers["www-authenticate"] == "Bearer"


def test_the_right_token_is_let_in_under_any_name(run):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = ask(run, token=TOKEN, host="coordinator.example.org", headers=headers)
    assert reply.status_code == 200


def test_without_a_token_a_foreign_host_name_is_refused(run):
    assert ask(run, host="evil.example:9109").status_code == 403
    for host in ("localhost:9109", "[::1]:9109", "127.0.0.1"):
        assert ask(run, host=host).status_code == 200, host


def test_the_comparison_of_tokens_is_the_constant_time_one(run, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or False)
    assert ask(run, token=TOKEN, headers={"Authorization": "Bearer x"}).status_code == 401
    assert compared == [(b"x", TOKEN.encode())]
