"""Checks of what lies on the site's disk: its file, its state, its shards, and the recipe's wishes.

None of this needs torch.
"""

import os
import stat
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from client.check.findings import Finding, gigabytes, green, red, yellow
from client.policy import PolicyRefusal, approve
from client.site import SiteConfig
from client.spending import FILE as LEDGER
from client.state import STUDY_ID, open_state
from core.checkpoint import read_json
from core.config import Recipe
from core.errors import UserError
from core.modalities import MODALITIES
from core.privacy.accounting import epsilon, study_events
from core.privacy.ledger import Ledger
from core.shards import Shard, open_shard
from core.sites import MAKE_SHARDS, sub_directories, training_images, training_patients

SHOWN_STUDIES = 3


def site_file(path: Path, site: SiteConfig) -> Finding:
    """The file is readable, as we got here; nobody else may change the policy in it."""
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return red(
            f"other users of this machine may change '{path}', which holds the site's policy",
            f"Type: chmod go-w '{path}'",
        )
    return green(f"site '{site.name}', {len(site.shards)} data path(s), device '{site.device}'")


def state_directory(directory: Path) -> Finding:
    """The state holds patient embeddings: it must be writable, and closed to others.

    A missing directory is made, so that it is private from its first file on.
    """
    missing = not directory.exists()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        return red(
            f"'{directory}' cannot be written: {error.strerror}",
            f"Make it a directory of the user who runs the SuperNode (uid {os.geteuid()} asks "
            "now), or change state_dir in the site file.",
        )
    if directory.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return red(
            f"other users of this machine may look into '{directory}', which holds embeddings "
            "of patients",
            f"Type: chmod 700 '{directory}'",
        )
    return green(f"'{directory}', private, {'made now' if missing else 'writable'}")


def shard_directories(path: Path) -> list[Path]:
    """The shards of one entry of the site file, found as training finds them."""
    if (path / "manifest.json").exists() or not path.is_dir():
        return [path]
    return sub_directories(path) or [path]


def read_shard(directory: Path, opened: list[Shard]) -> Finding:
    """Read a shard to its last byte; one that is whole is added to `opened`.

    Raises:
        UserError: it cannot be opened or is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"'{directory}' does not exist; correct shards in the site file")
    if not (directory / "manifest.json").exists():
        raise UserError(f"'{directory}' holds no shard (no manifest.json); {MAKE_SHARDS}")
    shard = open_shard(directory, verify=True)
    opened.append(shard)
    parts = []
    for modality, images in sorted(Counter(shard.modality.tolist()).items()):
        patients = len(set(shard.patient[shard.modality == modality].tolist()))
        parts.append(f"{MODALITIES[modality]} {images:,} images of {patients:,} patients")
    channels = "grey" if shard.images.shape[3] == 1 else "colour"
    return green(
        f"{', '.join(parts)}; {shard.images.shape[1]} px {channels}, "
        f"{gigabytes(shard.images.nbytes)}, every byte verified",
        images=len(shard.images), patients=len(set(shard.patient.tolist())),
    )  # fmt: skip


def policy(site: SiteConfig, recipe: Recipe, shards: Sequence[Shard]) -> Finding:
    """Would the site's policy let round 1 pass?"""
    counts = training_images(shards)
    if not counts:
        return red(
            "no image is in the split 'train'",
            "Prepare the shard again without a split column, or with images marked 'train'.",
        )
    try:
        approve(site.policy, recipe, 1, counts, training_patients(shards))
    except PolicyRefusal as refusal:
        return red(
            str(refusal),
            "Ask the coordinator for a recipe that fits, or have your privacy office change "
            "[policy] in the site file.",
        )
    images = ", ".join(f"{modality} {count:,}" for modality, count in counts.items())
    return green(f"allows round 1 of '{recipe.name}' with {images} training images")


def patients(site: SiteConfig, recipe: Recipe, shards: Sequence[Shard]) -> Finding:
    """Are there enough patients of each modality for a prototype to leave?"""
    minimum = max(recipe.federation.prototype_min_patients, site.policy.min_patients_per_prototype)
    if not site.policy.send_prototypes:
        return green("the policy sends no prototypes")
    held: dict[str, int] = defaultdict(int)
    for shard in shards:
        for modality in set(shard.modality.tolist()):
            rows = (shard.modality == modality) & (shard.split == "train")
            held[MODALITIES[modality]] += len(set(shard.patient[rows].tolist()))
    found = ", ".join(f"{modality} {count:,}" for modality, count in held.items())
    if few := [modality for modality, count in held.items() if count < minimum]:
        return yellow(
            f"training patients: {found}; a prototype needs {minimum}, so none of "
            f"{', '.join(few)} will leave",
            f"Training works without; add patients of {', '.join(few)} to take part in prototypes.",
        )
    return green(f"training patients: {found}; a prototype needs {minimum}")


def picture_size(recipe: Recipe, shards: Sequence[Shard]) -> Finding:
    """Are the pictures of the size that the recipe asks sites to prepare?"""
    sizes = sorted({shard.images.shape[1] for shard in shards})
    found = ", ".join(f"{px} px" for px in sizes)
    asked, view = recipe.images.px, recipe.views.global_px
    again = "Prepare again from the sources with: fedmermed-site prepare --recipe RECIPE"
    if sizes[0] < min(asked, view):
        return red(f"{found}; the recipe asks for {asked} px and trains on views of {view}", again)
    if sizes != [asked]:
        return yellow(
            f"{found}; the recipe asks for {asked} px, so other sites see other detail", again
        )
    return green(f"{found}, as the recipe asks; views of {view} px")


def ct_window(recipe: Recipe, directories: Sequence[Path], shards: Sequence[Shard]) -> Finding:
    """Were CT pictures made with the recipe's window?"""
    ct, asked = MODALITIES.index("ct"), list(recipe.images.ct_window)
    made: Mapping[str, list[float] | None] = {
        directory.name: read_json(directory / "manifest.json").get("ct_window")
        for directory, shard in zip(directories, shards, strict=True)
        if (shard.modality == ct).any()
    }
    if not made:
        return green("no CT here")
    wanted = f"centre {asked[0]:g}, width {asked[1]:g} HU"
    if wrong := sorted(name for name, window in made.items() if window not in (None, asked)):
        return red(
            f"{', '.join(wrong)}: another CT window than the recipe's {wanted}",
            "Prepare again from the DICOM files with: fedmermed-site prepare --recipe RECIPE",
        )
    if unknown := sorted(name for name, window in made.items() if window is None):
        return yellow(
            f"{', '.join(unknown)}: the shard does not say its CT window; the recipe's is {wanted}",
            "If the pictures were not made with it, prepare again from the DICOM files with: "
            "fedmermed-site prepare --recipe RECIPE",
        )
    return green(f"{wanted}, as the recipe asks")


def budget(site: SiteConfig, recipe: Recipe | None) -> Finding:
    """How many rounds the policy still allows each study that the site knows."""
    most = site.policy.max_rounds
    found = [f"the policy allows {most:,} rounds a study"]
    if recipe:
        found.append(f"the recipe asks for {recipe.federation.rounds:,}")
    directories = [p for p in site.state_path.glob("studies/*/") if STUDY_ID.fullmatch(p.name)]
    directories.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for directory in directories[:SHOWN_STUDIES]:
        used = open_state(site.state_path, directory.name).last_round()
        found.append(f"study {directory.name[:8]}: {used:,} used, {max(0, most - used):,} left")
    if not directories:
        found.append("none used yet")
    if (rest := len(directories) - SHOWN_STUDIES) > 0:
        found.append(f"{rest} older studies")
    return green("; ".join(found), studies=len(directories))


def privacy(site: SiteConfig, recipe: Recipe) -> Finding:
    """What the recipe costs of the site's privacy budget, and whether it is there."""
    mode, ceiling, delta = recipe.privacy.mode, site.policy.max_epsilon, site.policy.delta
    if mode != "record":
        return green("no record privacy: this site adds no noise, and no epsilon is spent")
    ledger = Ledger(site.state_path / LEDGER)
    spent = ledger.epsilon(delta)
    after = epsilon([*ledger.events(), *study_events(recipe)], delta)
    found = f"epsilon {spent:.2f} spent, {after:.2f} with all of this study, at delta {delta:g}"
    if ceiling is None:
        return yellow(
            f"{found}; the policy sets no max_epsilon",
            "Have your privacy office set max_epsilon in [policy]; see: fedmermed-site budget",
        )
    if after > ceiling:
        left = ledger.rounds_left(recipe, 1, delta, ceiling)
        return yellow(
            f"{found}; the policy allows {ceiling:g}, which is enough for {left:,} of its "
            f"{recipe.federation.rounds:,} rounds",
            "Ask for a recipe with more noise or fewer rounds; see: fedmermed-site budget",
        )
    return green(f"{found}; the policy allows {ceiling:g}")


def recipe_facts(recipe: Recipe) -> Finding:
    """What the recipe is, in one line."""
    federation, optim = recipe.federation, recipe.optim
    return green(
        f"'{recipe.name}': {federation.rounds:,} rounds of {federation.local_steps:,} steps of "
        f"{optim.batch_size:,} images, {recipe.model.backbone}, views of "
        f"{recipe.views.global_px} px"
    )
