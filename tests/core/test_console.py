import io
import threading

import pytest
from rich.console import Console

from core.console import counting


def test_a_bar_counts_to_its_end():
    out = io.StringIO()
    with counting(Console(file=out, force_terminal=True, width=60), "reading", 2) as one_done:
        one_done()
        one_done()
    assert "100%" in out.getvalue()


def test_a_bar_that_is_told_how_many_are_done_begins_there():
    out = io.StringIO()
    with counting(Console(file=out, force_terminal=True, width=60), "steps", 4) as count:
        count(2)
        count(3)
    assert "75%" in out.getvalue()
    assert "100%" not in out.getvalue()


def test_an_exception_ends_the_bar_and_its_thread_at_once():
    console, before = Console(file=io.StringIO(), force_terminal=True), set(threading.enumerate())
    with pytest.raises(ValueError, match="damaged") as caught, counting(console, "reading", 2):
        raise ValueError("damaged")
    assert caught.value.__traceback__ is not None  # it holds the frames, as one that is kept does
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
