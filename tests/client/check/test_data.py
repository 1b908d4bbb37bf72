import os
from dataclasses import replace

import numpy as np
import pytest

from client.check import data
from client.check.findings import Status
from client.site import load_site
from client.state import StoredReply, open_state
from core.checkpoint import read_json, write_json
from core.config import ImagesConfig
from core.errors import UserError
from core.phantoms import make_phantoms
from core.privacy.accounting import epsilon, study_events
from core.shards import open_shard, write_shard
from core.wire import Prototypes, SiteUpdate

GREEN, YELLOW, RED = Status


@pytest.fixture
def site_file(make_sites):
    """A site with CT and ultrasound, 14 patients of each, 32 px."""
    return make_sites({"st-mary": ["ct", "us"]})[0]


@pytest.fixture
def site(site_file):
    return load_site(site_file)


@pytest.fixture
def directories(site):
    return data.shard_directories(site.shard_paths[0])


@pytest.fixture
def shards(directories):
    return [open_shard(directory) for directory in directories]


def images_of(recipe, **values):
    return recipe.model_copy(update={"images": ImagesConfig(**values)})


def with_policy(site, **values):
    return site.model_copy(update={"policy": site.policy.model_copy(update=values)})


def test_a_site_file_that_others_may_change_is_red(site_file, site):
    site_file.chmod(0o644)
    assert data.site_file(site_file, site).status == GREEN
    for mode in (0o664, 0o646):
        site_file.chmod(mode)
        finding = data.site_file(site_file, site)
        assert finding.status == RED
        assert finding.remedy == f"Type: chmod go-w '{site_file}'"


def test_a_missing_state_directory_is_made_private(tmp_path):
    state = tmp_path / "a" / "state"
    assert data.state_directory(state).found.endswith("made now")
    assert state.stat().st_mode & 0o777 == 0o700
    assert data.state_directory(state).found.endswith("writable")
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_state_directory_that_others_may_read_is_red(tmp_path, mode):
    tmp_path.chmod(mode)
    finding = data.state_directory(tmp_path)
    assert finding.status == RED
    assert finding.remedy == f"Type: chmod 700 '{tmp_path}'"


def test_a_state_directory_that_cannot_be_written_is_red(tmp_path):
    (tmp_path / "file").touch()
    finding = data.state_directory(tmp_path / "file" / "state")
    assert finding.status == RED
    assert "Not a directory" in finding.found
    assert f"uid {os.geteuid()}" in finding.remedy


def test_a_whole_shard_is_green_with_its_counts(directories):
    opened = []
    finding = data.read_shard(directories[0], opened)
    assert finding.status == GREEN
    assert finding.found.startswith("ct 28 images of 14 patients; 32 px grey, 28.7 kB")
    assert [shard.name for shard in opened] == ["phantoms-ct"]


def test_one_changed_pixel_is_found(directories):
    pixels = np.load(directories[0] / "images.npy", mmap_mode="r+")
    pixels[-1, -1, -1, -1] ^= 1
    pixels.flush()
    opened = []
    with pytest.raises(UserError, match="its sha256 is not the manifest's"):
        data.read_shard(directories[0], opened)
    assert opened == []


def test_a_missing_and_an_empty_directory_are_told_apart(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    assert data.shard_directories(empty) == [empty]
    with pytest.raises(UserError, match="holds no shard"):
        data.read_shard(empty, [])
    assert data.shard_directories(tmp_path / "nowhere") == [tmp_path / "nowhere"]
    with pytest.raises(UserError, match="does not exist; correct shards"):
        data.read_shard(tmp_path / "nowhere", [])


@pytest.mark.parametrize(
    ("asked", "view", "status", "words"),
    [
        (32, 32, GREEN, "32 px, as the recipe asks"),
        (64, 32, YELLOW, "the recipe asks for 64 px"),
        (16, 32, YELLOW, "the recipe asks for 16 px"),
        (64, 48, RED, "trains on views of 48"),
    ],
)
def test_the_pictures_size_is_held_against_the_recipe(recipe, shards, asked, view, status, words):
    views = recipe.views.model_copy(update={"global_px": view})
    changed = images_of(recipe, px=asked).model_copy(update={"views": views})
    finding = data.picture_size(changed, shards)
    assert finding.status == status
    assert words in finding.found


@pytest.mark.parametrize(
    ("window", "status", "words"),
    [
        (None, YELLOW, "ct: the shard does not say"),
        ([40.0, 400.0], GREEN, "centre 40, width 400 HU, as the recipe asks"),
        ([40, 400], GREEN, "as the recipe asks"),
        ([-600.0, 1500.0], RED, "ct: another CT window than the recipe's centre 40"),
    ],
)
def test_the_ct_window_is_held_against_the_recipe(
    recipe, directories, shards, window, status, words
):
    manifest = read_json(directories[0] / "manifest.json")
    manifest.pop("ct_window", None)
    if window:
        manifest["ct_window"] = window
    write_json(directories[0] / "manifest.json", manifest)
    finding = data.ct_window(images_of(recipe, ct_window=(40.0, 400.0)), directories, shards)
    assert finding.status == status
    assert words in finding.found


def test_no_ct_needs_no_window(recipe, directories, shards):
    assert data.ct_window(recipe, directories[1:], shards[1:]).found == "no CT here"


def test_what_the_policy_refuses_is_red_with_its_reason(site, recipe, shards):
    assert data.policy(site, recipe, shards).status == GREEN
    finding = data.policy(with_policy(site, allowed_modalities=("ct",)), recipe, shards)
    assert finding.status == RED
    assert "does not allow training on 'us'" in finding.found
    untrained = [replace(s, split=np.full(len(s.split), "test")) for s in shards]
    assert "no image is in the split 'train'" in data.policy(site, recipe, untrained).found


def test_too_few_patients_for_a_prototype_are_yellow(site, make_recipe, shards):
    patients = {s.name: len(set(s.patient[s.split == "train"].tolist())) for s in shards}
    fewest, most = min(patients.values()), max(patients.values())
    assert data.patients(site, make_recipe(prototype_min_patients=fewest), shards).status == GREEN
    finding = data.patients(site, make_recipe(prototype_min_patients=most + 1), shards)
    assert finding.status == YELLOW
    assert "none of ct, us will leave" in finding.found
    stricter = with_policy(site, min_patients_per_prototype=most + 1)
    assert data.patients(stricter, make_recipe(), shards).status == YELLOW
    silent = with_policy(site, send_prototypes=False)
    assert data.patients(silent, make_recipe(prototype_min_patients=999), shards).status == GREEN


def test_patients_of_a_modality_add_up_over_shards(site, make_recipe, tmp_path):
    shards = []
    for seed in (1, 2):
        shard = make_phantoms("ct", patients=10, images_per_patient=1, px=32, seed=seed)
        shards.append(open_shard(write_shard(tmp_path / f"{seed}", shard)))
    one, both = (data.patients(site, make_recipe(), s).found for s in (shards[:1], shards))
    count = int(one.split("ct ")[1].split(";")[0])
    assert f"ct {2 * count};" in both


def test_rounds_left_are_told_for_each_study(site, recipe):
    site = with_policy(site, max_rounds=5)
    assert "none used yet" in data.budget(site, recipe).found
    update = SiteUpdate(
        round_number=3, student={"w": np.zeros(1)}, teacher={}, prototypes=Prototypes({}, {}),
        num_examples={"ct": 1}, metrics={},
    )  # fmt: skip
    open_state(site.state_path, "ab" * 16).commit(3, "digest", StoredReply(update, {}), {})
    finding = data.budget(site, recipe)
    assert finding.status == GREEN
    assert "the policy allows 5 rounds a study; the recipe asks for 2" in finding.found
    assert "study abababab: 3 used, 2 left" in finding.found


def test_a_recipe_without_record_privacy_spends_nothing(site, recipe):
    assert "no epsilon is spent" in data.privacy(site, recipe).found


def test_what_a_private_study_costs_is_held_against_the_ceiling(site, make_record_recipe):
    recipe = make_record_recipe()
    whole = epsilon(study_events(recipe), 1e-5)
    finding = data.privacy(site, recipe)
    assert finding.status == YELLOW
    assert f"epsilon 0.00 spent, {whole:.2f} with all of this study" in finding.found
    assert data.privacy(with_policy(site, max_epsilon=whole + 1), recipe).status == GREEN
    finding = data.privacy(with_policy(site, max_epsilon=whole * 0.99), recipe)
    assert finding.status == YELLOW
    assert "enough for 1 of its 2 rounds" in finding.found
