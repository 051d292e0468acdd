"""What the code of a module's class does with its parts: read off the compiled functions, without running them."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator

from torch import nn

#: ways to reach every part of a module
_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
#: what code asks of a weight without computing with it
_FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "element_size"})
#: functions that run before or between forwards, and read nothing to compute an output
_SETUP = frozenset({"__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights", "extra_repr"})


@functools.cache
def walks_over_parts(kind: type) -> bool:
    """Whether a method of a module's class looks at all of the module's parts, so that a further one would be met.

    >>> from torch import nn
    >>> walks_over_parts(nn.Sequential), walks_over_parts(nn.Linear)
    (True, False)
    """
    return any(_WALKS.intersection(code.co_names) for code in _codes(kind))


@functools.cache
def calls_super_of_own_class(kind: type) -> bool:
    """Whether a method calls ``super(self.__class__, self)`` or ``super(type(self), self)``.

    In a subclass that means the method itself again, without end. ``__init__`` has run already and does not count.

    >>> class Wrong(nn.Linear):
    ...     def forward(self, x):
    ...         return super(self.__class__, self).forward(x)
    >>> calls_super_of_own_class(Wrong), calls_super_of_own_class(nn.Linear)
    (True, False)
    """
    for code in _codes(kind):
        if code.co_name == "__init__":
            continue
        names = [instruction.argval for instruction in dis.get_instructions(code) if _loads(instruction)]
        for i, name in enumerate(names):
            following = names[i + 1 : i + 3]
            if name == "super" and (following[1:] == ["__class__"] or following[:1] == ["type"]):
                return True
    return False


@functools.cache
def tensor_reads(kind: type) -> tuple[tuple[str, str], ...]:
    """Which tensors of its parts a module's class reads instead of calling the part: (path of the part, tensor).

    ``self.attention.out_proj.weight`` gives ``("attention.out_proj", "weight")``, and ``layer.weight`` of any other
    variable ``("*", "weight")``: some part. ``self.linear.weight.dtype`` gives nothing, as it asks for a fact. Other
    attributes come along; whoever asks looks for names of tensors.

    >>> class Reads(nn.Module):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.query.weight, self.key.weight.dtype)
    >>> tensor_reads(Reads)
    (('query', 'weight'),)
    """
    found: dict[tuple[str, str], None] = {}
    for code in _codes(kind):
        if code.co_name in _SETUP:
            continue
        for root, attributes in _attribute_chains(code):
            if attributes[-1] in _FACTS:
                continue
            if root == "self":
                # a.b.weight.t() may read `a.b`, `a.b.weight` or `a.b.weight.t`; only tensors will be found later
                for end in range(2, len(attributes) + 1):
                    found[".".join(attributes[: end - 1]), attributes[end - 1]] = None
            else:
                for end in range(1, len(attributes) + 1):
                    found[".".join(["*", *attributes[: end - 1]]), attributes[end - 1]] = None
    return tuple(found)


def _attribute_chains(code: types.CodeType) -> Iterator[tuple[str, list[str]]]:
    """Expressions such as ``self.linear.weight``: ``self``, or "other", and the attributes behind it."""
    own_name = code.co_varnames[0] if code.co_argcount else ""
    root, global_name, asked_for_kind = "", "", False
    attributes: list[str] = []
    for instruction in [*dis.get_instructions(code), None]:
        if instruction is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append(instruction.argval)
            continue
        if root and attributes and not asked_for_kind:
            yield root, attributes
        attributes = []
        asked_for_kind = global_name == "isinstance"  # isinstance(self.linear.weight, Tensor) computes nothing
        global_name = ""
        if instruction is None or instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST")):
            root = ""  # modules and classes, not parts of the model
            global_name = instruction.argval if instruction is not None else ""
            continue
        variable = instruction.argval
        if isinstance(variable, tuple):  # Python 3.13 loads two variables at once
            variable = variable[-1]
        root = "self" if own_name and variable == own_name else "other"


def _codes(kind: type) -> Iterator[types.CodeType]:
    """The compiled functions of a class and of its bases below `nn.Module`, with the functions inside them."""
    for parent in kind.__mro__:
        if parent is nn.Module:
            return
        for member in vars(parent).values():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType):
                yield from _with_inner(code)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _loads(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_FAST", "LOAD_ATTR", "LOAD_DEREF", "LOAD_NAME"))
