"""The live page in a real browser: news without a reload, planted code that does not run."""

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

from core.checkpoint import write_json
from server.live import Live
from server.processes import free_port

TOKEN = "0123456789abcdef-token"
LIVE = "document.getElementById('link').textContent === 'live'"
SECONDS = 5.0
"""The longest that news may take from the run directory to the screen."""


@pytest.fixture(scope="module")
def tab(load_benchmark):
    """A browser's tab."""
    module = load_benchmark("browser")
    if not (binary := module.find_chromium()):
        pytest.skip("needs Chromium")
    with module.chromium(binary) as page:
        yield page


@pytest.fixture
def browser(tab):
    """The tab, empty: what it showed before tries no more to reach its server."""
    tab.call("Page.navigate", url="about:blank")
    tab.wait("location.href === 'about:blank'")
    del tab.console[:]
    return tab


@contextmanager
def served(log, *words):
    """`fedmermed-server page`; gives its address."""
    port = free_port()
    command = [sys.executable, "-m", "server", "page", *map(str, words)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--listen", f"127.0.0.1:{port}"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while "http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)
    assert log.read_text().count("\n") == 1, log.read_text()  # its address, and no complaint


@contextmanager
def serving(run):
    """A coordinator that works on a run directory, as far as that tells."""
    with open(run / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Live(run, 5)


def text(part):
    return f"document.querySelector('[data-part={part}]').innerText"


def row(site):
    """Of a site, as it is read."""
    rows = "[...document.querySelectorAll('[data-part=sites] tbody tr')]"
    return f"{rows}.find((row) => row.cells[0].innerText === '{site}').innerText"


def test_news_arrive_without_a_reload_within_seconds(browser, make_study, tmp_path):
    collapse = "site 'city': us: collapse: embeddings are one point; stop, then raise the weight"

    def change(number, sites, line):
        if number == 3:
            line["alarms"] = [collapse]

    run = make_study({"st-mary": ("ct",), "city": ("us",)}, rounds=3, planned=5, change=change)
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run / "history.jsonl").write_bytes(b"".join(lines[:2]))
    with serving(run) as live, served(tmp_path / "log", run) as url:
        live.begin_round(3)
        live.site("city", "asked")
        live.site("st-mary", "asked")
        live.phase("training", seconds=600, beat_seconds=100)
        browser.screen(1400, 900)
        browser.open(url)
        browser.wait(LIVE)
        browser.ask("window.loadedOnce = true")
        browser.wait(f"{row('city')}.includes('training')", SECONDS)

        def tell(site, state, reason=""):
            live.site(site, state, reason)
            live.phase("training", seconds=600, beat_seconds=100)

        tell("city", "lost")
        browser.wait(f"{row('city')}.includes('lost')", SECONDS)
        browser.wait(f"{text('alarms')}.includes(\"Site 'city' was asked and is not\")", SECONDS)
        tell("city", "asked")
        browser.wait(f"{row('city')}.includes('training')", SECONDS)
        browser.wait(f"!{text('alarms')}.includes('city')", SECONDS)
        tell("st-mary", "rejected", "array 'student/w' is not finite")
        browser.wait(f"{row('st-mary')}.includes('is not finite')", SECONDS)

        circles = "document.querySelectorAll('[data-part=losses] use').length"
        before = browser.ask(circles)
        with open(run / "history.jsonl", "ab") as file:
            file.write(lines[2])
        browser.wait(f"{text('head')}.includes('3 of 5')", SECONDS)
        browser.wait(f"{text('alarms')}.includes('collapse: embeddings are one point')", SECONDS)
        browser.wait(f"{circles} > {before}", SECONDS)
        assert browser.ask("window.loadedOnce") is True
        assert browser.ask("document.title").startswith("(2) tiny: running, 3 of 5")
    browser.wait("document.getElementById('link').textContent.startsWith('connection lost')", 20)


def test_planted_code_is_shown_and_does_not_run(browser, make_study, tmp_path):
    plants = [
        "<script>window.owned = 1</script>",
        "\"><img src=x onerror='window.owned = 2'>",
        "</script><svg onload=window.owned=3>",
        '", "html": "<b onmouseover=window.owned=4>", "x": "\\u003cscript\\u003e',
        "<a href=javascript:window.owned=5>here</a>",
        "<style>* { display: none }</style><meta http-equiv=refresh content=0;url=//evil.example>",
    ]

    def change(number, sites, line):
        for index, plant in enumerate(plants):
            sites[f"site-{index}"] = {"outcome": "rejected", "reason": plant}
        line["alarms"] = [f"{plant}; {plant}" for plant in plants]

    run = make_study({"st-mary": ("ct",)}, rounds=3, planned=5, change=change)
    recipe = json.loads((run / "recipe.json").read_text())
    write_json(run / "recipe.json", recipe | {"name": plants[1]})
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run / "history.jsonl").write_bytes(b"".join(lines[:2]))
    with served(tmp_path / "log", run) as url:
        browser.open(url)
        browser.wait(LIVE)
        (run / "history.jsonl").write_bytes(b"".join(lines))  # by the stream too
        browser.wait(f"{text('head')}.includes('3 of 5')", SECONDS)
        shown = browser.ask("document.body.innerText")
        assert all(shown.count(plant) >= 3 for plant in plants)
        assert browser.ask("window.owned === undefined")
        assert browser.ask("document.querySelectorAll('img, a, b[onmouseover]').length") == 0
        assert browser.ask("document.title").startswith(f"(12) {plants[1]}")
        assert browser.ask("location.href") == url
        # The second line of defence: even markup that got in would run nothing.
        planted = "document.body.insertAdjacentHTML('beforeend', {})".format(
            json.dumps("<img src=data:, onerror='window.owned = 9'>")
        )
        # The page itself violated no policy. (A page before may have lost its server.)
        assert not any("Content Security Policy" in words for words in browser.console)
        browser.ask(planted)
        time.sleep(0.5)
        assert browser.ask("window.owned === undefined")
        blocked = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')"
        assert browser.ask(blocked) == "blocked"
        assert any("Content Security Policy" in words for words in browser.console)


def test_a_browser_that_shows_the_token_gets_page_and_stream(browser, make_study, tmp_path):
    run = make_study({"st-mary": ("ct",)}, rounds=2, planned=5)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    os.chmod(token, 0o600)
    with served(tmp_path / "log", run, "--token-file", token) as url:
        assert httpx.get(url, trust_env=False).status_code == 401
        browser.open(url.replace("//", f"//anybody:{TOKEN}@"))
        browser.wait(LIVE)
        assert "st-mary" in browser.ask(text("sites"))


def test_the_page_fits_a_phone_and_values_are_read_by_pointer_and_by_keys(
    browser, make_study, tmp_path
):
    run = make_study({"x" * 64: ("ct", "us", "oct"), "city": ("us",)}, rounds=4, planned=5)
    with served(tmp_path / "log", run) as url:
        browser.screen(360, 740, mobile=True)
        browser.open(url)
        browser.wait(LIVE)
        assert browser.ask("document.documentElement.scrollWidth") == 360
        browser.screen(1400, 900)
        figure = "document.querySelector('[data-part=losses] figure')"
        left, top, width, height = browser.ask(
            f"(() => {{ {figure}.scrollIntoView(); const box = {figure}.querySelector('svg')"
            ".getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()"
        )
        browser.call(
            "Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.99 * width,
            y=top + height / 2,
        )  # fmt: skip
        tip = "document.querySelector('.tip')?.innerText.split('\\n').join(' ')"
        assert browser.ask(tip) == "round 4 loss 3.96 teacher entropy 2.96 collapse 4.159"
        browser.ask(f"{figure}.focus()")
        for _ in range(2):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
        assert browser.ask(tip).startswith("round 2 loss 3.98")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert browser.ask(tip) is None
