from pathlib import Path

import pytest

from client.site import PolicyRefusal, approve, load_site
from core.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "configs" / "sites" / "example.toml"


def write(tmp_path, text):
    file = tmp_path / "site.toml"
    file.write_text(text)
    return file


@pytest.fixture
def site(tmp_path):
    """A site whose policy is stricter than the defaults in every point."""
    return load_site(
        write(
            tmp_path,
            "name = 'st-mary'\nshards = ['data']\n[policy]\nallowed_modalities = ['ct']\n"
            "min_images = 50\nmax_rounds = 5\nmin_patients_per_prototype = 20\n",
        )
    )


def test_the_example_site_file_can_be_read():
    site = load_site(EXAMPLE)
    assert site.name == "st-mary"
    assert site.shard_paths == [EXAMPLE.parent.absolute() / "data/chest-xray"]
    assert site.state_path == EXAMPLE.parent.absolute() / "state"
    assert site.policy.allowed_modalities == ("cxr",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'a'\nshards = ['d']\ncolour = 1\n", "unknown key 'colour'"),
        ("name = 'a b'\nshards = ['d']\n", "'name': string should match pattern"),
        ("name = 'a'\nshards = []\n", "'shards'"),
        ("name = 'a'\nshards = ['d']\ndevice = 'tpu'\n", "'device': string should match"),
        ("name = 'a'\nshards = ['d']\n[policy]\nmin_images = '5'\n", "'policy.min_images'"),
        ("name = 'a'\nshards = ['d']\n[policy]\nmin_patients_per_prototype = 1\n", "greater than"),
        ("name = 'a'\nshards = ['d']\n[policy]\nallowed_modalities = ['mri']\n", "must be one of"),
    ],
)
def test_a_bad_site_file_is_refused_by_key(tmp_path, text, words):
    with pytest.raises(UserError, match=rf"site file '.*site.toml'.*{words}"):
        load_site(write(tmp_path, text))


def test_the_stricter_minimum_of_patients_holds(site, make_recipe):
    lax = approve(site, make_recipe(prototype_min_patients=2), 1, {"ct": 50})
    assert lax.federation.prototype_min_patients == 20
    strict = approve(site, make_recipe(prototype_min_patients=30), 1, {"ct": 50})
    assert strict.federation.prototype_min_patients == 30


@pytest.mark.parametrize(
    ("rounds", "round_number", "num_examples", "reason"),
    [
        (6, 1, {"ct": 50}, "the recipe has 6 rounds; this site's policy allows 5"),
        (2, 3, {"ct": 50}, "round 3 is not one of the recipe's rounds 1 to 2"),
        (2, 0, {"ct": 50}, "round 0 is not one of"),
        (2, 1, {}, "no training images"),
        (2, 1, {"ct": 49}, "49 training images of 'ct', fewer than the 50"),
        (2, 1, {"ct": 50, "us": 50}, "does not allow training on 'us'"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused(
    site, make_recipe, rounds, round_number, num_examples, reason
):
    with pytest.raises(PolicyRefusal, match=reason):
        approve(site, make_recipe(rounds=rounds), round_number, num_examples)
