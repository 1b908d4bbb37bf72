"""The options of `fedmermed-site prepare` as rules, with a line for every mistake."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar, cast, get_args

from client.ingest.types import BURNED_IN_DEFAULTS, MIN_SIDE_PX, Policy, Rules
from core.config import load_recipe
from core.errors import UserError
from core.modalities import MODALITIES

T = TypeVar("T", bound=str)

POLICIES: Final = get_args(Policy)
MAX_PX: Final = 1024
"""A picture of more is rather a mistake: training looks at crops of 224 pixels."""


def parse_rules(
    *,
    modality: str | None = None,
    px: int | None = None,
    ct_window: str | None = None,
    recipe: Path | None = None,
    labels: str = "none",
    patients: str = "file",
    burned_in: Sequence[str] = (),
    duplicates: str = "remove",
    frames: int = Rules.frames,
    tiles: int = Rules.tiles,
) -> Rules:
    """Read options as they are typed.

    Args:
        modality: Name of a modality, for files that do not tell.
        px: Side of the pictures, or None for the recipe's or the default.
        ct_window: CENTRE,WIDTH, or None for the recipe's or the default.
        recipe: File of the study's recipe, which gives both.
        labels: none or folder.
        patients: file or folder.
        burned_in: CLASS=POLICY each, or one POLICY for all classes; later ones win.
        duplicates: remove or keep.
        frames: Most pictures of one cine or volume.
        tiles: Most pictures of one slide.

    Raises:
        UserError: a value is unknown or out of range, or stands against the recipe.
    """
    if modality is not None:
        _one_of("--modality", modality, MODALITIES)
    if recipe is not None and (px is not None or ct_window is not None):
        raise UserError(
            "--recipe gives the pixels and the CT window; leave --px and --ct-window out"
        )
    window = Rules.ct_window
    if recipe is not None:
        images = load_recipe(recipe).images
        px, window = images.px, images.ct_window
    elif ct_window is not None:
        window = _parse_window(ct_window)
    px = Rules.px if px is None else px
    if not MIN_SIDE_PX <= px <= MAX_PX:
        raise UserError(f"expected --px from {MIN_SIDE_PX} to {MAX_PX}, found {px}; correct it")
    for option, most in (("--frames", frames), ("--tiles", tiles)):
        if most < 1:
            raise UserError(f"expected {option} of at least 1, found {most}; correct it")
    return Rules(
        px=px,
        modality=modality,
        ct_window=window,
        frames=frames,
        tiles=tiles,
        patients=_one_of("--patients", patients, ("file", "folder")),
        labels=_one_of("--labels", labels, ("none", "folder")),
        duplicates=_one_of("--duplicates", duplicates, ("remove", "keep")),
        burned_in=_parse_policies(burned_in),
    )


def _one_of(option: str, value: str, known: Sequence[T]) -> T:
    if value not in known:
        raise UserError(f"expected {option} {', '.join(known)}, found '{value}'; correct it")
    return cast(T, value)


def _parse_window(text: str) -> tuple[float, float]:
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"expected --ct-window CENTRE,WIDTH in Hounsfield units, such as 40,400, found '{text}'"
        ) from None
    if not (-2000 <= centre <= 5000 and 1 <= width <= 10_000):
        raise UserError(
            "expected --ct-window with a centre from -2000 to 5000 and a width from 1 to 10000, "
            f"found '{text}'; correct it"
        )
    return centre, width


def _parse_policies(texts: Sequence[str]) -> dict[str, Policy]:
    policies = dict(BURNED_IN_DEFAULTS)
    for text in texts:
        kind, equals, policy = text.rpartition("=")
        if policy not in POLICIES or (equals and kind not in policies):
            raise UserError(
                f"expected --burned-in CLASS=POLICY with a class of {', '.join(policies)} and a "
                f"policy of {', '.join(POLICIES)}, or a policy alone, found '{text}'; correct it"
            )
        policies.update(dict.fromkeys([kind] if equals else list(policies), cast(Policy, policy)))
    return policies
