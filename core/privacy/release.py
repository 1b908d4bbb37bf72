"""What a site says of its patients' embeddings in a round that releases prototypes."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import Recipe
from core.modalities import MODALITIES
from core.privacy.memory import public_embeddings
from core.privacy.noise import PrivateRandom
from core.privacy.prototypes import private_prototypes
from core.privacy.sampling import Patients, draw_patients
from core.privacy.views import patient_views, stacks
from core.prototypes import spherical_kmeans
from core.randomness import numpy_generator
from core.step import TrainState
from core.wire import Prototypes

Float32 = NDArray[np.float32]


def released_prototypes(
    recipe: Recipe,
    state: TrainState,
    patients: Patients,
    modalities: Sequence[str],
    received: Prototypes,
    random: PrivateRandom,
) -> Prototypes:
    """Prototypes of all patients of a site, with noise.

    Args:
        recipe: the study.
        state: whose teacher embeds.
        patients: of the site.
        modalities: that the site declares to hold: of them, and of no other, something may leave.
        received: released before, where the new ones start.
        random: the source of all draws.

    **Guarantees**: patients enter through `core.privacy.prototypes.private_prototypes` alone, each
    as one unit over all modalities, with at most `privacy.images_per_patient` images.
    """
    embeddings, units = embed_patients(recipe, state, patients, random)
    centroids = {name: starting_rows(recipe, state, name, received) for name in modalities}
    return private_prototypes(
        embeddings, units, centroids, noise=recipe.privacy.prototype_noise,
        min_count=recipe.federation.prototype_min_patients, random=random,
    )  # fmt: skip


def starting_rows(
    recipe: Recipe, state: TrainState, modality: str, received: Prototypes
) -> Float32:
    """Unit rows [K, D] that anybody may know: what was received, and means of public embeddings."""
    wanted = recipe.federation.prototypes_per_modality
    dim = recipe.model.embedding_dim
    rows = received.centroids.get(modality, np.zeros((0, dim), np.float32))[:wanted]
    if len(rows) == wanted:
        return rows
    public = public_embeddings(recipe, state, MODALITIES.index(modality)).cpu().numpy()
    rng = numpy_generator(recipe.seed, "starting rows", modality)
    more, _ = spherical_kmeans(public, np.ones(len(public)), wanted - len(rows), rng)
    return np.concatenate([rows, more])


@torch.no_grad()
def embed_patients(
    recipe: Recipe, state: TrainState, patients: Patients, random: PrivateRandom
) -> tuple[dict[str, Float32], dict[str, NDArray[np.int64]]]:
    """The teacher's embeddings of every patient's second global views, and whose they are.

    Returns:
        Modality -> [N, D], and modality -> [N]; they must not leave.
    """
    privacy, views = recipe.privacy, recipe.views.model_copy(update={"local_views": 0})
    drawn = draw_patients(patients, 1.0, privacy.images_per_patient, random)
    embeddings: dict[str, list[Float32]] = defaultdict(list)
    units: dict[str, list[int]] = defaultdict(list)
    for kinds, stack in stacks(patients, drawn, privacy.chunk):
        global_views, _ = patient_views(patients, kinds, stack, views, random, state.device)
        second = global_views[:, 1]  # [n, m, 3, P, P]
        rows = state.teacher(second.flatten(0, 1)).view(*second.shape[:2], -1).cpu().numpy()
        for place, (modality, _) in enumerate(kinds):
            embeddings[MODALITIES[modality]].append(rows[:, place])
            # Images belong to one patient, so that any of them tells whose the row is.
            units[MODALITIES[modality]] += [int(images.min()) for images in stack]
    return (
        {name: np.concatenate(parts) for name, parts in embeddings.items()},
        {name: np.array(owners) for name, owners in units.items()},
    )
