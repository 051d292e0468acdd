"""Merge when training is over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_peft.callbacks.peft import PEFT
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.files import near
from lightning_peft.lightning_packages import Callback, rank_zero_info, rank_zero_warn
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters
from lightning_peft.model.merging import merge, obstacle, packed_obstacle
from lightning_peft.saving.checkpoint import load_adapter
from lightning_peft.saving.export import check_target, float_base, save_merged
from lightning_peft.trainer.best import best_path
from lightning_peft.trainer.strategies import loads_late, readable

if TYPE_CHECKING:
    import lightning.pytorch as L


class MergeOnFitEnd(Callback):
    """After ``fit``, load the chosen weights and fold the adapters into the base.

    The merge in memory is reversible: a later ``fit`` or a ``ckpt_path`` unmerges by itself, so nothing is applied
    twice. Nothing happens after an exception or an interrupted run.

    Args:
        which: ``best`` (of the `ModelCheckpoint` that monitors something; the last weights without one) or ``last``.
        dirpath: folder for the merged model, ready for ``from_pretrained`` if it is a transformers model.

    Raises:
        MergeError: ``dirpath`` is given and the method does not merge (raised before training).

    >>> from lightning_peft import LoRA, MergeOnFitEnd, PEFT
    >>> callbacks = [PEFT(LoRA()), MergeOnFitEnd("last")]
    """

    def __init__(self, which: Literal["best", "last"] = "best", dirpath: str | None = None) -> None:
        if which not in ("best", "last"):
            raise ConfigError(f"MergeOnFitEnd(which={which!r}): choose 'best' or 'last'.")
        self.which = which
        self.dirpath = dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say early what cannot work."""
        methods = _methods(trainer, pl_module)
        if stage == "fit" and methods is not None:
            self._check(methods)
            self._check_strategy(trainer)
            if self.dirpath and Path(self.dirpath).expanduser().is_file():
                raise ConfigError(f"MergeOnFitEnd(dirpath={self.dirpath!r}): that is a file; give a folder.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check methods that the module injected itself in ``configure_model``."""
        adapters = Adapters.find(pl_module)
        if adapters is None:
            raise MergeError("MergeOnFitEnd found no adapters. Add PEFT(LoRA(...)) to the Trainer's callbacks.")
        if self.dirpath:
            check_target(Path(self.dirpath).expanduser(), adapters.network)
        if self.dirpath and any(not m.mergeable for m in adapters.methods):
            self._check(adapters.methods)
        if reason := obstacle(pl_module):
            # better now than after hours of training
            if self.dirpath and packed_obstacle(pl_module):
                float_base(adapters.network, reason)
            elif self.dirpath:
                raise MergeError(f"MergeOnFitEnd(dirpath={self.dirpath!r}) cannot merge {reason}")
            rank_zero_warn(f"MergeOnFitEnd leaves the adapters beside the base: {reason}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load, merge, write."""
        self._restore(trainer, pl_module)
        if any(not m.mergeable for m in Adapters.of(pl_module).methods):
            return
        if obstacle(pl_module) is None:
            merge(pl_module)
        if self.dirpath and trainer.is_global_zero and not trainer.fast_dev_run:
            data = getattr(trainer, "datamodule", None)
            save_merged(pl_module, self.dirpath, getattr(data, "tokenizer", None))
            rank_zero_info(f"Merged model written to {near(self.dirpath)}.")

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.which == "last":
            return
        path = best_path(trainer)
        if path:
            load_adapter(pl_module, path)
            rank_zero_info(f"Best weights loaded from {near(path)}.")
        elif not trainer.fast_dev_run:
            monitored = [c.monitor for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
            why = (
                f"no checkpoint of the best {monitored[0]} was written"
                if monitored
                else "no checkpoint monitors a metric"
            )
            rank_zero_info(f"MergeOnFitEnd: {why}, so the last weights are used.")

    def _check_strategy(self, trainer: L.Trainer) -> None:
        split = loads_late(trainer) or not readable(trainer)
        if split and (self.dirpath or not readable(trainer)):
            what = "write the whole model" if self.dirpath else "merge"
            raise MergeError(
                f"MergeOnFitEnd cannot {what} under {type(trainer.strategy).__name__}: each process holds a part. Leave"
                f" {'dirpath' if readable(trainer) else 'it'} out, and merge after the run: lightning-peft merge CKPT"
                " DIR."
            )

    def _check(self, methods: list[Method]) -> None:
        stuck = next((m for m in methods if not m.mergeable), None)
        if stuck is None:
            return
        reason = f"{type(stuck).__name__} cannot be merged: {stuck.why_not_mergeable}"
        if self.dirpath:
            raise MergeError(f"{reason} Remove dirpath from MergeOnFitEnd; the adapter file serves beside the base.")
        rank_zero_warn(f"{reason} Training goes on; the {self.which} weights are left in the model, unmerged.")


def _methods(trainer: L.Trainer, pl_module: L.LightningModule) -> list[Method] | None:
    adapters = Adapters.find(pl_module)
    if adapters is not None:
        return adapters.methods
    return next((c.methods for c in trainer.callbacks if isinstance(c, PEFT)), None)
