import json
import sys

import pytest

from client.__main__ import main
from client.audit_privacy import report, what_to_audit
from core.config import load_recipe
from core.privacy import step
from core.privacy.audit import Verdict
from core.privacy.config import PrivacyConfig

RECIPE = """
[loss]
koleo_weight = 0
[evaluation]
every_rounds = 0
[privacy]
mode = "record"
noise_multiplier = {noise}
clip_norm = 0.1
chunk = {chunk}
"""


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs `fedmermed-site audit-privacy`; gives exit status, output and errors."""

    def run(*arguments):
        shown = ["fedmermed-site", "audit-privacy", "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", shown)
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


def recipe_file(tmp_path, noise, chunk=16):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(noise=noise, chunk=chunk))
    return file


@pytest.fixture
def noiseless(monkeypatch):
    def add_noise(optimizer):
        for parameter in optimizer.params:
            parameter.grad = parameter.summed_grad.clone()

    monkeypatch.setattr(step._Noisy, "add_noise", add_noise)


def test_installed_code_passes_and_the_limits_are_told(command):
    status, output, errors = command("--canaries", 300)
    assert (status, errors) == (0, "")
    assert "claimed 2.19" in output
    assert "passed: no more is leaked than claimed, as far as 300 canaries can tell" in output
    assert "Not audited: whether a patient changes what others add" in output


def test_code_without_noise_ends_with_status_1_and_the_reason(command, noiseless):
    status, output, _ = command("--canaries", 300)
    assert status == 1
    assert "FLAGGED: no noise at all hides who was in. Do not answer in mode 'record'" in output


def test_json_has_the_verdict_and_no_infinity(command, noiseless, tmp_path):
    status, output, _ = command("--canaries", 300, "--json", "--recipe", recipe_file(tmp_path, 4.0))
    found = json.loads(output, parse_constant=pytest.fail)
    assert status == 1
    assert found["flagged"]
    assert found["bound_flagged"]
    assert found["least_gap"] is None
    assert (found["noise_multiplier"], found["clip_norm"], found["steps"]) == (4.0, 0.1, 5)


def test_recipes_noise_decides_the_steps_and_large_chunks_are_cut(tmp_path):
    _, steps = what_to_audit(recipe_file(tmp_path, 1.0))
    assert steps == 1  # one step claims more than 2.5 already
    _, steps = what_to_audit(recipe_file(tmp_path, 3.0))
    assert steps == 3  # (.6 * 3)^2 = 3.24
    privacy, steps = what_to_audit(recipe_file(tmp_path, 50.0, chunk=4096))
    assert (privacy.chunk, steps) == (256, 8)
    assert privacy.noise_multiplier == 50


def test_a_recipe_without_record_privacy_is_refused(command, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("")
    assert load_recipe(file).privacy == PrivacyConfig()
    status, _, errors = command("--recipe", file)
    assert status == 2
    assert "privacy.mode is 'none', in which sites add no noise" in " ".join(errors.split())


def test_a_claim_that_guesses_cannot_disprove_is_called_so():
    figures = {"canaries": 300, "found_epsilon": 0.5, "ceiling": 3.9, "claimed_gap": 2.0}
    figures |= {"found_gap": 2.0, "least_gap": 1.8, "exposed_by": "the weights"}
    told = " ".join(report(Verdict(claimed_epsilon=10.0, **figures)))
    assert "the claim is above what guesses can show" in told
    told = " ".join(report(Verdict(claimed_epsilon=2.0, **figures)))
    assert "the claim is above" not in told
