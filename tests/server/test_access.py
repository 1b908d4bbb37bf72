"""Who may read what the coordinator serves."""

import base64

import pytest
from starlette.requests import Request

from core.errors import UserError
from server.access import check_listen, is_loopback, read_token, refusal

TOKEN = "0123456789abcdef-token"


def token_file(tmp_path, text=TOKEN + "\n", mode=0o600):
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_hosts_are_told_apart():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "::", "localhost.evil.example"))


def test_a_token_file_is_its_owners_alone_and_long_enough(tmp_path):
    assert read_token(token_file(tmp_path)) == TOKEN
    with pytest.raises(UserError, match="has mode 0640, expected 0600"):
        read_token(token_file(tmp_path, mode=0o640))
    for text in ("short\n", "", TOKEN + "\n" + TOKEN, "ü" * 20):
        with pytest.raises(UserError, match="one line of 16 or more printable ASCII"):
            read_token(token_file(tmp_path, text))
    with pytest.raises(UserError, match="does not exist; make one"):
        read_token(tmp_path / "none")


def ask(token, **headers):
    """The status of the refusal of a request with these headers; None: it is let in."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    refused = refusal(Request({"type": "http", "headers": raw}), token, "Bearer")
    return refused and refused.status_code


def basic(words):
    return "Basic " + base64.b64encode(words.encode()).decode()


def test_the_token_is_taken_as_bearer_and_as_a_browsers_password():
    assert ask(TOKEN, authorization=f"Bearer {TOKEN}") is None
    for user in ("", "me", "\u00fc"):
        assert ask(TOKEN, authorization=basic(f"{user}:{TOKEN}")) is None


@pytest.mark.parametrize(
    "shown",
    ["", TOKEN, "Bearer", f"bearer{TOKEN}", basic(TOKEN), basic(f"{TOKEN}:"), basic(f"x:{TOKEN}x"),
     f"Basic {TOKEN}", "Basic \u00fc", "Basic ====", f"Digest {TOKEN}"],
)  # fmt: skip
def test_anything_else_is_refused(shown):
    assert ask(TOKEN, authorization=shown, host="127.0.0.1") == 401


def test_without_a_token_the_host_must_be_this_machine():
    assert ask(None, host="127.0.0.1:9110") is None
    for host in ("evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:9110"):
        assert ask(None, host=host) == 403


def test_beyond_the_loopback_nobody_listens_without_a_token():
    assert check_listen("[::1]:80", None, "the page names") == ("::1", 80)
    assert check_listen("0.0.0.0:80", TOKEN, "the page names") == ("0.0.0.0", 80)
    with pytest.raises(UserError, match="other machines, and the page names sites"):
        check_listen("0.0.0.0:80", None, "the page names")
