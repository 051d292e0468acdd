"""How bottleneck adapters find their places in a model: by role, or behind modules the user names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta, adapt
from lightning_peft.bottleneck.layers import (
    NON_LINEARITIES,
    AfterOutput,
    AroundNorm,
    Beside,
    BottleneckState,
    OnSum,
    ReadingInput,
    WithBottleneck,
    input_features,
    output_features,
)
from lightning_peft.bottleneck.sites import ROLES, Site, find_sites, unknown
from lightning_peft.errors import ConfigError, NoMatchError, PEFTError
from lightning_peft.heads import head_names
from lightning_peft.match import as_patterns, candidates, excluded, is_metric, layer_index, matcher, select
from lightning_peft.method import Method, check_number
from lightning_peft.torch_encoder import keep_open, restore


class AdapterMethod(Method):
    """Base of the bottleneck adapters: a subclass says for which roles, where, and what its correction is.

    Without ``target_modules`` an adapter goes to each sub-layer of the class's roles; the words ``attention`` and
    ``mlp`` choose roles, or modules of that name in a model whose layers are not known; any other pattern puts one at
    each module it matches. A module where a known sub-layer ends is treated as published however it was chosen, so that
    placement follows from the name alone (a file holds names).
    """

    mergeable: ClassVar[bool] = False
    why_not_mergeable: ClassVar[str] = "between its two projections stands a non-linearity, which no weight can hold."
    #: the sub-layers that get an adapter
    roles: ClassVar[tuple[str, ...]] = ROLES
    #: what the adapter reads: the sub-layer's "output" h, the "sum" h + x, or the "input" x
    reads: ClassVar[str] = "output"

    @abstractmethod
    def delta(self, like: Tensor, size_in: int, size_out: int, name: str) -> Delta:
        """The correction for one place, with its start values; ``like`` gives dtype and device."""

    def share(self, deltas: Mapping[str, Delta]) -> None:
        """Link the corrections of one model (by target name), before they are in it. Default: nothing is shared."""

    # ---- where -----------------------------------------------------------------------------------------------------
    def adapts(self, module: nn.Module) -> bool:
        """Modules whose output (for parallel adapters also input) has a known number of features."""
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":  # nn.MultiheadAttention never calls its out_proj
            return False
        known = output_features(module) is not None
        return known and (self.reads != "input" or input_features(module) is not None)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The modules to adapt, by full name.

        Raises:
            NoMatchError: the layers of the model are unknown, or a pattern matches nothing.
        """
        words, patterns = self._asked()
        chosen: dict[str, nn.Module] = {}
        if words:
            sites = self._sites(model, words)
            chosen = {name: model.get_submodule(name) for name in sites}
            if getattr(self, "target_modules", None) is not None:
                roles = {site.role for site in sites.values()}
                chosen |= self._called(model, [word for word in words if word not in roles])
            if not chosen:
                raise unknown(type(self).__name__, model)
            chosen = self._filtered(chosen, prefix)
        if patterns:
            chosen |= select(
                candidates(model),
                patterns,
                self.adapts,
                self.is_linear,
                exclude=getattr(self, "exclude_modules", None),
                layers=getattr(self, "layers", None),
                heads=head_names(model),
                prefix=prefix,
                method=type(self).__name__,
            )
        return chosen

    def _asked(self) -> tuple[tuple[str, ...], list[str]]:
        """Roles and patterns in ``target_modules``."""
        asked = as_patterns(getattr(self, "target_modules", None))
        if not asked:
            return self.roles, []
        words = tuple(word for word in asked if word in ROLES)
        return words, [pattern for pattern in asked if pattern not in ROLES]

    def _sites(self, model: nn.Module, words: tuple[str, ...]) -> dict[str, Site]:
        """Name of the module to adapt -> its place."""
        sites = {}
        for site in find_sites(base_modules(model)):
            if site.role in words:
                # In a post-norm layer the sum h + x exists only as the input of the normalisation.
                name = site.norm if site.post and self.reads == "sum" else site.output
                sites[name] = site
        return sites

    def _called(self, model: nn.Module, words: list[str]) -> dict[str, nn.Module]:
        """Modules whose own name is one of these words: in layers that no table knows, that is what the word means."""
        called = {}
        for name, module in candidates(model).items():
            if name.rpartition(".")[2] in words and self.adapts(module):
                called[name] = module
        return called

    def _filtered(self, chosen: dict[str, nn.Module], prefix: str) -> dict[str, nn.Module]:
        """Those of the chosen modules that ``exclude_modules`` and ``layers`` leave.

        Raises:
            NoMatchError: none are left.
        """
        exclude, layers = getattr(self, "exclude_modules", None), getattr(self, "layers", None)
        is_banned = [matcher(pattern) for pattern in as_patterns(exclude)]
        left = {}
        numbers = set()
        for name, module in chosen.items():
            number = layer_index(name)
            if number is not None:
                numbers.add(number)
            if (layers is None or number in layers) and not excluded(name, prefix, is_banned):
                left[name] = module
        if not left:
            raise NoMatchError(
                f"{type(self).__name__}: exclude_modules={exclude!r} and layers={layers!r} leave none of the"
                f" {len(chosen)} places, for example {next(iter(chosen))!r}; layers here: {sorted(numbers)}."
            )
        return left

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """The normalisations beside the adapters, if ``train_layer_norms`` asks for them."""
        if not getattr(self, "train_layer_norms", False):
            return []
        sites = self._sites(model, ROLES)
        # Two sub-layers may share a normalisation.
        norms = dict.fromkeys(sites[target].norm for target in targets if target in sites)
        names = []
        for norm in norms:
            for name, _ in model.get_submodule(norm).named_parameters():
                names.append(f"{norm}.{name}")
        return names

    # ---- what ------------------------------------------------------------------------------------------------------
    def adapt(self, module: nn.Module, name: str) -> None:
        """Put an adapter behind (or, parallel, beside) any module."""
        features = output_features(module)
        if features is None:
            raise ConfigError(f"{type(self).__name__}: the number of features that {name!r} gives cannot be read off.")
        size, channel = features
        like = _any_tensor(module)
        if self.reads == "input":
            delta = self.delta(like, input_features(module) or size, size, name)
            adapt(module, Beside, delta, BottleneckState(), name)
        else:
            # A module that the user named belongs to no known sub-layer, so there is no sum to read: h + delta(h).
            adapt(module, AfterOutput, self.delta(like, size, size, name), BottleneckState(channel), name)

    def attach(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
        """Adapt each target, and let the adapters that read a layer's input listen to it."""
        sites = self._sites(model, ROLES)
        for name, module in targets.items():
            if name in sites:
                self._adapt_site(model, sites[name], name)
            else:
                self.adapt(module, name)
        self.share({name: module.get_submodule("delta") for name, module in targets.items()})
        for name, layer in targets.items():
            if isinstance(layer, ReadingInput) and name in sites and sites[name].source != name:
                layer._adapter.listen(layer, model.get_submodule(sites[name].source))
        keep_open(model, targets.values())

    def _adapt_site(self, model: nn.Module, site: Site, name: str) -> None:
        """Put an adapter where a known sub-layer ends."""
        module, norm = model.get_submodule(name), model.get_submodule(site.norm)
        # A normalisation without a weight (elementwise_affine=False) still knows its width.
        weight: Any = getattr(norm, "weight", None)
        normalized_shape: Any = getattr(norm, "normalized_shape", None)
        size = normalized_shape[-1] if weight is None else len(weight)
        if self.reads == "output":
            kind = AfterOutput
        elif self.reads == "input":
            kind = Beside
        else:
            kind = AroundNorm if site.post else OnSum
        delta = self.delta(_any_tensor(norm, module), size, size, name)
        adapt(module, kind, delta, BottleneckState(), name)

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the adapters out and stop listening."""
        super().detach(model, names)
        restore(model)

    def check_fields(self) -> None:
        """Raise a `ConfigError` for a value that cannot work."""
        name, known = type(self).__name__, NON_LINEARITIES
        check_number(name, "reduction_factor", self.reduction_factor, 1)
        check_number(name, "dropout", self.dropout, 0.0, high=1.0)
        if self.non_linearity not in known:
            raise ConfigError(f"{name}(non_linearity={self.non_linearity!r}): choose one of {', '.join(known)}.")

    def width(self, size: int) -> int:
        """Features in the middle of an adapter for ``size`` features."""
        return max(1, int(size // self.reduction_factor))


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its name (the root is ``""``), without adapters and without torchmetrics."""
    modules: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        modules[name] = module
        for key, child in module.named_children():
            if not is_metric(child) and not isinstance(child, Delta):
                visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return modules


def drop_layers(model: nn.Module, layers: int | Collection[int]) -> None:
    """Switch off the bottleneck adapters of some layers, and on those of all others (AdapterDrop).

    The adapters of those layers cost nothing until they are switched on again by ``drop_layers(model, 0)``. In an
    encoder-decoder both stacks count from 0. Adapters outside numbered layers stay on.

    Args:
        model: with bottleneck adapters.
        layers: how many layers to drop, counted from the first; or the numbers of those to drop.

    Raises:
        PEFTError: the model has no bottleneck adapters.

    >>> from torch import nn
    >>> from lightning_peft import Houlsby, drop_layers, inject
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    >>> inject(net, Houlsby()); drop_layers(net, 1)
    >>> [layer._adapter.active for layer, _ in adapter_layers(net)]
    [False, False, True, True]
    """
    dropped = range(layers) if isinstance(layers, int) else frozenset(layers)
    for adapted, number in adapter_layers(model):
        adapted._adapter.switch(adapted, number not in dropped)


def adapter_layers(model: nn.Module) -> list[tuple[WithBottleneck, int | None]]:
    """The bottleneck adapters in a model with the numbers of their layers.

    Raises:
        PEFTError: there are none.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, WithBottleneck):
            layers.append((module, layer_index(name)))
    if not layers:
        raise PEFTError(
            f"{type(model).__name__} has no bottleneck adapters whose layers could be dropped; inject Houlsby(),"
            " Pfeiffer(), ParallelAdapter(), Compacter() or AdapterFusion() first."
        )
    return layers


def _any_tensor(*modules: nn.Module) -> Tensor:
    """The first parameter of these modules, for dtype and device; torch's defaults for modules without any."""
    for module in modules:
        for parameter in module.parameters():
            return parameter
    return torch.empty(())
