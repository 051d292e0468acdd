"""`SavedAdapter`: an adapter as a file holds it, checked when it is read and compared with a model in one place."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CheckpointError
from lightning_peft.fields import settle
from lightning_peft.files import read, split, write_adapter
from lightning_peft.fingerprint import difference
from lightning_peft.heads import label_names, listed_labels
from lightning_peft.method import Method, registry
from lightning_peft.model.adapters import Adapters, model_tensors
from lightning_peft.saving.section import Fingerprint, SavedMethod, Section, some
from lightning_peft.sharding import reshard, whole
from lightning_peft.untrusted import short

#: the ways a file can be given
Source = str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class SavedAdapter:
    """Tensors and section of a file. What the file says was checked by itself; `fitted` compares it with a model.

    Attributes:
        section: what the file says of itself.
        tensors: by name; with ``save="full"`` the base's as well.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> inject(net, LoRA(r=1))
    >>> saved = SavedAdapter.of(net)
    >>> list(saved.under("model.").tensors), saved.methods[0].r
    (['model.0.delta.lora_A', 'model.0.delta.lora_B'], 1)
    """

    section: Section
    tensors: dict[str, Tensor]

    # ---- made, read, written ---------------------------------------------------------------------------------------
    @classmethod
    def read(cls, source: Source) -> SavedAdapter:
        """From a file, a folder with one, a Lightning checkpoint (a file or shards), or what one of them holds.

        Raises:
            CheckpointError: missing (then also a FileNotFoundError), broken, unsafe, or not written by us.
        """
        if isinstance(source, Mapping):
            return cls.from_checkpoint(source, "the state dict")
        tensors, info = read(source)
        return cls._checked(tensors, info, str(source), hollow=False)

    @classmethod
    def from_checkpoint(cls, content: Any, where: str, *, hollow: bool = False) -> SavedAdapter:
        """From a loaded Lightning checkpoint.

        Args:
            content: the checkpoint.
            where: its name, for messages.
            hollow: its tensors stand for shapes alone, on the meta device.

        Raises:
            CheckpointError: damaged, or not written by us.
        """
        tensors, info = split(content, where)
        return cls._checked(tensors, info, where, hollow)

    @classmethod
    def _checked(cls, tensors: Mapping[str, Tensor], info: Any, where: str, hollow: bool) -> SavedAdapter:
        section = Section.parse(info, where)
        saved = cls(section, _without_aliases(tensors, section))
        saved._check_keys(hollow)
        saved.check_finite(set(section.trainable).intersection(section.keys))
        return saved

    @classmethod
    def of(cls, model: nn.Module) -> SavedAdapter:
        """The adapter in a model, to be written. Of a sharded model all processes get whole tensors, and all call this.

        Raises:
            PEFTError: inside `disabled`, or a strategy has flattened the parameters.
        """
        adapters = Adapters.of(model)
        adapters.refuse_disabled("save")
        adapters.refuse_flat("adapter_state_dict")
        reshard(model)
        tensors = {name: whole(tensor.detach()) for name, tensor in adapters.tensors().items()}
        return cls(section_of(adapters), tensors)

    def write(self, path: Path) -> None:
        """As one safetensors file."""
        write_adapter(path, self.tensors, self.section.as_dict())

    # ---- parts -----------------------------------------------------------------------------------------------------
    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.section.where

    @cached_property
    def methods(self) -> list[Method]:
        """The methods that the file describes.

        Raises:
            CheckpointError: one is unknown or cannot be built.
        """
        return [build_method(method, self.where) for method in self.section.methods]

    def under(self, path: str) -> SavedAdapter:
        """The same adapter with its network at another path; an empty one gives names relative to the network."""
        tensors = {self.section.name_under(path, name): tensor for name, tensor in self.tensors.items()}
        return SavedAdapter(self.section.under(path), tensors)

    def without_base(self) -> SavedAdapter:
        """The adapter alone, of a file that may hold the base and a part for resuming as well."""
        return SavedAdapter(self.section.without_base(), {name: self.tensors[name] for name in self.section.keys})

    # ---- checks of the file itself ---------------------------------------------------------------------------------
    def _check_keys(self, hollow: bool) -> None:
        """Raise unless the file holds the tensors that its section lists, and no others."""
        keys = set(self.section.keys)
        missing, extra = keys - set(self.tensors), set(self.tensors) - keys
        if missing or (extra and not self.section.full):
            raise CheckpointError(_misfit(self.where, missing, extra))
        odd = [name for name in self.section.keys if not _is_plain(self.tensors[name], hollow)]
        if odd:
            kind = type(self.tensors[odd[0]]).__name__
            raise CheckpointError(f"{self.where}: {some(odd)} should be plain tensors and are {kind}.")

    def check_finite(self, names: Collection[str]) -> None:
        """Raise if one of these tensors holds something that is no number."""
        _check_finite({name: self.tensors[name] for name in names}, self.where)

    # ---- comparison with a model -----------------------------------------------------------------------------------
    def fitted(self, adapters: Adapters) -> dict[str, Tensor]:
        """The adapter's tensors under the names they have in a model, after all comparisons.

        Raises:
            CheckpointError: another method, other targets, another base, or tensors of other names, shapes or types.
        """
        self.check(adapters)
        tensors = self._renamed(adapters, self.section.keys)
        check_tensors(adapters, tensors, self.where)
        return tensors

    def fitted_whole(self, adapters: Adapters) -> dict[str, Tensor]:
        """As `fitted`, for a file with ``save="full"`` of which everything is to be loaded: it brings its own base."""
        self.check(adapters, values=False)
        tensors = self._renamed(adapters, self.tensors)
        taken = {*adapters.names, *adapters.required}
        check_tensors(adapters, {n: t for n, t in tensors.items() if n in taken}, self.where)
        lost = [n for n, _ in adapters.network.named_parameters() if adapters.path + n not in tensors]
        if lost:
            raise CheckpointError(f"{self.where} should hold the whole model (save='full'), but lacks {some(lost)}.")
        # From now on this base is what the adapter stands beside: its statistics are where training started.
        record = adapters.record
        record.base = self.section.base
        moved = set(self.section.under("").keys)
        for name in record.start_buffers:
            if name not in moved and adapters.path + name in tensors:
                record.start_buffers[name] = tensors[adapters.path + name].detach().clone()
        base = set(adapters.base_weights())
        record.samples.update({name: tensors[adapters.path + name] for name in base - moved})
        record.moved = base & moved
        return tensors

    def _renamed(self, adapters: Adapters, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors under the names they have in a model.

        What a LightningModule kept beside its network is left out where this model has nothing of that name.
        """
        known = model_tensors(adapters.model)
        tensors = {}
        for name in names:
            if name.startswith(self.section.network) or name in known:
                tensors[self.section.name_under(adapters.path, name)] = self.tensors[name]
        return tensors

    def check(self, adapters: Adapters, *, values: bool = True) -> None:
        """Compare what the file says of methods, targets and base with a model; ``values``: those of the base too.

        Raises:
            CheckpointError: they differ.
        """
        present, saved = adapters.methods, self.methods
        if [type(m) for m in present] != [type(m) for m in saved]:
            names = [" + ".join(type(m).__name__ for m in methods) for methods in (saved, present)]
            raise CheckpointError(
                f"{self.where} was trained with {names[0]}, the model has {names[1]}. Inject the method of the file,"
                " or load it into a model without adapters."
            )
        for method, other, targets, entry in zip(
            present, saved, adapters.record.targets, self.section.methods, strict=True
        ):
            _check_config(method, other, self.where)
            different = set(targets) ^ set(entry.targets)
            if different:
                raise CheckpointError(
                    f"{self.where}: it adapts {len(entry.targets)} modules, the model has {len(targets)} adapted; they"
                    f" differ in {some(different)}. Use the same target_modules."
                )
        here, there = adapters.record.modules_to_save, self.section.modules_to_save
        if set(here) != set(there):
            raise CheckpointError(
                f"{self.where} trains {some(there) or 'nothing'} in full, the model {some(here) or 'nothing'}. Use the"
                " same modules_to_save."
            )
        check_base(self.section, adapters, values=values)


# ---- describing a model --------------------------------------------------------------------------------------------
def section_of(adapters: Adapters) -> Section:
    """The description that travels with the tensors of a model's adapters."""
    from lightning_peft import __version__

    record = adapters.record
    methods = []
    for method, targets in zip(record.methods, record.targets, strict=True):
        methods.append(SavedMethod(type(method).__name__, method.config(), list(targets)))
    return Section(
        where="the adapter",
        network=adapters.path,
        methods=methods,
        modules_to_save=list(record.modules_to_save),
        new_modules=list(record.new_modules),
        keys=adapters.names,
        trainable=adapters.trainable,
        base=record.base,
        labels=label_names(adapters.network),
        library_version=__version__,
        versions={"torch": str(torch.__version__)},
    )


# ---- single checks -------------------------------------------------------------------------------------------------
def build_method(saved: SavedMethod, where: str) -> Method:
    """Build a method that a file describes; names resolve through the registry, nothing is imported.

    Raises:
        CheckpointError: unknown, or its fields do not build it.
    """
    kinds = registry()
    kind = kinds.get(saved.type)
    if kind is None:
        raise CheckpointError(
            f"{where} uses the method {short(saved.type)!r}, unknown here. Known: {', '.join(kinds)}."
        )
    try:
        method = kind.rebuilt(saved.config)
        settle(method)
        return method
    except Exception as error:  # values of any type and size
        raise CheckpointError(f"{where}: its {saved.type} cannot be built: {short(error)}") from error


def check_base(section: Section, adapters: Adapters, *, values: bool = True) -> None:
    """Raise if an adapter was trained beside another base than that of a model.

    The values of weights that the file brings with it do not matter: the module had moved them.
    """
    saved, named = section.labels, label_names(adapters.network)
    if saved is not None and named is not None and len(saved) != len(named):  # the head has another shape
        raise CheckpointError(
            f"{section.where} has {listed_labels(saved)}, the model {listed_labels(named)}. Give the model the labels"
            " of the file, or train anew."
        )
    record = adapters.record
    brought = set(section.under("").keys)
    frozen = sorted(set(record.required_grad) - set(record.trained))
    but_for = [number for number, name in enumerate(frozen) if name in brought]
    reason = difference(record.base, section.base, values=values, but_for=but_for)
    if reason:
        ours, theirs = record.base, section.base
        raise CheckpointError(
            f"{section.where} was trained on another base model (fingerprint {theirs.values[:8]}, here"
            f" {ours.values[:8]}): {reason}. Load it into {base_name(theirs)}."
        )


def base_name(base: Fingerprint) -> str:
    """The class of a base and, if it is known, where it came from."""
    return f"{base.class_name} from {base.source}" if base.source else base.class_name


def check_tensors(adapters: Adapters, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless names, shapes and types of tensors are those of the adapters in a model."""
    known = model_tensors(adapters.model)
    missing = [name for name in adapters.required if name not in tensors]
    # statistics and frozen weights travel only when they moved
    base_weights = {adapters.path + name for name in adapters.base_weights()}
    expected = {*adapters.required, *dict(adapters.model.named_buffers()), *base_weights}
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        raise CheckpointError(_misfit(where, missing, extra))
    wrong_shapes, wrong_types = [], []
    for name, tensor in tensors.items():
        if name not in known:
            continue
        ours = known[name]
        shape = adapters.record.shapes.get(name, ours.shape)
        if tensor.shape != shape:
            wrong_shapes.append(f"{name} {tuple(tensor.shape)} (here {tuple(shape)})")
        if tensor.dtype != ours.dtype and not (tensor.is_floating_point() and ours.is_floating_point()):
            wrong_types.append(f"{name} {tensor.dtype} (here {ours.dtype})")
    if wrong_shapes:
        raise CheckpointError(f"{where} has other shapes than the adapters in the model: {some(wrong_shapes)}.")
    if wrong_types:
        raise CheckpointError(f"{where} has tensors of another type than the model: {some(wrong_types)}.")
    _check_finite({name: tensors[name] for name in adapters.required}, where)
    moved = [adapters.path + name for name in adapters.moved_weights()]
    lost = [name for name in moved if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{where} was saved before {some(lost)} moved, which the module has moved since then, and there is no copy"
            " to put back. Build the model again, and load it there."
        )


def _check_config(method: Method, saved: Method, where: str) -> None:
    """Raise if two methods differ in a field that decides about tensors or their meaning."""
    ours, theirs = method.config(), saved.config()
    wrong = []
    for key, value in ours.items():
        if key not in method.free_fields and theirs.get(key) != value:
            wrong.append(f"{key}={short(repr(theirs.get(key)))} (here {value!r})")
    if wrong:
        raise CheckpointError(
            f"{where}: its {type(saved).__name__} differs from the one in the model: {', '.join(wrong)}. Use the"
            " file's settings."
        )


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    broken = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            broken.append(name)
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinite values in {some(broken)}: the training diverged, or the file is damaged."
            " Take an earlier checkpoint."
        )


def _misfit(where: str, missing: Collection[str], extra: Collection[str]) -> str:
    """What a file lacks, and what it has that the model does not know."""
    parts = []
    if missing:
        parts.append(f"it lacks {some(missing)}")
    if extra:
        parts.append(f"it has in excess {some(extra)}")
    return f"{where} does not fit the adapters in the model: {'; '.join(parts)}."


def _is_plain(value: Any, hollow: bool) -> bool:
    """Whether this is a tensor with as many bytes as it has elements; a view may declare any number of them."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or (value.is_meta and not hollow):
        return False
    ordinary = type(value) in (Tensor, nn.Parameter)
    return not ordinary or value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _without_aliases(tensors: Mapping[str, Tensor], section: Section) -> dict[str, Tensor]:
    """The tensors of a file, those that several modules share under the one name that its section lists.

    DeepSpeed's converter writes a shared tensor under each of its names; in the file they are one and the same storage.
    """
    if section.full:  # the names of everything, as the module itself gives them
        return dict(tensors)
    listed = set(section.keys)
    known = {_memory(tensors[name]) for name in listed if name in tensors}
    kept = {}
    for name, tensor in tensors.items():
        memory = _memory(tensor)
        if name in listed or memory is None or memory not in known:
            kept[name] = tensor
    return kept


def _memory(value: Any) -> tuple | None:
    """What a tensor shows of which memory; None if it has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or not value.numel():
        return None
    return value.data_ptr(), value.dtype, value.shape, value.stride()
