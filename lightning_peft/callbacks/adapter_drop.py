"""Adapters that can do without their lower layers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_peft.bottleneck.placement import adapter_layers, drop_layers
from lightning_peft.errors import ConfigError, TrainingError
from lightning_peft.lightning_packages import Callback
from lightning_peft.trainer.strategies import runs_under

if TYPE_CHECKING:
    import lightning.pytorch as L


class AdapterDrop(Callback):
    """Drop the bottleneck adapters of the first n layers: n random in each training step, fixed at inference.

    AdapterDrop (Rücklé et al. 2020, arXiv:2010.11918). Trained this way, adapters lose little when the lower ones are
    left out, and what is left out costs nothing. n is drawn evenly from 0 … ``max_drop`` with a generator of its own:
    the same on all ranks, the same after a resume, one n for all batches of an accumulated step. Validation, test and
    prediction leave out the first ``inference`` layers, or the layers with these numbers; afterwards all adapters are
    on. `drop_layers` does the same without a Trainer. Under ``torch.compile`` each n is compiled once.

    Args:
        max_drop: the largest n in training; None stands for all layers but the last, 0 for none.
        inference: n while validating, testing and predicting, or the numbers of the layers to drop there.
        seed: seed of the draws.

    Raises:
        ConfigError: a value that cannot work.
        TrainingError: DDP without ``find_unused_parameters``: dropped adapters get no gradient.

    >>> from lightning_peft import AdapterDrop, PEFT, Pfeiffer
    >>> callbacks = [PEFT(Pfeiffer()), AdapterDrop(inference=2)]
    >>> callbacks = [PEFT(Pfeiffer()), AdapterDrop(max_drop=0, inference=[0, 2])]
    """

    def __init__(self, max_drop: int | None = None, inference: int | Iterable[int] = 0, seed: int = 0) -> None:
        if max_drop is not None and not _is_count(max_drop):
            raise ConfigError(f"AdapterDrop(max_drop={max_drop!r}): give a number of layers, 0 or more.")
        listed = isinstance(inference, Iterable) and not isinstance(inference, str)
        numbers: list[Any] = list(inference) if listed else [inference]
        if not all(_is_count(number) for number in numbers):
            raise ConfigError(
                f"AdapterDrop(inference={inference!r}): give a number of layers, 0 or more, or the numbers of the"
                " layers to drop."
            )
        self.inference: int | list[int] = sorted(set(numbers)) if listed else numbers[0]
        self.max_drop, self.seed = max_drop, seed
        self._most = 0
        self._dropped = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the layers; say early what cannot work."""
        depth = max(self._check_layers(pl_module), default=0)
        if self.max_drop is not None and self.max_drop > depth:
            raise ConfigError(
                f"AdapterDrop(max_drop={self.max_drop}): adapters stand in layers 0 to {depth}; at most {depth} layers"
                " can be dropped so that something trains in every step."
            )
        self._most = depth if self.max_drop is None else self.max_drop
        strategy = trainer.strategy
        unused = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
        if runs_under(trainer, "DDPStrategy") and self._most and not unused:
            raise TrainingError(
                "AdapterDrop leaves adapters without a gradient in each step, which DDP takes for an error. Use"
                " Trainer(strategy='ddp_find_unused_parameters_true')."
            )

    def _check_layers(self, pl_module: L.LightningModule) -> set[int]:
        """The numbers of the layers with adapters; those to drop at inference must be among them."""
        layers = {layer for _, layer in adapter_layers(pl_module) if layer is not None}
        listed = self.inference if isinstance(self.inference, list) else []
        for number in listed:
            if number not in layers:
                raise ConfigError(
                    f"AdapterDrop(inference={listed}): no adapter stands in layer {number}. Adapters stand in the"
                    f" layers {sorted(layers)}."
                )
        return layers

    def draw(self, step: int) -> int:
        """How many layers training step number ``step`` drops."""
        return random.Random(f"{self.seed}:{step}").randint(0, self._most)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Drop for this step."""
        self._drop(pl_module, self.draw(trainer.global_step))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All adapters again."""
        self._restore(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no adapter switched off behind."""
        self._restore(trainer, pl_module)

    def _infer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_layers(pl_module)
        self._drop(pl_module, self.inference)

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._dropped:
            self._drop(pl_module, 0)

    def _drop(self, pl_module: L.LightningModule, layers: int | list[int]) -> None:
        drop_layers(pl_module, layers)
        self._dropped = bool(layers)

    on_validation_start = on_test_start = on_predict_start = _infer
    on_validation_end = on_test_end = on_predict_end = _restore


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
