"""What a private round costs here; part of client.check.step, in a process of its own."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from client.check.training import Measured
from client.site import SiteConfig
from core.checkpoint import Arrays
from core.config import Recipe
from core.initial import initial_state
from core.private_round import private_round
from core.shards import Shard

MOST_STEPS: Final = 4


def measure_private_rounds(
    site: SiteConfig, recipe: Recipe, measured: Measured, shards: Sequence[Shard]
) -> Measured:
    """Time rounds of one step and of more: the difference is steps, the rest is once a round.

    Nothing of them leaves, so nothing is charged.
    """
    start = initial_state(recipe.from_scratch)

    def round_of(steps: int) -> tuple[float, Arrays]:
        federation = recipe.federation.model_copy(update={"local_steps": steps})
        began = time.perf_counter()
        _, kept = private_round(
            recipe.model_copy(update={"federation": federation}), start, shards, {},
            site=site.name, declared=site.policy.declared_images, first_step=0,
            device=measured.device,
        )  # fmt: skip
        return time.perf_counter() - began, kept

    round_of(1)  # allocates, compiles kernels, reads the disk
    (once, _), (many, kept) = round_of(1), round_of(1 + MOST_STEPS)
    step = max(many - once, 0.0) / MOST_STEPS
    network = sum(array.nbytes for array in start.student.values())
    return replace(
        measured,
        step_seconds=step,
        other_seconds=max(once - step, 0.0),
        message_bytes=2 * network,
        reply_bytes=2 * network if recipe.federation.teacher == "average" else network,
        private_bytes=sum(array.nbytes for array in kept.values()),
    )
