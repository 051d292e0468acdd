"""Adapting a layer in place: the layer stays the same object, its class is swapped for a subclass made on the fly.

This is how PyTorch itself goes about it in ``fully_shard`` and ``torch.nn.utils.parametrize``. After ``adapt`` a layer
is still an instance of its own class, every reference to it holds, and its tensors keep their names; beside them it has

* ``delta``, a submodule with everything that trains, and
* ``_adapter``, one plain object (`AdapterState`) with everything else that adapting needs to remember.

A kind of adapted layer is a subclass of `Adapted` that overrides ``forward``::

    class ScaledOutput(Adapted):
        def forward(self, input):
            output = self._base_forward(input)
            return output * self.delta.scale if self._adapter.active else output

    adapt(layer, ScaledOutput, delta)      # layer.__class__ is now a subclass of ScaledOutput and of Linear
    release(layer)                         # and now it is Linear again
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import operator
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.bytecode import calls_super_of_own_class, reads_table_of_parts, walks_over_parts
from lightning_peft.errors import ConfigError, MergeError, PEFTError
from lightning_peft.quantized import packed
from lightning_peft.sharding import gathered, sharded, write

_NARROW = (torch.float16, torch.bfloat16)
#: a hook's key that torch never gives out
_EMPTY_HOOK = -1


class Delta(nn.Module):
    """Holds the trained tensors of one adapted module; never narrower than float32, whatever the model is cast to."""

    #: start values of a module that was built on the meta device
    starts: dict[str, Tensor] | None = None

    def reset_parameters(self) -> None:
        """Take the start values, for strategies that give storage to a network built on the meta device."""
        if self.starts is None:
            raise PEFTError(
                "A model with adapters was given new storage, and their values are lost. Build the network on the meta"
                " device and let PEFT(...) or inject_now(self) adapt it there, or build it on the CPU."
            )
        for name, value in self.starts.items():
            write(getattr(self, name), value)
        self.starts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if not tensor.is_floating_point() or out.dtype not in _NARROW:
                return out
            if tensor.is_meta:
                return torch.empty_like(tensor, device=out.device)
            return tensor.to(out.device)

        return super()._apply(keep, recurse)


class AdapterState:
    """What an adapted layer remembers, at ``layer._adapter``. Kinds of layers that need more use a subclass.

    Attributes:
        active: False while the adapter is switched off or merged.
        originals: base parameters that merged ones have replaced, by name; copies of those that are split over
            processes.
        base_forward: a ``forward`` that was set on the instance before injection (as accelerate does).
        name: path of the layer at injection, for messages.
        windows: for each thread whose code may read corrected tensors now, those it has read so far; None for a
            thread that runs the base's forward and must read the base's own tensors.
        must_be_called: whether torch's fused encoder layers, which read weights and call nothing, must stay off.
        reads: paths of adapted layers inside this one whose tensors its forward reads instead of calling them.
    """

    def __init__(self) -> None:
        self.active = True
        self.originals: dict[str, nn.Parameter] = {}
        self.base_forward: Callable[..., Any] | None = None
        self.name = ""
        self.windows: dict[int, dict[tuple[str, bool], Tensor] | None] = {}
        self.must_be_called = False
        self.reads: tuple[str, ...] = ()

    def switch(self, layer: nn.Module, on: bool) -> None:
        """Switch the adapter on or off."""
        self.active = on
        self.windows = {}  # an interrupted forward may have left one open
        # torch's encoder layers take their fused path only if no module inside them has a hook. So an adapter that
        # must be called carries an empty one, and while it is switched off the base has its fused path back.
        layer._forward_pre_hooks.pop(_EMPTY_HOOK, None)
        if on and self.must_be_called:
            layer._forward_pre_hooks[_EMPTY_HOOK] = _do_nothing


class Adapted(nn.Module):
    """What every adapted layer is, beside an instance of its own class. Subclasses override `forward`.

    A subclass that corrects weights also defines `_corrected_names` and `_merged_tensors`.
    """

    _adapter: AdapterState
    delta: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with the correction; each kind defines it."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def _merged_tensors(self) -> dict[str, Tensor]:
        """The base's parameters with the adapter folded in, by name; float32 or wider.

        Raises:
            MergeError: the method cannot be folded into weights.
        """
        raise MergeError(f"The adapter of {type(self).__name__} cannot be merged into weights.")

    def _corrected_names(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes when it is merged."""
        return ()

    def _readable_names(self) -> tuple[str, ...]:
        """Those of them that other code may read corrected, through `_corrected`; none of a base in few bits."""
        return () if packed(self) else self._corrected_names()

    def _corrected(self, name: str) -> Tensor:
        """The tensor called ``name`` as code that reads it must see it, while a window is open."""
        own = base_tensor(self, name)
        return self._merged_tensors()[name].to(own.dtype)

    def _obstacle(self) -> str | None:
        """Why the base cannot take merged tensors, or None."""
        width = packed(self)
        if width is not None:
            return (
                f"the base weights are stored in {width} bits, and rounding the sum to {width} bits again would change"
                " what was trained."
            )
        for name in self._corrected_names():
            if name not in self._parameters:
                return (
                    f"{type(self).__name__}.{name} is computed at each call (weight_norm, spectral_norm, pruning or"
                    " another parametrization), so nothing can be written into it. Remove the parametrization before"
                    " injection."
                )
        return None

    def _check_class(self) -> None:
        """A parametrization that was registered after injection hides the weight, and with it the correction."""
        for kind in type(self).__mro__:
            if "_adapted_from" in kind.__dict__:
                return
            for name in self._readable_names():
                if name in kind.__dict__:
                    raise PEFTError(
                        f"{type(self).__name__}.{name} was parametrized after the adapters were injected, and the"
                        " adapter, which corrects that weight, would have no effect. Register the parametrization"
                        " before injection."
                    )

    def _own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the base's code, which may meet corrected tensors."""
        state = self._adapter
        forward = state.base_forward or super().forward
        if not state.reads:
            return forward(*args, **kwargs)
        with windows(adapted_parts(self, state.reads)):
            return forward(*args, **kwargs)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward as it was before injection: it reads its own tensors."""
        if not type(self)._adapted_from[2]:  # no tensor of it is readable, so there is nothing to shut
            return self._own_forward(*args, **kwargs)
        with _window(self, None):
            return self._own_forward(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if self._adapter.originals:
            unmerge_layer(self)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        # replicas run in threads: each opens windows of its own
        replica._adapter = copy.copy(self._adapter)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the kind and the base class, as a class made on the fly cannot be found by its name."""
        function, arguments, *rest = super().__reduce_ex__(protocol)
        recipe = type(self).__dict__.get("_adapted_from")
        if recipe is None or function is not copyreg.__newobj__:
            return (function, arguments, *rest)
        if rest and isinstance(rest[0], dict):
            # a bound method is pickled by its name, and would come back as that of the adapted class
            base_forward = recipe[1].forward
            state = {}
            for key, value in rest[0].items():
                is_base = isinstance(value, types.MethodType) and value.__func__ is base_forward
                state[key] = _BaseForward() if is_base else value
            rest[0] = state
        return (_new_adapted, (*recipe, *arguments[1:]), *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            if isinstance(value, _BaseForward):
                state[key] = types.MethodType(base_class(self).forward, self)
        super().__setstate__(state)


class _BaseForward:
    """Stands for the bound forward of the base's class in a pickle."""


class _HiddenDelta:
    """Hides ``delta`` from code of the base, or of its parents, that loops over the layer's children.

    What torch itself does with all children (moving, switching modes, `apply`) reaches it.
    """

    _modules: dict[str, nn.Module]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_children`."""
        for name, part in super().named_children():  # type: ignore[misc]
            if name != "delta":
                yield name, part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse and "delta" in self._modules:
            self._modules["delta"]._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        if "delta" in self._modules:
            self._modules["delta"].train(mode)
        return super().train(mode)  # type: ignore[misc]

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """As `nn.Module.apply`."""
        if "delta" in self._modules:
            self._modules["delta"].apply(fn)
        return super().apply(fn)  # type: ignore[misc]


class _SequentialParts(_HiddenDelta):
    """Hides ``delta`` also from the length of an `nn.Sequential` and from loops over it: it is not one of the steps."""

    def __len__(self) -> int:
        return len(self._modules) - ("delta" in self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([part for name, part in self._modules.items() if name != "delta"])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)  # type: ignore[misc]
        steps = [(name, part) for name, part in self._modules.items() if name != "delta"]
        return base_class(self)(OrderedDict(steps[index]))  # type: ignore[arg-type]

    def __delitem__(self, index: Any) -> None:
        delta = self._modules.pop("delta")  # deleting and inserting give every step a new number
        try:
            super().__delitem__(index)  # type: ignore[misc]
        finally:
            self._modules["delta"] = delta

    def insert(self, index: int, module: nn.Module) -> Any:
        """As `nn.Sequential.insert`."""
        delta = self._modules.pop("delta")
        try:
            return super().insert(index, module)  # type: ignore[misc]
        finally:
            self._modules["delta"] = delta

    def _get_item_by_idx(self, iterator: Any, idx: Any) -> Any:
        """What `nn.Sequential` calls to find a step, or its name, by a position."""
        delta = self._modules.get("delta")
        steps = [item for item in iterator if item is not delta and item != "delta"]
        return steps[operator.index(idx)]


# ---- adapting and releasing ----------------------------------------------------------------------------------------
def adapt(
    layer: nn.Module,
    kind: type[Adapted],
    delta: nn.Module | None,
    state: AdapterState | None = None,
    name: str = "",
) -> Any:
    """Swap the class of a layer for one that is ``kind`` and its own class at once. In place; returns the layer.

    Args:
        layer: the module to adapt; it stays the same object.
        kind: how it computes from now on.
        delta: what trains; becomes the submodule ``delta``. None for a kind that adds nothing itself.
        state: for kinds that keep more than `AdapterState`.
        name: path of the layer, for messages.

    Raises:
        ConfigError: the layer cannot be adapted in place.

    >>> from torch import nn
    >>> from lightning_peft import Delta
    >>> layer = nn.Linear(2, 2)
    >>> adapt(layer, Adapted, Delta()) is layer, isinstance(layer, nn.Linear), type(layer).__name__
    (True, True, 'Linear')
    >>> release(layer); type(layer) is nn.Linear
    True
    """
    base = type(layer)
    refusal = f"{name!r} ({base.__name__} of {base.__module__}) cannot be adapted: "
    _check_adaptable(layer, kind, refusal)
    if delta is not None and hasattr(layer, "delta"):
        raise ConfigError(
            f"{refusal}it has an attribute 'delta' of its own, the name under which adapters are kept. Rename it, or"
            " leave the module out with exclude_modules."
        )
    try:
        layer.__class__ = adapted_class(kind, base)
    except TypeError as error:
        raise ConfigError(f"{refusal}its class cannot be changed ({error}).") from None
    state = AdapterState() if state is None else state
    layer.__dict__["_adapter"] = state
    state.name = name
    state.base_forward = layer.__dict__.pop("forward", None)
    if delta is not None:
        delta.train(layer.training)
        layer.add_module("delta", delta)
    state.switch(layer, True)
    return layer


def release(layer: nn.Module) -> None:
    """Undo `adapt`: the layer gets its own class back, and what was added to it goes."""
    state = layer._adapter
    state.switch(layer, False)
    layer._modules.pop("delta", None)
    del layer.__dict__["_adapter"]
    adapted_forward = type(layer).forward
    layer.__class__ = _without_adapter(type(layer))
    # code that set a forward on the instance has kept the one it found (accelerate as `_old_forward`)
    for key, value in list(layer.__dict__.items()):
        if isinstance(value, types.MethodType) and value.__func__ is adapted_forward:
            layer.__dict__[key] = types.MethodType(type(layer).forward, layer)
    if state.base_forward is not None:
        layer.__dict__["forward"] = state.base_forward
    elif _is_own_forward(layer, layer.__dict__.get("forward")):
        del layer.__dict__["forward"]


def check_releasable(layer: nn.Module, name: str) -> None:
    """Raise a `PEFTError` if code has since put a forward on the instance that may lead to the adapted one."""
    values = [value for value in layer.__dict__.values() if isinstance(value, types.MethodType)]
    known = any(value.__func__ is type(layer).forward for value in values)  # `release` rebinds that one
    if "forward" in layer.__dict__ and not known:
        raise PEFTError(
            f"{name!r} got a `forward` of its own after the adapters were injected, and it may call the adapted layer."
            " Take that forward away first, or set it before injection."
        )


def is_bypassed(layer: nn.Module) -> bool:
    """Whether a forward on the instance leads past the adapter: a bound method of the base's class."""
    forward = layer.__dict__.get("forward")
    return isinstance(forward, types.MethodType) and forward.__func__ is base_class(layer).forward


def _is_own_forward(layer: nn.Module, forward: Any) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ is type(layer).forward


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class a layer had before it was adapted; that of any other module is its own."""
    return _without_adapter(type(layer)) if isinstance(layer, Adapted) else type(layer)


@functools.cache
def adapted_class(kind: type, base: type, readable: tuple[str, ...] = ()) -> type:
    """The class of an adapted layer: a subclass of both, which carries the name of ``base``.

    Args:
        kind: a subclass of `Adapted`.
        base: the layer's own class.
        readable: tensors that answer their corrected values while a window is open (see `windows`).
    """
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_adapted_from": (kind, base, readable),
    }
    for name in readable:
        namespace[name] = _readable_property(name, inspect.getattr_static(base, name, None))
    namespace["forward"] = _with_signature_of(base.forward, kind.forward)
    if issubclass(base, nn.Sequential):
        bases: tuple[type, ...] = (kind, _SequentialParts, base)
    elif walks_over_parts(base):
        bases = (kind, _HiddenDelta, base)
    else:
        bases = (kind, base)
    options = {"metaclass": _adapted_type(type(base))}
    return types.new_class(base.__name__, bases, options, lambda body: body.update(namespace))


def _with_signature_of(base_forward: Any, forward: Any) -> Any:
    """A copy of an adapted forward that tells the arguments of the base's: callers ask for them by `inspect`."""
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied = functools.update_wrapper(copied, forward)
    del copied.__wrapped__
    with suppress(TypeError, ValueError):  # a forward that is no plain function
        copied.__signature__ = inspect.signature(base_forward)  # type: ignore[attr-defined]
    return copied


@functools.cache
def _adapted_type(metaclass: type) -> type:
    """The class of adapted classes. ``type(layer)(…)`` in foreign code means a new, plain layer, and gets one."""

    def __call__(kind: Any, *args: Any, **kwargs: Any) -> Any:
        return _without_adapter(kind)(*args, **kwargs)

    return type("AdaptedType", (metaclass,), {"__call__": __call__})


def make_readable(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Let tensors of an adapted layer answer their corrected values while a window is open."""
    kind, base, known = type(layer)._adapted_from
    layer.__class__ = adapted_class(kind, base, tuple(dict.fromkeys(known + names)))


def _new_adapted(kind: type, base: type, readable: tuple[str, ...], *arguments: Any) -> Any:
    return copyreg.__newobj__(adapted_class(kind, base, readable), *arguments)


def _without_adapter(kind: type) -> type:
    """The class without its adapter. What was put on top of it later (FSDP, a parametrization) stays."""
    recipe = kind.__dict__.get("_adapted_from")
    if recipe is not None:
        return recipe[1]
    if not issubclass(kind, Adapted):
        return kind
    bases = tuple(_without_adapter(parent) for parent in kind.__bases__)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(kind.__name__, bases, exec_body=lambda body: body.update(own))


def _check_adaptable(layer: nn.Module, kind: type[Adapted], refusal: str) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise ConfigError(f"{refusal}it is a ScriptModule, whose code is fixed. Adapt it before torch.jit.script.")
    # what the kind defines for itself; the base's own attribute of that name would be hidden
    names = [name for parent in kind.__mro__ if issubclass(parent, Adapted) for name in vars(parent)]
    added = {name for name in names if not name.startswith("__") and not hasattr(nn.Module, name)}
    for name in sorted(added | {"_adapter"}):
        if hasattr(layer, name):
            raise ConfigError(
                f"{refusal}it has an attribute {name!r} of its own, a name that adapters use. Rename it, or leave the"
                " module out with exclude_modules."
            )
    if reads_table_of_parts(type(layer)) and not isinstance(layer, nn.Sequential):
        raise ConfigError(
            f"{refusal}its forward looks into self._modules and would run the adapter as one of its parts. Loop over"
            " self.children(), or leave the module out with exclude_modules."
        )
    if calls_super_of_own_class(type(layer)):
        raise ConfigError(
            f"{refusal}its code calls super(self.__class__, self), which never ends in a subclass. Write super(), or"
            " leave the module out with exclude_modules."
        )


def _do_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that is there to be seen."""


# ---- tensors that other code reads ---------------------------------------------------------------------------------
def base_tensor(layer: nn.Module, name: str, *default: Any) -> Any:
    """A tensor of the base, wherever it stands: a parameter, a plain attribute (pruning, the older weight_norm), a
    property of the class (parametrizations)."""
    with _window(layer, None):
        return getattr(layer, name, *default)


@contextmanager
def windows(layers: list[Any]) -> Iterator[None]:
    """While the block runs, tensors of these layers that were made readable answer their corrected values.

    At every other moment they are the parameters themselves, so that initialising, tying, pruning, sharding and the
    like meet those.
    """
    with ExitStack() as stack:
        for layer in layers:
            if layer._adapter.active and not isinstance(layer._adapter.windows.get(thread_key()), dict):
                layer._check_class()
                stack.enter_context(_window(layer, {}))
        yield


@contextmanager
def _window(layer: Any, window: dict[tuple[str, bool], Tensor] | None) -> Iterator[None]:
    """Let this thread read corrected tensors of a layer (a dictionary for those it reads), or its own (None)."""
    opened, thread = layer._adapter.windows, thread_key()
    nested = thread in opened
    before = opened.get(thread)
    opened[thread] = window
    try:
        yield
    finally:
        if nested:
            opened[thread] = before
        else:
            opened.pop(thread, None)


def thread_key() -> int:
    """What tells threads apart; while code is traced there is one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def current_backward() -> int:
    """Torch's number of the backward pass that this thread works for, -1 outside of one. Torch has no public name."""
    return torch._C._current_graph_task_id()


class CorrectedWeights(Adapted):
    """A layer that is corrected at its weights: while its forward runs, they answer their corrected values.

    So whatever the forward computes from them is right. The corrected tensors, as large as the weights themselves, live
    until the backward pass.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the base."""
        if not self._adapter.active:
            return self._own_forward(*args, **kwargs)
        with windows([self]):
            return self._own_forward(*args, **kwargs)


def adapted_parts(reader: nn.Module, paths: tuple[str, ...]) -> list[Any]:
    """The adapted layers at some paths; one that was replaced since is none of them."""
    parts = [part_at(reader, path) for path in paths]
    return [part for part in parts if isinstance(part, Adapted)]


def part_at(module: Any, path: str) -> nn.Module | None:
    """The part at a path, or None. Looks at parts alone: attributes may be properties that raise."""
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


def _open_window(state: AdapterState) -> dict[tuple[str, bool], Tensor] | None:
    """Where corrected tensors are kept if this is a moment in which code may read them; None if it is not."""
    thread = thread_key()
    if state.windows and thread in state.windows:
        return state.windows[thread]
    # A checkpoint inside a reader's forward runs a part of it again in the backward pass, where no window is open.
    in_backward = not torch.compiler.is_compiling() and current_backward() != -1
    return {} if in_backward and state.active else None


def _readable_property(name: str, inherited: Any) -> property:
    """A property for one tensor of an adapted layer. ``inherited`` is what the base's class has under that name."""

    def get(layer: Any) -> Any:
        window = _open_window(layer.__dict__["_adapter"])
        if window is not None:
            # computed once for each forward; a value read under no_grad has no history, so it is kept apart
            key = (name, torch.is_grad_enabled())
            if key not in window:
                try:
                    window[key] = layer._corrected(name)
                except AttributeError as error:  # Python would take it for a missing weight, and ask the base for it
                    raise PEFTError(f"Correcting {name!r} of {type(layer).__name__} failed: {error}") from error
            return window[key]
        if hasattr(inherited, "__get__"):
            return inherited.__get__(layer, type(layer))
        if name in layer.__dict__:
            return layer.__dict__[name]
        return nn.Module.__getattr__(layer, name)

    def put(layer: Any, value: Any) -> None:
        if hasattr(inherited, "__set__"):
            inherited.__set__(layer, value)
        else:
            layer.__dict__[name] = value

    def remove(layer: Any) -> None:
        if hasattr(inherited, "__delete__"):
            inherited.__delete__(layer)
        elif layer.__dict__.pop(name, None) is None:
            raise AttributeError(name)

    return property(get, put, remove)


# ---- merging one layer ---------------------------------------------------------------------------------------------
def merge_layer(layer: Any) -> None:
    """Swap the merged tensors in; the originals are kept, so that `unmerge_layer` restores the very same objects."""
    if reason := layer._obstacle():
        raise MergeError(f"Cannot merge: {reason}")
    with torch.no_grad(), gathered(layer.modules(), keep=False):
        tensors = layer._merged_tensors()
    for name, tensor in tensors.items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise MergeError(f"The merged {name!r} holds NaN or infinity: the adapter or the base diverged.")
    state = layer._adapter
    for name, tensor in tensors.items():
        original = layer._parameters[name]
        if sharded(original):  # FSDP gathers from the parameter it knows
            state.originals[name] = nn.Parameter(original.detach().clone(), requires_grad=False)
            write(original, tensor.to(original.dtype))
        else:
            state.originals[name] = original
            layer._parameters[name] = nn.Parameter(tensor.to(original.dtype), requires_grad=False)
    state.switch(layer, False)


def unmerge_layer(layer: Any) -> None:
    """Put the original parameters back."""
    state = layer._adapter
    for name, original in state.originals.items():
        merged = layer._parameters[name]
        if sharded(merged):
            write(merged, original)
            continue
        if original.device != merged.device:
            original.data = original.data.to(merged.device)
        layer._parameters[name] = original
    state.originals = {}
    state.switch(layer, True)


def runs_as_torch(layer: nn.Module) -> bool:
    """Whether a layer computes its output as the linear layers, embeddings and convolutions of torch do."""
    kind = base_class(layer)
    base_forward = layer._adapter.base_forward if isinstance(layer, Adapted) else layer.__dict__.get("forward")
    # accelerate's hooks move tensors and then call the forward that was there before
    if base_forward is not None and "_hf_hook" not in layer.__dict__:
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        plain = next(conv for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, conv))
        return kind.forward is plain.forward and kind._conv_forward is plain._conv_forward
    return kind.forward in (nn.Linear.forward, nn.Embedding.forward)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of adapter tensors beside ``weight``: float64 stays, everything else gives float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer from ``nx`` to ``nf`` features, weight (nx, nf)."""
    return hasattr(module, "nx") and hasattr(module, "nf") and getattr(module.weight, "ndim", 0) == 2
