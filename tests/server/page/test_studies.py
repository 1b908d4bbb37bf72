"""Which studies the live page shows, and how several are compared."""

import re
import shutil

import pytest

from core.errors import UserError
from server.page.studies import MOST, Studies


@pytest.fixture
def runs(make_study, tmp_path):
    """A directory with studies 'a' and 'b'."""
    made = make_study({"st-mary": ("ct",)}, rounds=3)
    for name in ("a", "b"):
        shutil.copytree(made, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_what_is_no_run_directory_and_holds_none_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match="is not a run directory and holds none"):
            Studies([path])


def test_a_directory_of_studies_is_looked_at_again(runs):
    studies = Studies([runs])
    assert list(studies.views()) == ["a", "b"]
    first = studies.views()["a"]
    shutil.copytree(runs / "a", runs / "c")
    assert list(studies.views()) == ["a", "b", "c"]
    assert studies.views()["a"] is first
    shutil.rmtree(runs / "b")
    assert list(studies.views()) == ["a", "c"]
    assert len(studies.front().look().parts) == 5


def test_a_link_in_a_directory_of_studies_is_passed_over(runs, tmp_path):
    shutil.move(runs / "b", tmp_path / "elsewhere")
    (runs / "b").symlink_to(tmp_path / "elsewhere")
    assert list(Studies([runs]).views()) == ["a"]


def test_studies_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "more")
    assert list(Studies([runs, tmp_path / "more"]).views()) == ["a", "b", "a-2", "b-2"]


def test_a_damaged_recipe_hides_one_study_of_several_and_is_told_of_one(runs):
    (runs / "b" / "recipe.json").write_text("{")
    assert list(Studies([runs]).views()) == ["a"]
    with pytest.raises(UserError):
        Studies([runs / "b"]).front()


def test_the_newest_studies_are_shown_where_there_are_too_many(runs):
    for number in range(MOST):
        shutil.copytree(runs / "a", runs / f"more-{number:02d}")
    (runs / "a" / "recipe.json").touch()
    names = list(Studies([runs]).views())
    assert len(names) == MOST
    assert "a" in names


def test_one_study_is_its_own_front_page_and_several_are_compared(runs):
    assert "sites" in Studies([runs / "a"]).front().look().parts
    assert "studies" in Studies([runs]).front().look().parts


def test_a_comparison_has_a_row_and_a_line_a_study(runs):
    parts = Studies([runs]).front().look().parts
    rows = re.findall(r"<tr><th.*?</tr>", parts["studies"].html, re.DOTALL)[1:]
    assert len(rows) == 2
    for name, row in zip(("a", "b"), rows, strict=True):
        assert f'<a href="/study/{name}">{name}</a>' in row
        assert 'data-label="kNN AUROC">0.700' in row
        assert 'data-label="loss, of collapse line">0.955' in row  # 3.97 / 4.159
    for part in ("means", "auroc"):
        assert parts[part].html.count("&#34;name&#34;:&#34;b&#34;") == parts[part].html.count(
            "<figure"
        )


def test_a_name_of_a_directory_is_escaped_and_its_link_is_quoted(runs):
    (runs / "a").rename(runs / '"><script>x&y')
    found = Studies([runs]).front().look().parts
    text = "".join(part.html for part in found.values())
    assert "<script" not in text
    assert 'href="/study/%22%3E%3Cscript%3Ex%26y"' in text
