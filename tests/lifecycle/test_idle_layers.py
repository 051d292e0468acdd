"""An adapter that never acts is named after the first optimizer steps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import PEFT, AdapterDrop, Houlsby, LoRA
from tests.models import Plain, plain_loader, trainer


class ReadsThroughList(Plain):
    """Keeps a weight in a list since ``__init__``, where injection does not look, and never calls its layer."""

    def __init__(self):
        super().__init__()
        self.net.extra = nn.Linear(8, 8)
        self.kept = [self.net.extra.weight]

    def training_step(self, batch, index):
        hidden = F.linear(batch[0], self.kept[0])
        for part in list(self.net)[:4]:
            hidden = part(hidden)
        return F.cross_entropy(hidden, batch[1])


def fit(tmp_path, module, method, *callbacks, **options) -> list[str]:
    """Warnings of a fit that speak of idle adapters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, PEFT(method), *callbacks, **options).fit(module, plain_loader())
    return [str(warning.message) for warning in caught if "got no gradient" in str(warning.message)]


@pytest.mark.parametrize("steps", [2, 8])
def test_a_layer_that_takes_no_part_is_named_once(tmp_path, steps):
    """With the way out; a run too short to judge says nothing."""
    found = fit(tmp_path, ReadsThroughList(), LoRA(r=2), max_steps=steps, max_epochs=-1)
    assert len(found) == (steps > 3)
    for message in found:
        assert "of net.extra got" in message and "exclude_modules=['net.extra']" in message


def test_layers_that_train_are_not_named(tmp_path):
    """Neither are those that are switched off for the time being."""
    assert fit(tmp_path, Plain(), LoRA(r=2)) == []
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
    module = Plain()
    module.net = nn.Sequential(nn.Unflatten(1, (1, 8)), net, nn.Flatten(), nn.Linear(8, 3))
    assert fit(tmp_path, module, Houlsby(), AdapterDrop(max_drop=1)) == []
    assert all(torch.isfinite(p).all() for p in module.parameters())
