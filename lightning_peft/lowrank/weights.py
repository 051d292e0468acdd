"""Layers that correct their weights: their code computes with a weight in a way of its own, so nothing can be added to
an output. While their forward runs, the weight answers ``W + ΔW``, and whatever is computed from it is right."""

from __future__ import annotations

import weakref
from typing import Any

from lightning_peft.adapted import CorrectedWeights, base_class
from lightning_peft.lowrank.layers import LowRankLayer


class LowRankWeights(LowRankLayer, CorrectedWeights):
    """Low-rank corrections of the parameters of any layer that reads them in Python.

    Such are subclasses of layers of torch that have a forward of their own, linear layers of other libraries,
    `nn.MultiheadAttention`, recurrent cells, stacked expert weights.
    """


class LowRankRecurrent(LowRankWeights):
    """`nn.LSTM`, `nn.GRU`, `nn.RNN`: their forward reads a list of their weights, not the weights by name."""

    _flat_weights_names: list[str]

    def _readable_names(self) -> tuple[str, ...]:
        return ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the base."""
        if not self._adapter.active:
            return self._own_forward(*args, **kwargs)
        factors = self._factors()
        own = [getattr(self, name) for name in self._flat_weights_names]
        weights = list(own)
        for position, name in enumerate(self._flat_weights_names):
            if name in factors:
                weights[position] = self._corrected(name)
        # The list is exchanged in a stand-in that shares everything else: the layer's own is copied, moved and pickled
        # with it, and other threads may be using it.
        stand_in = object.__new__(type(self))
        references = [weakref.ref(weight) for weight in own]  # by which torch sees that the list is up to date
        stand_in.__dict__.update({**self.__dict__, "_flat_weights": weights, "_flat_weight_refs": references})
        return base_class(self).forward(stand_in, *args, **kwargs)
