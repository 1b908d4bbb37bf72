from datetime import datetime, timedelta

import pytest

from client.hours import DAYS, check_window, opens_at

MONDAY = datetime(2026, 11, 30)


def at(day, time):
    hours, minutes = map(int, time.split(":"))
    return MONDAY + timedelta(days=DAYS.index(day), hours=hours, minutes=minutes)


@pytest.mark.parametrize(
    ("windows", "now", "expected"),
    [
        ([], ("sun", "12:00"), None),
        (["mon-fri 20:00-06:00"], ("mon", "20:00"), None),
        (["mon-fri 20:00-06:00"], ("tue", "05:59"), None),
        (["mon-fri 20:00-06:00"], ("tue", "06:00"), ("tue", "20:00")),
        (["mon-fri 20:00-06:00"], ("sat", "05:59"), None),  # Friday's window
        (["mon-fri 20:00-06:00"], ("mon", "05:59"), ("mon", "20:00")),  # Sunday has none
        (["fri-mon 08:00-09:00"], ("sun", "08:30"), None),  # over the end of the week
        (["fri-mon 08:00-09:00"], ("tue", "08:30"), ("fri", "08:00")),
        (["sat-sun 00:00-24:00"], ("sat", "23:59"), None),
        (["sat 00:00-24:00"], ("fri", "23:59"), ("sat", "00:00")),
        (["mon 08:00-09:00", "tue 07:00-08:00"], ("mon", "09:00"), ("tue", "07:00")),
    ],
)
def test_a_window_is_open_from_its_begin_until_before_its_end(windows, now, expected):
    assert opens_at(windows, at(*now)) == (at(*expected) if expected else None)


def test_a_window_of_one_day_opens_again_a_week_later():
    assert opens_at(["mon 08:00-09:00"], at("mon", "09:00")) == MONDAY + timedelta(days=7, hours=8)


@pytest.mark.parametrize("minute", range(0, 7 * 24 * 60, 37))
def test_it_is_open_when_it_says_that_it_opens(minute):
    windows = ["mon-wed 22:30-01:15", "sat 12:00-13:00"]
    now = MONDAY + timedelta(minutes=minute)
    if begin := opens_at(windows, now):
        assert begin > now
        assert opens_at(windows, begin) is None
        assert opens_at(windows, begin - timedelta(minutes=1)) == begin


@pytest.mark.parametrize(
    "text",
    ["", "mon", "20:00-06:00", "mon 8:00-9:00", "mon 20:00-20:00", "mon 24:00-06:00",
     "mon 10:00-24:01", "mon 10:60-11:00", "mo 10:00-11:00", "mon-fri-sun 10:00-11:00"],
)  # fmt: skip
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValueError, match=r"like 'mon-fri|hours go from|write 00:00-24:00"):
        check_window(text)
