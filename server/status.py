"""`fedmermed-server status`: a study on a terminal of 80 columns, what needs a person first."""

import json
import time
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live as Display
from rich.table import Table
from rich.text import Text

from server.overview import Figure, ModalityView, Overview, SiteView
from server.overview_reader import OverviewReader

REDRAW_SECONDS = 1.0
COLOURS = {"stop": "bold red", "act": "red", "look": "yellow"}
STATE_COLOURS = {
    "finished": "green", "running": "green", "starting": "yellow", "waiting for sites": "yellow",
    "failed": "bold red", "not heard of": "bold red",
}  # fmt: skip
SITE_COLOURS = {
    "admitted": "green", "connected": "green", "lost": "red", "asked again": "yellow",
    "rejected": "red", "error": "red", "silent": "red", "absent": "red", "quarantined": "red",
}  # fmt: skip


def show_status(run: Path, console: Console, *, watch: bool = False, as_json: bool = False) -> None:
    """Print a run's overview, once or until Ctrl-C.

    Args:
        run: The run directory.
        console: Where to.
        watch: Draw it anew each second.
        as_json: Print JSON instead, one line a look where `watch` is set too.

    Raises:
        UserError: it is no run directory.
    """
    reader = OverviewReader(run)
    if not watch:
        if as_json:
            print(json.dumps(reader.read().as_json(), indent=1))
        else:
            console.print(picture(reader.read()))
        return
    try:
        if as_json:
            while True:
                print(json.dumps(reader.read().as_json()), flush=True)
                time.sleep(REDRAW_SECONDS)
        with Display(picture(reader.read()), console=console, auto_refresh=False) as display:
            while True:
                time.sleep(REDRAW_SECONDS)
                display.update(picture(reader.read()), refresh=True)
    except KeyboardInterrupt:
        return


def picture(view: Overview) -> RenderableType:
    """The overview as a terminal shows it."""
    parts: list[RenderableType] = [_head(view), *_alarms(view)]
    if view.modalities:
        parts += [_learning(view), Text(), _modalities(view)]
    if view.sites:
        parts += [Text(), _sites(view)]
    return Group(*parts)


def _head(view: Overview) -> Text:
    text = Text()
    text.append(f"{view.name}: ", "bold")
    text.append(view.state, STATE_COLOURS.get(view.state, "bold"))
    text.append(f", {view.rounds_done} of {view.rounds} rounds done")
    if view.seconds_left is not None:
        end = time.localtime(view.now + view.seconds_left)
        text.append(f", about {duration(view.seconds_left)} left")
        text.append(time.strftime(" (%a %d %b %H:%M)", end))
    if view.steps:
        done, steps = view.steps
        text.append(f"\nbefore round 1: step {done:,} of {steps:,} of pretraining on phantoms")
        if view.steps_left is not None:
            text.append(f", about {duration(view.steps_left)} more")
    elif view.phase and view.since is not None:
        text.append(f"\nround {view.round}: {view.phase} for {duration(view.now - view.since)}")
        if view.deadline is not None:
            text.append(f", at most {duration(view.deadline - view.now)} more")
        if view.phase == "training":
            away = ("absent", "quarantined")
            asked = [site.state for site in view.sites.values() if site.state not in away]
            owing = sum(state in ("asked", "asked again", "lost") for state in asked)
            text.append(f"; {len(asked) - owing} of {len(asked)} sites have answered")
    elif view.written is not None and view.state != "finished":
        text.append(f"\nserver last heard of {duration(view.now - view.written)} ago")
    if view.privacy.mode != "none":
        text.append(f"\n{privacy_words(view)}")
    if view.rounds_done:
        typical = duration(view.round_seconds or 0)
        text.append(
            f"\na round takes {typical}; sent {size(view.bytes_down)}, received "
            f"{size(view.bytes_up)} so far"
        )
    return text


def privacy_words(view: Overview) -> str:
    """What differential privacy the study has, and what is spent."""
    privacy = view.privacy
    unit = "patient" if privacy.mode == "record" else "site"
    spent = "none yet" if privacy.spent is None else f"{privacy.spent:.2f}"
    of = "" if privacy.planned is None else f" of {privacy.planned:.2f}"
    return f"{privacy.mode} privacy: epsilon {spent}{of} a {unit}, at delta {privacy.delta:g}"


def _alarms(view: Overview) -> list[Text]:
    if not view.alarms:
        quiet = view.rounds_done or view.state in ("running", "waiting for sites")
        return [Text("no alarms", "green")] if quiet else []
    lines = []
    for one, following in zip_longest(view.alarms, view.alarms[1:]):
        lines.append(Text(f"! {one.words}", COLOURS[one.level]))
        if following is None or following.what_to_do != one.what_to_do:
            lines.append(Text(f"  -> {one.what_to_do}"))
    return lines


def _learning(view: Overview) -> Text:
    text = Text("model, by kNN AUROC of the last rounds: ")
    words = {"collapse": "bold red", "worse": "yellow", "untrained": "yellow", "better": "green",
             "steady": "default", "too early": "default", "unlabelled": "default",
             "private": "default"}  # fmt: skip
    parts = []
    for verdict, colour in words.items():
        names = [m for m, modality in view.modalities.items() if modality.verdict == verdict]
        if names:
            parts.append(Text(f"{verdict} in {', '.join(names)}", colour))
    return text + Text("; ").join(parts)


def _modalities(view: Overview) -> Table:
    table = _table("modality", "images", "loss/ceiling", "entropy", "RankMe", "cosine", "AUROC",
                   "proto")  # fmt: skip
    for name, modality in view.modalities.items():
        figures = modality.figures
        entropy, rank, cosine = (
            f"{figures[metric].last:.2f}" if metric in figures else "-"
            for metric in ("teacher_entropy", "rankme", "mean_cosine")
        )
        colour = "bold red" if modality.verdict == "collapse" else "default"
        table.add_row(
            Text(name, colour), f"{modality.images:,}", _loss(modality), entropy, rank, cosine,
            _auroc(figures.get("knn_auroc")), str(modality.prototypes or "-"),
        )  # fmt: skip
    return table


def _loss(modality: ModalityView) -> str:
    loss, ceiling = modality.figures.get("loss"), modality.figures.get("loss_ceiling")
    if loss is None:
        return "-"
    moved = loss.change or 0.0
    arrow = "" if abs(moved) < 0.005 else " \u2191" if moved > 0 else " \u2193"
    return f"{loss.last:.2f}/{ceiling.last:.2f}{arrow}" if ceiling else f"{loss.last:.2f}{arrow}"


def _auroc(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.last:.3f}" + ("" if figure.change is None else f" {figure.change:+.3f}")


def _sites(view: Overview) -> Table:
    private = view.privacy.mode == "record"
    table = _table("site", "now", "last", "ok", "late", "bad", "time", "sent",
                   *["epsilon"] * private, "holds")  # fmt: skip
    for name, site in view.sites.items():
        count = site.rounds.get
        late = count("silent", 0) + count("absent", 0)
        bad = count("rejected", 0) + count("error", 0)
        table.add_row(
            Text(name), _state(site, view), str(site.last_admitted or "-"),
            str(count("admitted", 0)), _marked(late), _marked(bad),
            "-" if site.seconds is None else duration(site.seconds),
            size(site.bytes_up) if site.bytes_up else "-",
            *["-" if site.epsilon is None else f"{site.epsilon:.2f}"] * private,
            Text(", ".join(f"{m} {n:,}" for m, n in site.images.items()) or "-"),
        )  # fmt: skip
    return table


def _state(site: SiteView, view: Overview) -> Text:
    state = "quarantined" if site.quarantine else site.state
    text = Text(state, SITE_COLOURS.get(state, "default"))
    if site.since is not None and state in ("asked", "asked again", "lost", "absent"):
        text.append(f" {duration(view.now - site.since)}", "default")
    return text


def _marked(count: int) -> Text:
    return Text(str(count), "red" if count else "default")


def _table(*headings: str) -> Table:
    """Numbers to the right; what is long folds, nothing is cut."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        left = heading in ("modality", "site", "now", "holds")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    return table


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    seconds = max(seconds, 0.0)
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} days"


def size(number: int) -> str:
    """Bytes in the unit that a person would use."""
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if number < limit:
            return f"{number / unit:.3g} {name}"
    return f"{number / 1e12:.3g} TB"
