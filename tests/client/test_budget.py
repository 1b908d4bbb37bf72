"""The command `fedmermed-site budget`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client.__main__ import main
from client.site import load_site
from core.privacy.accounting import Event, epsilon, study_events
from core.privacy.ledger import Ledger

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `fedmermed-site budget`; gives its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmermed-site", "budget", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def recipe(make_record_recipe):
    """Without sampling, of which epsilon takes no time to find."""
    return make_record_recipe(
        {"rounds": 10}, sampling_rate=1.0, noise_multiplier=9.0, expected_patients=14
    )


@pytest.fixture
def recipe_file(recipe, tmp_path: Path) -> Path:
    def toml(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
        return json.dumps(value)

    path = tmp_path / "recipe.toml"
    lines = (f"{key} = {toml(value)}\n" for key, value in recipe.model_dump(mode="json").items())
    path.write_text("".join(lines))
    return path


@pytest.fixture
def site(make_sites) -> Path:
    """A site with a ceiling."""
    (path,) = make_sites({"a": ["ct"]}, policy="max_epsilon = 2.0\ndelta = 1e-4\n")
    return path


def told(output: str) -> dict[str, str]:
    """Name -> value of the lines of facts."""
    pairs = (line.split("  ", 1) for line in output.splitlines() if "  " in line.strip())
    return {name.strip(): value.strip() for name, value in pairs}


def test_a_recipe_tells_its_epsilon_by_round(budget: Run, recipe, recipe_file: Path) -> None:
    status, output, errors = budget("--recipe", recipe_file)
    assert (status, errors) == (0, "")
    facts = told(output)
    assert facts["noise multiplier"] == "9"
    assert facts["steps"] == "2 a round, 10 rounds"
    assert facts["patients to train on"] == "14, about 14 a step"
    assert "epsilon spent before" not in facts
    total = epsilon(study_events(recipe), 1e-5)
    assert float(output.split(" 10  ")[1].split()[0]) - 0.01 < total  # rounded up
    assert float(output.split(" 10  ")[1].split()[0]) >= total


def test_a_plan_finds_the_noise_of_an_epsilon(budget: Run) -> None:
    options = "--patients 4000 --epsilon 2 --rounds 6 --steps 5 --rate 1 --weights 40000 --json"
    status, output, _ = budget(*options.split())
    assert status == 0
    found = json.loads(output)
    assert found["rounds"] == 6
    assert found["local_steps"] == 5
    sigma = found["noise_multiplier"]
    assert found["epsilon_by_round"]["6"] == epsilon([Event("gradients", sigma, 1.0, 30)], 1e-5)
    assert 1.99 < found["epsilon_by_round"]["6"] <= 2
    assert found["noise_to_signal"] == pytest.approx(sigma * 200 / 4000)
    assert found["remarks"] == []
    assert found["site"] is None


def test_a_recipe_without_privacy_is_planned_from_only_with_an_epsilon(
    budget: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plain.toml"
    path.write_text("name = 'plain'\n[federation]\nrounds = 4\n")
    status, _, errors = budget("--recipe", path)
    assert status == 2
    assert errors == (
        "error: recipe 'plain' has privacy.mode 'none', so no noise of its own to account for; "
        "give --epsilon to find the noise that it would take\n"
    )
    options = ("--recipe", path, "--epsilon", 4, "--rate", 1, "--weights", 100, "--json")
    status, output, _ = budget(*options)
    assert status == 0
    assert json.loads(output)["rounds"] == 4


def test_a_site_counts_its_patients_ledger_and_ceiling(
    budget: Run, recipe, recipe_file: Path, site: Path
) -> None:
    ledger = Ledger(load_site(site).state_path / "ledger.jsonl")
    earlier = (Event("gradients", 3.0, 1.0, 1),)
    ledger.charge("earlier", 1, "a" * 64, earlier, delta=1e-5, ceiling=None)
    before = ledger.path.read_bytes()
    status, output, _ = budget(site, "--recipe", recipe_file, "--json")
    assert status == 0
    found = json.loads(output)
    assert found["patients"] == 8  # to train on; the others are for validation and test
    of_site = found["site"]
    total = epsilon([*earlier, *study_events(recipe)], 1e-4)
    assert of_site["with_spent_by_round"]["10"] == total
    assert (of_site["spent"], of_site["ceiling"]) == (epsilon(earlier, 1e-4), 2.0)
    left = of_site["rounds_left"]
    assert 0 < left < 10
    for rounds, fits in ((left, True), (left + 1, False)):
        total = epsilon([*earlier, *study_events(recipe, 1, rounds)], 1e-4)
        assert (total <= 2.0) == fits
    assert ledger.path.read_bytes() == before
    _, output, _ = budget(site, "--recipe", recipe_file)
    facts = told(output)
    assert facts["rounds left under it"] == f"{left} of 10"
    assert facts["ceiling"] == "2 at delta 0.0001"
    assert "and of all before" in output


def test_a_number_of_patients_that_is_given_goes_before_the_sites(
    budget: Run, recipe_file: Path, site: Path
) -> None:
    _, output, _ = budget(site, "--recipe", recipe_file, "--json", "--patients", 9)
    assert json.loads(output)["patients"] == 9


def test_a_site_without_a_ceiling_is_told_so(budget: Run, recipe_file: Path, make_sites) -> None:
    (path,) = make_sites({"a": ["ct"]})
    _, output, _ = budget(path, "--recipe", recipe_file)
    facts = told(output)
    assert facts["ceiling"] == "none: policy.max_epsilon"
    assert facts["epsilon spent before"] == "0.00 at delta 1e-05"
    assert "rounds left under it" not in facts


def test_what_makes_a_guarantee_weak_or_a_step_long_is_remarked(
    budget: Run, recipe_file: Path
) -> None:
    options = ("--recipe", recipe_file, "--patients", 100, "--delta", 0.05)
    _, output, _ = budget(*options)
    assert "Delta 0.05 is more than one over the number of patients" in output
    assert "take at most 0.001" in output
    assert "The recipe divides by 14 patients a step, and about 100 would be in one" in output


def test_a_damaged_ledger_is_an_error_and_no_epsilon(
    budget: Run, recipe_file: Path, site: Path
) -> None:
    state = load_site(site).state_path
    state.mkdir(parents=True, exist_ok=True)
    (state / "ledger.jsonl").write_text("{}\n{}\n")
    status, output, errors = budget(site, "--recipe", recipe_file)
    assert (status, output) == (2, "")
    assert "what was spent is not known" in errors
