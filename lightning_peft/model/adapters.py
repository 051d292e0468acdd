"""`Adapters`: what injection left in a network, and every answer about it.

What trains, what a file must hold, which layers are adapted, whether they are merged or switched off: the optimizer,
checkpoints, the summary and the callbacks all ask here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, Delta, check_releasable, merge_layer, unmerge_layer
from lightning_peft.errors import PEFTError
from lightning_peft.match import is_metric
from lightning_peft.method import Method
from lightning_peft.readers import RootReader, close_to_readers
from lightning_peft.samples import Samples
from lightning_peft.saving.section import Fingerprint
from lightning_peft.sharding import named_parameters, reshard, sharded, unwrapped, write

#: the attribute of a network that holds its `Injection`
MARK = "_lightning_peft"


@dataclass
class Injection:
    """The record of one injection, kept on the network: plain data that pickles and deep-copies with the model.

    All names are relative to the network. `Adapters` answers questions about it.

    Attributes:
        methods: in the order in which they were given.
        targets: for each method, the names of the modules it adapts.
        modules_to_save: modules trained and saved in full, new heads included.
        new_modules: those of them that ``from_pretrained`` did not fill.
        base: fingerprint of what stays frozen.
        trained, frozen: names of all parameters after injection.
        start_values: base parameters that train, as they were at injection.
        start_buffers: buffers of the network, as they were at injection.
        samples: of the frozen weights of the base, as they were at injection.
        moved: names of those frozen weights that a loaded file has brought with it.
        outside_buffers: the same for buffers beside the network, by their names in the LightningModule.
        required_grad: whether each parameter required gradients before injection.
        summary, shapes: counts, and shapes by full name, from before a strategy flattened the parameters.
        root_reader: opens windows around the network's own forward (see `readers`).
        awaits_base: injected on the meta device: the values of the base, and its fingerprint, are to come.
        merged: whether the adapters are folded into the base weights.
        disabled: depth of `Adapters.disabled` contexts.
    """

    methods: list[Method]
    targets: list[list[str]]
    modules_to_save: list[str]
    new_modules: list[str]
    base: Fingerprint
    trained: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    start_values: dict[str, Tensor] = field(default_factory=dict)
    start_buffers: dict[str, Tensor] = field(default_factory=dict)
    samples: Samples = field(default_factory=lambda: Samples({}))
    moved: set[str] = field(default_factory=set)
    outside_buffers: dict[str, Tensor] = field(default_factory=dict)
    required_grad: dict[str, bool] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    root_reader: RootReader = field(default_factory=lambda: RootReader(()))
    awaits_base: bool = False
    merged: bool = False
    disabled: int = 0


class Adapters:
    """The adapters in a model, seen from that model: all names are those of ``model.named_parameters()``.

    An object of this class is a short-lived view. Lists of names are made once and kept until `inject`, a load or
    `replace_method` changes them through the same object; ask `Adapters.of` again after anything else.

    Attributes:
        model: the module that was asked about: the network, or one that contains it.
        network: the module that was injected.
        path: of the network in the model, with a dot at its end; empty if they are the same.
        record: what injection noted down, by names relative to the network.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2))})
    >>> inject(module["net"], LoRA(r=1))
    >>> Adapters.of(module).trainable, Adapters.of(module).path
    (['net.0.delta.lora_A', 'net.0.delta.lora_B'], 'net.')
    """

    def __init__(self, model: nn.Module, path: str, network: nn.Module) -> None:
        self.model, self.path, self.network = model, path, network
        self.record: Injection = network.__dict__[MARK]

    @classmethod
    def find(cls, model: nn.Module) -> Adapters | None:
        """The adapters in a model, or None."""
        for name, module in model.named_modules():
            if MARK in module.__dict__:
                return cls(model, unwrapped(name + ".") if name else "", module)
        return None

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """The adapters in a model.

        Raises:
            PEFTError: it has none.
        """
        found = cls.find(model)
        if found is None:
            raise PEFTError(
                f"{type(model).__name__} has no adapters. Call inject(model, method) or load_adapter(model, path)"
                " first, and pass the module they were called with, or one that contains it."
            )
        return found

    # ---- methods and layers ----------------------------------------------------------------------------------------
    @property
    def methods(self) -> list[Method]:
        """The methods in the order in which they were given."""
        return self.record.methods

    @property
    def complete(self) -> bool:
        """Whether the base itself changes (full fine-tuning), so that no copy of it is kept."""
        return is_complete(self.methods)

    def layers(self) -> Iterator[tuple[str, Adapted]]:
        """The adapted layers with their names in the network."""
        return adapted_modules(self.network)

    def modules_of(self, method: Method) -> list[nn.Module]:
        """The modules that one of the methods adapts."""
        names = self.record.targets[self.methods.index(method)]
        return [self.network.get_submodule(name) for name in names]

    def replace_method(self, old: Method, new: Method) -> None:
        """Put another method in the place of one, after it has exchanged the tensors in its layers."""
        self.methods[self.methods.index(old)] = new
        self.note_parameters()

    def note_parameters(self) -> None:
        """Write down which parameters train and which stay frozen, as they are now."""
        self.record.trained, self.record.frozen = [], []
        for name, parameter in self.network.named_parameters():
            (self.record.trained if parameter.requires_grad else self.record.frozen).append(name)
        self._forget()

    # ---- names -----------------------------------------------------------------------------------------------------
    @cached_property
    def trainable(self) -> list[str]:
        """Names of all parameters that train; see `trainable_names`."""
        trained = {self.path + name for name in self.record.trained}
        return [n for n, p in named_parameters(self.model) if n in trained or p.requires_grad]

    @cached_property
    def state(self) -> list[str]:
        """Names of frozen tensors and buffers that inference needs as well; see `state_names`."""
        record, buffers = self.record, persistent_buffers(self.network)
        names = set(self._declared)
        for name, start in record.start_buffers.items():
            in_saved_module = any(name.startswith(f"{module}.") for module in record.modules_to_save)
            if in_saved_module or (name in buffers and moved(start, buffers[name])):
                names.add(name)
        names |= self.moved_weights()
        tensors = dict(named_parameters(self.network)) | buffers
        found = [self.path + n for n in tensors if n in names and n not in record.trained]
        # statistics of the LightningModule itself, beside its network
        beside = persistent_buffers(self.model) if record.outside_buffers else {}
        for name, start in record.outside_buffers.items():
            if name in beside and moved(start, beside[name]):
                found.append(name)
        return found

    @cached_property
    def names(self) -> list[str]:
        """``trainable`` and ``state``: what a checkpoint holds."""
        return list(dict.fromkeys(self.trainable + self.state))

    @cached_property
    def required(self) -> list[str]:
        """What a file must hold: `names` without the statistics, which travel only when they moved."""
        return list(dict.fromkeys(self.trainable + [self.path + name for name in self._declared]))

    @cached_property
    def _declared(self) -> list[str]:
        """Names in the network of what the methods say that inference needs."""
        return [unwrapped(name) for method in self.methods for name in method.state_names(self.network)]

    def base_weights(self) -> dict[str, Tensor]:
        """The parameters that stay frozen and are no part of an adapter, by name in the network."""
        added, parameters = adapter_tensors(self.network), model_tensors(self.network)
        trained = set(self.record.trained)
        weights = {}
        for name in self.record.required_grad:
            if name in parameters and name not in trained and id(parameters[name]) not in added:
                weights[name] = parameters[name]
        return weights

    def moved_weights(self) -> set[str]:
        """Names in the network of frozen weights that have other values than at injection.

        The module has moved them itself, or a file has brought them.
        """
        if self.record.summary is not None:  # flattened by a strategy: each process holds pieces
            return self.record.moved
        return self.record.moved | set(self.record.samples.moved(self.base_weights()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors called `names`."""
        tensors = model_tensors(self.model)
        return {name: tensors[name] for name in self.names}

    def _forget(self) -> None:
        """Make the lists of names anew when they are next asked for."""
        for name in ("trainable", "state", "names", "required", "_declared"):
            self.__dict__.pop(name, None)

    # ---- on and off ------------------------------------------------------------------------------------------------
    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base as it was before injection; see `lightning_peft.disabled`."""
        record, network = self.record, self.network
        self.refuse_complete("disabled")
        self.refuse_flat("disabled")
        if record.disabled:
            record.disabled += 1
            try:
                yield
            finally:
                record.disabled -= 1
            return
        record.disabled = 1
        was_merged = record.merged
        self.switch(merged=False)
        reshard(network)
        swapped = self._swap_in_start_values()
        layers = [(layer, layer._adapter.active) for _, layer in self.layers()]
        for layer, _ in layers:
            layer._adapter.switch(layer, False)
        record.root_reader.switch(network, False)
        try:
            yield
        finally:
            for layer, was_active in layers:
                layer._adapter.switch(layer, was_active)
            record.root_reader.switch(network, True)
            if any(sharded(tensor) for tensor, _ in swapped):
                reshard(network)
            for tensor, value in swapped:
                _set(tensor, value)
            self.switch(merged=was_merged)
            record.disabled = 0

    def switch(self, *, merged: bool) -> None:
        """Bring all adapted layers into the merged or the unmerged state."""
        if self.record.merged == merged:
            return
        reshard(self.network)
        change, undo = (merge_layer, unmerge_layer) if merged else (unmerge_layer, merge_layer)
        changed: list[Adapted] = []
        try:
            for _, layer in list(self.layers()):
                change(layer)
                changed.append(layer)
        except PEFTError:
            for layer in changed:
                undo(layer)
            raise
        self.record.root_reader.switch(self.network, not merged)
        self.record.merged = merged

    def _swap_in_start_values(self) -> list[tuple[Tensor, Tensor]]:
        """Point changed base tensors at their values from before injection; returns what to put back."""
        tensors = dict(self.network.named_parameters()) | persistent_buffers(self.network)
        swapped = []
        for name, start in (self.record.start_values | self.record.start_buffers).items():
            if name in tensors:
                tensor = tensors[name]
                swapped.append((tensor, tensor.detach().clone() if sharded(tensor) else tensor.data))
                # a copy, because a forward may write statistics into it
                _set(tensor, start.to(tensor.device, tensor.dtype, copy=True))
        return swapped

    def settle_flags(self) -> None:
        """Let require gradients what trains and nothing else, as at injection (after ``freeze`` or ``unfreeze``)."""
        trained, frozen = set(self.record.trained), set(self.record.frozen)
        for name, parameter in named_parameters(self.network):
            if name in trained or name in frozen:
                parameter.requires_grad_(name in trained)

    def frozen_statistics(self) -> list[nn.Module]:
        """Normalisation layers with running statistics that do not train; in train mode these would drift."""
        if self.complete:
            return []
        saved = [self.network.get_submodule(name) for name in self.record.modules_to_save]
        training = {id(part) for module in saved for part in module.modules()}
        found = []
        for module in self.network.modules():
            trains = id(module) in training or any(p.requires_grad for p in module.parameters(recurse=False))
            if getattr(module, "running_mean", None) is not None and not trains and not is_metric(module):
                found.append(module)
        return found

    # ---- values in, adapters out -----------------------------------------------------------------------------------
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy values in by name, after all names and shapes were compared. Unmerges; other statistics start afresh."""
        self.refuse_flat("load_adapter")
        self.make_way(values)
        tensors = model_tensors(self.model)
        for name, value in values.items():
            write(tensors[name], value)

    def make_way(self, names: Collection[str], *, whole: bool = False) -> None:
        """Unmerge, and set statistics that are not to be loaded back to their start: they had not moved then.

        Args:
            names: of what is to be loaded. Frozen weights among them had moved.
            whole: they are those of a whole model, of which nothing had to move.
        """
        self.refuse_disabled("load")
        reshard(self.network)
        self.switch(merged=False)
        names_in_network = {name.removeprefix(self.path) for name in names}
        self.reset_buffers(keep=names_in_network)
        if not whole:
            self.record.moved = names_in_network.intersection(self.base_weights())

    def reset_buffers(self, keep: Collection[str] = ()) -> None:
        """Set the network's buffers back to their values at injection, but for those in ``keep``."""
        buffers = persistent_buffers(self.network)
        with torch.no_grad():
            for name, start in self.record.start_buffers.items():
                if name in buffers and name not in keep and not start.is_meta:
                    buffers[name].copy_(start)
        self._forget()

    def reset(self) -> None:
        """Set everything of the base that changed back to its values at injection."""
        self.switch(merged=False)
        reshard(self.network)
        parameters = dict(self.network.named_parameters())
        for name, start in self.record.start_values.items():
            write(parameters[name], start)
        self.reset_buffers()

    def remove(self) -> None:
        """Take adapters and record out of the network; base values stay as they are."""
        record, network = self.record, self.network
        close_to_readers(network, record.root_reader)
        for method, names in zip(reversed(record.methods), reversed(record.targets), strict=True):
            method.detach(network, names)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(record.required_grad.get(name, parameter.requires_grad))
        del network.__dict__[MARK]

    # ---- what cannot be done now -----------------------------------------------------------------------------------
    def check_removable(self) -> None:
        """Raise a `PEFTError` if adapters cannot be taken out of their layers."""
        for name, layer in self.layers():
            check_releasable(layer, name)

    def refuse_complete(self, verb: str) -> None:
        """Raise if the base itself was trained."""
        if self.complete:
            raise PEFTError(
                f"{verb}: full fine-tuning changes the base itself and keeps no copy of it. Build the model again"
                " instead."
            )

    def refuse_disabled(self, verb: str) -> None:
        """Raise inside `disabled`, where tensors are those of the base: not the time to save, load or merge."""
        if self.record.disabled:
            raise PEFTError(f"{verb} inside `with disabled(model)`: the adapters are switched off. Do it outside.")

    def refuse_flat(self, verb: str) -> None:
        """Raise if a strategy has flattened the parameters: each process then holds pieces."""
        if self.record.summary is not None:
            raise PEFTError(
                f"{verb}: FSDP or DeepSpeed flattened the parameters of this model, and each process holds pieces. Save"
                " with trainer.save_checkpoint(path), and load that into a model built anew."
            )


# ---- the same questions as functions -------------------------------------------------------------------------------
def trainable_names(model: nn.Module) -> list[str]:
    """Names of all parameters that train, in the order of ``named_parameters``.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> inject(net, LoRA(target_modules="0", modules_to_save="1"))
    >>> trainable_names(net)
    ['0.delta.lora_A', '0.delta.lora_B', '1.weight', '1.bias']
    """
    return Adapters.of(model).trainable


def state_names(model: nn.Module) -> list[str]:
    """Frozen tensors and buffers that inference needs beside the trained ones; empty for plain LoRA.

    That is what the method declares, the buffers of modules trained in full, statistics that moved since injection,
    the buffers a LightningModule keeps beside its network, and frozen weights that the module has moved itself.
    """
    return Adapters.of(model).state


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
    with Adapters.of(model).disabled():
        yield


# ---- about any model -----------------------------------------------------------------------------------------------
def network_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The network inside a LightningModule, with its path: the only child that has parameters, else the module itself.

    Files name tensors relative to it, so an adapter trained in one LightningModule fits another, or the bare network.
    """
    path, module = "", model
    packages = [sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    kinds = tuple(kind for p in packages if (kind := getattr(p, "LightningModule", None)) is not None)
    if isinstance(model, kinds):
        parts = [(n, m) for n, m in model.named_children() if not is_metric(m) and any(True for _ in m.parameters())]
        # a single layer is itself the network's only part, and has no names
        if len(parts) == 1 and not model._parameters and list(parts[0][1].children()):
            path, module = parts[0][0] + ".", parts[0][1]
    if type(module).__name__ == "OptimizedModule":  # torch.compile(net) as a submodule
        path, module = path + "_orig_mod.", module.get_submodule("_orig_mod")
    return path, module


def is_complete(methods: list[Method]) -> bool:
    """Whether one of the methods changes the base itself."""
    return any(method.complete for method in methods)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """All adapted modules with their names."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Adapted) and "delta" in m._modules)


def adapter_tensors(model: nn.Module) -> set[int]:
    """``id`` of every parameter and buffer that adapters brought with them."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, Delta):
            found |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return found


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; of merged layers those of the base, which will be there again."""
    tensors = dict(named_parameters(model)) | {unwrapped(n): b for n, b in model.named_buffers()}
    for name, layer in adapted_modules(model):
        for own_name, original in layer._adapter.originals.items():
            tensors[f"{unwrapped(name)}.{own_name}" if name else own_name] = original
    return tensors


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a state dict."""
    buffers, seen = {}, set()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[unwrapped(f"{path}.{name}") if path else name] = buffer
    return buffers


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def moved(start: Tensor, now: Tensor) -> bool:
    """Whether a tensor differs from its earlier value."""
    if start.is_meta or now.is_meta:
        return False
    return start.shape != now.shape or not torch.equal(start, now.detach().to(start.device, start.dtype))


def _set(tensor: Tensor, value: Tensor) -> None:
    if sharded(tensor):
        write(tensor, value)
    else:
        tensor.data = value
