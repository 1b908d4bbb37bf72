"""Who holds what, and who answers when: the scenarios of benchmarks/scenarios.py.

Sites are cut out of the shards of seven hospitals, a modality each, by patient: no patient is at
two sites. Everything follows from the scenario's name, the seed and the round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.modalities import MODALITIES
from core.randomness import numpy_generator
from core.shards import Shard

Sites = dict[str, list[Shard]]
Indices = NDArray[np.int64]

SCENARIOS: Final = (
    *("extreme", "skewed_0.5", "skewed_0.1", "sizes", "leaving", "joining", "participation"),
    *("broken", "misnamed", "quarter", "sixteenth", "three", "alone", "endless"),
)
SHARES: Final[Mapping[str, float]] = {"quarter": 1 / 4, "sixteenth": 1 / 16}
"""Of its patients that each site keeps."""
THREE: Final = ("cxr", "us", "oct")
"""The modalities of `three`: those with the fewest images."""
LEAVING: Final = ("us", "dermatology")
"""A grey and a coloured modality, whose only sites leave at half time."""
JOINING: Final = ("dermatology",)
STAYING: Final = "ct"
"""Whose site stays in `alone`: random weights solve it, so it says nothing itself."""
CHANGING: Final[Mapping[str, tuple[str, ...]]] = {
    "leaving": LEAVING,
    "joining": JOINING,
    "alone": tuple(m for m in MODALITIES if m != STAYING),
}
"""Modalities whose sites leave or join, at half time if ENDLESS does not say when."""
ENDLESS: Final[Mapping[str, float]] = {"alone": 1 / 8, "endless": 1 / 8}
"""Scenarios of a study whose end nobody knew: its learning rate stays at its peak; and the share of
the rounds before sites leave, if any do."""
SHARE: Final = 0.3
"""Of the sites, in each round of `participation`."""
BIG_SHARE: Final = 0.8
"""Of each modality's patients, at the big site of `sizes`."""
DAMAGED: Final = "dermatology"
"""Half of whose patients are at a site that spoils their images."""
MANY_IMAGES: Final = 1500
"""From so many training images on a modality is split over three sites and not two."""
FEWEST_IMAGES: Final = 24
"""A site has no fewer."""
MOST_SPLITS: Final = 1000
"""Draws of a split until that holds."""


@dataclass(frozen=True)
class Scenario:
    """Sites, who answers, and what to look at."""

    sites: Sites
    answering: Callable[[int], list[str]]
    """Round, from 1 -> names."""
    half: int
    """The round after which somebody leaves or before whose successor somebody joins."""
    changing: tuple[str, ...] = ()
    """Modalities that leave or join then; where there are any, that state is measured too."""


def build(name: str, hospitals: Mapping[str, Sequence[Shard]], seed: int, rounds: int) -> Scenario:
    """Make a scenario.

    Args:
        name: One of SCENARIOS.
        hospitals: Modality -> its shards, one modality each.
        seed: Draws the split and who answers.
        rounds: Of the whole study, at least 2.

    Raises:
        UserError: a modality has too few images to be split.
    """
    half = max(1, int(rounds * ENDLESS.get(name, 1 / 2)))
    whole: Sites = {modality: list(shards) for modality, shards in hospitals.items()}
    sites, changing = whole, ()
    if name.startswith("skewed"):
        sites = _skewed(whole, float(name.partition("_")[2]), seed)
    elif name == "participation":
        sites = _skewed(whole, 0.5, seed)
    elif name == "sizes":
        sites = _sizes(whole, seed)
    elif name in ("broken", "misnamed"):
        sites = _damaged(whole, seed, name)
    elif name in SHARES:
        sites = _share(whole, SHARES[name], seed)
    elif name == "three":
        sites = {modality: whole[modality] for modality in THREE if modality in whole}
    elif name in CHANGING:
        changing = tuple(m for m in CHANGING[name] if m in whole)
    names = sorted(sites)

    def answering(number: int) -> list[str]:
        if name == "participation":
            count = max(2, round(SHARE * len(names)))
            drawn = numpy_generator(seed, "who answers", number).permutation(len(names))[:count]
            return [names[place] for place in sorted(drawn)]
        away = (number <= half) if name == "joining" else (number > half)
        return [site for site in names if not (away and site in changing)]

    return Scenario(sites, answering, half, changing)


def cut(shard: Shard, chosen: Indices, name: str) -> Shard:
    """Some of a shard's images, as a shard of another site."""
    return replace(
        shard,
        name=name,
        images=shard.images[np.sort(chosen)],
        **{
            column: getattr(shard, column)[np.sort(chosen)]
            for column in ("modality", "patient", "label", "split")
        },
    )


def split_patients(
    shard: Shard, shares: Callable[[int], NDArray[np.float64]], generator: np.random.Generator
) -> list[Indices]:
    """Deal the training patients of each label out to sites.

    Args:
        shard: of one modality.
        shares: label -> the part of its patients that each site gets [S]; sums to 1.
        generator: shuffles the patients.

    Returns:
        The images [n] of each site; a patient is of the label of the first image.
    """
    training = np.flatnonzero(shard.split == "train")
    patients, first = np.unique(shard.patient[training], return_index=True)
    label = shard.label[training][first]
    parts: list[list[Indices]] = []
    for value in np.unique(label):
        mine = generator.permutation(patients[label == value])
        borders = np.rint(np.cumsum(shares(int(value)))[:-1] * len(mine)).astype(int)
        parts.append(np.split(mine, borders))
    return [
        training[np.isin(shard.patient[training], np.concatenate(site))]
        for site in zip(*parts, strict=True)
    ]


def _skewed(whole: Sites, concentration: float, seed: int) -> Sites:
    """Two or three sites a modality, the labels dealt by Dirichlet; images without one evenly.

    Drawn anew until no site has fewer than FEWEST_IMAGES, as is usual (Li et al., ICDE 2022).
    """
    sites: Sites = {}
    for modality, shards in whole.items():
        images = sum(int((shard.split == "train").sum()) for shard in shards)
        count = 3 if images >= MANY_IMAGES else 2
        generator = numpy_generator(seed, "skew", str(concentration), modality)

        def shares(label: int, count: int = count, generator: np.random.Generator = generator):
            if label < 0:
                return np.full(count, 1 / count)
            return generator.dirichlet([concentration] * count)

        for _ in range(MOST_SPLITS):
            parts = [split_patients(shard, shares, generator) for shard in shards]
            if min(sum(map(len, site)) for site in zip(*parts, strict=True)) >= FEWEST_IMAGES:
                break
        else:
            raise UserError(
                f"{modality}: {MOST_SPLITS} draws of a split over {count} sites all left one with "
                f"fewer than {FEWEST_IMAGES} of the {images} training images; give more images"
            )
        for number in range(count):
            held = zip(shards, (part[number] for part in parts), strict=True)
            sites[f"{modality}-{number + 1}"] = [cut(s, i, s.name) for s, i in held if len(i)]
    return sites


def _sizes(whole: Sites, seed: int) -> Sites:
    """A university hospital with most patients of all modalities, and a small site a modality."""
    sites: Sites = {"big": []}
    for modality, shards in whole.items():
        for shard in shards:
            generator = numpy_generator(seed, "sizes", shard.name)
            big, small = split_patients(
                shard, lambda label: np.array([BIG_SHARE, 1 - BIG_SHARE]), generator
            )
            sites["big"].append(cut(shard, big, shard.name))
            sites.setdefault(modality, []).append(cut(shard, small, shard.name))
    return sites


def _share(whole: Sites, share: float, seed: int) -> Sites:
    """A part of each site's patients; a smaller part is within a larger one."""
    sites: Sites = {}
    for modality, shards in whole.items():
        for shard in shards:
            generator = numpy_generator(seed, "share", shard.name)
            kept, _ = split_patients(shard, lambda label: np.array([share, 1 - share]), generator)
            sites.setdefault(modality, []).append(cut(shard, kept, shard.name))
    return sites


def _damaged(whole: Sites, seed: int, how: str) -> Sites:
    """One more site, with half of a modality's patients, whose images or names are wrong."""
    sites = dict(whole)
    sites[DAMAGED], sites["damaged"] = [], []
    for shard in whole[DAMAGED]:
        generator = numpy_generator(seed, "damaged", shard.name)
        good, bad = split_patients(shard, lambda label: np.array([0.5, 0.5]), generator)
        sites[DAMAGED].append(cut(shard, good, shard.name))
        taken = cut(shard, bad, shard.name)
        sites["damaged"].append(_broken(taken, generator) if how == "broken" else _misnamed(taken))
    return sites


def _broken(shard: Shard, generator: np.random.Generator) -> Shard:
    """Half of the images black, half noise."""
    images = generator.integers(0, 256, shard.images.shape, dtype=np.uint8)
    images[::2] = 0
    return replace(shard, images=images)


def _misnamed(shard: Shard) -> Shard:
    """Photographs of skin said to be chest X-rays."""
    modality = MODALITIES.index("cxr")
    return replace(shard, modality=np.full_like(shard.modality, modality), classes={"cxr": ()})
