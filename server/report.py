"""The report of a study: one HTML file that needs nothing beside itself.

**Guarantees**:
    - What comes from sites (names, reasons, words) is escaped; the page's own policy forbids it
      scripts and the network.
    - It holds what the run directory's history holds and no more: what a site's policy keeps back
      never came here. Arrays are shown as counts and checksums alone.
    - Of the run directory nothing is changed; the report alone is written.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.checkpoint import write_atomically
from core.config import Recipe
from core.errors import UserError
from core.evaluation.card import model_card
from core.evaluation.page import page_environment
from core.modalities import TITLES
from server import report_curves as curves
from server import report_facts as facts
from server.history import Line, read_history, read_recipe
from server.incidents import KINDS, Incident, incidents
from server.report_privacy import privacy_words
from server.summary import series

MOST_INCIDENTS: Final = 1000
"""Beyond it a list is no longer read, and a browser slows down."""


def write_report(run: Path, out: Path) -> None:
    """Write the report of a study that has at least one round; it need not be over.

    Args:
        run: The run directory.
        out: File to write (.html).

    Raises:
        UserError: there is no such study, or it has no round yet.
    """
    if not (run / "recipe.json").exists():
        raise UserError(f"'{run}' is not a run directory; give the directory of a study")
    recipe, lines = read_recipe(run / "recipe.json"), read_history(run)
    if not lines:
        raise UserError(f"'{run}' has no finished round yet; report once it has")
    environment = page_environment(Path(__file__).parent)
    environment.filters |= {"bytes": _bytes, "duration": _duration}
    write_atomically(out, environment.get_template("report.html.j2").render(
        recipe=recipe,
        settings=facts.changed_settings(recipe),
        whole_recipe=json.dumps(recipe.model_dump(mode="json"), indent=2),
        titles=TITLES,
        **_study(run, recipe, lines),
        **_tables(run, recipe, lines),
        **_pictures(run, lines),
    ).encode())  # fmt: skip


def _study(run: Path, recipe: Recipe, lines: Sequence[Line]) -> dict[str, Any]:
    failure = facts.read_optional(run / "failure.json")
    study = facts.read_optional(run / "study.json")
    return {
        "study": study,
        "began": str(study.get("began", "")).replace("T", " ").replace("+00:00", " UTC"),
        "failure": str(failure.get("reason", "")),
        "done": len(lines),
        "planned": recipe.federation.rounds,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _tables(run: Path, recipe: Recipe, lines: Sequence[Line]) -> dict[str, Any]:
    sites, found = facts.site_rows(lines), incidents(lines)
    images, model = facts.total_images(sites), facts.read_model(run, lines)
    seconds = {phase: sum(values) for phase, values in facts.phase_seconds(lines).items()}
    return {
        "sites": sites,
        "images": images,
        "model": model,
        "incidents": found[:MOST_INCIDENTS],
        "left_out": max(0, len(found) - MOST_INCIDENTS),
        "kinds": KINDS,
        "kind_counts": _kind_counts(found),
        "collapses": [incident for incident in found if incident.kind == "collapse"],
        "seconds": seconds,
        "training_seconds": sum(row.training_seconds for row in sites),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "privacy": (privacy := privacy_words(recipe, lines)),
        "card": model_card({}, name=recipe.name, training=images, privacy=privacy),
    }


def _pictures(run: Path, lines: Sequence[Line]) -> dict[str, Any]:
    measured = facts.read_optional(run / "summary.json").get("metrics", {})
    final = {m: row["knn_auroc_last"] for m, row in measured.items() if "knn_auroc_last" in row}
    auroc = curves.auroc_series(lines, final)
    panels = [
        curves.modality_panel(title, found)
        for title, found in (
            ("RankMe (effective rank)", series(lines, "rankme")),
            ("Mean cosine of embeddings", series(lines, "mean_cosine")),
        )
        if found
    ]
    if auroc:
        title = "kNN AUROC, validation"
        panels.append(curves.modality_panel(title, auroc, reference=0.5, breaks=False))
    odd = _odd_sites(lines)
    losses = [series(lines, name) for name in ("loss", "loss_ceiling", "teacher_entropy")]
    norms = curves.site_series(lines, "update_norm"), curves.site_series(lines, "cosine")
    return {
        "losses": curves.loss_panels(*losses),
        "loss_legend": curves.LOSS_LEGEND,
        "modality_panels": panels,
        "modality_legend": [
            (TITLES[m], curves.modality_look(m)) for m in {**series(lines, "loss"), **auroc}
        ],
        "auroc": [(TITLES[m], points[0], points[-1]) for m, points in auroc.items()],
        "site_panels": [
            curves.site_panel(title, found, odd)
            for title, found in zip(
                ("Length of each site's update", "Cosine with the other sites' mean update"),
                norms, strict=True,
            )
            if found
        ],
        "many_sites": max(len(found) for found in norms) > curves.MOST_NAMED,
        "seconds_panel": curves.seconds_panel(facts.phase_seconds(lines)),
    }  # fmt: skip


def _odd_sites(lines: Sequence[Line]) -> list[str]:
    """Sites that stood out or were rejected, the most often first."""
    times: dict[str, int] = {}
    for line in lines:
        odd = {outlier["site"] for outlier in line.get("outliers", ())}
        odd |= {s for s, outcome in line["sites"].items() if outcome["outcome"] == "rejected"}
        for site in odd:
            times[site] = times.get(site, 0) + 1
    return sorted(times, key=lambda site: (-times[site], site))


def _kind_counts(found: Sequence[Incident]) -> dict[str, int]:
    """Rounds by kind of incident, kinds that occurred, the gravest first."""
    counts = {k: sum(i.last - i.first + 1 for i in found if i.kind == k) for k in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"
