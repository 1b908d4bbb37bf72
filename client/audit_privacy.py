"""`fedmermed-site audit-privacy`: what is attacked, and the verdict in words."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from core.config import load_recipe
from core.errors import UserError
from core.privacy.audit import BOUND_ERROR, DELTA, GAP_ERROR, REPLAYED, Verdict
from core.privacy.config import PrivacyConfig

DEFAULT: Final = PrivacyConfig(mode="record", noise_multiplier=2.6)
"""Without a recipe: two steps of it claim 2.2, well below what a thousand canaries can show."""
LARGEST_GAP: Final = 0.6
"""Steps are added up to here, a claim of 2.5: the smaller a claim, the more an attack can show."""
MOST_STEPS: Final = 8
CHUNK: Final = 256
"""Canaries at a time at most: each has a gradient as long as there are canaries."""


def what_to_audit(recipe_file: Path | None) -> tuple[PrivacyConfig, int]:
    """The privacy section that is audited and the number of steps.

    Raises:
        UserError: the recipe cannot be read, or its sites do not train privately.
    """
    if recipe_file is None:
        return DEFAULT, 2
    privacy = load_recipe(recipe_file).privacy
    if privacy.mode != "record":
        raise UserError(
            f"recipe '{recipe_file}': privacy.mode is '{privacy.mode}', in which sites add no "
            "noise; give a recipe with 'record', or none"
        )
    steps = math.floor((LARGEST_GAP * privacy.noise_multiplier) ** 2)
    bounded = privacy.model_copy(update={"chunk": min(privacy.chunk, CHUNK)})
    return bounded, min(max(steps, 1), MOST_STEPS)


def report(verdict: Verdict) -> Iterator[str]:
    """The verdict for a person, a line each."""
    yield (
        f"epsilon    claimed {verdict.claimed_epsilon:.2f}, found at least "
        f"{verdict.found_epsilon:.2f} of the {verdict.ceiling:.2f} that this audit could show "
        f"(delta {DELTA:g}, {1 - BOUND_ERROR:.0%} sure)"
    )
    yield (
        f"noise      canaries in and out should lie {verdict.claimed_gap:.2f} deviations apart; in "
        f"{verdict.exposed_by} they lie {verdict.found_gap:.2f}, at least "
        f"{verdict.least_gap:.2f} ({1 - GAP_ERROR:.1%} sure)"
    )
    if verdict.flagged:
        yield (
            f"[bold red]FLAGGED[/]: {_reason(verdict)}. Do not answer in mode 'record' with this "
            "installation; install the released version again, and tell its maintainers if this "
            "comes back"
        )
        return
    yield (
        f"[bold green]passed[/]: no more is leaked than claimed, as far as {verdict.canaries:,} "
        "canaries can tell"
    )
    if not verdict.conclusive:
        yield (
            "the claim is above what guesses can show: only the distance was tested; more "
            "canaries show a little more, a recipe with more noise shows much more"
        )


LIMITS: Final = (
    "Audited: images, views, loss, gradients, clip, sum, noise and its randomness, on this device. "
    "Not audited: whether a patient changes what others add, and prototypes (the tests of this "
    "version bound both), drawing patients by chance, and the accounting. A pass is no proof."
)


def as_json(verdict: Verdict, privacy: PrivacyConfig, steps: int, device: str) -> dict[str, Any]:
    """The same for scripts; a gap without any noise is null."""
    figures = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in asdict(verdict).items()
    }
    return {
        "flagged": verdict.flagged,
        "bound_flagged": verdict.bound_flagged,
        "gap_flagged": verdict.gap_flagged,
        "conclusive": verdict.conclusive,
        "delta": DELTA,
        **figures,
        "noise_multiplier": privacy.noise_multiplier,
        "clip_norm": privacy.clip_norm,
        "gradients": privacy.gradients,
        "steps": steps,
        "device": device,
        "limits": LIMITS,
    }


def _reason(verdict: Verdict) -> str:
    if not math.isfinite(verdict.least_gap):
        return "no noise at all hides who was in"
    if verdict.exposed_by == REPLAYED:
        return "its noise can be drawn again by who knows a seed"
    return "there is less noise than claimed, or a patient counts for more than one clip"
