"""What report, overview and status say of a study's differential privacy."""

from rich.console import Console

from core.checkpoint import write_json
from server.overview_reader import PLAN, OverviewReader
from server.report import write_report
from server.status import picture

TWO = {"city": ["ct"], "st-mary": ["us"]}


def spent(number, sites, line):
    """City's ledger holds 1.5 a round; St Mary answers the first round alone."""
    sites["city"]["metrics"] = {"epsilon": 1.5 * number}
    sites["st-mary"]["metrics"] = {"epsilon": 1.25}
    if number > 1:
        sites["st-mary"] = {"outcome": "absent", "reason": "not connected"}


def drawn(run):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture(OverviewReader(run).read()))
    return console.export_text()


def test_record_privacy_is_told_with_each_sites_epsilon(make_study, make_record_recipe, tmp_path):
    run = make_study(TWO, recipe=make_record_recipe(), change=spent)
    write_json(run / PLAN, {"epsilon": 3.25, "delta": 1e-5})
    view = OverviewReader(run).read()
    assert (view.privacy.mode, view.privacy.spent, view.privacy.planned) == ("record", 3.0, 3.25)
    assert {name: site.epsilon for name, site in view.sites.items()} == {
        "city": 3.0, "st-mary": 1.25,
    }  # fmt: skip
    assert {modality.verdict for modality in view.modalities.values()} == {"private"}
    text = drawn(run)
    assert "private in ct, us" in text
    assert "record privacy: epsilon 3.00 of 3.25 a patient, at delta 1e-05" in text
    assert "1.25" in text
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Mode: record, by 2 sites." in page
    assert "city 3.00, st-mary 1.25" in page
    assert "Mode: none" not in page


def test_without_privacy_nothing_speaks_of_an_epsilon_but_the_report(make_study, tmp_path):
    run = make_study(TWO)
    view = OverviewReader(run).read()
    assert (view.privacy.mode, view.privacy.spent) == ("none", None)
    assert "epsilon" not in drawn(run)
    write_report(run, tmp_path / "report.html")
    assert "no epsilon was spent" in (tmp_path / "report.html").read_text()


def test_a_hostile_epsilon_does_not_break_the_view(make_study, make_record_recipe):
    def change(number, sites, line):
        sites["city"]["metrics"] = {"epsilon": "<script>"}

    run = make_study(TWO, recipe=make_record_recipe(), change=change)
    assert OverviewReader(run).read().sites["city"].epsilon is None
