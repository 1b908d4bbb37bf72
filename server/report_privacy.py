"""What a study's report and model card say of its differential privacy."""

from collections.abc import Sequence
from typing import Final

from core.config import Recipe
from core.wire import EPSILON
from server.history import Line

NONE: Final = (
    "Mode: none. No differential privacy was applied, no epsilon was spent, and none can be "
    "stated. What the model remembers of single training images has not been bounded. Images, "
    "labels and patient keys stayed at the sites; weights, prototypes, counts and scalar figures "
    "left them, weights in clear to the coordinator."
)
RECORD: Final = (
    "Mode: record, by {sites}. Each site trained with DP-SGD, its unit one patient, added or "
    "removed: what it sent in this study is (epsilon, delta)-differentially private at delta "
    "{delta:g}, whoever reads it, the coordinator included. Epsilon so far, by each site's own "
    "ledger: {epsilons}. Noise multiplier {sigma:g}, sampling rate {rate:g}, {steps:,} steps a "
    "round; an upper bound (PRV, Renyi, or the closed form). Not covered: that a site took part, "
    "how long it took, the numbers of images that sites declare in public, a patient who is in two "
    "hospitals (add up), other studies of a site, and how this recipe was chosen."
)
SITE: Final = (
    "Mode: site. The server cut each site's update to {clip:g}, added noise of {sigma:g} times "
    "that to their sum and divided by {sites:,}: the weights and prototypes that it released are "
    "({epsilon:.2f}, {delta:g})-differentially private in whether one site took part. The server "
    "saw every update in clear and is trusted. This report, the history and the metrics are not "
    "covered; a patient is covered only as a part of the site."
)


def privacy_words(recipe: Recipe, lines: Sequence[Line]) -> str:
    """One paragraph: mode, unit, epsilon, and what is not covered."""
    privacy = recipe.privacy
    if privacy.mode == "none":
        return NONE
    if privacy.mode == "site":
        spent = lines[-1]["metrics"].get(EPSILON, 0.0)
        return SITE.format(
            clip=privacy.clip_norm, sigma=privacy.noise_multiplier, sites=privacy.sites,
            epsilon=spent, delta=privacy.delta,
        )  # fmt: skip
    told: dict[str, float] = {}
    for line in lines:
        for site, outcome in line["sites"].items():
            if EPSILON in outcome.get("metrics", {}):
                told[site] = outcome["metrics"][EPSILON]
    return RECORD.format(
        sites="no site yet" if not told else f"{len(told)} sites" if len(told) > 1 else "one site",
        delta=privacy.delta,
        epsilons=", ".join(f"{site} {told[site]:.2f}" for site in sorted(told)) or "none",
        sigma=privacy.noise_multiplier, rate=privacy.sampling_rate,
        steps=recipe.federation.local_steps,
    )  # fmt: skip
