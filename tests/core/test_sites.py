from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.modalities import MODALITIES
from core.shards import Shard, write_shard
from core.sites import open_site, open_sites

IMAGES64 = Path(__file__).parents[2].parent / "shared/data/images64"


def tiny_shard(name: str = "tiny", px: int = 8, channels: int = 3) -> Shard:
    return Shard(
        name=name,
        images=np.zeros((2, px, px, channels), np.uint8),
        modality=np.zeros(2, np.int16),
        patient=np.arange(2),
        label=np.arange(2),
        split=np.array(["train", "test"]),
        classes={"ct": ("head", "chest")},
    )


def test_a_site_is_a_shard_or_holds_several(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "alpha", tiny_shard("one"))
    write_shard(tmp_path / "data" / "beta" / "x", tiny_shard("x"))
    write_shard(tmp_path / "data" / "beta" / "y", tiny_shard("y", channels=1))
    (tmp_path / "data" / ".x.partial").mkdir()
    (tmp_path / "data" / "alpha.report").mkdir()
    (tmp_path / "data" / "beta" / "x.report").mkdir()
    sites = open_sites(tmp_path / "data")
    assert {name: [s.name for s in shards] for name, shards in sites.items()} == {
        "alpha": ["one"],
        "beta": ["x", "y"],
    }
    assert list(open_sites(tmp_path / "data" / "alpha")) == ["one"]
    assert [s.name for s in open_site(tmp_path / "data" / "beta")] == ["x", "y"]


def test_shards_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "site" / "x", tiny_shard("x"))
    write_shard(tmp_path / "site" / "y", tiny_shard("y", px=16))
    with pytest.raises(UserError, match="mixes pixel sizes \\('x' 8 px, 'y' 16 px\\)"):
        open_site(tmp_path / "site")
    other = replace(tiny_shard("y"), classes={"ct": ("a", "b")})
    write_shard(tmp_path / "site" / "y", other)
    with pytest.raises(UserError, match="'x' and 'y' name different classes for 'ct'"):
        open_site(tmp_path / "site")


def test_a_data_directory_without_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; check the path"):
        open_sites(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither npz files nor shards; make shards with"):
        open_sites(tmp_path)
    (tmp_path / "site").mkdir()
    with pytest.raises(UserError, match=r"'.*/site' holds no shard"):
        open_sites(tmp_path)
    write_shard(tmp_path / "site", tiny_shard())
    np.savez(tmp_path / "ct_a.npz", train_images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match="holds npz files and shards"):
        open_sites(tmp_path)


def test_npz_files_become_one_site_a_modality_in_the_fixed_order(tmp_path: Path) -> None:
    for name in ("octmnist_64", "cxr_b", "pneumoniamnist", "path_a"):
        np.savez(tmp_path / f"{name}.npz", train_images=np.zeros((2, 8, 8), np.uint8))
    sites = open_sites(tmp_path)
    assert list(sites) == ["cxr", "pathology", "oct"]
    assert [shard.name for shard in sites["cxr"]] == ["cxr_b", "pneumoniamnist"]
    np.savez(tmp_path / "oct_c.npz", train_images=np.zeros((2, 16, 16), np.uint8))
    with pytest.raises(UserError, match="site 'oct' mixes pixel sizes"):
        open_sites(tmp_path)


@pytest.mark.skipif(not IMAGES64.is_dir(), reason="the shared images are not here")
def test_the_real_images_open_as_seven_sites_without_leaks() -> None:
    sites = open_sites(IMAGES64)
    assert sorted(sites) == sorted(MODALITIES)
    assert [len(shard.images) for shard in sites["cxr"]] == [1000, 550]
    assert sites["cfp"][0].classes["cfp"][3] == "diabetic_retinopathy"
    assert len(np.unique(sites["pathology"][0].patient)) == 154
