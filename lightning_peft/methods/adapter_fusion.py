"""AdapterFusion: a learned attention over several trained adapters (Pfeiffer et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.bottleneck.placement import AdapterMethod, base_modules
from lightning_peft.errors import CheckpointError, ConfigError, NoMatchError, PEFTError
from lightning_peft.fingerprint import difference, fingerprint
from lightning_peft.method import Method, registry
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.saving.section import SavedMethod, Section, some
from lightning_peft.untrusted import short


class Fusion(Delta):
    """``Σ_i p_i W_v u_i`` with ``u_i`` the correction of adapter i and ``p = softmax_i(W_q v · W_k u_i)``.

    Args:
        like: a tensor of the base, for dtype and device.
        adapters: the frozen corrections by name.
        size_in, size: features of what the adapters read and of what they give.
        generator: for the start of query and key, normal with σ = 0.02; the value starts as the identity.
    """

    def __init__(
        self, like: Tensor, adapters: dict[str, Delta], size_in: int, size: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(adapters).requires_grad_(False)
        options = {"dtype": factor_dtype(like), "device": like.device}
        self.query_weight = nn.Parameter(torch.zeros(size, size_in, **options))
        self.query_bias = nn.Parameter(torch.zeros(size, **options))
        self.key_weight = nn.Parameter(torch.zeros(size, size, **options))
        self.key_bias = nn.Parameter(torch.zeros(size, **options))
        self.value_weight = nn.Parameter(torch.zeros(size, size, **options))
        self.record: list[Tensor] | None = None
        if not like.is_meta:
            for weight in (self.query_weight, self.key_weight):
                weight.data.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.02)
            self.value_weight.data.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, v: Tensor) -> Tensor:
        """v: (…, size_in) -> (…, size), in the dtype of the factors (or of autocast)."""
        given = torch.stack([adapter(v) for adapter in self.adapters.values()], dim=-2)  # (…, adapters, size)
        query = F.linear(v.to(self.query_weight.dtype), self.query_weight, self.query_bias)
        key = F.linear(given, self.key_weight, self.key_bias)
        weights = torch.softmax((key @ query.unsqueeze(-1)).squeeze(-1), dim=-1)
        if self.record is not None:
            self.record.append(weights.detach())
        mixed = (weights.to(given.dtype).unsqueeze(-2) @ given).squeeze(-2)
        return F.linear(mixed, self.value_weight)  # the value is linear: one product after the sum instead of one each

    def distance(self) -> Tensor:
        """``‖I − W_v‖²``."""
        return (torch.eye(len(self.value_weight)).to(self.value_weight) - self.value_weight).square().sum()


@dataclass(frozen=True)
class AdapterFusion(AdapterMethod):
    """Mix trained adapters of one kind by an attention that is learned at each of their places.

    The adapters are frozen and stand in their own places; what each would add, without the residual, is weighted by
    how well it fits what they read. Trains ``2(d² + d) + d²`` numbers a place. The loss gets
    ``regularization · Σ ‖I − W_v‖²``. The frozen adapters are saved with the fusion: its file needs no other. Heads
    that were trained with the adapters are left behind; the new task brings its own.

    Args:
        adapters: name -> file written by `save_adapter`, folder with one, or checkpoint, of one bottleneck method with
            equal settings and places.
        regularization: weight of the penalty that keeps the value matrices near the identity.
        modules_to_save: further modules, trained and saved in full (heads).
        init_seed: seed of the start values.
        adapter: the adapters' own method; read from the files, and given only where a saved fusion is rebuilt.

    Raises:
        ConfigError: no adapters are named, or they differ in method or places.
        CheckpointError: a file is missing, broken, or made for another base.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import AdapterFusion, Houlsby, inject, save_adapter, summarize, unload
    >>> net, folder = nn.Sequential(nn.Linear(8, 8)), tempfile.mkdtemp()
    >>> files = {name: os.path.join(folder, f"{name}.safetensors") for name in ("news", "mail")}
    >>> for path in files.values():
    ...     inject(net, Houlsby(target_modules="0")); save_adapter(net, path); unload(net)
    >>> inject(net, AdapterFusion(files)); summarize(net)["trainable"]
    208
    """

    paper: ClassVar[str] = (
        "AdapterFusion: Non-Destructive Task Composition for Transfer Learning, Pfeiffer et al. 2020, arXiv:2005.00247"
    )
    identity_at_init: ClassVar[bool] = False
    reference_lr: ClassVar[float] = 5e-5
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = "AdapterFusion, arXiv:2005.00247, section 4.2: fusion at 5e-5"
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"adapters", "regularization"}

    adapters: dict[str, str]
    regularization: float = 0.01
    modules_to_save: str | list[str] | None = None
    init_seed: int = 0
    adapter: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise ConfigError(
                f"AdapterFusion(adapters={self.adapters!r}): name two or more, as {{name: path of a file}}."
            )
        bad = [n for n in self.adapters if not n or "." in n]
        if bad:
            raise ConfigError(f"AdapterFusion: an adapter's name is part of tensor names, so {bad[0]!r} cannot serve.")

    @property
    def inner(self) -> AdapterMethod:
        """The method of the adapters: what a saved fusion says, or else the first file."""
        if self.adapter is not None:
            return _method(SavedMethod(self.adapter["type"], self.adapter["config"], []), "AdapterFusion")
        if "_inner" not in self.__dict__:  # kept, because the files may be gone when the fusion is saved
            path = next(iter(self.adapters.values()))
            object.__setattr__(self, "_inner", _method(_read(path).section.methods[0], path))
        return self.__dict__["_inner"]

    @property
    def reads(self) -> str:  # type: ignore[override]
        """What the adapters read."""
        return self.inner.reads

    def config(self) -> dict[str, Any]:
        """The fields as plain values; after injection with the adapters' own method."""
        known = self.adapter is None and "_inner" in self.__dict__
        return super().config() | ({"adapter": _entry(self.inner)} if known else {})

    @classmethod
    def rebuilt(cls, config: Mapping[str, Any]) -> Method:
        """From a file of a fusion, which describes the adapters itself: no other file is opened on its behalf."""
        if config.get("adapter") is None:
            raise ConfigError("it does not say what its adapters are.")
        return cls(**config)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The places of the adapters, in which the files must agree."""
        names: list[str] = []
        for title, path in self.adapters.items():
            section, where = _read(path).section, f"AdapterFusion: {title!r} ({path})"
            method = _method(section.methods[0], where)
            if _entry(method) != _entry(self.inner):
                raise ConfigError(f"{where} was trained with {_entry(method)}, the first with {_entry(self.inner)}.")
            places = section.targets
            if names and set(places) != set(names):
                raise ConfigError(f"{where} stands in other places than the first: {some(set(places) ^ set(names))}.")
            names = names or places
            _check_base(model, section, where)
        modules = base_modules(model)
        lost = [n for n in names if n not in modules]
        if lost:
            raise NoMatchError(
                f"AdapterFusion: {type(model).__name__} has no {lost[0]!r}, where the adapters stand. Use the model"
                " they were trained in."
            )
        return {n: modules[n] for n in names}

    def delta(self, like: Tensor, size_in: int, size_out: int, name: str) -> Fusion:
        """The fusion at one place, with one adapter of each name."""
        adapters = {title: self.inner.delta(like, size_in, size_out, name) for title in self.adapters}
        return Fusion(like, adapters, size_in, size_out, self.generator(name))

    def share(self, deltas: Mapping[str, Delta]) -> None:
        """Fill in the adapters: from their files, or with NaN where a saved fusion will bring all values."""
        for title, path in self.adapters.items():
            mine = {name: delta.adapters[title] for name, delta in deltas.items()}
            self.inner.share(mine)
            group = nn.ModuleList(mine.values()).requires_grad_(False)
            if self.adapter is None:
                _fill(mine, path, f"AdapterFusion: {title!r} ({path})")
            else:
                for parameter in group.parameters():
                    parameter.data.fill_(float("nan"))

    def regularizer(self, model: nn.Module) -> Tensor | None:
        """``regularization · Σ ‖I − W_v‖²`` over all places."""
        terms = [m.distance() for m in model.modules() if isinstance(m, Fusion)]
        return self.regularization * torch.stack([t.to(terms[0]) for t in terms]).sum() if terms else None

    def state_names(self, model: nn.Module) -> list[str]:
        """The frozen adapters."""
        held = {id(p) for m in model.modules() if isinstance(m, Fusion) for p in m.adapters.parameters()}
        return [n for n, p in model.named_parameters() if id(p) in held]


@contextmanager
def fusion_weights(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Read out how a fusion mixes: inside the block run batches, after it look into the dictionary.

    Returns:
        place -> adapter -> its weight, the mean over all positions seen (padding included). Each place adds up to 1.

    Raises:
        PEFTError: the model has no fusion.
    """
    places = {n.removesuffix(".delta"): m for n, m in model.named_modules() if isinstance(m, Fusion)}
    if not places:
        raise PEFTError(f"{type(model).__name__} has no AdapterFusion; inject(model, AdapterFusion({{...}})) first.")
    found: dict[str, dict[str, float]] = {}
    for fusion in places.values():
        fusion.record = []
    try:
        yield found
    finally:
        for name, fusion in places.items():
            seen, fusion.record = fusion.record, None
            if seen:
                mean = torch.cat([w.reshape(-1, w.shape[-1]) for w in seen]).mean(0).tolist()
                found[name] = dict(zip(fusion.adapters, mean, strict=True))


def _read(path: str) -> SavedAdapter:
    """A file that holds the adapters of one bottleneck method, and nothing else that would be in their way."""
    saved = SavedAdapter.read(path)
    section = saved.section
    kinds = [method.type for method in section.methods]
    kind = registry().get(kinds[0])
    if len(kinds) > 1 or kind is None or not issubclass(kind, AdapterMethod) or kind is AdapterFusion:
        raise ConfigError(f"AdapterFusion: {path} holds {' + '.join(kinds)}; it fuses single bottleneck adapters.")
    heads = tuple(f"{name}." for name in section.modules_to_save)
    for name in section.under("").trainable:
        in_head = bool(heads) and name.startswith(heads)
        if ".delta." not in f".{name}" and not in_head:
            raise ConfigError(
                f"AdapterFusion: {path} also changed {name!r} of the base itself, which cannot be mixed. Train the"
                " adapters with train_layer_norms=False."
            )
    return saved


def _method(saved: SavedMethod, where: str) -> AdapterMethod:
    """The method of a file as far as its tensors depend on it."""
    kind = registry()[saved.type]
    try:
        method = kind(**{k: v for k, v in saved.config.items() if k not in kind.free_fields})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its {saved.type} cannot be built: {short(error)}") from None
    assert isinstance(method, AdapterMethod)
    return method


def _entry(method: Method) -> dict[str, Any]:
    fields = {k: v for k, v in method.config().items() if k not in method.free_fields}
    return {"type": type(method).__name__, "config": fields}


def _check_base(model: nn.Module, section: Section, where: str) -> None:
    """Compare the base's values where its names and shapes are those of the file; another head makes them differ."""
    heads = tuple(f"{name}." for name in section.modules_to_save)
    skip = {id(p) for n, p in model.named_parameters() if heads and n.startswith(heads)}
    ours = fingerprint(model, skip)
    reason = difference(ours, section.base) if ours.structure == section.base.structure else None
    if reason:
        raise CheckpointError(f"{where} was trained on another base model: {reason}.")


def _fill(deltas: Mapping[str, Delta], path: str, where: str) -> None:
    """Copy the values of one file into its adapters; a tensor that all share stands in the file once."""
    saved = SavedAdapter.read(path).under("")
    unfilled = {id(p): f"{n}.delta.{leaf}" for n, d in deltas.items() for leaf, p in d.named_parameters()}
    for target, delta in deltas.items():
        for leaf, parameter in delta.named_parameters():
            name = f"{target}.delta.{leaf}"
            value = saved.tensors.get(name)
            if value is None:
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{where}: {name} is {tuple(value.shape)}, this model needs {tuple(parameter.shape)}."
                )
            if not value.is_floating_point():
                raise CheckpointError(f"{where}: {name} holds {value.dtype}, no numbers to compute with.")
            saved.check_finite([name])
            if not parameter.is_meta:
                parameter.data.copy_(value)
            unfilled.pop(id(parameter), None)
    if unfilled:
        raise CheckpointError(f"{where} lacks {min(unfilled.values())}.")
