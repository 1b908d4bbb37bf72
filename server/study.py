"""One study from its run directory: open or resume it, run the rounds that are left."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from core.checkpoint import write_json
from core.config import Recipe
from core.errors import UserError
from core.privacy.accounting import epsilon, study_events
from core.wire import EPSILON, GlobalState
from server.history import Checkpoint, RunDirectory, open_run
from server.live import Live
from server.overview_reader import PLAN
from server.release import finish_release
from server.strategy import FederatedMemory

LOG = logging.getLogger("fedmermed.server")
TOLD_STEPS: Final = 50
PRETRAINING: Final = "pretraining.safetensors"
OnSteps = Callable[[int, int], None]


def run_study(
    grid: Grid,
    recipe: Recipe,
    run_dir: Path,
    *,
    expect_sites: int = 0,
    registered: Path | None = None,
) -> None:
    """Run a study to its end; called again on the same directory, it resumes.

    Args:
        grid: Reaches the sites.
        recipe: The study.
        run_dir: Its run directory.
        expect_sites: The first round waits for so many, if they come in the recipe's time; the
            quorum is the recipe's all the same.
        registered: Where the coordinator's service notes which key is which site's; without it
            each node is asked.

    Raises:
        UserError: the directory holds another recipe or is in use, or a round missed its quorum.
    """
    run = open_run(run_dir, recipe)
    with run.locked():
        note_plan(run_dir, recipe)
        live = Live(run_dir, recipe.federation.rounds)  # until the strategy has its own
        try:
            if recipe.privacy.mode == "site":
                finish_release(run, recipe)
            # No name here for the checkpoint: the strategy lets go of it after a round.
            strategy = FederatedMemory(
                recipe,
                run,
                open_state(run, recipe, live.pretraining),
                expect_sites,
                registered,
            )
            live = strategy.live
            strategy.start(
                grid,
                ArrayRecord(),  # the strategy has the checkpoint
                num_rounds=recipe.federation.rounds,
                timeout=recipe.federation.round_timeout_seconds,
            )
            live.phase("finished")
        except Exception as error:
            ours = isinstance(error, UserError)
            run.fail(str(error) if ours else repr(error), final=ours)
            live.phase("failed")
            raise
        except BaseException:  # SIGTERM, by Flower's own handler, or Ctrl-C
            live.phase("stopped")
            raise


def note_plan(run_dir: Path, recipe: Recipe) -> None:
    """Write down what privacy will have cost at the end, for those who look at the run.

    Record privacy's accountant needs torch: a server without it leaves it out, unless the run came
    from `init`.
    """
    file = run_dir / PLAN
    if recipe.privacy.mode == "none" or file.exists():
        return
    try:
        planned = epsilon(study_events(recipe), recipe.privacy.delta)
    except ModuleNotFoundError:
        return
    write_json(file, {EPSILON: planned, "delta": recipe.privacy.delta})


def open_state(
    run: RunDirectory, recipe: Recipe, on_steps: OnSteps = lambda done, steps: None
) -> Checkpoint:
    """What the last round left; before round 1 its state is made, from where that was stopped.

    Args:
        run: The run directory, locked.
        recipe: The study.
        on_steps: As for `initial_state`.
    """
    keep = run.path / PRETRAINING
    checkpoint = run.load(lambda: initial_state(recipe, on_steps, keep))
    keep.unlink(missing_ok=True)
    return checkpoint


def initial_state(
    recipe: Recipe, on_steps: OnSteps = lambda done, steps: None, keep: Path | None = None
) -> GlobalState:
    """The state of round 0, the only thing for which a server needs torch.

    Args:
        recipe: The study.
        on_steps: Called with steps of pretraining done and asked for, with none before the first.
        keep: The file that pretraining goes on from if it is killed.
    """
    try:
        from core.device import resolve_device
        from core.initial import initial_state as make
    except ModuleNotFoundError as error:
        raise UserError(
            f"the initial weights need torch and timm, but '{error.name}' is not installed; "
            "install fedmermed[site], or run 'fedmermed-server init RECIPE RUN' where they are and "
            "bring RUN here"
        ) from None
    steps, first = recipe.model.phantom_steps, True
    if steps:
        LOG.info("pretraining on phantoms: drawing them, then %d steps", steps)
        on_steps(0, steps)

    def on_step(done: int, steps: int, loss: float) -> None:
        nonlocal first
        on_steps(done, steps)
        if first or done % TOLD_STEPS == 0 or done == steps:
            LOG.info(
                "pretraining on phantoms: step %d of %d, loss %.3f", done, steps, loss,
                extra={"pretrained": (done, steps)},
            )  # fmt: skip
        first = False

    return make(recipe, on_step, device=resolve_device("auto"), keep=keep)
