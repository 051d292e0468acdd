"""Lightning's finders fit a little and take it back."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_peft import PEFT, LoRA, adapter_state_dict, trainable_names
from tests.contract.battery import same
from tests.lifecycle.test_optional_parts import Sgd
from tests.models import plain_loader, trainer


def test_finders(tmp_path):
    """Finders try, put the adapter back, and the fit starts where it would have started without them."""

    class Sized(Sgd):
        lr, batch_size = 0.1, 8

        def train_dataloader(self):
            return plain_loader(batch_size=self.batch_size)

        val_dataloader = train_dataloader

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    ends = []
    for finders in ([], [LearningRateFinder(num_training_steps=8, update_attr=False)]):
        torch.manual_seed(0)
        module = Sized()
        trainer(tmp_path, PEFT(LoRA()), *finders).fit(module)
        ends.append(adapter_state_dict(module))
    assert same(*ends)
    for find in (
        lambda t, m: trainer(tmp_path, PEFT(LoRA()), BatchSizeFinder(steps_per_trial=1, max_trials=2)).fit(m),
        lambda t, m: Tuner(t).scale_batch_size(m, steps_per_trial=1, max_trials=2),
        lambda t, m: Tuner(t).lr_find(m, num_training=5),
    ):
        module = Sized()
        find(trainer(tmp_path, PEFT(LoRA())), module)
        assert len(trainable_names(module)) == 4
        trainer(tmp_path, PEFT(LoRA())).fit(module)
