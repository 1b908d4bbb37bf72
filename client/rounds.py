"""One round at one site: policy, state, training, and the reply that may leave."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from client.egress import cut
from client.holdings import training_images, training_patients
from client.policy import Refusal, approve
from client.progress import ProgressFile
from client.site import SiteConfig
from client.state import StoredReply, open_state
from core.checkpoint import Arrays, sha256_arrays
from core.config import Recipe
from core.sites import open_site
from core.transport import TransportError, pack_update, unpack_state
from core.wire import (
    COUNTS,
    PROTOTYPES,
    SCALES,
    STUDENT,
    TEACHER,
    GlobalState,
    SiteUpdate,
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
    """The global state under its wire names, as it came."""
    expires: float = math.inf
    """Unix time after which the coordinator waits for the reply no more."""

    def unpacked(self) -> Arrays:
        """The global state from which the round starts.

        Raises:
            Refusal: it did not come in the recipe's transport.
        """
        try:
            return unpack_state(self.arrays, self.recipe.federation.transport)
        except TransportError as error:
            raise Refusal(f"the message is not in the recipe's transport: {error}") from None

    def reply(self, update: SiteUpdate) -> Arrays:
        """The arrays of an update to this round, as they leave."""
        transport = self.recipe.federation.transport
        return pack_update(update.to_arrays(), self.unpacked(), transport)


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
        policy, number = site.policy, request.round_number
        if (stored := state.stored_reply(number, received)) is not None:
            images = stored.update.num_examples
            recipe = approve(policy, request.recipe, number, images, stored.patients)
            return cut(policy, recipe, stored.update), False
        if time.time() > request.expires:  # it waited here while an earlier round was trained
            raise Refusal(f"round {number} was over before this site could begin with it")
        shards = [shard for path in site.shard_paths for shard in open_site(path)]
        images, patients = training_images(shards), training_patients(shards)
        recipe = approve(policy, request.recipe, number, images, patients)
        # torch takes seconds to import: a query, a refusal or a stored reply needs none of it.
        import torch

        from core.site_round import resolve_device, site_round

        if site.threads:
            torch.set_num_threads(site.threads)
        device = resolve_device(site.device)
        progress = ProgressFile(
            state.directory, number, recipe.federation.local_steps, recipe.optim.batch_size, device
        )
        update, private = site_round(
            recipe,
            GlobalState.from_arrays(request.unpacked()),
            shards,
            state.private(),
            site=site.name,
            first_step=request.step,
            device=device,
            on_step=_progress(site.name, number, progress),
        )
        update = cut(policy, recipe, update)
        state.commit(number, received, StoredReply(update, patients), private)
        progress.end()
    return update, True


def _check(request: Request) -> None:
    expected = (request.round_number - 1) * request.recipe.federation.local_steps
    if request.step != expected:
        raise Refusal(
            f"round {request.round_number} starts at step {expected} of the recipe, not at "
            f"{request.step}"
        )
    prefixes: tuple[str, ...] = (STUDENT, TEACHER, PROTOTYPES, COUNTS)
    if request.recipe.federation.transport == "delta16":
        prefixes += (SCALES,)
    if any(not name.startswith(prefixes) for name in request.arrays):
        raise Refusal("the message holds an array that is not on the list of what is sent down")


def _progress(
    site: str, round_number: int, file: ProgressFile
) -> Callable[[int, int, float], None]:
    def on_step(done: int, steps: int, loss: float) -> None:
        LOG.info(
            "site %s, round %d: step %d of %d, loss %.3f", site, round_number, done, steps, loss,
            extra={"step": (site, round_number, done, loss)},
        )  # fmt: skip
        file.step(done, loss)

    return on_step
