"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.method import Method
from lightning_peft.model.adapters import persistent_buffers


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter that is not frozen already; the baseline the other methods are measured by.

    Parameters that were frozen before injection (sinusoidal positions, for example) stay frozen.

    >>> from torch import nn
    >>> from lightning_peft import FullFineTuning, inject, trainable_names
    >>> net = nn.Linear(4, 2)
    >>> inject(net, FullFineTuning())
    >>> trainable_names(net)
    ['weight', 'bias']
    """

    paper: ClassVar[str] = "BERT: Pre-training of Deep Bidirectional Transformers, Devlin et al. 2018, arXiv:1810.04805"
    complete: ClassVar[bool] = True
    reference_lr: ClassVar[float] = 2.5e-5
    lr_width_exponent: ClassVar[float] = 1.0
    lr_source: ClassVar[str] = (
        "ours on MiniLM, 60 steps: 2.7e-4; BERT, arXiv:1810.04805, appendix A.3: 2e-5 to 5e-5; 1e-5 is usual at 7B;"
        " the exponent is that of μP, Yang et al. 2022, arXiv:2203.03466, for Adam"
    )

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """Everything that requires a gradient now."""
        return [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]

    def state_names(self, model: nn.Module) -> list[str]:
        """All that is not trained, so that the file is the complete model."""
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        return frozen + list(persistent_buffers(model))
