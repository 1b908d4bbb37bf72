"""When a site works: windows of its own local time, such as "mon-fri 20:00-06:00".

A window begins on the days it names and, where its end is not after its begin, ends on the next
day: "fri 20:00-06:00" ends on Saturday morning. 24:00 is the end of a day. In the night in which
the clock is set, a window is as long as that night makes it.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Final

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WINDOW: Final = re.compile(
    rf"({'|'.join(DAYS)})(?:-({'|'.join(DAYS)}))? (\d\d):(\d\d)-(\d\d):(\d\d)"
)


def check_window(text: str) -> str:
    """Hold that a window can be read.

    Raises:
        ValueError: it cannot.
    """
    _parse(text)
    return text


def opens_at(windows: Iterable[str], now: datetime) -> datetime | None:
    """When the site works next.

    Args:
        windows: All its windows; none: it always works.
        now: Local time.

    Returns:
        None if it works now; else when the next window begins, within eight days.
    """
    spans = [span for window in windows for span in _spans(window, now)]
    if not spans or any(begin <= now < end for begin, end in spans):
        return None
    return min(begin for begin, _ in spans if begin > now)


def _spans(window: str, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Begin and end of a window on each of its days, from yesterday to this day next week."""
    days, begin, end = _parse(window)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    for number in range(-1, 8):
        day = midnight + timedelta(days=number)
        if day.weekday() in days:
            yield day + begin, day + end + timedelta(days=end <= begin)


def _parse(text: str) -> tuple[set[int], timedelta, timedelta]:
    """Weekdays, and begin and end as time from midnight."""
    found = WINDOW.fullmatch(text)
    if not found:
        raise ValueError(
            "each must be like 'mon-fri 20:00-06:00' or 'sat 00:00-24:00': days "
            f"{', '.join(DAYS)}; hours of two digits"
        )
    first = DAYS.index(found[1])
    last = DAYS.index(found[2] or found[1])
    times = [timedelta(hours=int(found[n]), minutes=int(found[n + 1])) for n in (3, 5)]
    limits = (timedelta(hours=23, minutes=59), timedelta(hours=24))
    minutes = (int(found[4]), int(found[6]))
    if max(minutes) > 59 or any(t > limit for t, limit in zip(times, limits, strict=True)):
        raise ValueError("hours go from 00:00 to 23:59, and to 24:00 at the end")
    if times[0] == times[1]:
        raise ValueError("begin and end are the same; for a whole day write 00:00-24:00")
    days = {(first + number) % 7 for number in range((last - first) % 7 + 1)}
    return days, times[0], times[1]
