"""Adapter tensors to files and back, strict both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

import lightning_peft.methods  # noqa: F401  (defines the classes that files name)
from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, locate
from lightning_peft.guards import bounded
from lightning_peft.model.adapters import Adapters, network_of
from lightning_peft.model.injection import inject_at
from lightning_peft.saving.saved_adapter import SavedAdapter, Source, base_name, build_method, check_base, check_tensors
from lightning_peft.saving.section import Section, some
from lightning_peft.untrusted import short

#: bytes that an adapter may take whatever the size of the model
_ROOM = 2**28


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the adapter: exactly ``trainable_names + state_names``, detached.

    Of a sharded model all processes get whole tensors, and all must call this.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, adapter_state_dict, inject
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> {name: tuple(t.shape) for name, t in adapter_state_dict(net).items()}
    {'0.delta.lora_A': (2, 4), '0.delta.lora_B': (4, 2)}
    """
    return SavedAdapter.of(model).tensors


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter as one safetensors file with its description inside; through a temporary name, then renamed.

    >>> import tempfile, os
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, load_adapter, save_adapter
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> save_adapter(net, path); load_adapter(net, path)
    """
    SavedAdapter.of(model).write(locate(path))


def load_adapter(model: nn.Module, path: Source) -> None:
    """Load a saved adapter, strictly.

    A model without adapters is injected with what the file describes; one with the same method takes the new values;
    anything else is an error, and then the model is as it was.

    Args:
        model: a LightningModule or the network inside it.
        path: a safetensors file, a folder with one, a Lightning checkpoint, or a state dict as `adapter_state_dict`
            gives it.

    Raises:
        CheckpointError: another base, method, rank or set of tensors, a plain checkpoint, a broken or newer file.
    """
    if isinstance(path, Mapping) and SECTION not in path:
        _load_tensors(model, path)
    else:
        load_saved(model, SavedAdapter.read(path))


def load_saved(model: nn.Module, saved: SavedAdapter) -> None:
    """As `load_adapter`, from what was read already."""
    present = Adapters.find(model)
    adapters = present or inject_saved(model, saved.section)
    try:
        adapters.load(saved.fitted(adapters))
    except Exception:
        if present is None:
            adapters.remove()
        raise


def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """From a state dict that says nothing of itself, into a model that has the adapters already."""
    adapters = Adapters.find(model)
    if adapters is None:
        raise CheckpointError(f"The state dict holds no {SECTION!r} section, so it cannot say how to adapt the model.")
    check_tensors(adapters, tensors, "the state dict")
    adapters.load(tensors)


def inject_saved(model: nn.Module, section: Section, *, values: bool = True) -> Adapters:
    """Inject the methods a file describes at the modules it names; ``values`` of the base must be the file's.

    Raises:
        CheckpointError: they do not fit the model, or its base is another one; then the model is as it was.
    """
    methods = [build_method(method, section.where) for method in section.methods]
    _, network = network_of(model)
    modules = dict(network.named_modules(remove_duplicate=False))
    lost = [name for name in section.targets + section.modules_to_save if name not in modules]
    if lost:
        raise CheckpointError(
            f"{section.where} adapts modules that {type(network).__name__} lacks: {some(lost)}. It was made for"
            f" {base_name(section.base)}; load it into that model."
        )
    targets = [{name: modules[name] for name in method.targets} for method in section.methods]
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    try:
        with bounded(4 * size + _ROOM):
            adapters = inject_at(model, methods, targets, section.modules_to_save, section.new_modules)
    except Exception as error:  # a file may name sizes and modules that no method was written for
        what = type(network).__name__
        raise CheckpointError(f"{section.where}: its methods do not fit {what}: {short(error)}") from error
    try:
        check_base(section, adapters, values=values)
    except CheckpointError:
        adapters.remove()
        raise
    return adapters
