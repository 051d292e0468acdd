"""Put a method into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_peft.adapted import Adapted
from lightning_peft.errors import ConfigError, NoMatchError, PEFTError
from lightning_peft.fingerprint import fingerprint
from lightning_peft.heads import new_modules, resolve_modules
from lightning_peft.match import as_patterns
from lightning_peft.method import Method
from lightning_peft.trainable import (
    MARK,
    Injection,
    adapted_modules,
    find,
    network,
    persistent_buffers,
    require,
)

Methods = Method | Sequence[Method]


def inject(model: nn.Module, method: Methods) -> None:
    """Freeze the model, put the method's parameters in, and thaw what trains in full. In place.

    A second call with an equal method does nothing. Random numbers come from the method's own seed; the global
    generators are left alone.

    Args:
        model: a LightningModule or any network.
        method: one method or several; several must not adapt the same module.

    Raises:
        NoMatchError: a pattern matches nothing.
        ConfigError: the methods collide, or another method is in the model already.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, summarize
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> inject(net, LoRA(r=1))
    >>> summarize(net)["trainable"]
    16
    """
    methods = as_methods(method)
    found = find(model)
    if found is not None:
        _check_same(found[0], methods)
        return
    prefix, root = network(model)
    place(root, methods, [m.targets(root, prefix) for m in methods], *_saved(root, methods, prefix))
    for name, parameter in model.named_parameters():  # whatever stands beside the network is frozen, too
        if prefix and not name.startswith(prefix):
            parameter.requires_grad_(False)


def place(
    root: nn.Module,
    methods: list[Method],
    targets: list[dict[str, nn.Module]],
    saved: list[str],
    new: list[str],
) -> None:
    """Inject at modules that are already chosen (by patterns, or by the names in a checkpoint)."""
    targets = [_outside(m, chosen, saved) for m, chosen in zip(methods, targets, strict=True)]
    _check_overlap(methods, targets)
    thawed = _thawed(root, methods, targets, saved)
    injection = Injection(
        methods=methods,
        targets=[list(chosen) for chosen in targets],
        saved=saved,
        new=new,
        base=fingerprint(root, {id(p) for p in thawed}),
        flags={n: p.requires_grad for n, p in root.named_parameters()},
    )
    base = list(root.parameters())
    for m, chosen in zip(methods, targets, strict=True):
        m.attach(root, chosen)
    for parameter in base:
        parameter.requires_grad_(False)
    for parameter in thawed:
        parameter.requires_grad_(True)
    keep = {id(p) for p in thawed} if not _complete(methods) else set()
    injection.trained = [n for n, p in root.named_parameters() if p.requires_grad]
    injection.frozen = [n for n, p in root.named_parameters() if not p.requires_grad]
    injection.buffers = {n: b.detach().clone() for n, b in persistent_buffers(root).items()}
    injection.before = {n: p.detach().clone() for n, p in root.named_parameters() if id(p) in keep}
    root.__dict__[MARK] = injection
    if not injection.trained:
        raise_untrained(root)


def unload(model: nn.Module) -> None:
    """Give back the untouched base: original modules, names, values and ``requires_grad`` flags.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, unload
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> inject(net, LoRA()); unload(net); list(net.state_dict())
    ['0.weight', '0.bias']
    """
    injection, _, root = require(model)
    _refuse_complete(injection, "unload")
    switch(injection, root, merged=False)
    values = dict(root.named_parameters())
    with torch.no_grad():
        for name, old in injection.before.items():
            values[name].copy_(old)
        _restore_buffers(root, injection)
    remove(injection, root)


def remove(injection: Injection, root: nn.Module) -> None:
    """Take wrappers and record out of the network; base values stay as they are."""
    for m, names in zip(reversed(injection.methods), reversed(injection.targets), strict=True):
        m.detach(root, names)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(injection.flags.get(name, parameter.requires_grad))
    del root.__dict__[MARK]


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
    _refuse_complete(injection, "disabled")
    injection.disabled += 1
    if injection.disabled > 1:
        try:
            yield
        finally:
            injection.disabled -= 1
        return
    was_merged = injection.merged
    switch(injection, root, merged=False)
    swapped = _swap_values(root, injection)
    wrapped = [(m, m.active) for _, m in adapted_modules(root)]
    for m, _ in wrapped:
        m.active = False
    try:
        yield
    finally:
        for m, was_active in wrapped:
            m.active = was_active
        for tensor, value in swapped:
            tensor.data = value
        switch(injection, root, merged=was_merged)
        injection.disabled -= 1


def switch(injection: Injection, root: nn.Module, *, merged: bool) -> None:
    """Bring all wrapped modules into the merged or the unmerged state."""
    if injection.merged == merged:
        return
    done: list[Adapted] = []
    try:
        for _, module in list(adapted_modules(root)):
            module.merge() if merged else module.unmerge()
            done.append(module)
    except PEFTError:
        for module in done:
            module.unmerge() if merged else module.merge()
        raise
    injection.merged = merged


def as_methods(method: Methods) -> list[Method]:
    """One method or several, as a list; anything else is an error."""
    methods = [method] if isinstance(method, Method) else list(method) if isinstance(method, (list, tuple)) else []
    if not methods or not all(isinstance(m, Method) for m in methods):
        raise ConfigError(
            f"Expected a method such as LoRA(r=8), or a list of methods; got {method!r}."
            " `lightning-peft methods` lists them."
        )
    return methods


def raise_untrained(root: nn.Module) -> None:
    """Undo an injection that left nothing to train, and say so."""
    injection = root.__dict__[MARK]
    remove(injection, root)
    names = " + ".join(type(m).__name__ for m in injection.methods)
    if not injection.flags:
        raise ConfigError(
            f"{names}: {type(root).__name__} has no parameters yet. Build the network in `__init__` or"
            " `configure_model`, not in `setup` (callbacks are set up before the module)."
        )
    raise ConfigError(
        f"{names} leaves nothing to train in {type(root).__name__}: all its parameters were frozen before."
    )


def _saved(root: nn.Module, methods: list[Method], prefix: str) -> tuple[list[str], list[str]]:
    if _complete(methods):
        return [], []
    patterns = [p for m in methods for p in as_patterns(getattr(m, "modules_to_save", None))]
    new = new_modules(root)
    return list(dict.fromkeys(resolve_modules(root, patterns, prefix) + new)), new


def _thawed(root, methods, targets, saved) -> list[nn.Parameter]:
    names = [n for m, chosen in zip(methods, targets, strict=True) for n in m.thaw(root, chosen)]
    parameters = [root.get_parameter(n) for n in names]
    for name in saved:
        parameters += [p for p in root.get_submodule(name).parameters() if p.is_floating_point()]
    return list({id(p): p for p in parameters}.values())


def _outside(method: Method, chosen: dict[str, nn.Module], saved: list[str]) -> dict[str, nn.Module]:
    """Modules trained in full need no adapter."""
    left = {n: m for n, m in chosen.items() if not any(n == s or n.startswith(s + ".") for s in saved)}
    if chosen and not left:
        raise NoMatchError(
            f"{type(method).__name__}: everything it would adapt ({', '.join(chosen)}) trains in full already, as part"
            f" of {', '.join(saved)}. Name other target_modules, or use FullFineTuning."
        )
    return left


def _complete(methods: list[Method]) -> bool:
    return any(m.complete for m in methods)


def _refuse_complete(injection: Injection, verb: str) -> None:
    if _complete(injection.methods):
        raise PEFTError(
            f"{verb}: full fine-tuning changes the base itself and keeps no copy of it. Build the model again instead."
        )


def _check_same(injection: Injection, methods: list[Method]) -> None:
    if injection.methods == methods:
        return
    raise ConfigError(
        f"The model is adapted already, by {injection.methods}; it cannot take {methods} on top."
        " Call unload(model) or build the model again; give several methods at once as a list."
    )


def _check_overlap(methods: list[Method], targets: list[dict[str, nn.Module]]) -> None:
    if _complete(methods) and len(methods) > 1:
        raise ConfigError("Full fine-tuning trains everything already; give it alone.")
    owner: dict[int, str] = {}
    for m, chosen in zip(methods, targets, strict=True):
        for name, module in chosen.items():
            if id(module) in owner:
                raise ConfigError(
                    f"Both {owner[id(module)]} and {type(m).__name__} would adapt {name!r}; set target_modules or"
                    " exclude_modules of one of them so that they do not meet."
                )
            owner[id(module)] = type(m).__name__


def _swap_values(root: nn.Module, injection: Injection) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Point changed base tensors at their values from before injection; returns what to put back."""
    tensors = dict(root.named_parameters()) | persistent_buffers(root)
    swapped = []
    for name, old in (injection.before | injection.buffers).items():
        if name in tensors:
            tensor = tensors[name]
            swapped.append((tensor, tensor.data))
            tensor.data = old.to(tensor.device, tensor.dtype)
    return swapped


def _restore_buffers(root: nn.Module, injection: Injection) -> None:
    now = persistent_buffers(root)
    for name, old in injection.buffers.items():
        if name in now:
            now[name].copy_(old)
