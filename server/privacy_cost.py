"""What a study with site privacy costs, said before it begins."""

import importlib.util
import math

from rich.console import Console
from safetensors import safe_open

from core.config import Recipe
from core.wire import STUDENT
from server.history import RunDirectory, read_history
from server.release import spent_epsilon


def planned_epsilon(run: RunDirectory, recipe: Recipe) -> float:
    """Epsilon of the study after its last round: what is spent, and the rounds that are left."""
    left = range(len(read_history(run.path)) + 1, recipe.federation.rounds + 1)
    return spent_epsilon(run, recipe, *left)


def say_cost(console: Console, run: RunDirectory, recipe: Recipe) -> None:
    """Print `cost_words`."""
    for words in cost_words(run, recipe):
        console.print(words, style="yellow", highlight=False, markup=False, soft_wrap=True)


def cost_words(run: RunDirectory, recipe: Recipe) -> list[str]:
    """What the coordinator should know before a study begins or goes on; nothing without privacy.

    Returns:
        Sentences: epsilon, whom one has to trust, and how the noise compares with what is learnt.
    """
    privacy = recipe.privacy
    if privacy.mode != "site":
        return []
    words = [
        f"site privacy: epsilon {planned_epsilon(run, recipe):.3g} at delta {privacy.delta:g} "
        f"after {recipe.federation.rounds} rounds, in whether one of {privacy.sites} sites took "
        "part; this server sees every update in clear and has to be trusted"
    ]
    if (weights := count_weights(run, recipe)) is not None:
        words.append(noise_words(privacy.noise_multiplier, weights, privacy.sites))
    return words


def noise_words(sigma: float, weights: int, sites: int) -> str:
    """How long the noise on the mean update is, beside the longest that the mean can be.

    Args:
        sigma: The noise multiplier.
        weights: Numbers in the student.
        sites: What the noised sum is divided by.
    """
    ratio = sigma * math.sqrt(weights) / sites
    told = (
        f"noise on the mean update: {ratio:.3g} clips long ({sigma:g} x sqrt({weights:,} weights) "
        f"/ {sites} sites), where the mean itself is 1 at the most: "
    )
    if ratio > 1:
        return (
            f"{told}it drowns what the sites learn. With 5 to 50 sites and a whole network it "
            "always does; privacy.mode = 'record' protects patients, at each site, with less"
        )
    return f"{told}sites that agree can be heard through it"


def count_weights(run: RunDirectory, recipe: Recipe) -> int | None:
    """Numbers in the student; None where neither its initial weights nor torch are at hand."""
    file = run.checkpoint_path(0)
    if file.exists():
        with safe_open(file, framework="numpy") as arrays:
            names = [name for name in arrays.keys() if name.startswith(STUDENT)]  # noqa: SIM118
            return sum(math.prod(map(int, arrays.get_slice(n).get_shape())) for n in names)
    if importlib.util.find_spec("torch") is None:
        return None
    from server.study import initial_state

    return sum(array.size for array in initial_state(recipe.from_scratch).student.values())
