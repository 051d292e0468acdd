"""P-tuning v2: deep prompts for understanding tasks (Liu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.methods.prefix_tuning import PrefixTuning, part_of


@dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """Prompts in every layer of an encoder, as learned keys and values; the head reads the real [CLS].

    The sequence keeps its length, so pooler, classification, token and span heads see the tokens they always saw.
    Trains ``2·n·heads·width`` numbers per layer. Positions move on by n, as in the authors' code; encoders only.

    Args:
        num_virtual_tokens: length n of the prompt in each layer.
        projection, hidden_size, positions, encoder, decoder, cross, init_std: see `PrefixTuning`.
        target_modules, exclude_modules, modules_to_save, layers, init_seed: see `PrefixTuning`.

    Raises:
        ConfigError: the model is a decoder.

    >>> from torch import nn
    >>> from lightning_peft import PTuningV2, inject, summarize
    >>> net = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> inject(net, PTuningV2(num_virtual_tokens=3, positions="keep"))
    >>> summarize(net)["trainable"]
    48
    """

    paper: ClassVar[str] = (
        "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks,"
        " Liu et al. 2021, arXiv:2110.07602"
    )
    encoders_only: ClassVar[bool] = True
    lr_source: ClassVar[str] = "as PrefixTuning; the authors' scripts (github.com/THUDM/P-tuning-v2): 5e-3 to 1e-2"

    positions: Literal["keep", "shift"] = "shift"

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The attentions of an encoder."""
        found = super().targets(model, prefix)
        for name, module in found.items():
            if getattr(module, "is_causal", False) or part_of(name) in ("decoder", "cross"):
                raise ConfigError(
                    f"PTuningV2 is for encoders; {name!r} in {type(model).__name__} belongs to a decoder."
                    " PrefixTuning does the same there: use PrefixTuning(positions='shift')."
                )
        return found
