"""Lightning's progress bar without what no one asked for, on one line of the terminal."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, TimeRemainingColumn

from lightning_peft.lightning_packages import L

#: letters that everything but the drawn bar takes: description, batches, times, speed and two losses
_BESIDE_BAR = 90
#: letters of a drawn bar
_SHORTEST, _LONGEST = 6, 40


class Bar(L.callbacks.RichProgressBar):
    """Ends with the training, so that what callbacks then say is not drawn over; leaves out the run's number; fits the
    terminal; counts epochs from one.
    """

    def __init__(self) -> None:
        # the losses of a run that diverges have many digits before the point
        super().__init__(theme=L.callbacks.progress.rich_progress.RichProgressBarTheme(metrics_format=".4g"))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is logged for the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """As many columns as the terminal has room for: the drawn bar goes first, then the time that has passed."""
        description, bar, batches, times, speed = super().configure_columns(trainer)
        room = self._console.width - _BESIDE_BAR
        if room < _SHORTEST:
            return [description, batches, TimeRemainingColumn(), speed]
        assert isinstance(bar, BarColumn)
        bar.bar_width = min(room, _LONGEST)
        return [description, bar, batches, times, speed]

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        text = f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs and epochs > 0 else "")
        return f"{text:{len(self.validation_description)}}"  # as long as its other lines, or it would flicker

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop drawing, before the predictions are written and that is said."""
        self.teardown(trainer, pl_module, "predict")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop drawing."""
        self.teardown(trainer, pl_module, "fit")
