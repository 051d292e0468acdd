"""Networks built on the meta device, without values: start values for the adapters now, base values later."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.fingerprint import with_values
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters, copies, persistent_buffers
from lightning_peft.model.injection import inject
from lightning_peft.samples import Samples
from lightning_peft.sharding import reshard, whole, write


def is_hollow(model: nn.Module) -> bool:
    """Whether some parameters have no values."""
    return any(p.is_meta for p in model.parameters())


def inject_hollow(model: nn.Module, methods: Sequence[Method]) -> None:
    """`inject` into a network on the meta device; the adapters get their start values once they have storage.

    That happens in ``reset_parameters``, which sharding strategies call.

    Raises:
        ConfigError: a method starts from base weights, or trains some of them.
    """
    reason = ConfigError(
        f"{' + '.join(type(m).__name__ for m in methods)} starts from base weights, and the network is on the meta"
        " device, where it has none. Build the network on the CPU."
    )
    twin = _with_numbers(copy.deepcopy(model))
    try:
        inject(twin, list(methods))
    except torch.linalg.LinAlgError:  # a decomposition of NaN
        raise reason from None
    starts = {n: _own(m) for n, m in twin.named_modules() if isinstance(m, Delta)}
    inside = {id(p) for m in twin.modules() if isinstance(m, Delta) for p in m._parameters.values()}
    outside = any(p.requires_grad and id(p) not in inside for p in twin.parameters())
    if outside or any(t.isnan().any() for own in starts.values() for t in own.values() if t.is_floating_point()):
        raise reason
    inject(model, list(methods))
    for name, module in model.named_modules():
        if isinstance(module, Delta):
            module.starts = starts[name]
    Adapters.of(model).record.awaits_base = True


def load_base(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the frozen base of an adapted model, also a sharded one, from a state dict of the plain network.

    For networks built on the meta device: call it in ``on_fit_start`` (``on_test_start``, …), on all processes.

    Args:
        model: the module that was adapted, or one that contains it.
        state: names as in the network before injection.

    Raises:
        CheckpointError: names are missing or shapes differ.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, load_base
    >>> net = nn.Sequential(nn.Linear(2, 2)); state = net.state_dict()
    >>> inject(net, LoRA()); load_base(net, state)
    """
    adapters = Adapters.of(model)
    root = adapters.network
    reshard(root)
    targets = dict(base_tensors(root))
    lost = sorted(n for n, t in targets.items() if n not in state or state[n].shape != t.shape)
    if lost:
        raise CheckpointError(f"The state dict lacks {', '.join(lost[:4])} of {type(root).__name__}, or in that shape.")
    for name, tensor in targets.items():
        write(tensor, state[name])
    adapters.record.samples.update(adapters.base_weights())


def base_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the base that belong to a state dict, by their names before injection."""
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            if tensor is not None and name not in module._non_persistent_buffers_set and id(tensor) not in seen:
                seen.add(id(tensor))
                yield prefix + name, tensor
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Delta):
                yield from visit(child, f"{prefix}{name}.")

    return visit(root, "")


def settle_base(model: nn.Module) -> bool:
    """Take the fingerprint that could not be taken at injection, once there are values; whether there was one to take.

    Of a sharded model all processes must call this.
    """
    if not waits(model):
        return False
    adapters = Adapters.of(model)
    record, root = adapters.record, adapters.network
    record.awaits_base = False
    reshard(root)
    parameters = {n: p for n, p in base_tensors(root) if isinstance(p, nn.Parameter)}
    record.base = with_values(record.base, [whole(parameters[n].detach()) for n in sorted(parameters)])
    record.samples = Samples(adapters.base_weights())
    record.start_buffers = copies(persistent_buffers(root))
    return True


def waits(model: nn.Module) -> bool:
    """Whether base values are still to come."""
    adapters = Adapters.find(model)
    return adapters is not None and adapters.record.awaits_base


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


def _with_numbers(model: nn.Module) -> nn.Module:
    """Parameters of the same shapes on the CPU that take no memory and read as NaN."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.full((), float("nan")).to(parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model
