"""Weights stored in few bits: recognised without importing the library that packed them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import ConfigError


def bits(weight: Tensor | None) -> int | None:
    """How many bits a packed weight has per number, or None for a plain one (bitsandbytes, torchao).

    >>> import torch
    >>> bits(torch.zeros(2)), bits(None)
    (None, None)
    """
    if getattr(weight, "quant_state", None) is not None:
        return 4  # also where pickling left a plain Parameter
    kind = type(weight)
    if kind is Tensor or kind is nn.Parameter:  # before any work on strings, which torch.compile cannot trace
        return 8 if weight.is_floating_point() and weight.dtype.itemsize == 1 else None
    home = kind.__module__.partition(".")[0]
    if home == "bitsandbytes":
        return 4 if kind.__name__ == "Params4bit" else 8
    if home == "torchao":  # IntxUnpackedToInt8Tensor names its bits in target_dtype, the others in the class
        return 4 if "4" in str(getattr(weight, "target_dtype", kind.__name__.replace("To4d", ""))) else 8
    return None


def packed(module: nn.Module) -> int | None:
    """Bits of the packed weights a module holds itself, or None if all are plain."""
    return next((b for p in module.parameters(recurse=False) if (b := bits(p)) is not None), None)


def plain(weight: Tensor) -> Tensor:
    """The values of a packed weight as a plain tensor; a plain one as it is."""
    if bits(weight) is None:
        return weight
    if hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    state = getattr(weight, "quant_state", None)
    if state is None and weight.dtype.itemsize == 1:
        raise ConfigError(
            "The scales of this 8-bit weight are kept apart from it, so its values cannot be read: DoRA and the starts"
            " pissa and olora need a base in 4 bits or floats. Use LoRA(init='kaiming') here."
        )
    if state is None:  # not packed yet: bitsandbytes does so on the way to the device
        return weight.data
    from bitsandbytes.functional import dequantize_4bit

    data = weight.data
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    return dequantize_4bit(data, state)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The usual layout: with AVX-512 bitsandbytes rearranges weights for the CPU at the first pass in eval mode."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)  # the way back writes into it, and rounds the scales if they were nested
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return data, state
