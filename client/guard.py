"""What of Flower's insides this program replaces, it replaces in the one version that it knows."""

import importlib.metadata
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, Final

from core.errors import UserError

FLOWER: Final = "1.41.0"
"""The version whose insides these lines were checked against."""
FIRST_PAUSE_SECONDS: Final = 0.1
"""Before a part of a message that has not come yet is asked for again; Flower's own is a second. It
doubles each time, as Flower's does."""


def check_flower() -> str:
    """Hold that the installed Flower is the one that these lines were checked against.

    Returns:
        Its version.

    Raises:
        UserError: it is another, or there is none.
    """
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"Flower is not installed; run: pip install flwr=={FLOWER}") from None
    if version != FLOWER:
        raise UserError(
            f"Flower {version} is installed, and this program guards against bundles in Flower "
            f"{FLOWER} alone; run: pip install flwr=={FLOWER}"
        )
    return version


def replace_in(
    module: ModuleType, caller: Callable[..., Any], names: dict[str, Callable[..., Any]]
) -> None:
    """Give names in one of Flower's modules another meaning, if it still is what we know.

    Args:
        module: Where the names are.
        caller: The function of that module that calls them.
        names: Name -> what it shall mean.

    Raises:
        UserError: Flower is of another version, or a name is missing or not called any more.
    """
    version = check_flower()
    assert isinstance(caller, FunctionType)
    for name in names:
        if not callable(getattr(module, name, None)) or name not in caller.__code__.co_names:
            raise UserError(
                f"Flower {version} has no '{name}' in '{module.__name__}' that can be replaced, so "
                "a bundle that is sent could run; nothing is started. Install this program and "
                "Flower anew"
            )
    for name, meaning in names.items():
        setattr(module, name, meaning)
