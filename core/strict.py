"""Strict reading of what comes from outside: recipes, site files, messages.

No unknown key, no silent conversion; every failure names file, key, what was expected and found.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Jitter = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Base of every file we read: no unknown key, no silent conversion, no change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


S = TypeVar("S", bound=Strict)


def load_toml(model: type[S], path: Path, what: str) -> S:
    """Read a TOML file into a strict model; every failure is a UserError that names the file."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} '{path}' does not exist; give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} '{path}' cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} '{path}' is not valid TOML: {error}") from None
    # Through JSON, because there pydantic's strict mode takes an array for a tuple.
    return validate(model, json.dumps(table, default=str), f"{what} '{path}'")


def validate(model: type[S], text: str, where: str) -> S:
    """Read JSON into a strict model; `where` names the source in error messages."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{where}: unknown key '{key}'; check its spelling and section"
            ) from None
        if not key:  # parts that do not go together: the text says which
            raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        raise UserError(
            f"{where}: '{key}': {first['msg'].lower()}, found {first['input']!r}"
        ) from None
