from pathlib import Path

import pytest

from client.site import load_site
from core.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "configs" / "sites" / "example.toml"


def write(tmp_path, text):
    file = tmp_path / "site.toml"
    file.write_text(text)
    return file


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
        ("name = 'a'\nshards = ['d']\n[policy]\nhours = ['8-17']\n", "'policy.hours.0'.*like 'mon"),
        ("name = 'a'\nshards = ['d']\n[policy]\nprivacy = 'some'\n", "'policy.privacy'"),
        ("name = 'a'\nshards = ['d']\n[policy]\nmax_epsilon = 0\n", "'policy.max_epsilon'"),
        ("name = 'a'\nshards = ['d']\n[policy]\nallowed_apps = ['x']\n", "'policy.allowed_apps.0'"),
    ],
)
def test_a_bad_site_file_is_refused_by_key(tmp_path, text, words):
    with pytest.raises(UserError, match=rf"site file '.*site.toml'.*{words}"):
        load_site(write(tmp_path, text))
