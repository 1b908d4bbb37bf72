import html
import json
import re
import subprocess
import sys
import time

import pytest

from core.checkpoint import sha256_file
from core.errors import UserError
from server.report import MOST_INCIDENTS, write_report

SCRIPT = "<script>document.title='mine'</script>"
NONE = "\N{EN DASH}"
TWO = {"st-mary": ("ct", "us"), "city": ("cxr",)}


def written(run):
    out = run.parent / "report.html"
    write_report(run, out)
    return out.read_text(encoding="utf-8")


def text(page):
    """What a reader sees, on one line."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def cells(page, site):
    row = re.search(rf'<tr><th scope="row">{site}</th>(.*?)</tr>', page, re.DOTALL)
    return [text(cell) for cell in re.findall(r"<td.*?</td>", row[1], re.DOTALL)]


def test_a_study_of_two_sites_is_told_with_its_curves_cost_versions_and_checksum(make_study):
    run = make_study(TWO, rounds=3)
    page = written(run)
    seen = text(page)
    assert "3 of 3 rounds done" in seen
    assert "2 sites 301 images" in seen  # ct 100 + us 100 + cxr 101
    assert "flwr 1.41.0" in seen
    assert json.loads((run / "study.json").read_text())["study"] in seen
    for title in ("CT", "ultrasound", "chest X-ray"):
        assert f'aria-label="Loss over rounds, {title}: loss from 3.99 to 3.97; ' in page
    assert "kNN AUROC, validation over rounds: CT from 0.7 to 0.7" in page
    assert "Length of each site&#39;s update over rounds, 2 sites: city from 1.1 to 1.1" in page
    assert "to the sites 6 kB 2 kB from the sites 3 kB 1 kB" in seen
    assert "exchange 2 min 45 s" in seen
    assert "trained and evaluated for 15 s together" in seen  # 2.5 s x 2 sites x 3 rounds
    assert "CT 2 42 1 chest X-ray 2 42 1 ultrasound 2 42 1" in seen
    assert sha256_file(run / "round-0003.safetensors") in seen
    assert "the file agrees" in seen
    assert "# tiny" in seen  # the model card's draft
    assert "federation.prototypes_per_modality 3" in seen
    assert "Incidents None: every site that was asked answered in time" in seen
    assert "Read first" not in seen


def test_the_sites_table_counts_rounds_by_outcome(make_study):
    def change(number, sites, line):
        if number == 2:
            sites["city"] = {"outcome": "silent", "reason": "no reply", "asked": 3}
        if number == 3:
            sites["city"] = {"outcome": "rejected", "reason": "site 'city', round 3: a NaN"}

    page = written(make_study(TWO, rounds=4, change=change))
    assert cells(page, "city") == [
        "2", "1", "1", NONE, NONE, NONE, "2", "40 s", "0.500", "chest X-ray 101",
    ]  # fmt: skip
    assert cells(page, "st-mary")[:3] == ["4", NONE, NONE]
    seen = text(page)
    assert "Update rejected 1, late 1 (rounds times sites)." in seen
    assert "round 2 late city no reply round 3 update rejected city a NaN" in seen


def test_what_comes_from_sites_does_not_become_part_of_the_page(make_study):
    def change(number, sites, line):
        sites[f"x{SCRIPT}"] = {"outcome": "error", "reason": f"no {SCRIPT}", "failures": [SCRIPT]}
        line["alarms"] = [f"site 'x{SCRIPT}': ct: {SCRIPT}"]
        line["refused_nodes"] = [SCRIPT]
        line["outliers"] = [{"site": "city", "figure": "cosine", "words": f"site 'city': {SCRIPT}"}]
        sites["city"]["update_norm"] = 5.0
        sites[f"y{SCRIPT}"] = {**sites["city"]}  # is named in the pictures

    page = written(make_study(TWO, rounds=2, change=change))
    assert "<script" not in page
    assert "<SCRIPT" not in page
    assert page.count("&lt;script&gt;") >= 7
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"(?:src|href|action|data)\s*=\s*[\"'](?!#)", page)
    assert "url(http" not in page
    assert "@import" not in page


def test_figures_that_a_policy_keeps_back_leave_their_curves_out(make_study):
    def change(number, sites, line):
        for outcome in sites.values():
            outcome["metrics"] = {}

    seen = text(written(make_study(TWO, change=change)))
    assert "Loss and collapse line" not in seen
    assert "Embeddings RankMe" not in seen
    assert "Updates of the sites" in seen


def test_a_collapse_and_a_failed_run_are_read_first(make_study):
    def change(number, sites, line):
        line["alarms"] = ["site 'city': cxr: collapse: embeddings are one point"]

    run = make_study(TWO, rounds=2, planned=5, change=change)
    (run / "failure.json").write_text('{"reason": "round 3 missed its quorum", "final": true}')
    seen = text(written(run))
    first = seen[seen.index("Read first") : seen.index("The study", seen.index("Read first"))]
    assert "The last run stopped: round 3 missed its quorum" in first
    assert "Collapse alarm, rounds 1 to 2, site city: cxr: collapse" in first
    assert "the study is not over" in seen


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_checkpoint_that_is_not_the_historys_is_said_to_be_so(make_study, harm):
    run = make_study(TWO)
    file = run / "round-0002.safetensors"
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    seen = text(written(run))
    assert f"The checkpoint of round 2 is {harm}" in seen
    assert "the file agrees" not in seen


def test_nothing_in_the_run_directory_is_changed(make_study):
    run = make_study(TWO)
    before = {file.name: sha256_file(file) for file in run.iterdir()}
    written(run)
    assert {file.name: sha256_file(file) for file in run.iterdir()} == before


def test_fifty_sites_and_five_hundred_rounds_take_seconds(make_study):
    def change(number, sites, line):
        for index, name in enumerate(list(sites)):
            if (number + index) % 7 == 0:
                sites[name] = {"outcome": "silent", "reason": "no reply"}

    sites = {f"site-{index:02d}": ("ct", "us")[: 1 + index % 2] for index in range(50)}
    run = make_study(sites, rounds=20, change=change)
    lines = [json.loads(text) for text in (run / "history.jsonl").read_text().splitlines()]
    many = [{**lines[n % 20], "round": n + 1} for n in range(500)]
    many[-1]["sha256"] = lines[-1]["sha256"]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many))
    began = time.process_time()
    page = written(run)
    assert time.process_time() - began < 20  # 2 s of one core where it was written
    assert len(page) < 3_000_000
    assert f"The first {MOST_INCIDENTS} are shown" in text(page)


def test_a_directory_without_a_study_or_a_round_is_refused_in_plain_words(tmp_path, make_study):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path, tmp_path / "out.html")
    run = make_study(TWO)
    (run / "history.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished round yet"):
        write_report(run, tmp_path / "out.html")


def test_a_coordinator_without_torch_and_scikit_learn_can_report(make_study):
    run = make_study(TWO)
    program = (
        "import sys\n"
        "for name in ('torch', 'sklearn', 'timm', 'scipy'): sys.modules[name] = None\n"
        "from server.__main__ import app\n"
        f"app(['report', {str(run)!r}])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert "Study tiny" in (run / "report.html").read_text(encoding="utf-8")
