"""Delta-LoRA: the pretrained weight follows the change of the low-rank product (Zi et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.method import check_number
from lightning_peft.methods.lora import LoRA

#: K of the paper's runs
LATEST_START = 500


class DeltaFactors(LowRank):
    """`LowRank` with the product of an earlier step, ``snapshot_A`` and ``snapshot_B``, and the factor ``follow``.

    The updates ``λ·s·(B_{t+1}·A_{t+1} - B_t·A_t)`` telescope, so the weight never has to be written: it is
    ``W_0 + λ·s·(B·A - snapshot)`` at all times, with the difference detached. ``follow`` is 0 before the snapshot, λ
    after it; it is a buffer, for a number cannot be split over processes as parameters are.
    """

    follow: Tensor

    def build(self, place: Place, r: int) -> None:
        """Make the tensors."""
        super().build(place, r)
        self.snapshot_A = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
        self.snapshot_B = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)
        self.register_buffer("follow", self.lora_A.detach().new_zeros(()))
        #: whether the program knows that the weight follows; reading ``follow`` would wait for the device
        self.known_to_follow = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the trained product, of its detached copy in the weight, and of the snapshot."""
        A, B = super().factors()
        if self.parts is None:
            old_B = self.snapshot_B
            new_A, new_B = self.lora_A.detach(), self.lora_B.detach()
        else:
            old_B, new_A, new_B = self.spread(self.snapshot_B), self.lora_A.detach(), self.spread(self.lora_B.detach())
        gain = self.follow * self.scaling
        return (
            torch.cat([A, new_A, self.snapshot_A], self.stacked),
            torch.cat([B, new_B * gain, old_B * -gain], self.stacked + 1),
        )

    @classmethod
    def saved(cls, tensors: Mapping[str, Tensor], scaling: float, stacked: int) -> tuple[Tensor, Tensor]:
        """As `factors`, from the tensors in a file."""
        A, B = super().saved(tensors, scaling, stacked)
        gain = tensors["follow"] * scaling
        new, old = ([tensors[f"{x}_{m}"].flatten(stacked + 1) for m in "AB"] for x in ("lora", "snapshot"))
        return torch.cat([A, new[0], old[0]], -2), torch.cat([B, new[1] * gain, old[1] * -gain], -1)

    def take_snapshot(self, update_ratio: float) -> None:
        """From now on the weight follows. One that follows already (a loaded adapter) keeps its earlier snapshot."""
        with torch.no_grad():
            follows = self.follow != 0
            self.snapshot_A.copy_(torch.where(follows, self.snapshot_A, self.lora_A))
            self.snapshot_B.copy_(torch.where(follows, self.snapshot_B, self.lora_B))
            self.follow.copy_(torch.where(follows, self.follow, update_ratio))
        self.known_to_follow = True

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.known_to_follow = False


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    """LoRA whose frozen weight follows: after ``start_step`` each step adds ``λ·s·(B_{t+1}A_{t+1} - B_tA_t)`` to W.

    W itself is never written: the updates sum to ``λ·s·(B_tA_t - B_{K+1}A_{K+1})``, so one earlier pair of factors
    beside the trained ones says all. Checkpoints stay small, `disabled` and `unload` give back the base bit for bit.
    Steps count from 1, W changes for the first time in step ``start_step + 2`` (the paper counts from 0 and tests
    ``t > K``). Trains as many numbers as `LoRA` and takes its arguments, but no dropout. Continuing from a saved
    adapter in which W follows already goes on without a new start.

    Args:
        update_ratio: λ.
        start_step: K, the steps before W starts to follow. None: a quarter of the run, at most 500 steps (the paper's).

    Raises:
        ConfigError: dropout, which the paper rules out in the low-rank branch.

    >>> from torch import nn
    >>> from lightning_peft import DeltaLoRA, inject, state_names
    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> inject(net, DeltaLoRA(r=2))
    >>> state_names(net)
    ['0.delta.snapshot_A', '0.delta.snapshot_B', '0.delta.follow']
    """

    paper: ClassVar[str] = (
        "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, Zi et al. 2023,"
        " arXiv:2309.02411"
    )
    lr_source: ClassVar[str] = "as LoRA, whose settings the paper keeps (arXiv:2309.02411, section 4)"
    factors: ClassVar[type[LowRank]] = DeltaFactors
    free_fields: ClassVar[frozenset[str]] = LoRA.free_fields | {"start_step"}

    update_ratio: float = 2.0
    start_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_step is not None:
            check_number("DeltaLoRA", "start_step", self.start_step, 0)
        if self.dropout:
            raise ConfigError(
                f"DeltaLoRA(dropout={self.dropout!r}): the weight follows the product, which is not defined under"
                " dropout; leave it at 0."
            )

    def state_names(self, model: nn.Module) -> list[str]:
        """The snapshots, whether they are followed, and what `LoRA` keeps."""
        follows = [f"{name}.follow" for name, module in model.named_modules() if isinstance(module, DeltaFactors)]
        return super().state_names(model) + follows

    def start(self, total_steps: int | None) -> int:
        """K in a run of so many steps."""
        if self.start_step is not None:
            return self.start_step
        return LATEST_START if total_steps is None else min(LATEST_START, total_steps // 4)

    def after_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
        """Take the snapshot once, after step ``start_step + 1``."""
        start = self.start(total_steps)
        if step == 1 and total_steps is not None and total_steps <= start + 1:
            warnings.warn(
                f"DeltaLoRA(start_step={start}) trains as plain LoRA in this run of {total_steps} steps:"
                " the weight would follow from a later step on. Lower start_step.",
                stacklevel=2,
            )
        for delta in (m for m in model.modules() if isinstance(m, DeltaFactors)):
            if step <= start:
                delta.known_to_follow = False  # another run with this model: ask again when its time comes
            elif not delta.known_to_follow:
                delta.take_snapshot(self.update_ratio)
