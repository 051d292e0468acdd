"""A pickle is read, and nothing in it is imported, called or changed."""

from __future__ import annotations

import collections
import contextlib
import enum
import io
import os
import pickle
import sys

import pytest

from lightning_peft.pickles import NotBuilt, PickleReader, first_object

NAME = "lightning_peft_test_module_that_is_nowhere"


class Point:
    """An object with attributes."""

    def __init__(self, *args, **options) -> None:
        self.args, self.options = args, options

    def __setstate__(self, state):
        pytest.fail("an object was built")


class Entries(dict):
    """A dictionary of another kind."""


class Rows(list):
    """A list of another kind."""


class WithArguments(Point):
    """Its constructor is called with names."""

    def __new__(cls, *args, **options):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"a": 2}


class Kind(enum.Enum):
    ONE = 1


def read(data: bytes):
    return PickleReader(io.BytesIO(data)).load()


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "value", [Point(1), Entries(a=1), Rows([1]), WithArguments(), Kind.ONE, collections.defaultdict(list, a=[1])]
)
def test_objects_are_named_and_not_built(value, protocol):
    """In every protocol; what stands beside them is read."""
    found = read(pickle.dumps({"before": [1, (2.5, None)], "object": value, "after": {"b": "c"}}, protocol))
    assert found["before"] == [1, (2.5, None)] and found["after"] == {"b": "c"}
    kind = type(value)
    names = {f"{kind.__module__}.{kind.__qualname__}"}
    if kind is WithArguments:
        names.add("functools.partial")  # how protocols 2 and 3 make such an object
    assert isinstance(found["object"], NotBuilt) and found["object"].path in names
    assert first_object([{"deep": ({"er": found["object"]},)}]) is found["object"]
    assert first_object({"before": found["before"]}) is None


HOSTILE = {
    "a call": b"cposix\nsystem\n(S'touch EXECUTED'\ntR.",
    "an old instance": b"(S'touch EXECUTED'\niposix\nsystem\n.",
    "an old object": b"(cposix\nsystem\nS'touch EXECUTED'\no.",
    "a class that gets attributes": b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.",
    "a function that gets attributes": b"ccollections\nOrderedDict\n(N}S'__defaults__'\nI1\nstb.",
    "a module that is imported": f"c{NAME}\nf\n.".encode(),
    "a name out of the stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch EXECUTED\x85R.",
    "a registered number": b"\x80\x02\x82\x01.",
    "a class put into a dictionary's place": b"ccollections\nOrderedDict\n(S'a'\nI1\nu.",
    "memory by a number": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a list in itself": b"]q\x00h\x00a.",
    "the end of nothing": b".",
    "an operation that there is not": b"\xff.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_pickles_do_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(vars(collections.OrderedDict))
    with contextlib.suppress(pickle.UnpicklingError, LookupError, TypeError, AttributeError, ValueError, EOFError):
        first_object(read(data))
    assert not os.listdir(tmp_path) and NAME not in sys.modules
    assert dict(vars(collections.OrderedDict)) == before


def test_a_short_pickle_that_repeats_itself_is_searched_in_no_time():
    value: list = []
    for _ in range(200):
        value = [value, value]
    assert first_object(read(pickle.dumps(value))) is None
