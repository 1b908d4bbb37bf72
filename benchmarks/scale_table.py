"""From measured parts to a round's seconds beside training, for 10 to 1,000 sites; for scale.py.

Of a round with S sites, D bytes down to each and U up:
  network     S (D + U) at 1 Gbit/s
  SuperLink   processor seconds, c + a S + b S (D + U): c and a from the runs of small messages, b
              from that of large ones; likewise the gateway
  ServerApp   likewise, from asking to the spool: fetching, putting together, admission
  closing     per update screening and sum, as measured with the model; packing and checkpoint
  round       the longest of the first four, which work at the same time, and then closing
One core for each process: all of them are Python. `looks`: what S sites that wait, and look for a
message every three seconds, take of the SuperLink's core. It is measured before a study begins and
taken off the seconds of its rounds, in which sites that have answered wait too; where it comes near
100 % the seconds of the SuperLink are a lower bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SITES = (10, 30, 100, 300, 1000)
LINK = 125e6
"""Bytes a second of 1 Gbit/s."""
SMALL_BYTES = 2e6
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a part of the service."""

    fixed: float
    site: float
    byte: float
    look: float
    """Of each second, for a site that waits."""

    def round(self, sites: int, size: float) -> float:
        """Of a round with so many bytes a site."""
        return self.fixed + sites * (self.site + self.byte * size)


def fit(runs: Sequence[Figures], part: str) -> Cost:
    """What a part of the service costs, from runs of few and many sites, small and large states."""
    small = [run for run in runs if _size(run) < SMALL_BYTES]
    sites = [run["sites"] for run in small]
    site, fixed = np.polyfit(sites, [_worked(run, part) for run in small], 1)
    look, _ = np.polyfit(sites, [run["idle"][part] for run in small], 1)
    plain = Cost(float(fixed), float(site), 0.0, float(look))
    rest = [
        (_worked(run, part) - plain.round(run["sites"], 0)) / (run["sites"] * _size(run))
        for run in runs
        if _size(run) >= SMALL_BYTES
    ]
    return Cost(plain.fixed, plain.site, max(0.0, float(np.mean(rest))), plain.look)


def _worked(run: Figures, part: str) -> float:
    """Processor seconds of a round without the looks of sites that wait."""
    return float(run["cpu"][part] - run["idle"][part] * run["seconds"]["exchange"])


def _size(run: Figures) -> int:
    return int(run["bytes_down"] + run["bytes_up"])


def parts(model: Figures, costs: Mapping[str, Cost], sites: int) -> dict[str, float]:
    """Seconds of each part of a round."""
    each, size = model["each"], _size(model)
    return {
        "network": sites * size / LINK,
        "SuperLink": costs["superlink"].round(sites, size),
        "gateway": costs["gateway"].round(sites, size),
        "ServerApp": costs["serverapp"].round(sites, size),
        "closing": sites * (each["screen"] + each["sum"]) + model["pack"] + model["checkpoint"],
    }


def whole(found: Mapping[str, float]) -> float:
    """Seconds of a round beside training."""
    return max(value for name, value in found.items() if name != "closing") + found["closing"]


def tell(figures: Mapping[str, Sequence[Figures]], plot: Path | None) -> None:
    """Print the tables; draw the second one."""
    costs = {part: fit(figures["service"], part) for part in ("superlink", "gateway", "serverapp")}
    for part, cost in costs.items():
        print(
            f"{part}: {cost.fixed:.2f} s a round, {cost.site:.3f} s a site, "
            f"{cost.byte * 1e9:.1f} s a GB; a waiting site takes {1e3 * cost.look:.2f} ms a second"
        )
    print(
        "\n| model | sites | GB a round | network | SuperLink | gateway | ServerApp | closing ",
        end="",
    )
    print("| round, s | longest | spool, GB | looks |\n|---|" + "---:|" * 8 + "---|---:|---:|")
    for model in figures["server"]:
        for sites in SITES:
            found = parts(model, costs, sites)
            cells = " | ".join(f"{value:,.0f}" for value in found.values())
            longest = max(found, key=lambda name: found[name])
            print(
                f"| {model['model']}, {model['transport']} | {sites:,} | "
                f"{sites * _size(model) / 1e9:,.1f} | {cells} | {whole(found):,.0f} | {longest} | "
                f"{sites * 4 * model['numbers'] / 1e9:,.1f} | "
                f"{100 * sites * costs['superlink'].look:,.0f} % |"
            )
    if plot:
        draw([m for m in figures["server"] if m["transport"] == "delta8"], costs, plot)


def draw(models: Sequence[Figures], costs: Mapping[str, Cost], file: Path) -> None:
    """Seconds of each part over the number of sites, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(models), figsize=(4 * len(models), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    styles = ("-", "--", "-.", ":", (0, (1, 3)))
    for axis, model in zip(axes[0], models, strict=True):
        found = [parts(model, costs, sites) for sites in SITES]
        for name, style in zip(found[0], styles, strict=True):
            axis.loglog(SITES, [f[name] for f in found], linestyle=style, label=name)
        axis.loglog(SITES, [whole(f) for f in found], color="black", marker="o", label="round")
        axis.set_title(f"{model['model']}, {model['transport']}, teacher {model['teacher']}")
        axis.set_xlabel("sites")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("seconds beside training")
    axes[0][0].legend()
    figure.savefig(file, metadata={"Date": None})
