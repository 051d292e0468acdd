"""The callback that brings a method into a LightningModule and keeps every checkpoint small."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_peft.errors import ConfigError, PEFTError, TrainingError
from lightning_peft.formats.card import settings
from lightning_peft.lightning_packages import Callback, every, is_overridden, package_of, rank_zero_info
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters
from lightning_peft.model.hollow import inject_hollow, is_hollow
from lightning_peft.model.injection import as_methods, inject
from lightning_peft.model.summary import describe, keep_sizes
from lightning_peft.saving.checkpoint import load_adapter
from lightning_peft.trainer.checks import (
    check_loss,
    check_not_adapted,
    check_nothing_new,
    check_optimizers,
    check_present,
    check_pruning,
    check_rates,
)
from lightning_peft.trainer.driving import add_loss_terms, change_gradients, step_taken
from lightning_peft.trainer.idle_layers import IdleLayers
from lightning_peft.trainer.rate_check import warn_of_rate
from lightning_peft.trainer.session import Session
from lightning_peft.trainer.strategies import (
    check_methods,
    check_sharding,
    check_strategy,
    check_trained,
    loads_late,
    readable,
    warn_of_children,
)

if TYPE_CHECKING:
    import lightning.pytorch as L


class PEFT(Callback):
    """Fine-tune any LightningModule with a method; every checkpoint holds only what was trained.

    Injects before the optimizers are built (in ``setup``, or at the end of ``configure_model`` where the module has
    one), once over all of fit, validate, test and predict. Checkpoints of every kind hold exactly
    ``adapter_state_dict(module)`` and a description that a reload is checked against.

    Args:
        method: one method or a list. May be left out when ``init_from`` is given, or when the module injects itself.
        init_from: an adapter file, adapter folder or checkpoint to start from: its values, a fresh optimizer.
        save: ``trainable``, or ``full`` to keep the frozen weights in the checkpoints as well.
        allow_untested: also run under strategies that PEFT is not tested with.

    Raises:
        NoMatchError: no target matches.
        TrainingError: something that trains is in no optimizer, a callback that copies the module comes first, or the
            strategy does not fit.

    >>> import lightning.pytorch as L
    >>> from lightning_peft import PEFT, LoRA
    >>> trainer = L.Trainer(callbacks=[PEFT(LoRA(r=8))], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        method: Method | Sequence[Method] | None = None,
        init_from: str | None = None,
        save: Literal["trainable", "full"] = "trainable",
        allow_untested: bool = False,
    ) -> None:
        if save not in ("trainable", "full"):
            raise ConfigError(f"PEFT(save={save!r}): choose 'trainable' or 'full'.")
        self.methods = None if method is None else as_methods(method)
        self.init_from = init_from
        self.save = save
        self.allow_untested = allow_untested
        self._fresh = False  # injected by this callback in this process
        self._frozen: list[torch.nn.Module] = []
        self._idle: IdleLayers | None = None
        self._steps_done = 0
        self._total_steps: int | None = None

    def __repr__(self) -> str:
        """As it is written: ``PEFT(LoRA(r=8))``; options that have their defaults are left out."""
        given = [settings(method) for method in self.methods or []]
        if len(given) > 1:
            given = [f"[{', '.join(given)}]"]
        if self.init_from is not None:
            given.append(f"init_from={self.init_from!r}")
        if self.save != "trainable":
            given.append(f"save={self.save!r}")
        return f"PEFT({', '.join(given)})"

    # ---- before training -------------------------------------------------------------------------------------------
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Inject now, or defer to the end of ``configure_model``."""
        package_of(trainer)  # an error for a Trainer of a package that was imported too late
        check_strategy(trainer, self.allow_untested)
        self._check_order(trainer, pl_module, stage)
        if stage == "fit" and self.methods is not None:
            check_pruning(trainer, self.methods)  # before anything is injected
        session = Session.on(pl_module)
        session.begin_run(trainer)
        deferred = is_overridden("configure_model", pl_module)
        if deferred and loads_late(trainer) and any(True for _ in pl_module.parameters()):
            self.ensure(pl_module, stage)  # before configure_model shards what is there
        if isinstance(trainer.precision_plugin, every("plugins.BitsandbytesPrecision")) and not deferred:
            # Lightning would do so a moment later: methods must see the layers that train
            check_not_adapted(pl_module)
            trainer.precision_plugin.convert_module(pl_module)
        if deferred:
            # WeightAveraging calls configure_model in its own setup, Lightning once more after that.
            averages = any(isinstance(c, every("callbacks.WeightAveraging")) for c in trainer.callbacks)
            session.defer(partial(self.ensure, pl_module, stage), calls=2 if averages and stage == "fit" else 1)
        else:
            self.ensure(pl_module, stage)

    def ensure(self, pl_module: L.LightningModule, stage: str) -> None:
        """Inject unless that was done, make the module's checkpoints small; training goes on from unmerged weights."""
        fresh = Adapters.find(pl_module) is None
        if fresh and self.methods is None and self.init_from is None:
            raise ConfigError(
                "PEFT() needs a method such as PEFT(LoRA(r=8)) (in a command --peft LoRA), or init_from=PATH of a saved"
                " adapter; the module has no adapters of its own."
            )
        if self.methods is not None:
            (inject_hollow if fresh and is_hollow(pl_module) else inject)(pl_module, self.methods)
        self._fresh |= fresh
        if fresh and self.init_from is not None:
            self._start_from(pl_module, self.init_from)
        Session.on(pl_module).keep_small(self.save)
        if pl_module._trainer is not None and not readable(pl_module.trainer):
            keep_sizes(pl_module)
        if stage == "fit":  # here and not in on_fit_start: the learning-rate finder trains in its own on_fit_start
            adapters = Adapters.of(pl_module)
            adapters.switch(merged=False)
            # Under full fine-tuning it is the user's choice what is frozen, as it is without this callback.
            if not adapters.complete:
                adapters.settle_flags()

    def _start_from(self, pl_module: L.LightningModule, path: str) -> None:
        try:
            load_adapter(pl_module, path)
        except PEFTError:
            adapters = Adapters.find(pl_module)
            if adapters is not None:
                adapters.remove()
            raise

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what trains, and make sure that it does."""
        check_nothing_new(pl_module)
        check_methods(trainer, pl_module)
        check_pruning(trainer, Adapters.of(pl_module).methods)
        check_sharding(trainer, pl_module)
        check_optimizers(trainer, pl_module)
        check_rates(trainer, pl_module)
        Session.on(pl_module).settle_optimizers(trainer)
        rank_zero_info(describe(pl_module))
        # a schedule that asked for the length of the run has built the loader before its state is restored, and
        # Lightning would not look at that state again: a mid-epoch resume would start the epoch over
        trainer.fit_loop._combined_loader = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find frozen statistics and idle adapters; read the length of the run, and say if its rate is far off."""
        Session.on(pl_module).check_base()
        adapters = Adapters.of(pl_module)
        self._frozen = adapters.frozen_statistics()
        self._idle = IdleLayers(adapters) if readable(trainer) else None
        self._steps_done = trainer.global_step
        total = trainer.estimated_stepping_batches
        self._total_steps = int(total) if total != float("inf") else None
        warn_of_rate(trainer, pl_module, self._total_steps)

    # ---- every step ------------------------------------------------------------------------------------------------
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Frozen normalisation layers keep their statistics, whatever mode the module was put into."""
        for module in self._frozen:
            module.training = False

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        """A loss that no trained tensor takes part in is an error."""
        check_loss(pl_module, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the gradients of the methods' loss terms, scaled as Lightning has scaled the loss.

        The terms depend on parameters alone, so they are the same on every rank and need no reduction.
        """
        add_loss_terms(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Let the methods change gradients: unscaled, complete over accumulation, not yet clipped.

        Note which adapted layers have any.
        """
        change_gradients(pl_module)
        if self._idle is not None:
            self._idle.look()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the methods about each optimizer step."""
        if trainer.global_step == self._steps_done:
            return
        self._steps_done = trainer.global_step
        step_taken(pl_module, self._steps_done, self._total_steps)
        if self._idle is not None:
            self._idle.step_taken()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the result is, if not in this module."""
        warn_of_children(trainer, self._fresh)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo what only the run needed; a run that failed before there were adapters leaves nothing."""
        session = Session.of(pl_module)
        if session is not None and Adapters.find(pl_module) is not None:
            session.end_run()
        elif session is not None:
            session.remove()
        self._frozen = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same after a run that failed or was interrupted, which has no ``teardown``."""
        self.teardown(trainer, pl_module, "")

    def _check_base(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Session.on(pl_module).check_base()

    # after the module's own hooks, in which it may have loaded its base
    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _check_base

    def _check_adapters(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The adapters must still be there, and the trained ones."""
        check_present(pl_module)
        check_trained(trainer, self._fresh and self.init_from is None)

    on_validation_start = on_test_start = on_predict_start = _check_adapters

    def _check_order(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Callbacks that deep-copy the module in their setup must come after the injection."""
        if sum(isinstance(c, PEFT) for c in trainer.callbacks) > 1:
            raise ConfigError("The Trainer has two PEFT callbacks. Give one of them a list: PEFT([...]).")
        stochastic = every("callbacks.StochasticWeightAveraging")
        averaging = stochastic + every("callbacks.WeightAveraging")
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if isinstance(callback, averaging):
                raise TrainingError(
                    f"{type(callback).__name__} copies the module before PEFT adapts it. Put PEFT first:"
                    f" Trainer(callbacks=[PEFT(...), {type(callback).__name__}(...)])."
                )
        swa = any(isinstance(c, stochastic) for c in trainer.callbacks)
        if swa and stage == "fit" and is_overridden("configure_model", pl_module) and Adapters.find(pl_module) is None:
            raise TrainingError(
                "StochasticWeightAveraging copies the module before `configure_model` has run. Build the network in"
                " `__init__`, or use WeightAveraging / EMAWeightAveraging."
            )
