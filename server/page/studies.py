"""Which studies the live page shows: run directories, and directories that hold such.

**Guarantees**:
    - A study is found by its name in a table, never by a path that a request holds.
    - In a directory of studies, symbolic links are passed over: it shows nothing outside itself.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from core.errors import UserError
from server.page.comparison import ComparisonView
from server.page.view import LOCK, StudyView, View

LOG = logging.getLogger("fedmermed.server")
MOST: Final = 30
"""More lines in a picture cannot be told apart."""


class Studies:
    """The studies, looked for again whenever they are asked for.

    Args:
        paths: Run directories, or directories of run directories.

    Raises:
        UserError: one of them is neither.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._known: dict[Path, tuple[str, StudyView | None]] = {}
        for path in paths:
            if not _is_run(path) and not any(_runs_below(path)):
                raise UserError(
                    f"'{path}' is not a run directory and holds none; give the directory of a "
                    "study, or one with studies in it"
                )
        self._comparison = ComparisonView(self.views)
        self._alone = len(paths) == 1 and _is_run(paths[0])

    def views(self) -> dict[str, StudyView]:
        """Name -> page of each study, in the order of the command line, then by name."""
        with LOCK:
            found = [run for path in self._paths for run in _runs(path)]
            if len(found) > MOST:
                LOG.warning("%d studies are there; the newest %d are shown", len(found), MOST)
                newest = set(sorted(found, key=_age)[:MOST])
                found = [run for run in found if run in newest]
            known = {run: self._view(run) for run in dict.fromkeys(found)}
            return {name: view for name, view in known.values() if view is not None}

    def front(self) -> View:
        """The page that is shown first: the only study, or a comparison of all."""
        return next(iter(self.views().values())) if self._alone else self._comparison

    def _view(self, run: Path) -> tuple[str, StudyView | None]:
        if run not in self._known:
            taken = {name for name, _ in self._known.values()}
            name, number = run.resolve().name, 1
            while (unique := name if number == 1 else f"{name}-{number}") in taken:
                number += 1
            self._known[run] = unique, _open(run, alone=self._paths == [run])
        return self._known[run]


def _open(run: Path, *, alone: bool) -> StudyView | None:
    try:
        return StudyView(run)
    except UserError as error:
        if alone:
            raise
        LOG.warning("'%s' is not shown: %s", run, error)
        return None


def _is_run(path: Path) -> bool:
    return (path / "recipe.json").is_file()


def _runs(path: Path) -> Iterator[Path]:
    return iter((path,)) if _is_run(path) else _runs_below(path)


def _runs_below(path: Path) -> Iterator[Path]:
    children = sorted(path.iterdir()) if path.is_dir() else ()
    return (child for child in children if not child.is_symlink() and _is_run(child))


def _age(run: Path) -> float:
    return -(run / "recipe.json").stat().st_mtime
