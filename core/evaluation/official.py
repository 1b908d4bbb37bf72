"""Published figures of the MedMNIST sets, to be read beside ours, and what is wrong with the sets.

MedMNIST v2: Yang et al., Scientific Data 10:41 (2023), https://doi.org/10.1038/s41597-022-01721-8.
MedMNIST+: Doerrich et al., Scientific Reports (2025), https://arxiv.org/abs/2404.15786, figures of
its repository. Split sizes are those of the medmnist package; a set is known by its name and its
split sizes, so a copy in another order counts, and a part of a set does not.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from core.evaluate import Task
from core.medmnist import SETS, SIZES

V2_COLUMNS: Final = (
    *("ResNet-18 (28)", "ResNet-18 (224)", "ResNet-50 (28)", "ResNet-50 (224)"),
    *("auto-sklearn (28)", "AutoKeras (28)", "Google AutoML Vision (28)"),
)
PLUS_COLUMNS: Final = (
    *("ResNet-18, all weights trained", "ViT-B/16, all weights trained"),
    *("DINO ViT-B/16, linear probe", "CLIP ViT-B/16, linear probe", "DINO ViT-B/16, kNN (11)"),
)


@dataclass(frozen=True)
class Official:
    """Published figures of one set.

    Attributes:
        splits: possible counts of train, val and test images.
        v2: AUC/accuracy of each of V2_COLUMNS, all measured on the whole test split.
        plus: size in pixels -> percent AUC/accuracy of each of PLUS_COLUMNS.
        warning: known flaws, one line.
    """

    splits: tuple[tuple[int, int, int], ...]
    v2: str
    plus: dict[int, str]
    warning: str


OFFICIAL: Final = {
    "organamnist": Official(
        ((34561, 6491, 17778), (34581, 6491, 17778)),
        ".997/.935 .998/.951 .997/.935 .998/.947 .963/.762 .994/.905 .990/.886",
        {
            28: "99.30/92.04 99.20/90.29 99.27/89.74 97.62/80.36 -/84.59",
            64: "99.76/95.49 99.80/94.78 99.74/93.91 99.19/88.20 -/90.75",
            128: "99.84/96.21 99.86/96.27 99.79/94.97 99.42/90.19 -/91.25",
            224: "99.70/96.01 99.91/96.93 99.78/94.96 99.45/90.96 -/90.69",
        },
        "the test images are slices of 70 scans that the file does not number, so intervals over "
        "images are too narrow; files with 34,581 training images hold blank ones",
    ),
    "pneumoniamnist": Official(
        ((4708, 524, 624),),
        ".944/.854 .956/.864 .948/.854 .962/.884 .942/.855 .947/.878 .991/.946",
        {
            28: "95.01/83.12 95.60/83.65 97.29/86.59 94.48/84.88 -/85.74",
            64: "94.34/86.00 96.41/85.84 97.56/86.43 96.54/85.04 -/87.82",
            128: "97.91/89.85 96.81/83.76 98.89/90.33 96.64/84.67 -/90.54",
            224: "98.04/91.13 96.33/86.11 98.92/91.56 97.17/84.99 -/89.74",
        },
        "children only; val is a tenth of the source's training images without patient numbers, so "
        "val flatters",
    ),
    "breastmnist": Official(
        ((546, 78, 156),),
        ".901/.863 .891/.833 .857/.812 .866/.842 .836/.803 .871/.831 .919/.861",
        {
            28: "87.61/83.97 84.83/82.05 86.77/83.33 75.48/79.27 -/78.21",
            64: "87.14/83.33 84.49/81.62 91.70/85.68 84.40/81.20 -/86.54",
            128: "87.78/85.47 83.63/82.48 93.25/88.89 89.73/85.26 -/85.26",
            224: "89.94/87.18 86.18/83.76 93.43/88.68 86.52/83.55 -/87.18",
        },
        "156 test images without patient numbers: published runs of one method differ by .03 AUC, "
        "so differences below about .02 are no evidence",
    ),
    "pathmnist": Official(
        ((89996, 10004, 7180),),
        ".983/.907 .989/.909 .990/.911 .989/.892 .934/.716 .959/.834 .944/.728",
        {
            28: "98.24/85.54 97.81/82.82 97.93/85.05 98.01/83.78 -/80.54",
            64: "99.40/93.36 99.28/91.97 99.59/93.90 99.17/90.83 -/90.39",
            128: "99.62/95.27 99.67/94.61 99.64/94.27 99.33/91.12 -/93.72",
            224: "99.30/93.82 99.64/95.82 99.75/96.14 99.32/91.82 -/94.32",
        },
        "patches without patient numbers: val is of the training centre and flatters, intervals "
        "over patches are too narrow",
    ),
    "retinamnist": Official(
        ((1080, 120, 400),),
        ".717/.524 .710/.493 .726/.528 .716/.511 .690/.515 .719/.503 .750/.531",
        {
            28: "70.41/52.33 71.72/49.83 71.99/52.08 73.10/54.17 -/48.00",
            64: "74.40/53.08 73.58/54.08 77.18/55.92 77.77/56.00 -/52.50",
            128: "80.81/59.25 73.71/54.00 82.17/58.42 82.29/59.33 -/51.00",
            224: "83.16/61.50 78.58/55.08 85.57/62.58 85.35/61.25 -/59.00",
        },
        "400 test images: differences below about .02 are no evidence; grades are ordered, which "
        "AUROC and accuracy ignore",
    ),
    "octmnist": Official(
        ((97477, 10832, 1000),),
        ".943/.743 .958/.763 .952/.762 .958/.776 .887/.601 .955/.763 .963/.771",
        {
            28: "92.10/69.07 88.59/64.00 92.30/62.63 89.47/58.20 -/46.50",
            64: "97.53/80.70 96.51/80.23 95.99/71.20 93.00/63.37 -/61.10",
            128: "97.77/84.03 98.95/87.47 97.83/75.47 97.66/77.23 -/72.20",
            224: "98.81/85.10 99.12/90.13 98.35/73.73 98.66/81.13 -/74.10",
        },
        "slices without patient numbers: splits of such slices inflate results (Tampu et al., "
        "Scientific Data 9:580, 2022), val most of all; the test classes are balanced, the "
        "training classes are not",
    ),
    "dermamnist": Official(
        ((7007, 1003, 2005),),
        ".917/.735 .920/.754 .913/.735 .912/.731 .902/.719 .915/.749 .914/.768",
        {
            28: "88.35/73.38 90.62/74.40 91.87/75.78 90.08/74.15 -/73.97",
            64: "91.70/76.36 93.77/77.01 95.40/79.88 93.40/77.22 -/75.91",
            128: "93.46/79.19 95.89/80.81 95.95/81.65 94.89/80.28 -/76.51",
            224: "95.27/82.33 96.28/82.31 96.83/84.42 95.92/81.93 -/78.35",
        },
        "lesions with several images are in both train and test (Abhishek et al., Scientific Data "
        "12:196, 2025, who give corrected splits), so results are inflated",
    ),
}
"""Set name -> figures, in the order of our modalities."""


def official_figures(task: Task) -> dict[str, Any] | None:
    """Published figures of a task's set; None unless it is one of OFFICIAL, whole.

    Returns:
        {"dataset": name, "size": pixels, "rows": [{"method", "auc", "acc"}], "warning": line}. Rows
        of MedMNIST v2 name the size they were measured at; those of MedMNIST+ are of this size. auc
        is None where it was not published.
    """
    match = re.match(r"[a-z]+", task.shard.name.lower())
    name, size = match.group() if match else "", task.shard.images.shape[1]
    found = OFFICIAL.get(name)
    counts = (len(task.train), len(task.val), len(task.test))
    classes = len(task.shard.classes[task.name])
    if (
        found is None or counts not in found.splits or size not in SIZES
        or (task.name, classes) != (SETS[name].modality, len(SETS[name].classes))
    ):  # fmt: skip
        return None
    rows = [
        _row(method, cell, 1) for method, cell in zip(V2_COLUMNS, found.v2.split(), strict=True)
    ] + [
        _row(f"{method} ({size})", cell, 100)
        for method, cell in zip(PLUS_COLUMNS, found.plus[size].split(), strict=True)
    ]
    return {"dataset": name, "size": size, "rows": rows, "warning": found.warning}


def _row(method: str, cell: str, unit: int) -> dict[str, Any]:
    auc, acc = (None if part == "-" else round(float(part) / unit, 4) for part in cell.split("/"))
    return {"method": method, "auc": auc, "acc": acc}
