"""What stands in the place of an adapted module: the untouched base, and beside it what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import MergeError, PEFTError
from lightning_peft.quantized import packed
from lightning_peft.sharding import gathered, sharded, write

_NARROW = (torch.float16, torch.bfloat16)


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


class Adapted(nn.Module):
    """A module with an adapter: ``base`` is the untouched original, ``delta`` holds what trains.

    Attributes the wrapper lacks (``weight``, ``in_features``, …) are those of the base, so code that looks inside
    keeps working. ``active`` is False while the adapter is switched off or merged.
    """

    active: bool

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__()
        self.base, self.delta = base, delta
        self.active = True
        #: base parameters replaced by merged ones (outside parameters()); copies of those that are split over processes
        self.originals: dict[str, nn.Parameter] = {}
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base and add the correction; each method defines it."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def merged(self) -> dict[str, Tensor]:
        """Base parameters with the adapter folded in, by their name in ``base``; float32 or wider.

        Raises:
            MergeError: the method cannot be folded into weights.
        """
        raise MergeError(f"{type(self).__name__} cannot be merged into weights.")

    def obstacle(self) -> str | None:
        """Why the base cannot take merged tensors, or None."""
        width = packed(self.base)
        if width is None:
            return None
        return (
            f"the base weights are stored in {width} bits, and rounding the sum to {width} bits again would change what"
            " was trained."
        )

    def merge(self) -> None:
        """Swap the merged tensors in; the originals are kept, so that `unmerge` restores the very same objects."""
        if reason := self.obstacle():
            raise MergeError(f"Cannot merge: {reason}")
        with torch.no_grad(), gathered(self.modules(), keep=False):
            tensors = self.merged()
        for name, tensor in tensors.items():
            if name not in dict(self.base.named_parameters()):
                raise MergeError(
                    f"{type(self.base).__name__}.{name} is computed at each call (weight_norm, spectral_norm or another"
                    " parametrization), so nothing can be merged into it. Remove the parametrization before injection."
                )
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise MergeError(f"The merged {name!r} holds NaN or infinity: the adapter or the base diverged.")
        for name, tensor in tensors.items():
            old = self.base.get_parameter(name)
            if sharded(old):  # FSDP gathers from the parameter it knows
                self.originals[name] = nn.Parameter(old.detach().clone(), requires_grad=False)
                write(old, tensor.to(old.dtype))
                continue
            self.originals[name] = old
            self._put(name, nn.Parameter(tensor.to(old.dtype), requires_grad=False))
        self.active = False

    def unmerge(self) -> None:
        """Put the original base parameters back."""
        for name, old in self.originals.items():
            now = self.base.get_parameter(name)
            if sharded(now):
                write(now, old)
                continue
            if old.device != now.device:
                old.data = old.data.to(now.device)
            self._put(name, old)
        self.originals = {}
        self.active = True

    def _put(self, name: str, value: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.base.get_submodule(owner)._parameters[leaf] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # `lm_head.weight = embedding.weight` (tying after injection) must reach the base
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name in base._parameters:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if self.originals:
            self.unmerge()
        for key in [k for k in state_dict if k.startswith(prefix)]:
            if key[len(prefix) :].split(".", 1)[0] not in self._modules:  # a plain checkpoint of the base fits as well
                state_dict[f"{prefix}base.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of adapter tensors beside ``weight``: float64 stays, everything else gives float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer from ``nx`` to ``nf`` features, weight (nx, nf)."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and hasattr(module, "nx") and hasattr(module, "nf")
