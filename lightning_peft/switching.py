"""Switch what was injected: off and on, merged and unmerged, back to the values it started from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_peft.adapted import Adapted, merge_layer, unmerge_layer
from lightning_peft.errors import PEFTError
from lightning_peft.method import Method
from lightning_peft.sharding import named_parameters, reshard, sharded, write
from lightning_peft.trainable import Injection, adapted_modules, persistent_buffers, refuse_flat, require


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model exactly as it was before injection; may be nested.

    Heads, biases and statistics go back to their values at injection for the time being, too.

    Raises:
        PEFTError: full fine-tuning keeps no copy of the base.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import LoRA, disabled, inject
    >>> net, x = nn.Linear(4, 4), torch.ones(1, 4)
    >>> net = nn.Sequential(net); before = net(x)
    >>> inject(net, LoRA())
    >>> with disabled(net):
    ...     torch.equal(net(x), before)
    True
    """
    injection, _, root = require(model)
    refuse_complete(injection, "disabled")
    refuse_flat(model, "disabled")
    injection.disabled += 1
    if injection.disabled > 1:
        try:
            yield
        finally:
            injection.disabled -= 1
        return
    was_merged = injection.merged
    switch(injection, root, merged=False)
    reshard(root)
    swapped = _swap_values(root, injection)
    layers = [(layer, layer._adapter.active) for _, layer in adapted_modules(root)]
    for layer, _ in layers:
        layer._adapter.switch(layer, False)
    injection.root_reader.switch(root, False)
    try:
        yield
    finally:
        for layer, was_active in layers:
            layer._adapter.switch(layer, was_active)
        injection.root_reader.switch(root, bool(injection.root_reader.paths))
        if any(sharded(tensor) for tensor, _ in swapped):
            reshard(root)
        for tensor, value in swapped:
            _set(tensor, value)
        switch(injection, root, merged=was_merged)
        injection.disabled -= 1


def switch(injection: Injection, root: nn.Module, *, merged: bool) -> None:
    """Bring all adapted layers into the merged or the unmerged state."""
    if injection.merged == merged:
        return
    reshard(root)
    change, undo = (merge_layer, unmerge_layer) if merged else (unmerge_layer, merge_layer)
    done: list[Adapted] = []
    try:
        for _, layer in list(adapted_modules(root)):
            change(layer)
            done.append(layer)
    except PEFTError:
        for layer in done:
            undo(layer)
        raise
    injection.root_reader.switch(root, not merged and bool(injection.root_reader.paths))
    injection.merged = merged


def reset_buffers(injection: Injection, root: nn.Module, given: Collection[str] = ()) -> None:
    """Set buffers back to their values at injection, but for those named in ``given``."""
    now = persistent_buffers(root)
    with torch.no_grad():
        for name, old in injection.buffers.items():
            if name in now and name not in given and not old.is_meta:
                now[name].copy_(old)


def settle_flags(injection: Injection, root: nn.Module) -> None:
    """Let require gradients what trains and nothing else, as at injection (after ``freeze()`` or ``unfreeze()``)."""
    parameters = dict(named_parameters(root))
    for names, flag in ((injection.trained, True), (injection.frozen, False)):
        for name in names:
            if name in parameters:
                parameters[name].requires_grad_(flag)


def refuse_complete(injection: Injection, verb: str) -> None:
    if is_complete(injection.methods):
        raise PEFTError(
            f"{verb}: full fine-tuning changes the base itself and keeps no copy of it. Build the model again instead."
        )


def is_complete(methods: list[Method]) -> bool:
    return any(m.complete for m in methods)


def _swap_values(root: nn.Module, injection: Injection) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Point changed base tensors at their values from before injection; returns what to put back."""
    tensors = dict(root.named_parameters()) | persistent_buffers(root)
    swapped = []
    for name, old in (injection.before | injection.buffers).items():
        if name in tensors:
            tensor = tensors[name]
            swapped.append((tensor, tensor.detach().clone() if sharded(tensor) else tensor.data))
            _set(tensor, old.to(tensor.device, tensor.dtype, copy=True))  # a forward may write statistics into it
    return swapped


def _set(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if sharded(tensor):
        write(tensor, value)
    else:
        tensor.data = value
