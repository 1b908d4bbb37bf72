"""The command as an operator types it."""

import json
import sys

import numpy as np
import pytest

from client.__main__ import main
from client.check.training import Measured
from core.checkpoint import read_json, sha256_file, write_json
from server.certificates import new_key, private_ssh


@pytest.fixture
def site_file(make_sites):
    return make_sites({"st-mary": ["ct"]})[0]


@pytest.fixture
def recipe_file(tmp_path, recipe):
    """The tiny recipe, for pictures of the size that the site has."""
    table = json.loads(recipe.to_json())
    text = "".join(
        f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table[section].items())
        for section in ("views", "memory", "optim", "federation", "evaluation")
    )
    text += "[images]\npx = 32\n[model]\nhead_hidden = 32\nembedding_dim = 16\n"
    text += "options = { embed_dim = 32, depth = 1, num_heads = 2, patch_size = 8 }\n"
    file = tmp_path / "recipe.toml"
    file.write_text(f'name = "tiny"\n{text}')
    return file


@pytest.fixture
def check(monkeypatch, capfd, tmp_path):
    """Runs the command; gives its exit status, what it printed, and its JSON by check."""

    def run(*arguments):
        file = tmp_path / "check.json"
        words = ["fedmermed-site", "check", *arguments, "--json", file]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            main()
        output = capfd.readouterr()
        found = json.loads(file.read_text()) if file.exists() else {"checks": []}
        lines = {line["check"]: line for line in found["checks"]}
        return int(end.value.code or 0), output.out + output.err, found, lines

    return run


@pytest.fixture
def quick(monkeypatch):
    """Where the training step does not matter: three seconds less."""
    measured = Measured(device="cpu", step_seconds=0.1)
    monkeypatch.setattr("client.check.training.measure", lambda *_: measured)


def colours(lines):
    return {name: line["status"] for name, line in lines.items()}


def test_a_ready_site_has_no_red_line(check, site_file, recipe_file):
    status, output, found, lines = check(site_file, "--recipe", recipe_file)
    assert status == 0
    assert {name for name, colour in colours(lines).items() if colour != "green"} == {
        "coordinator",  # none configured
        "CT window",  # phantoms know none
    }
    assert (found["site"], found["recipe"], found["red"], found["yellow"]) == (
        "st-mary", "tiny", 0, 2,
    )  # fmt: skip
    assert f"{found['green']} green, 2 yellow, 0 red" in output
    assert lines["training step"]["values"]["step_seconds"] > 0
    assert list(lines)[-1] == "disk"


def test_every_red_line_says_what_to_do_and_the_status_is_one(check, site_file, recipe_file):
    site_file.chmod(0o666)
    pixels = np.load(site_file.parent / "data" / "ct" / "images.npy", mmap_mode="r+")
    pixels[0, 0, 0, 0] ^= 1
    pixels.flush()
    text = site_file.read_text().replace("device = 'cpu'", "device = 'cuda:63'")
    site_file.write_text(f"{text}[coordinator]\nsuperlink = '127.0.0.1:1'\n")
    status, output, _, lines = check(site_file, "--recipe", recipe_file)
    assert status == 1
    red = {name for name, colour in colours(lines).items() if colour == "red"}
    assert red == {"site file", "shard ct", "coordinator", "device"}
    assert all(lines[name]["remedy"] for name in red)
    assert all(name in output for name in red)
    assert not {"TLS", "fleet path", "policy", "memory"} & set(lines)
    assert lines["training step"]["found"] == "not tried"


def test_without_a_recipe_the_rest_is_checked(check, site_file):
    status, _, found, lines = check(site_file)
    assert status == 0
    assert lines["recipe"]["status"] == "yellow"
    assert "--recipe" in lines["recipe"]["remedy"]
    assert lines["device"]["status"] == "green"
    assert found["recipe"] == ""


def test_a_key_that_others_may_read_is_a_red_line(check, site_file, quick):
    key = site_file.with_name("site.key")
    key.write_bytes(private_ssh(new_key()))
    text = site_file.read_text()
    site_file.write_text(f"{text}[coordinator]\nprivate_key = 'site.key'\n")
    key.chmod(0o644)
    status, _, _, lines = check(site_file)
    assert status == 1
    assert "open to others" in lines["site key"]["found"]
    assert lines["site key"]["remedy"].startswith("Run: chmod 600")
    key.chmod(0o600)
    status, _, _, lines = check(site_file)
    assert status == 0
    assert lines["site key"]["status"] == "green"


def test_a_bad_recipe_is_a_red_line(check, site_file, recipe_file, quick):
    recipe_file.write_text("colour = 1\n")
    site_file.write_text(
        site_file.read_text() + f"[coordinator]\nrecipe = {json.dumps(str(recipe_file))}\n"
    )
    status, _, _, lines = check(site_file)
    assert status == 1
    assert "unknown key 'colour'" in lines["recipe"]["found"]
    assert lines["recipe"]["remedy"] == "Check its spelling and section."


def test_an_unusable_site_file_is_one_line_and_status_two(check, tmp_path, site_file):
    status, output, _, lines = check(tmp_path / "nowhere.toml")
    assert (status, lines) == (2, {})
    assert output.startswith("error: site file")
    site_file.write_text(site_file.read_text() + "[coordinator]\nsuperlink = 'https://fl:443'\n")
    status, output, _, _ = check(site_file)
    assert status == 2
    assert "'coordinator.superlink': string should match pattern" in output


def test_no_patient_is_named(check, site_file, recipe_file, quick):
    """Keys as `prepare` writes them, in a table that was tampered with, digest and all."""
    directory, key = site_file.parent / "data" / "ct", "5ac1e7" * 5
    header, *lines = (directory / "table.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    manifest = read_json(directory / "manifest.json")
    for last_split, colour in ((rows[-1][3], "green"), ("test!", "red")):
        rows[-1][3] = last_split
        text = "\n".join(
            [header, *(f"{m},{key}{p:>02},{label},{s}" for m, p, label, s in rows), ""]
        )
        (directory / "table.csv").write_text(text)
        manifest["sha256"]["table.csv"] = sha256_file(directory / "table.csv")
        write_json(directory / "manifest.json", manifest)
        _, output, found, checks = check(site_file, "--recipe", recipe_file)
        assert checks["shard ct"]["status"] == colour
        assert key not in output + json.dumps(found)
    assert "line 29 does not fit the manifest" in checks["shard ct"]["found"]
