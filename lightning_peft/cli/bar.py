"""Lightning's progress bar without what no one asked for."""

from __future__ import annotations

from typing import Any

from lightning_peft.lightning_packages import L


class Bar(L.callbacks.RichProgressBar):
    """Ends with the training, so that what callbacks then say is not drawn over; leaves out the run's number."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is logged for the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop drawing."""
        self.teardown(trainer, pl_module, "fit")
