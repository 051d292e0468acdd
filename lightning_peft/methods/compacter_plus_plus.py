"""Compacter++: Compacter with one adapter a layer (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.methods.compacter import Compacter


@dataclass(frozen=True)
class CompacterPlusPlus(Compacter):
    """`Compacter` in the places of `Pfeiffer`: behind the feed-forward part only, so half the adapters.

    Trains ``2k(d + B) + B + d`` numbers a layer and ``n³`` once; the arguments are those of `Compacter`.

    >>> from torch import nn
    >>> from lightning_peft import CompacterPlusPlus, inject, summarize
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    >>> inject(net, CompacterPlusPlus()); summarize(net)["trainable"]
    100
    """

    roles: ClassVar[tuple[str, ...]] = ("mlp",)
    reads: ClassVar[str] = "sum"
