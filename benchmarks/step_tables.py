"""The figures of training_step.py in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from step_cases import CASES


def tables(results: dict[str, Any]) -> str:
    """Markdown: a column a case."""
    cases = results["cases"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("times the published step's images/s", lambda c: spread(c["times_the_published_rate"])),
        ("published, s a step (least)", lambda c: f"{c['seconds']['published'][0]:.3f}"),
        ("ours, s a step (least)", lambda c: f"{c['seconds']['ours'][0]:.3f}"),
        ("of a bare pass of both networks", lambda c: spread(c["share_of_bare"])),
        ("of a bare pass of the student", lambda c: spread(c["share_of_bare_student"])),
        ("loading and views, times the need", lambda c: spread(c["views_times_the_need"], 0)),
        ("memory's logits, share of the ring's", lambda c: spread(c["logits_cost"], 3)),
        (
            "peak of a step, MB: published, ours (foretold)",
            lambda c: (
                f"{c['peak_mb']['published']:.0f}, {c['peak_mb']['ours']:.0f} "
                f"({c['peak_mb']['foretold']:.0f})"
            ),
        ),
        ("GFLOP a step: published, ours", lambda c: counted(c, "flops", 1e9)),
        ("GB read and written: published, ours", lambda c: counted(c, "bytes", 1e9)),
        ("largest difference of the losses", lambda c: f"{c['loss_difference']:.0e}"),
    ]
    lines = ["| | " + " | ".join(CASES[name].title for name in cases) + " |"]
    lines.append("|---|" + "---|" * len(cases))
    lines += [
        f"| {title} | " + " | ".join(map(cell, cases.values())) + " |" for title, cell in rows
    ]
    profile = [f"{share:.0%} {kind}" for kind, share in next(iter(cases.values()))["profile"]]
    rates = [f"{name} {rate:.0f}" for name, rate in results["gflops"].items()]
    lines += ["", "Our step: " + ", ".join(profile), "", "GFLOP/s: " + ", ".join(rates)]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def counted(case: dict[str, Any], key: str, unit: float) -> str:
    return ", ".join(f"{case[f'counted_{arm}'][key] / unit:.0f}" for arm in ("published", "ours"))
