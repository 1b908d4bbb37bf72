"""One round at one site: policy, state, training, and the reply that may leave."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from client.site import Refusal, SiteConfig, approve
from client.state import open_state
from core.checkpoint import Arrays, sha256_arrays
from core.config import Recipe
from core.sites import open_site
from core.wire import (
    COUNTS,
    PROTOTYPES,
    STUDENT,
    TEACHER,
    GlobalState,
    Prototypes,
    SiteUpdate,
    metric_is_declared,
)

LOG = logging.getLogger("fedmermed.site")


@dataclass(frozen=True)
class Request:
    """What the coordinator asks for in one round."""

    study: str
    round_number: int
    step: int
    """Global step at which the round starts."""
    recipe: Recipe
    arrays: Arrays
    """The global state under its wire names."""


def answer(site: SiteConfig, request: Request) -> tuple[SiteUpdate, bool]:
    """Train a round, or find that it was trained already.

    Args:
        site: The site's file.
        request: The round.

    Returns:
        The reply, and whether it was trained now (False: it is the stored one).

    Raises:
        Refusal: the site will not do it; the text may be sent to the coordinator.
        UserError: the site cannot do it; the text may hold paths and stays here.
    """
    _check(request)
    received = sha256_arrays(request.arrays)
    state = open_state(site.state_path, request.study)
    with state.locked():
        if (stored := state.stored_reply(request.round_number, received)) is not None:
            return stored, False
        # torch takes seconds to import: a query or a stored reply needs none of it.
        import torch

        from core.site_round import num_examples, resolve_device, site_round

        if site.threads:
            torch.set_num_threads(site.threads)
        shards = [shard for path in site.shard_paths for shard in open_site(path)]
        counts = num_examples(shards)
        recipe = approve(site, request.recipe, request.round_number, counts)
        update, private = site_round(
            recipe,
            GlobalState.from_arrays(request.arrays),
            shards,
            state.private(),
            site=site.name,
            first_step=request.step,
            device=resolve_device(site.device),
            on_step=_progress(site.name, request.round_number),
        )
        update = outgoing(site, recipe, update)
        state.commit(request.round_number, received, update, private)
    return update, True


def outgoing(site: SiteConfig, recipe: Recipe, update: SiteUpdate) -> SiteUpdate:
    """What of an update may leave the site.

    **Guarantees**, for every update:
        - Metrics leave only if the policy sends metrics, and then only names on the closed list.
        - Prototypes leave only if the policy sends prototypes.
        - The teacher leaves only if the recipe averages teachers.
    """
    metrics = {n: v for n, v in update.metrics.items() if metric_is_declared(n)}
    averages = recipe.federation.teacher == "average"
    return replace(
        update,
        teacher=update.teacher if averages else {},
        prototypes=update.prototypes if site.policy.send_prototypes else Prototypes({}, {}),
        metrics=metrics if site.policy.send_metrics else {},
    )


def _check(request: Request) -> None:
    expected = (request.round_number - 1) * request.recipe.federation.local_steps
    if request.step != expected:
        raise Refusal(
            f"round {request.round_number} starts at step {expected} of the recipe, not at "
            f"{request.step}"
        )
    prefixes = (STUDENT, TEACHER, PROTOTYPES, COUNTS)
    if any(not name.startswith(prefixes) for name in request.arrays):
        raise Refusal("the message holds an array that is not on the list of what is sent down")


def _progress(site: str, round_number: int) -> Callable[[int, int, float], None]:
    def on_step(done: int, steps: int, loss: float) -> None:
        LOG.info(
            "site %s, round %d: step %d of %d, loss %.3f", site, round_number, done, steps, loss,
            extra={"step": (site, round_number, done, loss)},
        )  # fmt: skip

    return on_step
