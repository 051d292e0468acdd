"""The default learning rate: what a method wants on a model of some width in a run of some length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_peft.adapted import is_conv1d
from lightning_peft.method import Method

#: the model and the run for which a method states its `reference_lr`
REFERENCE_WIDTH = 2000
REFERENCE_STEPS = 1000
#: the rate falls with this power of the number of steps, within these bounds of the factor
STEPS_EXPONENT = 0.25
STEPS_BOUNDS = (0.2, 2.0)
#: widths below are taken as this one
SMALLEST_WIDTH = 64


class Factor(NamedTuple):
    """One factor of a rate, and how it is written."""

    text: str
    value: float


@dataclass(frozen=True)
class SuggestedRate:
    """A learning rate and how it comes about; ``str()`` gives the derivation."""

    lr: float
    derivation: str

    def __str__(self) -> str:
        return self.derivation


def suggest_lr(model: nn.Module, method: Method | Sequence[Method], steps: float | None = None) -> SuggestedRate:
    """The default learning rate of a method, for AdamW with a short warm-up and linear decay.

    It is the method's `reference_lr` times

    * ``√(2000 / width)`` for methods that put small matrices beside the model's, the width being the median number of
      input features of its linear layers: μA, Chen et al. 2026, arXiv:2602.06204, corollary 4.4 (and the rates of 35
      language models in tinker-cookbook's sweep); ``2000 / width`` for full fine-tuning; nothing for vectors;
    * what the method's own settings do (`Method.lr_factors`: scaling and rank, start values);
    * ``(1000 / steps)^¼``, at most 2 and at least ⅕. Learning rates of LoRA fell by 3.1 over 79 times the steps in
      arXiv:2602.04998. The number of rows in a batch has no factor of its own: at a fixed number of rows seen, a
      larger batch means fewer steps.

    Measured (``tests/benchmarks/rates.py``, one seed, 60 steps): on MiniLM, width 384, the best rates of LoRA, full
    fine-tuning and Pfeiffer lie within a fifth of it; prefixes want more, and for IA3 and prompts only this rate was
    run. The power of the width for full fine-tuning was also tried on a ViT of width 64. Everything else stands on the
    sources that each method names. Not tried: longer runs, decoders, other batch sizes.

    Args:
        model: the network, or the module that holds it; with or without the method in it.
        method: one or several; of several the smallest rate counts.
        steps: optimizer steps of the run; None or infinite where the end is not known.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, suggest_lr
    >>> net = nn.Sequential(nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))
    >>> print(suggest_lr(net, LoRA(alpha=32), steps=1000))
    lr 8e-4 = 4e-4 × √(2000/500) for LoRA
    """
    methods = [method] if isinstance(method, Method) else list(method)
    return min((_suggest(model, one, steps) for one in methods), key=lambda rate: rate.lr)


def _suggest(model: nn.Module, method: Method, steps: float | None) -> SuggestedRate:
    factors = [Factor(short_rate(method.reference_lr), method.reference_lr)]
    factors += _width_factor(model, method.lr_width_exponent)
    factors += [Factor(text, value) for text, value in method.lr_factors().items()]
    factors += _steps_factor(steps)
    lr = float(f"{math.prod(factor.value for factor in factors):.1e}")
    product = " × ".join(factor.text for factor in factors)
    return SuggestedRate(lr, f"lr {short_rate(lr)} = {product} for {type(method).__name__}")


def _width_factor(model: nn.Module, exponent: float) -> list[Factor]:
    width = model_width(model)
    if width is None or not exponent:
        return []
    width = max(width, SMALLEST_WIDTH)
    root = {0.5: "√", 1.0: ""}[exponent]
    return [Factor(f"{root}({REFERENCE_WIDTH}/{width})", (REFERENCE_WIDTH / width) ** exponent)]


def _steps_factor(steps: float | None) -> list[Factor]:
    if steps is None or steps == math.inf or steps == REFERENCE_STEPS:
        return []
    steps = max(1, int(steps))
    value = (REFERENCE_STEPS / steps) ** STEPS_EXPONENT
    low, high = STEPS_BOUNDS
    if low <= value <= high:
        return [Factor(f"({REFERENCE_STEPS}/{steps})^¼", value)]
    bound = min(max(value, low), high)
    return [Factor(f"{bound:g} ({steps} steps)", bound)]


def model_width(model: nn.Module) -> int | None:
    """Median number of input features of a model's linear layers; None if it has none.

    >>> from torch import nn
    >>> model_width(nn.TransformerEncoderLayer(8, 2, dim_feedforward=32))
    8
    """
    widths = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            widths.append(module.embed_dim)
        elif is_conv1d(module):
            widths.append(module.weight.shape[0])
        elif isinstance(getattr(module, "in_features", None), int):  # nn.Linear, and what quantised layers call it too
            widths.append(module.in_features)
    return statistics.median_low(widths) if widths else None


def short_rate(value: float) -> str:
    """A rate as people write it.

    >>> short_rate(0.0002), short_rate(0.00063)
    ('2e-4', '6.3e-4')
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
