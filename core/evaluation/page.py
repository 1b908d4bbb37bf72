"""What every report shares: one style sheet, one set of macros, and everything escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SHARED = Path(__file__).parent
"""page.css and page.html.j2 are here."""


def page_environment(templates: Path) -> Environment:
    """Templates of a directory beside the shared ones; what they show is escaped.

    Args:
        templates: The directory.
    """
    environment = Environment(
        loader=FileSystemLoader([templates, SHARED]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["sentence"] = _sentence
    return environment


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
