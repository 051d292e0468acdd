"""Precision plugins of Lightning: factors stay wide, whatever becomes of the base."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn

from lightning_peft import PEFT, LoRA, MergeOnFitEnd, TrainabilityCheck, inject, trainable_names
from tests.lifecycle.test_optional_parts import Sgd
from tests.models import plain_loader, trainer


@pytest.mark.parametrize(
    ("precision", "base", "factor"),
    [
        ("bf16-mixed", torch.float32, torch.float32),
        ("16-mixed", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_precision(tmp_path, precision, base, factor):
    """Factors and what the optimizer keeps of them never get narrower than float32."""

    class Adam(Sgd):
        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module, saver = Adam(), ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck(), MergeOnFitEnd("last"), saver, precision=precision)
    run.fit(module, plain_loader(), plain_loader())
    assert {p.dtype for n, p in module.named_parameters() if n in set(trainable_names(module))} == {factor}
    assert module.net[0].weight.dtype == base
    kept = torch.load(saver.best_model_path, weights_only=True)["optimizer_states"][0]["state"].values()
    assert {s["exp_avg"].dtype for s in kept} == {factor}
    assert run.test(module, plain_loader(), ckpt_path="best", verbose=False)[0]["test_loss"] > 0


def test_bitsandbytes_precision(tmp_path):
    """A base that Lightning's plugin has packed is adapted; converting once more leaves the adapters as they are."""
    pytest.importorskip("bitsandbytes")
    module, precision = Sgd(), BitsandbytesPrecision("nf4", dtype=torch.float32)
    precision.convert_module(module)
    inject(module, LoRA(r=4))
    names = trainable_names(module)
    precision.convert_module(module)
    parameters = dict(module.named_parameters())
    assert trainable_names(module) == names and all(type(parameters[n]) is nn.Parameter for n in names)
    assert type(module.net[0]).__name__ == "_NF4Linear" and all(parameters[n].requires_grad for n in names)
