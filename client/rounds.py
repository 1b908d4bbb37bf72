"""One round at one site: policy, state, training, and the reply that may leave."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from client.egress import cut
from client.policy import Refusal, approve
from client.progress import ProgressFile, end_progress
from client.ranks import OnReport, train_on_ranks
from client.site import SiteConfig
from client.spending import Spending
from client.state import SiteState, StoredReply, open_state
from core.checkpoint import Arrays, sha256_arrays
from core.config import Recipe
from core.shards import Shard
from core.sites import open_site, training_images, training_patients
from core.transport import TransportError, carry, pack_update, unpack_state
from core.wire import (
    COUNTS,
    EPSILON,
    PROTOTYPES,
    SCALES,
    STUDENT,
    TEACHER,
    GlobalState,
    SiteUpdate,
    take,
)

LOG = logging.getLogger("fedmermed.site")
OWED = "owed/"
"""Before the private arrays that hold what rounding took from what was sent, see core.transport."""


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

    def carry(self, update: SiteUpdate, private: Arrays) -> tuple[SiteUpdate, Arrays]:
        """Add what is owed from the round before; the update to store, and what to keep of it."""
        transport, owed = self.recipe.federation.transport, take(private, OWED)
        whole, left = carry(update.to_arrays(), self.unpacked(), owed, transport)
        student, teacher = take(whole, STUDENT), take(whole, TEACHER)
        kept = {OWED + name: array for name, array in left.items()}
        return replace(update, student=student, teacher=teacher), kept


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
    policy, number = site.policy, request.round_number
    spending = Spending(policy, request.recipe, request.study, number, site.state_path)
    with state.locked():
        spending.recover(state)
        if (stored := state.stored_reply(number, received)) is not None:
            images = stored.update.num_examples
            recipe = approve(policy, request.recipe, number, images, stored.patients)
            spending.hold_stored(stored.update.to_arrays())
            return cut(policy, recipe, stored.update), False
        if time.time() > request.expires:  # it waited here while an earlier round was trained
            raise Refusal(f"round {number} was over before this site could begin with it")
        spending.hold_new()
        shards = [shard for path in site.shard_paths for shard in open_site(path)]
        images, patients = training_images(shards), training_patients(shards)
        recipe = approve(policy, request.recipe, number, images, patients)
        update, private = _train(site, request, recipe, shards, state)
        if spending.private:
            update = replace(update, metrics={EPSILON: spending.epsilon_after()})
        update, owed = request.carry(cut(policy, recipe, update), state.private())
        charge = spending.charge if spending.private else None
        state.commit(number, received, StoredReply(update, patients), private | owed, charge)
        end_progress(state.directory)
    return update, True


def _train(
    site: SiteConfig, request: Request, recipe: Recipe, shards: Sequence[Shard], state: SiteState
) -> tuple[SiteUpdate, Arrays]:
    # torch takes seconds to import: a query, a refusal or a stored reply needs none of it.
    import torch

    from core.device import resolve_devices
    from core.private_round import private_round
    from core.site_round import site_round

    if site.threads:
        torch.set_num_threads(site.threads)
    devices = _shared(recipe, site.name, resolve_devices(site.device, site.devices))
    number = request.round_number
    progress = ProgressFile(
        state.directory, number, recipe.federation.local_steps, recipe.optim.batch_size
    )
    received = GlobalState.from_arrays(request.unpacked())
    private = recipe.privacy.mode == "record"
    on_report = _progress(site.name, number, progress, private=private)
    if len(devices) > 1:
        return train_on_ranks(
            recipe, received, state, site=site, first_step=request.step, devices=devices,
            on_report=on_report,
        )  # fmt: skip

    def on_step(done: int, steps: int, loss: float) -> None:
        on_gpu = devices[0].startswith("cuda")
        on_report(done, steps, loss, torch.cuda.max_memory_allocated() if on_gpu else None)

    if private:
        return private_round(
            recipe, received, shards, state.private(), site=site.name,
            declared=site.policy.declared_images, first_step=request.step, device=devices[0],
            on_step=on_step,
        )  # fmt: skip
    return site_round(
        recipe, received, shards, state.private(), site=site.name, first_step=request.step,
        device=devices[0], on_step=on_step,
    )  # fmt: skip


def _shared(recipe: Recipe, site: str, devices: Sequence[str]) -> Sequence[str]:
    """The devices that a round can use."""
    if recipe.privacy.mode == "record":
        # Which patients are in a step, and the noise, are drawn once, by one process.
        most, why = 1, "record privacy trains on one"
    else:
        most = recipe.optim.batch_size // recipe.optim.accumulate
        why = f"parts of {recipe.optim.batch_size} images would be empty on more"
    if len(devices) > most:
        LOG.info("site %s: %d of %d devices train: %s", site, most, len(devices), why)
    return devices[:most]


def _check(request: Request) -> None:
    expected = (request.round_number - 1) * request.recipe.federation.local_steps
    if request.step != expected:
        raise Refusal(
            f"round {request.round_number} starts at step {expected} of the recipe, not at "
            f"{request.step}"
        )
    prefixes: tuple[str, ...] = (STUDENT, TEACHER, PROTOTYPES, COUNTS)
    if request.recipe.federation.transport != "float32":
        prefixes += (SCALES,)
    if any(not name.startswith(prefixes) for name in request.arrays):
        raise Refusal("the message holds an array that is not on the list of what is sent down")


def _progress(site: str, round_number: int, file: ProgressFile, *, private: bool) -> OnReport:
    def on_report(done: int, steps: int, loss: float, gpu_bytes: int | None) -> None:
        # Poisson sampling may draw no patient; without record privacy, NaN is a broken model.
        words = "no patient drawn" if math.isnan(loss) and private else f"loss {loss:.3f}"
        LOG.info(
            "site %s, round %d: step %d of %d, %s", site, round_number, done, steps, words,
            extra={"step": (site, round_number, done, loss)},
        )  # fmt: skip
        file.step(done, loss, gpu_bytes)

    return on_report
