"""Read a pickle without building the objects in it.

A pickle names classes and functions, and says what to call them with. `PickleReader` builds plain values, and what a
subclass lists as known. For everything else it puts a `NotBuilt`, which remembers the class alone: nothing is imported
for it, and nothing is called. Needs no torch.
"""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

#: operations that take memory by a number in the file; those that write checkpoints use none of them
_REFUSED = {operation[0] for operation in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)}
#: functions that make an object of the class that they are given first
_MAKERS = {
    *("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__", "builtins.getattr"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
}
_MAPPINGS = (dict, OrderedDict, Counter)


class NotBuilt:
    """Stands for an object, or for a class or function, that was not built.

    Args:
        path: the import path of the class, as the file gives it.
    """

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return "<an object that was not built>"


class PickleReader(pickle._Unpickler):  # type: ignore[name-defined]
    """Builds plain values and what is known.

    It derives from the unpickler written in Python, because that of C cannot be told what an operation does.
    """

    #: what may be built: values, and functions that may be called, by their import paths
    known: ClassVar[Mapping[str, Any]] = {"collections.OrderedDict": OrderedDict}

    dispatch: ClassVar[dict[int, Callable]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if code not in _REFUSED
    }

    def find_class(self, module: str, name: str) -> Any:
        """What is known by this path."""
        if self.proto < 3:  # such pickles use the names of Python 2
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        return self.known[path] if path in self.known else NotBuilt(path)

    def load_reduce(self) -> None:
        """Call a known function."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if callable(function) and any(function is value for value in self.known.values()):
            self.stack[-1] = function(*arguments)
        else:
            self.stack[-1] = NotBuilt(_class_of(function, arguments))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        """No class makes an object."""
        self.stack.pop()
        self.stack[-1] = NotBuilt(_class_of(self.stack[-1]))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_newobj_ex(self) -> None:
        """No class makes an object."""
        self.stack.pop()
        self.load_newobj()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        """No class makes an object, in the oldest protocols."""
        self.append(NotBuilt(_class_of(kind)))

    def get_extension(self, code: int) -> None:
        """A class by a number that a program has registered."""
        self.append(NotBuilt(f"copyreg extension {code}"))

    def load_build(self) -> None:
        """Give attributes to nothing but an ordered dictionary, which a module's state dict is."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is OrderedDict and type(state) is dict and first_object(state) is None:
            target.__dict__.update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_append(self) -> None:
        """An element of a list."""
        value = self.stack.pop()
        _put(self.stack[-1], (list,), [value])

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        """Elements of a list."""
        values = self.pop_mark()
        _put(self.stack[-1], (list,), values)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_setitem(self) -> None:
        """An entry of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], _MAPPINGS, [(key, value)])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """Entries of a dictionary."""
        values = self.pop_mark()
        _put(self.stack[-1], _MAPPINGS, zip(values[::2], values[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_additems(self) -> None:
        """Elements of a set."""
        values = self.pop_mark()
        _put(self.stack[-1], (set,), values)

    dispatch[pickle.ADDITEMS[0]] = load_additems


def _put(target: Any, kinds: tuple[type, ...], items: Iterable[Any]) -> None:
    """Put items into a container; what belongs to an object that was not built is forgotten."""
    if isinstance(target, NotBuilt):
        return
    if type(target) not in kinds:
        raise pickle.UnpicklingError(f"it puts something into a {type(target).__name__}")
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(items)
    else:
        for key, value in items:
            target[key] = value


def _class_of(maker: Any, arguments: Any = ()) -> str:
    """The class of an object, by what makes it: the class itself, or a function whose first argument is the class."""
    if not isinstance(maker, NotBuilt):
        return type(maker).__name__
    first = arguments[0] if isinstance(arguments, tuple) and arguments else None
    return first.path if maker.path in _MAKERS and isinstance(first, NotBuilt) else maker.path


def first_object(value: Any, allowed: Collection[str] = ()) -> NotBuilt | None:
    """An object that was not built in a value, at any depth; None if there is none.

    Args:
        value: plain values as `PickleReader` gives them.
        allowed: paths of classes that do not count.
    """
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, NotBuilt) and part.path not in allowed:
            return part
        if id(part) in seen or not isinstance(part, (Mapping, list, tuple, set, frozenset)):
            continue
        seen.add(id(part))  # a short file can repeat a list in a list very often
        waiting += part
        if isinstance(part, Mapping):
            waiting += part.values()
    return None
