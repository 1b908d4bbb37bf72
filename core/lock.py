"""Whether somebody holds a lock file, which tells a process that lives from one that was killed."""

import fcntl
from pathlib import Path


def held(lock: Path) -> bool:
    """Whether a process holds a lock file; one that cannot be there is not held.

    The look itself holds the file for an instant, in a way that other looks do not mind.
    """
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
