"""What a fine-tuning method is: the contract `Method`, and how every family stands on it.

========================================  ============================================================================
family                                    parts it uses
========================================  ============================================================================
LoRA and relatives                        ``adapt(linear)``; ``Adapted.merged`` gives the new base tensors
bottleneck adapters                       ``adapt(sub-layer)``: the module whose output is h (dropout, LayerNorm, block)
parallel adapters                         ``adapt`` the sub-layer's output; ``attach`` lets it listen to the input
prefixes inside attention                 ``adapt(attention)``: its keys and values get longer while its forward runs
virtual tokens                            ``adapt(embedding)`` in place of placeholders; `connect` puts hooks on the
                                          backbone, in which the sequence is longer
weights that follow the product           ``after_step`` takes the snapshot, ``state_names`` saves it
state shared by modules                   ``connect`` registers one ``Delta`` in all: ``named_parameters`` names it once
loss terms                                ``regularizer``: the callback adds its gradient to those of the loss
gradient transforms                       ``transform_grads``, called on unscaled gradients before clipping
looks at a batch                          ``before_transfer``, while the batch is on the CPU
optimizer groups                          ``param_groups``
full fine-tuning, BitFit                  ``thaw`` names the base parameters that train; nothing is adapted
========================================  ============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, is_conv1d, release
from lightning_peft.errors import ConfigError
from lightning_peft.heads import head_names
from lightning_peft.match import aliases, candidates, select


class Method(ABC):
    """A way to fine-tune. Subclasses are frozen dataclasses: their fields are the configuration (and the YAML).

    A method must define `adapt` (or `thaw`); everything else has a default. The optional parts are plain functions of
    the model, driven by the ``PEFT`` callback and usable without Lightning.
    """

    #: the source: title, authors, arXiv number
    paper: ClassVar[str] = ""
    #: whether `merge` can fold it into the base weights
    mergeable: ClassVar[bool] = True
    why_not_mergeable: ClassVar[str] = ""
    #: the best learning rate in a run of 1,000 steps on a model of width 2,000, from which `suggest_lr` derives the
    #: default; the power of the width with which it falls (0, ½ or 1); and where they come from
    reference_lr: ClassVar[float] = 4e-4
    lr_width_exponent: ClassVar[float] = 0.5
    lr_source: ClassVar[str] = ""
    #: whether the adapted model gives the base's output right after injection
    identity_at_init: ClassVar[bool] = True
    #: whether it refuses decoders
    encoders_only: ClassVar[bool] = False
    #: whether it changes the base itself, so that no copy of it is kept
    complete: ClassVar[bool] = False
    #: fields in which a saved adapter may differ from the one it is loaded into (targets are compared by resolved name)
    free_fields: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "exclude_modules", "modules_to_save", "layers", "dropout", "init_seed"}
    )

    # ---- where -----------------------------------------------------------------------------------------------------
    def adapts(self, module: nn.Module) -> bool:
        """Whether `adapt` can take this module (its type)."""
        return False

    def is_linear(self, module: nn.Module) -> bool:
        """Whether the word ``all-linear`` means this module."""
        return isinstance(module, nn.Linear) or is_conv1d(module)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The modules to adapt, by full name. Default: ``target_modules`` minus ``exclude_modules``, in ``layers``."""
        patterns = getattr(self, "target_modules", None)
        if patterns is None:
            return {}
        modules = candidates(model)
        if not modules and any(True for _ in model.parameters()):
            kind = type(model).__name__
            if any(isinstance(module, Adapted) for module in model.modules()):
                raise ConfigError(
                    f"The layers of {kind} are adapted already, as parts of another network. Call unload(...) on that"
                    " one first, or give this one layers of its own (copy.deepcopy)."
                )
            raise ConfigError(
                f"{kind} is itself a layer: adapters are named by their place inside a module, and here there is none"
                f" around it. Use nn.Sequential({kind}(...)), or give the module that holds it."
            )
        return select(
            modules,
            patterns,
            self.adapts,
            self.is_linear,
            exclude=getattr(self, "exclude_modules", None),
            layers=getattr(self, "layers", None),
            heads=head_names(model),
            prefix=prefix,
            method=type(self).__name__,
            other_names=aliases(model),
        )

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """Names of base parameters that train as they are (full fine-tuning, biases). Default: none."""
        return []

    # ---- what ------------------------------------------------------------------------------------------------------
    def adapt(self, module: nn.Module, name: str) -> None:
        """Adapt one module in place, with `lightning_peft.adapted.adapt`.

        Args:
            module: it stays the same object.
            name: its path, which also seeds its random numbers.
        """
        raise TypeError(f"{type(self).__name__} defines no adapt")

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """Link the adapted modules: shared tensors, inputs from elsewhere."""

    def attach(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
        """Put the method into the model, in place."""
        for name, module in targets.items():
            self.adapt(module, name)
        self.connect(model, targets)

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the method out again: the modules get their own classes back."""
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, Adapted):
                release(module)

    # ---- optional parts, driven by the callback ---------------------------------------------------------------------
    def regularizer(self, model: nn.Module) -> Tensor | None:
        """A term to add to the loss, or None."""
        return None

    def lr_factors(self) -> dict[str, float]:
        """What the settings of this method do to its best learning rate: factors, by the text that explains them."""
        return {}

    def param_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups over everything that trains. Default: decay for matrices, none for vectors."""
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]

    def transform_grads(self, model: nn.Module) -> None:
        """Change gradients before the optimizer step; they are unscaled and not yet clipped."""

    def after_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
        """Called after optimizer step number ``step`` (from 1); gradients of that step are still there."""

    def before_transfer(self, model: nn.Module, batch: Any) -> Any:
        """Look at a batch before it goes to the device, where looking would mean waiting; see `after_transfer`."""

    def after_transfer(self, model: nn.Module, batch: Any, seen: Any) -> None:
        """Called with the same batch on the device and with what `before_transfer` gave."""

    def state_names(self, model: nn.Module) -> list[str]:
        """Frozen tensors and buffers that inference needs beside the trained ones."""
        return []

    def resume_state(self, model: nn.Module) -> dict[str, Any]:
        """What only a resume needs: primitives and tensors."""
        return {}

    def load_resume_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take back what `resume_state` gave."""

    def load_options(self) -> dict[str, Any]:
        """Arguments for ``from_pretrained`` that the base must be loaded with (a quantisation): plain values."""
        return {}

    # ---- identity --------------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON and for ``weights_only`` checkpoints."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def rebuilt(cls, config: Mapping[str, Any]) -> Method:
        """The method that a saved `config` describes."""
        return cls(**config)

    def generator(self, name: str) -> torch.Generator:
        """A seeded generator for the module called ``name``: the same for every set of targets and every rank."""
        seed = f"{getattr(self, 'init_seed', 0)}:{name}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed).digest()[:7], "big"))


def registry() -> dict[str, type[Method]]:
    """Every method by its class name: ours, and subclasses of `Method` that the user's code has defined."""
    found: dict[str, type[Method]] = {}
    waiting = list(Method.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        ours = kind.__module__.startswith("lightning_peft.")
        if dataclasses.is_dataclass(kind) and (ours or kind.__name__ not in found):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))


def brief(method: Method) -> str:
    """A method with the fields that differ from their defaults.

    >>> from lightning_peft import LoRA
    >>> brief(LoRA(r=4))
    'LoRA(r=4)'
    """
    given = [f for f in dataclasses.fields(method) if getattr(method, f.name) != _default(f)]  # type: ignore[arg-type]
    return f"{type(method).__name__}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in given)})"


def check_number(owner: str, field: str, value: float, low: float, *, high: float | None = None) -> None:
    """Raise a `ConfigError` unless ``low <= value (<= high)``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{owner}({field}={value!r}): {field} must be a number, not {type(value).__name__}.")
    if not math.isfinite(value):
        raise ConfigError(f"{owner}({field}={value!r}): {field} must be finite.")
    if not low <= value or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{owner}({field}={value!r}): {field} must be {bound}.")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value
