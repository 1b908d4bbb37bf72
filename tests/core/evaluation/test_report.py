"""The report: what stands in it, what is left out of it, and that it needs nothing but itself."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import auc, roc_auc_score

from core.backbone import Network
from core.checkpoint import save_arrays
from core.config import Recipe
from core.errors import UserError
from core.evaluation.attention import attention_maps, prototype_maps
from core.evaluation.figures import look
from core.evaluation.figures_curves import interval_chart, mean_roc, reliability
from core.evaluation.figures_maps import draw_examples, neighbour_strips, overlay
from core.evaluation.html import write_report
from core.evaluation.models import LoadedModel
from core.evaluation.tables import auroc_table, headline
from core.evaluation.types import Interval, Prediction
from core.evaluation.words import number, signed
from core.export import Model
from core.modalities import MEAN_STD

EVIL = "<script>alert('$x$')</script>"
CLASSES = {"cxr/nih": ["clear", EVIL], "us/busi": ["normal", "benign", "malignant"]}


class Page(HTMLParser):
    """Elements of a page in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag in names]


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def comparison(task: str, low: float, high: float) -> dict[str, Any]:
    return {
        "task": task, "method": "probe", "a": "fed", "b": "random", "metric": "auroc",
        "difference": (low + high) / 2, "low": low, "high": high, "p": 0.0004, "p_holm": 0.0012,
        "test": "paired bootstrap",
    }  # fmt: skip


def make_results() -> dict[str, Any]:
    """Two models, two tasks, two methods, few labels, and one of everything else."""
    figures = [
        {
            "model": model, "task": task, "method": method, "fraction": fraction, "seed": seed,
            "n_train": 20, "metrics": {"auroc": interval(0.9 - 0.1 * (model == "random"))},
        }
        for model in ("fed", "random")
        for task in CLASSES
        for method in ("probe", "knn20")
        for fraction, seed in ((10, 0), (10, 1), (100, 0))
    ]  # fmt: skip
    return {
        "created": "2026-11-22",
        "versions": {"fedmermed": "0.1.0"},
        "settings": {"fractions": [10, 100], "seeds": [0, 1]},
        "models": [
            {"name": "fed", "kind": "run", "path": "runs/fed", "sha256": "ab" * 32,
             "parameters": 2_800_000, "px": 64, "features": 1152},
            {"name": "random", "kind": "random", "path": None, "sha256": None, "parameters": None,
             "px": 64, "features": 1152},
        ],
        "tasks": [
            {"task": task, "modality": task.split("/")[0], "shard": task.split("/")[1],
             "classes": classes, "multi_label": False, "n": {"train": 20, "val": 9, "test": 24},
             "patients": {"train": 10, "val": 5, "test": 12}, "official": None}
            for task, classes in CLASSES.items()
        ],
        "results": figures,
        "means": [
            {"model": m, "method": "probe", "fraction": 100, "metric": "auroc", **interval(v)}
            for m, v in (("fed", 0.9), ("random", 0.8))
        ],
        "comparisons": [comparison("mean", 0.04, 0.16), comparison("us/busi", -0.02, 0.22)],
        "subgroups": [
            {"model": "fed", "task": "us/busi", "column": "sex", "group": "F", "n": 40,
             "auroc": 0.77, "gap": 0.05}
        ],
        "leakage": [
            {"shard": "busi", "kind": "identical image", "splits": ["train", "test"], "count": 2,
             "examples": ["3 = 9"]}
        ],
        "stability": [
            {"factor": "noise", "level": "sd .05", "model": "fed", "method": "knn20",
             "metric": "auroc", "value": 0.85, "change": -0.05, "task": "mean"}
        ],
        "stability_conclusion": "fed stays above random",
        "warnings": [f"beware of {EVIL}"],
    }  # fmt: skip


def write_arrays(directory: Path) -> tuple[Path, Path]:
    """predictions.npz and maps.npz that fit `make_results`."""
    rng = np.random.default_rng(0)
    predictions, maps = {}, {}
    for task, classes in CLASSES.items():
        labels = np.arange(24) % len(classes)
        for model in ("fed", "random"):
            key = f"{model}|{task}|probe|100|0"
            predictions[f"scores/{key}"] = rng.dirichlet(np.ones(len(classes)), 24)
            predictions[f"labels/{key}"] = labels
            predictions[f"groups/{key}"] = np.arange(24) // 2
            maps[f"{model}|{task}"] = rng.normal(size=(24, 8)).astype(np.float32)
            maps[f"attention|{model}|{task}"] = rng.random((24, 2, 2)).astype(np.float32)
        maps[f"labels|{task}"] = labels
        maps[f"groups|{task}"] = np.arange(24) // 2
        maps[f"images|{task}"] = rng.integers(0, 256, (24, 16, 16, 3), np.uint8)
        maps[f"embeddings|{task}"] = np.eye(8, dtype=np.float32)[np.arange(24) % 8]
    maps["prototypes|us"] = np.eye(8, dtype=np.float32)[:2]
    maps["counts|us"] = np.array([12, 30], np.float32)
    np.savez(directory / "predictions.npz", **predictions)
    np.savez(directory / "maps.npz", **maps)
    return directory / "predictions.npz", directory / "maps.npz"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with every section."""
    directory = tmp_path_factory.mktemp("report")
    results = make_results()
    results["tasks"][0]["official"] = {
        "dataset": "pneumoniamnist", "size": 28, "warning": "small and odd",
        "rows": [{"method": "ResNet-18 (28)", "auc": 0.944, "acc": 0.854}],
    }  # fmt: skip
    for row in results["results"]:
        row["metrics"]["accuracy"] = interval(0.7)
    json.dumps(results, allow_nan=False)
    write_report(results, *write_arrays(directory), directory / "report.html")
    return (directory / "report.html").read_text()


def bare(tmp_path: Path, results: dict[str, Any]) -> str:
    """A report from results.json alone."""
    write_report(results, tmp_path / "no.npz", tmp_path / "none.npz", tmp_path / "r.html")
    return (tmp_path / "r.html").read_text()


def test_the_page_needs_nothing_beside_itself(full: str) -> None:
    page = Page(full)
    assert not page.open
    assert not page.all("script", "link", "iframe", "object", "embed", "base", "form")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "http:" not in full
    assert "https:" not in full
    assert full.count("url(") == full.count("url(#")


def test_text_from_data_stays_text_in_tables_and_in_figures(full: str) -> None:
    assert "<script" not in full
    page = Page(full)
    assert f"beware of {EVIL}" in page.text
    assert any(EVIL in (image["alt"] or "") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_a_reader_without_sight_or_mouse_gets_on(full: str) -> None:
    page = Page(full)
    assert len(page.all("table")) == len(page.all("caption")) > 5
    assert all(svg.get("aria-label") or "aria-hidden" in svg for svg in page.all("svg"))
    assert all(image.get("alt") for image in page.all("img"))
    identifiers = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(identifiers) == len(set(identifiers))
    targets = [link["href"] for link in page.all("a")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(identifiers)


SECTIONS = (
    "warnings", "headline", "tables", "comparisons", "roc", "calibration", "labels", "stability",
    "subgroups", "official", "maps", "neighbours", "attention", "prototypes", "measured", "read",
)  # fmt: skip


def test_sections_stand_in_the_order_in_which_an_evaluator_reads(full: str) -> None:
    found = [section["id"] for section in Page(full).all("section")]
    assert tuple(found) == SECTIONS


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    found = {section["id"] for section in Page(bare(tmp_path, make_results())).all("section")}
    drawn = {"roc", "calibration", "maps", "neighbours", "attention", "prototypes", "official"}
    assert found == set(SECTIONS) - drawn


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    page = Page(bare(tmp_path, {}))
    assert [section["id"] for section in page.all("section")] == ["measured", "read"]


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    arrays = write_arrays(tmp_path)
    for name in ("a", "b"):
        write_report(make_results(), *arrays, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_clean_splits_are_said_to_be_clean_only_if_they_were_looked_at(tmp_path: Path) -> None:
    clean = make_results() | {"leakage": []}
    unknown = make_results() | {"leakage": None}
    assert "found in two splits" in Page(bare(tmp_path, clean)).text
    assert "found in two splits" not in Page(bare(tmp_path, unknown)).text


def test_one_model_on_images_with_several_labels(tmp_path: Path) -> None:
    results = make_results()
    results["models"] = results["models"][:1]
    results["tasks"] = [results["tasks"][1] | {"multi_label": True}]
    predictions, maps = (dict(np.load(path)) for path in write_arrays(tmp_path))
    several = np.random.default_rng(0).integers(0, 2, (24, 3))
    predictions["labels/fed|us/busi|probe|100|0"] = maps["labels|us/busi"] = several
    maps["images|us/busi"] = maps["images|us/busi"][..., :1]  # grey
    np.savez(tmp_path / "p.npz", **predictions)
    np.savez(tmp_path / "m.npz", **maps)
    write_report(results, tmp_path / "p.npz", tmp_path / "m.npz", tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "benign, malignant (several at once)" in page.text
    assert {"several", "roc", "calibration", "neighbours"} <= {
        *page.text.split(), *(section["id"] for section in page.all("section"))
    }  # fmt: skip
    assert "by modality" not in page.text  # one task needs no map of all


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    predictions, maps = write_arrays(tmp_path)
    maps.write_bytes(maps.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"maps\.npz' is not a whole npz file"):
        write_report(make_results(), predictions, maps, tmp_path / "r.html")


def test_the_headline_tells_higher_from_not_told_apart() -> None:
    results = make_results()
    assert headline(results) == (
        "fed reaches a mean AUROC of 0.900 (95 % interval 0.850 to 0.950) over 2 modalities, by "
        "linear probe on 100 % of the labels. That is higher than random (+0.100; +0.040 to "
        "+0.160)."
    )
    results["comparisons"] = [comparison("mean", -0.02, 0.1)]
    assert "not told apart from random (+0.040" in headline(results)
    results["comparisons"] = [comparison("mean", -0.3, -0.1)]
    assert "lower than random (\N{MINUS SIGN}0.200" in headline(results)
    results["comparisons"] = []
    assert "not compared with random (0.800)" in headline(results)


def test_the_headline_of_one_task_is_about_that_task() -> None:
    results = make_results()
    results["tasks"] = results["tasks"][1:]
    results["comparisons"] = [comparison("us/busi", 0.04, 0.16)]
    said = headline(results)
    assert said.startswith("fed reaches an AUROC of 0.900 (95 % interval 0.850 to 0.950) on ultra")
    assert "higher than random (+0.100" in said
    assert [row.title for row in auroc_table(results, "probe")[1]] == ["ultrasound"]


def test_best_is_marked_only_where_the_interval_of_the_difference_excludes_zero() -> None:
    columns, rows = auroc_table(make_results(), "probe")
    marks = {row.title: [cell.best for cell in row.cells] for row in rows}
    assert columns == ["fed", "random"]
    assert marks["mean over modalities"] == [True, False]
    assert marks["ultrasound"] == [False, False]  # its interval holds zero
    assert marks["chest X-ray"] == [False, False]  # not compared
    assert [row.cells[1].against_first for row in rows if row.is_mean] == ["lower"]


def test_best_needs_every_other_model() -> None:
    results = make_results()
    results["models"].append({"name": "pixels"})
    for row in copy.deepcopy(results["results"][:6]):
        results["results"].append(row | {"model": "pixels"})
    _, rows = auroc_table(results, "probe")
    assert not any(cell.best for row in rows for cell in row.cells)


def test_numbers_have_true_signs() -> None:
    assert [number(-0.12341), number(-0.0001), number(None), number(float("nan"))] == [
        "\N{MINUS SIGN}0.123", "0.000", "\N{EN DASH}", "\N{EN DASH}",
    ]  # fmt: skip
    assert [signed(0.1), signed(-0.1), signed(0.0001)] == ["+0.100", "\N{MINUS SIGN}0.100", "0.000"]


def prediction(scores: Any, labels: Any) -> Prediction:
    scores, labels = np.asarray(scores, float), np.asarray(labels)
    names = tuple(map(str, range(scores.shape[1])))
    groups = np.arange(len(scores))
    return Prediction("m", "us/s", "probe", 100, 0, 9, scores, labels, groups, names)


def test_the_area_under_the_drawn_curve_is_the_auroc() -> None:
    rng = np.random.default_rng(0)
    two, three = rng.dirichlet(np.ones(2), 90), rng.dirichlet(np.ones(3), 90)
    labels = rng.integers(0, 2, 90)
    assert auc(*mean_roc(prediction(two, labels))) == pytest.approx(
        roc_auc_score(labels, two[:, 1])
    )
    labels = rng.integers(0, 3, 90)
    expected = roc_auc_score(labels, three, multi_class="ovr")
    assert auc(*mean_roc(prediction(three, labels))) == pytest.approx(expected, abs=0.01)
    several = rng.integers(0, 2, (90, 3))
    expected = roc_auc_score(several, three)
    assert auc(*mean_roc(prediction(three, several))) == pytest.approx(expected, abs=0.01)


def test_reliability_compares_stated_with_true_shares() -> None:
    sure = np.array([0.6] * 25 + [0.9] * 30)  # of the class that is predicted
    scores = np.where(np.arange(55)[:, None] % 2 == [0, 1], sure[:, None], 1 - sure[:, None])
    labels = np.arange(55) % 2
    labels[[0, 1, 2, 3, 4, 30]] = 1 - labels[[0, 1, 2, 3, 4, 30]]
    low, high = reliability(prediction(scores, labels))
    assert low == pytest.approx(((25 * 0.6 + 3 * 0.9) / 28, 23 / 28, 28))
    assert high == pytest.approx((0.9, 26 / 27, 27))


def test_neighbours_are_of_other_patients_and_marked_by_class() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.3, 3.0, 3.1])
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 2, 3, 4])
    images = np.zeros((6, 8, 8, 3), np.uint8)
    rng = np.random.default_rng(0)
    strips = neighbour_strips(features, labels, images, ("a", "b"), groups, rng, queries=6)
    first = next(s for s in strips if [t.caption for t in s.tiles[:5]] == ["a", "a", "b", "b", "b"])
    assert [tile.mark for tile in first.tiles] == ["query", "same", "other", "other", "other"]
    assert max(len(strip.tiles) for strip in strips) == 6


def test_examples_are_drawn_from_the_classes_in_turn() -> None:
    belongs = np.array([0] * 50 + [1] * 3 + [2])
    drawn = draw_examples(belongs, 6, np.random.default_rng(0))
    assert sorted(belongs[drawn]) == [0, 0, 0, 1, 1, 2]
    assert len(set(drawn)) == 6
    assert sorted(draw_examples(belongs[-4:], 9, np.random.default_rng(0))) == [0, 1, 2, 3]


def test_the_overlay_is_brightest_where_attention_is() -> None:
    attention = np.array([[0.1, 0.0], [0.0, 0.9]], np.float32)
    drawn = overlay(np.full((16, 16, 1), 100, np.uint8), attention).astype(int)
    assert drawn[12:, 12:, 0].mean() > drawn[:4, 12:, 0].mean() + 50
    assert overlay(np.zeros((4, 4, 3), np.uint8), np.ones((2, 2), np.float32)).shape == (4, 4, 3)


def test_a_model_name_stays_text_in_the_chart() -> None:
    name = "<b>$a_1$</b>"
    picture = str(interval_chart([(name, look(0), Interval(0.8, 0.7, 0.9))], "AUROC").picture)
    assert "<b>" not in picture
    assert name in Page(picture).text
    assert "0.800" in Page(picture).text


def test_symbols_stay_distinct_beyond_the_colours() -> None:
    looks = [(look(i).colour, look(i).marker) for i in range(24)]
    assert len(set(looks)) == 24


def loaded(name: str = "vit_tiny_patch16_224", **options: Any) -> LoadedModel:
    torch.manual_seed(0)
    if name.startswith("vit"):
        options |= {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "img_size": 16}
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    return LoadedModel("m", "timm", Model(backbone, 16), Path("m"), "", 0)


@torch.no_grad()
def test_attention_is_softmax_of_queries_and_keys() -> None:
    model = loaded(reg_tokens=2)
    backbone: Any = model.model.backbone
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    fused = backbone.blocks[-1].attn.fused_attn
    maps = attention_maps(model, images, "us")
    assert maps is not None
    assert backbone.blocks[-1].attn.fused_attn == fused

    mean, std = (torch.tensor(x)[:, None, None] for x in MEAN_STD["us"])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    tokens = backbone._pos_embed(backbone.patch_embed(pixels))
    block = backbone.blocks[1]
    qkv = block.attn.qkv(block.norm1(backbone.blocks[0](tokens)))  # [5, 19, 36]
    q, k, _ = qkv.reshape(5, 19, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k)
    expected = (expected / 4**0.5).softmax(-1).mean(1)[:, 3:]  # without class token and registers
    assert maps.shape == (5, 4, 4)
    np.testing.assert_allclose(maps.reshape(5, 16), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_a_network_without_class_token_has_no_attention_map() -> None:
    image = np.zeros((1, 16, 16, 3), np.uint8)
    assert attention_maps(loaded(class_token=False, global_pool="avg"), image, "us") is None
    assert attention_maps(loaded("test_resnet"), image, "us") is None


@torch.no_grad()
def test_prototypes_meet_images_in_the_space_of_the_teacher(tmp_path: Path, recipe: Recipe) -> None:
    px = recipe.views.global_px
    network = Network(recipe.model, px).eval()
    teacher = {f"teacher/{n}": t.numpy() for n, t in network.state_dict().items()}
    centroid = np.eye(16, dtype=np.float32)[:2]
    counts = np.array([12, 30], np.float32)
    prototypes = {"prototypes/us": centroid, "prototype_counts/us": counts}
    save_arrays(tmp_path / "round-0003.safetensors", teacher | prototypes)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    images = np.random.default_rng(0).integers(0, 256, (3, px, px, 3), np.uint8)
    arrays = prototype_maps(tmp_path, {"us/busi": images, "ct/other": images})
    assert set(arrays) == {"prototypes|us", "counts|us", "embeddings|us/busi"}
    mean, std = (torch.tensor(x)[:, None, None] for x in MEAN_STD["us"])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    expected = network(pixels).numpy()
    np.testing.assert_allclose(arrays["embeddings|us/busi"], expected, rtol=1e-4, atol=1e-5)
    assert prototype_maps(tmp_path, {"ct/other": images}) == {}
