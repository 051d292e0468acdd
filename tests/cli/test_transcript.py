"""What turns a played hour into a transcript: ``python -m tests.cli.transcript`` writes one a width."""

from __future__ import annotations

from tests.cli.transcript import comparable, shown


def test_the_lines_that_a_terminal_shows():
    assert shown("a\r\nbar 1/2\rbar 2/2\r\n\x1b[1mlast\x1b[0m") == ["a", "bar 2/2", "last"]
    assert shown("one\r\ntwo\x1b[1A\r\x1b[2Kthree") == ["three", "two"]
    assert comparable("$ a 1\n0.53 s\n$ b") == ["$ a # # s", "$ b"]
