"""BitFit: train the biases (Ben Zaken et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.errors import NoMatchError
from lightning_peft.match import as_patterns, bias_names, excluded, layer_index, matcher
from lightning_peft.method import Method


@dataclass(frozen=True)
class BitFit(Method):
    """Train the biases that the model has, and nothing else.

    Args:
        exclude_modules: patterns of modules whose biases stay frozen.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: only biases of the layers with these numbers.

    Raises:
        NoMatchError: at injection, if the model has no biases (Llama, T5).

    >>> from torch import nn
    >>> from lightning_peft import BitFit, inject, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> inject(net, BitFit())
    >>> trainable_names(net)
    ['0.bias', '1.bias']
    """

    paper: ClassVar[str] = "BitFit: Simple Parameter-efficient Fine-tuning, Ben Zaken et al. 2021, arXiv:2106.10199"
    reference_lr: ClassVar[float] = 2e-3
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = "arXiv:2106.10199, appendix A.2: 1e-4 to 1e-3 for base models; ours on MiniLM: 5e-3"

    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """Every bias, of the layers and modules asked for."""
        every = bias_names(model)
        banned = [matcher(p) for p in as_patterns(self.exclude_modules)]
        owners = {n: n.rpartition(".")[0] for n in every}
        found = [
            n
            for n, owner in owners.items()
            if not excluded(owner, "", banned) and (self.layers is None or layer_index(owner) in self.layers)
        ]
        if not found:
            why = (
                f"all {len(every)} were dropped by exclude_modules={self.exclude_modules!r} and layers={self.layers!r}."
                if every
                else "Architectures such as Llama and T5 have none; use LoRA or IA3 there."
            )
            raise NoMatchError(f"BitFit: {type(model).__name__} has no bias to train. {why}")
        return found
