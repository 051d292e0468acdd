"""Full fine-tuning as a method: what trains, what is saved."""

import torch
from torch import nn

from lightning_peft import FullFineTuning, adapter_state_dict, inject, state_names, trainable_names
from tests.models import Plain, plain_loader, trainer


def test_everything_trains_but_what_was_frozen():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].bias.requires_grad_(False)
    inject(net, FullFineTuning())
    assert trainable_names(net) == ["0.weight", "1.weight", "1.bias"]
    assert state_names(net) == ["0.bias"]


def test_statistics_train_and_travel(tmp_path):
    """Normalisation layers are trained, so their running statistics move and are saved."""
    from lightning_peft import PEFT

    module = Plain()
    before = module.net[1].running_mean.clone()
    trainer(tmp_path, PEFT(FullFineTuning())).fit(module, plain_loader())
    assert not torch.equal(module.net[1].running_mean, before)
    assert set(adapter_state_dict(module)) == set(module.net.state_dict(prefix="net."))
