import re
from typing import Any

import yaml

from core.evaluation.card import model_card, write_card

RESULTS: dict[str, Any] = {
    "models": [{"name": "fed <b> | `x`"}, {"name": "random"}],
    "tasks": [
        {"task": "us/busi", "modality": "us", "shard": "busi: \"a\" # b", "classes": ["n", "y"]},
    ],
    "results": [
        {
            "model": model, "task": "us/busi", "method": "probe", "fraction": 100, "seed": 0,
            "metrics": {"auroc": {"value": value, "low": value - 0.05, "high": value + 0.05}},
        }
        for model, value in (("fed <b> | `x`", 0.81), ("random", 0.7))
    ],
    "warnings": ["labels are [noisy](http://x)\nand few"],
    "leakage": [{"shard": "busi", "kind": "patient", "splits": ["train", "test"], "count": 3}],
    "stability_conclusion": "it holds",
}  # fmt: skip


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_front_matter_holds_the_figures_whatever_the_names_hold() -> None:
    matter = front_matter(model_card(RESULTS))
    [entry] = matter["model-index"]
    assert entry["name"] == "fed <b> | `x`"
    assert entry["results"][0]["dataset"]["type"] == 'busi: "a" # b'
    assert entry["results"][0]["metrics"][0]["value"] == 0.81


def test_the_licence_is_left_to_the_coordinator() -> None:
    card = model_card(RESULTS)
    assert "license" not in front_matter(card)
    assert "# license: to be chosen by the coordinator" in card


def test_names_cannot_break_the_table_or_carry_markup() -> None:
    body = model_card(RESULTS).split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)[<>]", body)
    assert "\\[noisy\\](http://x) and few" in body
    header, ruler, *rows = [line for line in body.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in (header, ruler, *rows)}
    assert columns == {4}
    assert "| ultrasound | 0.810 (0.760 to 0.860) | 0.700 (0.650 to 0.750) |" in rows


def test_warnings_leakage_and_stability_are_among_the_limits() -> None:
    limits = model_card(RESULTS).split("## Limits")[1].split("##")[0]
    assert "noisy" in limits
    assert "Leakage in busi: patient (3) in train and test" in limits
    assert "Stability: it holds" in limits


def test_training_data_are_counts_by_modality() -> None:
    card = model_card(RESULTS, training={"us": 405, "ct": 3000})
    assert "| CT | 3,000 |\n| ultrasound | 405 |\n| all | 3,405 |" in card


def test_privacy_is_none_unless_stated() -> None:
    said = "(epsilon 8, delta 1e-5) for each patient"
    assert "## Privacy\n\nNone." in model_card(RESULTS)
    assert f"## Privacy\n\n{said}" in model_card(RESULTS, privacy=said)


def test_a_model_that_was_not_evaluated_has_a_card_too(tmp_path) -> None:
    write_card({}, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in card
    assert "must not be used to diagnose" in card
    assert "model-index" not in front_matter(card)
