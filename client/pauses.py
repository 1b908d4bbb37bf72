"""Pauses between looks for something: short at first, longer the longer it has not come."""

import time
from typing import Final

FRACTION: Final = 0.1


class Pauses:
    """Stands in for the module `time` where Flower sleeps between looks, always equally long.

    What a site waits for comes soon, or takes long: the next round follows the reply by a second,
    or by the hours that another site trains. A pause is a tenth of the wait so far, and between a
    tenth of Flower's own and Flower's own; another length of Flower's is another wait.
    """

    def __init__(self) -> None:
        self._kind = 0.0
        self._since = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep, no longer than this."""
        now = time.monotonic()
        if seconds != self._kind:
            self._kind, self._since = seconds, now
        time.sleep(min(seconds, FRACTION * max(seconds, now - self._since)))
