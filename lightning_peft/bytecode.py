"""What the code of a module's class does with its parts: read off the compiled functions, without running them."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator

from torch import nn

#: ways to reach every part of a module
_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
#: what code asks of a weight without computing with it
_FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "element_size"})
#: what a forward pass starts with
_ENTRIES = ("forward", "__call__")


@functools.cache
def walks_over_parts(kind: type) -> bool:
    """Whether a method of a module's class looks at all of the module's parts, so that a further one would be met.

    >>> from torch import nn
    >>> walks_over_parts(nn.Sequential), walks_over_parts(nn.Linear)
    (True, False)
    """
    return issubclass(kind, nn.Sequential) or any(_WALKS.intersection(code.co_names) for code in _codes(kind))


@functools.cache
def reads_table_of_parts(kind: type) -> bool:
    """Whether a forward pass looks into ``_modules`` itself, where nothing can be hidden from it."""
    return any("_modules" in code.co_names for code in _codes_of_forward(kind, kind.forward))


@functools.cache
def calls_super_of_own_class(kind: type) -> bool:
    """Whether a method calls ``super(self.__class__, self)`` or ``super(type(self), self)``.

    In a subclass that means the method itself again, without end. Only what a forward pass runs counts.

    >>> class Wrong(nn.Linear):
    ...     def forward(self, x):
    ...         return super(self.__class__, self).forward(x)
    >>> calls_super_of_own_class(Wrong), calls_super_of_own_class(nn.Linear)
    (True, False)
    """
    for code in _codes_of_forward(kind, kind.forward):
        names = [instruction.argval for instruction in dis.get_instructions(code) if _loads(instruction)]
        for i, name in enumerate(names):
            following = names[i + 1 : i + 3]
            if name == "super" and (following[1:] == ["__class__"] or following[:1] == ["type"]):
                return True
    return False


def tensor_reads(module: nn.Module, kind: type) -> tuple[tuple[str, str], ...]:
    """Which tensors of its parts a module's forward reads instead of calling the part: (path of the part, tensor).

    ``self.attention.out_proj.weight`` and ``getattr(self.attention.out_proj, "weight")`` give
    ``("attention.out_proj", "weight")``, and ``layer.weight`` of any other variable ``("*", "weight")``: some part.
    ``self.linear.weight.dtype`` gives nothing, as it asks for a fact, and neither does ``self.linear.weight.data``,
    through which code writes. Other attributes come along; whoever asks looks for names of tensors.

    Args:
        module: the module, which may have a forward of its own.
        kind: its class, before it was adapted.

    >>> class Reads(nn.Module):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.query.weight, self.key.weight.dtype)
    >>> tensor_reads(Reads(), Reads)
    (('query', 'weight'),)
    """
    # the forward is part of the question, because code may exchange that of a class between two injections
    reads = _tensor_reads(kind, kind.forward)
    own_forward = module.__dict__.get("forward")
    function = getattr(own_forward, "__func__", getattr(own_forward, "func", own_forward))
    if isinstance(function, types.FunctionType):
        reads += _reads_in(_with_inner(function.__code__))
    return reads


@functools.cache
def _tensor_reads(kind: type, forward: object) -> tuple[tuple[str, str], ...]:
    return _reads_in(_codes_of_forward(kind, forward))


def _reads_in(codes: Iterable[types.CodeType]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for code in codes:
        for root, attributes in _attribute_chains(code):
            if attributes[-1] in _FACTS or "data" in attributes:
                continue
            path = [] if root == "self" else ["*"]
            # a.b.weight.t() may read `a.b`, `a.b.weight` or `a.b.weight.t`; only tensors will be found later
            for attribute in attributes:
                if path:
                    found[".".join(path), attribute] = None
                path.append(attribute)
    return tuple(found)


def _attribute_chains(code: types.CodeType) -> Iterator[tuple[str, list[str]]]:
    """Expressions such as ``self.linear.weight``: ``self``, or "other", and the attributes behind it."""
    own_name = code.co_varnames[0] if code.co_argcount else ""
    # `function` is the global name in front of the expression, which is then its first argument
    root, global_name, function = "", "", ""
    attributes: list[str] = []
    for instruction in [*dis.get_instructions(code), None]:
        if instruction is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append(instruction.argval)
            continue
        if function == "getattr" and instruction is not None and instruction.opname == "LOAD_CONST":
            attributes.append(str(instruction.argval))  # getattr(self.linear, "weight")
        # isinstance(self.linear.weight, Tensor) computes nothing
        if root and attributes and function != "isinstance":
            yield root, attributes
        attributes, function, global_name = [], global_name, ""
        if instruction is None or instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST")):
            root = ""  # modules and classes, not parts of the model
            global_name = instruction.argval if instruction is not None else ""
            continue
        variable = instruction.argval
        if isinstance(variable, tuple):  # Python 3.13 loads two variables at once
            variable = variable[-1]
        root = "self" if own_name and variable == own_name else "other"


def _codes(kind: type) -> Iterator[types.CodeType]:
    """The compiled functions of a class and of all its bases but `nn.Module`, with the functions inside them."""
    for codes in _codes_by_name(kind).values():
        yield from codes


def _codes_of_forward(kind: type, forward: object) -> list[types.CodeType]:
    """The compiled functions of a class that a forward pass may run: `forward`, and what is named in them."""
    by_name = _codes_by_name(kind)
    found: list[types.CodeType] = []
    waiting = [name for name in _ENTRIES if name in by_name]
    seen = set(waiting)
    while waiting:
        codes = by_name[waiting.pop()]
        found += codes
        for code in codes:
            for name in code.co_names:
                if name in by_name and name not in seen:
                    seen.add(name)
                    waiting.append(name)
    return found


def _codes_by_name(kind: type) -> dict[str, list[types.CodeType]]:
    """Every definition of each function in a class and its bases, by the function's name."""
    found: dict[str, list[types.CodeType]] = {}
    for parent in kind.__mro__:
        if parent in (nn.Module, object):
            continue
        for name, member in vars(parent).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                function = inspect.unwrap(function)
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType):
                found.setdefault(name, []).extend(_with_inner(code))
    return found


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _loads(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_FAST", "LOAD_ATTR", "LOAD_DEREF", "LOAD_NAME"))
