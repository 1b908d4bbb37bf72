"""What the parts of the live page show of a study, and what they never do."""

import json
import re
from html import unescape

import pytest

from core.checkpoint import write_json
from server.overview_reader import PLAN
from server.page import view as page
from server.page.view import StudyView

BREAKERS = (
    "<script>owned()</script>",
    '"><img src=x onerror=owned()>',
    "'; owned(); //",
    "</script></section></main>",
    "{{ 7 * 191 }} ${owned()} &lt;b&gt;",
    "`<b>`",
)
ALLOWED = {"a", "b", "br", "caption", "clippath", "code", "defs", "div", "figcaption", "figure",
           "g", "h1", "h2", "li", "p", "path", "progress", "rect", "section", "span", "svg",
           "table", "tbody", "td", "text", "th", "thead", "time", "tr", "ul", "use"}  # fmt: skip


def html(run):
    return "".join(part.html for part in StudyView(run).look().parts.values())


def words(text):
    """What a reader reads."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).replace("\N{EN DASH}", "-").split())


@pytest.fixture
def spoil():
    """A change of rounds: the second rejects 'city' with a reason, and raises every alarm."""

    def make(text):
        def change(number, sites, line):
            if number == 2:
                sites["city"] = {"outcome": "rejected", "reason": text, "seconds": 3.0}
                line["alarms"] = [f"site 'st-mary': {text}; {text}"]
                line["outliers"] = [{"site": "st-mary", "figure": "cosine", "words": text}]
                line["refused_nodes"] = [text]

        return change

    return make


@pytest.mark.parametrize("text", BREAKERS)
def test_no_text_of_a_site_or_file_becomes_markup(make_study, spoil, text):
    run = make_study({"st-mary": ("ct",), "city": ("us",)}, change=spoil(text))
    write_json(run / "failure.json", {"reason": text, "final": True})
    write_json(run / "study.json", {"study": text, "began": text})
    recipe = json.loads((run / "recipe.json").read_text())
    write_json(run / "recipe.json", recipe | {"name": text})
    found = html(run)
    assert set(re.findall(r"<([a-z0-9]+)", found.lower())) <= ALLOWED
    assert not re.search(r"<[^>]* on[a-z]+=", found)
    assert not re.search(r"<[^>]* (?:src|style)=", found)
    assert {h.partition("#")[0] for h in re.findall(r'href="([^"]*)"', found)} <= {""}
    assert "1337" not in found
    if "`" not in text:  # which marks a command in what there is to do
        assert words(found).count(text) >= 5  # shown as it is, and not obeyed


def test_nothing_of_a_site_is_shown_but_the_closed_list(make_study):
    def change(number, sites, line):
        sites["city"] |= {"pixels": "secret", "digest": "secret", "weight": 0.123456789}
        sites["city"]["num_examples"] = {"us": 41, "secret": 7}
        sites["city"]["metrics"] |= {"ward": 98765.0, "loss/secret": 98765.0}
        line["secret"] = "secret"

    run = make_study({"st-mary": ("ct",), "city": ("us",)}, change=change)
    found = html(run)
    assert "us 41" in words(found)
    for kept in ("secret", "98765", "0.1234", "ward"):
        assert kept not in found


def test_a_site_whose_policy_sends_no_metrics_is_shown_without(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"] = {}

    found = html(make_study({"city": ("us",)}, change=change))
    assert "ultrasound" in found
    assert "kNN AUROC" in found
    assert not re.search(r"0\.7\b|0\.700", found)


def test_each_site_has_a_row_with_what_it_did(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"]["epsilon"] = 1.25 * number
        sites["city"]["bytes"] = 5_000_000
        if number == 3:
            sites["st-mary"] = {"outcome": "rejected", "reason": "not finite", "seconds": 40.0}
        if number == 4:
            sites["st-mary"] = {"outcome": "silent", "reason": "no reply before the deadline"}

    run = make_study({"city": ("us",), "st-mary": ("ct",)}, rounds=4, change=change)
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", StudyView(run).look().parts["sites"].html,
                      re.DOTALL)  # fmt: skip
    city, mary = map(words, rows)
    assert city == "city ✓ admitted round 4 us 100 4 - - - round 4 40 s 20 MB 5.00"
    assert mary == ("st-mary ✕ late no reply before the deadline round 2 ct 101 2 1 - 1 not finite "
                    "round 2 40 s - none")  # fmt: skip


def test_epsilon_is_shown_with_what_the_study_may_yet_take(make_study):
    def change(number, sites, line):
        sites["city"]["metrics"]["epsilon"] = 1.25 * number

    run = make_study({"city": ("us",), "st-mary": ("ct",)}, change=change)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["loss"]["koleo_weight"] = recipe["evaluation"]["every_rounds"] = 0
    recipe["memory"]["at_round_start"] = "kept"
    recipe["privacy"]["mode"] = "record"
    write_json(run / "recipe.json", recipe)
    write_json(run / PLAN, {"epsilon": 8.0})
    parts = StudyView(run).look().parts
    assert "2.50 of 8.00 epsilon a patient, delta 1e-05" in words(parts["head"].html)
    assert "2.50 5.50 left" in words(parts["sites"].html)


def test_alarms_come_before_the_sites_with_what_to_do(make_study, spoil):
    run = make_study({"st-mary": ("ct",), "city": ("us",)}, planned=3, change=spoil("odd"))
    look = StudyView(run).look()
    assert list(look.parts)[:3] == ["head", "alarms", "sites"]
    said = words(look.parts["alarms"].html)
    assert said.startswith("5 alarms ✕ Stop Site 'st-mary': odd. Odd. ▲ Act Odd. See Messages")
    assert look.title.startswith("(2) tiny: ")


def test_a_study_that_has_not_begun_has_a_page(make_study):
    run = make_study({"st-mary": ("ct",)}, rounds=0, planned=3)
    assert "not started" in words(html(run))


def test_a_new_round_changes_the_parts_and_the_pictures(make_study):
    run = make_study({"st-mary": ("ct",)}, rounds=3)
    history = (run / "history.jsonl").read_bytes()
    (run / "history.jsonl").write_bytes(b"".join(history.splitlines(keepends=True)[:2]))
    view = StudyView(run)
    before = view.look().parts
    assert view.look().parts is before  # half a second has not passed
    (run / "history.jsonl").write_bytes(history)

    def changed():
        view._last, view._next_drawing = None, 0.0
        after = view.look().parts
        return [name for name in after if after[name] != before[name]]

    assert changed() == ["head", "sites", "modalities"]  # words do not wait for pictures
    assert changed() == [
        "head",
        "sites",
        "modalities",
        "losses",
        "embeddings",
        "updates",
        "seconds",
    ]


def test_pictures_are_drawn_no_more_than_a_fifth_of_the_time(make_study, monkeypatch):
    run = make_study({"st-mary": ("ct",)}, rounds=3)
    now = 100.0
    monkeypatch.setattr(page.time, "monotonic", lambda: now)
    view = StudyView(run)
    drawn = []

    def draw():
        nonlocal now
        now += 2.0  # so long it takes
        drawn.append(now)
        return {}

    monkeypatch.setattr(view, "_draw", draw)
    for number in range(100):
        now += 1.0
        view._charts(number // 2)  # something new every other second
    assert 2.0 * len(drawn) <= (drawn[-1] - drawn[0] + 10) / 5
    assert len(drawn) >= 10
