import dataclasses
import fcntl
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.evaluate import extract
from core.evaluation import embed as embed_module
from core.evaluation.embed import embed
from core.evaluation.models import LoadedModel, open_model
from core.modalities import MODALITIES
from core.shards import Shard, open_shard, write_shard

Sites = dict[str, list[Shard]]


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    torch.set_num_threads(1)  # the tests below fork
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[model]\noptions = { patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }\n"
        "[views]\nglobal_px = 16\nlocal_px = 8\n"
    )
    return open_model(str(path))


def noise(name: str, modality: str, patients: int, seed: int) -> Shard:
    """Two images a patient; every third patient's are without label."""
    draws, count = np.random.default_rng(seed), 2 * patients
    patient = np.arange(count) // 2
    return Shard(
        name=name,
        images=draws.integers(0, 256, (count, 16, 16, 1), dtype=np.uint8),
        modality=np.full(count, MODALITIES.index(modality), np.int16),
        patient=patient,
        label=patient % 3 - 1,
        split=np.array(["train", "val", "test"])[patient % 3],
        classes={modality: (f"{modality} without", f"{modality} with finding")},
    )


def mixed_shard() -> Shard:
    """Images of two modalities by turns."""
    us, ct = noise("mixed", "us", 150, 0), noise("", "ct", 150, 0)
    modality = np.where(np.arange(300) % 2, us.modality, ct.modality)
    return dataclasses.replace(us, modality=modality, classes=us.classes | ct.classes)


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    """Three shards at two hospitals, 300 + 300 + 42 images, opened from disk."""
    shards = {
        "north/mixed": mixed_shard(),
        "north/cxr": noise("cxr", "cxr", 150, 1),
        "south/cxr": noise("cxr", "cxr", 21, 2),
    }
    result: Sites = {}
    for path, shard in shards.items():
        directory = write_shard(tmp_path / "data" / path, shard)
        result.setdefault(path.split("/")[0], []).append(open_shard(directory))
    return result


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of 256 images at any input size; returns how many images each `features` call got."""
    sizes: list[int] = []
    original = embed_module.features

    def counted(loaded: LoadedModel, images: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(images))
        return original(loaded, images, *args, **options)

    monkeypatch.setattr(embed_module, "features", counted)
    monkeypatch.setattr(embed_module, "PIXELS_A_PART", 1)
    return sizes


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_every_image_has_one_row_with_its_features_and_what_the_shard_says(
    tmp_path, loaded, sites, small_parts
) -> None:
    assert embed(loaded, sites, tmp_path / "e.npz") == 642
    rows = read(tmp_path / "e.npz")
    about = json.loads(str(rows.pop("about")))
    assert about["sha256"] == loaded.sha256
    assert set(rows) == {"site", "shard", "index", "modality", "split", "label", "embedding"}
    assert {len(column) for column in rows.values()} == {642}
    pairs = [(site, shard) for site, shards in sites.items() for shard in shards]
    for site, shard in pairs:
        mine = np.flatnonzero((rows["site"] == site) & (rows["shard"] == shard.name))
        assert rows["index"][mine].tolist() == list(range(len(shard.images)))
        assert (rows["split"][mine] == shard.split).all()
        for number in np.unique(shard.modality):
            name = MODALITIES[number]
            chosen = np.flatnonzero(shard.modality == number)
            expected = extract(loaded.model.backbone, shard.images[chosen], name, 16, last_blocks=1)
            assert rows["embedding"][mine[chosen]] == pytest.approx(expected, abs=1e-5)
            assert (rows["modality"][mine[chosen]] == name).all()
            names = np.array([*shard.classes[name], ""])  # -1 is the last
            assert (rows["label"][mine[chosen]] == names[shard.label[chosen]]).all()


def test_parquet_holds_the_same_table(tmp_path: Path, loaded, sites, small_parts) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    embed(loaded, sites, tmp_path / "e.npz", patients=True)
    embed(loaded, sites, tmp_path / "e.parquet", patients=True)
    table, rows = pq.read_table(tmp_path / "e.parquet"), read(tmp_path / "e.npz")
    assert json.loads(table.schema.metadata[b"fedmermed"]) == json.loads(str(rows.pop("about")))
    assert set(table.column_names) == set(rows)
    assert (np.array(table["embedding"].to_pylist(), np.float32) == rows["embedding"]).all()
    for name in ("site", "shard", "index", "modality", "split", "patient"):
        assert table[name].to_pylist() == rows[name].tolist()
    assert [label or "" for label in table["label"].to_pylist()] == rows["label"].tolist()
    assert table["label"].null_count == (rows["label"] == "").sum() > 0
    assert rows["patient"].tolist() == [
        number for shards in sites.values() for shard in shards for number in shard.patient
    ]


def test_killed_at_any_file_operation_it_goes_on_to_the_same_bytes(
    tmp_path: Path, loaded, sites, small_parts, kill_points
) -> None:
    embed(loaded, sites, tmp_path / "whole.npz")
    out = tmp_path / "e.npz"
    deaths = 0
    for killed in kill_points(lambda: embed(loaded, sites, out)):
        embed(loaded, sites, out)
        assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
        assert not (tmp_path / ".e.npz.parts").exists()
        out.unlink()
        deaths += killed
    assert deaths > 3 * 5  # three operations a part at least


def stop_after(images: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= images:
            raise KeyboardInterrupt

    return progress


def test_finished_parts_are_not_computed_again(tmp_path, loaded, sites, small_parts) -> None:
    out = tmp_path / "e.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(loaded, sites, out, progress=stop_after(300))
    assert not out.exists()
    small_parts.clear()
    seen: list[tuple[int, int]] = []
    embed(loaded, sites, out, progress=lambda done, total: seen.append((done, total)))
    assert sum(small_parts) == 342
    assert seen == [(256, 642), (300, 642), (556, 642), (600, 642), (642, 642)]


def test_a_changed_model_or_changed_data_does_not_resume(
    tmp_path: Path, loaded, sites, small_parts
) -> None:
    out = tmp_path / "e.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(loaded, sites, out, progress=stop_after(256))
    parameter = next(loaded.model.backbone.parameters())
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] += 1
    with pytest.raises(UserError, match=r"another extraction \(a change of the model\); remove"):
        embed(loaded, sites, out)
    with torch.no_grad():
        parameter.copy_(original)
    with pytest.raises(UserError, match="a change of the model"):
        embed(loaded, sites, out, last_blocks=2)
    images = sites["south"][0].images.copy()
    images[-1, 0, 0, 0] ^= 1
    changed = {**sites, "south": [dataclasses.replace(sites["south"][0], images=images)]}
    with pytest.raises(UserError, match="a change of the data"):
        embed(loaded, changed, out)
    label = np.roll(sites["south"][0].label, 1)
    changed = {**sites, "south": [dataclasses.replace(sites["south"][0], label=label)]}
    with pytest.raises(UserError, match="a change of the data"):
        embed(loaded, changed, out)
    assert embed(loaded, sites, out) == 642


def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, loaded, small_parts
) -> None:
    def peak(patients: int) -> int:
        directory = write_shard(tmp_path / str(patients), noise("a", "us", patients, 0))
        mapped = open_shard(directory)
        tracemalloc.start()
        embed(loaded, {"a": [mapped]}, tmp_path / f"{patients}.npz")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(128)  # what is allocated once
    grown = peak(1024) - peak(256)
    assert grown < 1536 * 32 * 4  # half of the 1,536 further rows of 64 numbers, 4 bytes each


def test_two_processes_do_not_work_on_one_target(tmp_path: Path, loaded, sites) -> None:
    (tmp_path / ".e.npz.parts").mkdir()
    with open(tmp_path / ".e.npz.parts" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working in"):
            embed(loaded, sites, tmp_path / "e.npz")


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path, loaded, sites) -> None:
    with torch.no_grad():
        next(loaded.model.backbone.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"shard 'mixed': embeddings of 300 of 300 images are NaN"):
        embed(loaded, sites, tmp_path / "e.npz")
    assert not (tmp_path / "e.npz").exists()


def test_an_unknown_format_is_refused(tmp_path: Path, loaded, sites) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.npz or \.parquet"):
        embed(loaded, sites, tmp_path / "e.csv")
