"""The default learning rate: its arithmetic, where it is used, and what is said of rates far from it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_peft import PEFT, AdaLoRA, FullFineTuning, LoRA, PromptTuning, TaskModule, inject, suggest_lr
from lightning_peft.lightning_packages import L
from lightning_peft.rates import model_width
from tests.models import plain_loader, trainer
from tests.task_cases import BERT, CASES, NAMES, Data


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def test_the_rate_is_the_product_that_is_printed():
    base, rate = LoRA.reference_lr, lambda method, width=2000, steps=1000: suggest_lr(net(width), method, steps).lr
    assert rate(LoRA(alpha=32)) == base
    assert rate(LoRA(alpha=8)) == pytest.approx(2 * base, rel=0.05)
    assert rate(LoRA(r=16, alpha=8, use_rslora=True)) == base  # 8·√16 = 32
    assert rate(LoRA(alpha=32), width=500) == pytest.approx(2 * base, rel=0.05)
    assert rate(LoRA(alpha=32, init="pissa")) == pytest.approx(base / 10, rel=0.05)
    assert rate(LoRA(alpha=32, lr_ratio=16)) == pytest.approx(base / 4, rel=0.05)
    assert rate(PromptTuning(), width=500) == PromptTuning.reference_lr
    assert rate(FullFineTuning()) == FullFineTuning.reference_lr
    assert rate(FullFineTuning(), width=500) == pytest.approx(4 * FullFineTuning.reference_lr)
    said = str(suggest_lr(net(384), LoRA(), 200))
    assert said.startswith("lr ") and "√(2000/384)" in said and "√(32/16)" in said and "LoRA" in said
    product = said.split(" = ")[1].split(" for ")[0]
    for shown, python in (("√(", "math.sqrt("), ("×", "*"), ("^¼", "**0.25"), ("^½", "**0.5")):
        product = product.replace(shown, python)
    assert float(said.split()[1]) == pytest.approx(eval(product, {"math": math}), rel=0.03)


def test_long_short_and_endless_runs():
    rates = [suggest_lr(net(16), LoRA(), steps).lr for steps in (1, 50, 500, 5_000, 10**9)]
    assert rates == sorted(rates, reverse=True) and rates[0] <= 10 * rates[-1]
    assert suggest_lr(net(16), LoRA(), math.inf) == suggest_lr(net(16), LoRA()) == suggest_lr(net(16), LoRA(), 1000)
    assert suggest_lr(net(16), [LoRA(), FullFineTuning()], 100) == suggest_lr(net(16), FullFineTuning(), 100)


def test_the_width_of_models():
    """Injected or not, Conv1D, attention of torch, and models without linear layers."""
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )
    for model in (gpt2, bert, nn.TransformerEncoderLayer(8, 2, 64)):
        assert model_width(model) == 8
    before = suggest_lr(bert, LoRA(), 100)
    inject(bert, LoRA())
    assert suggest_lr(bert, LoRA(), 100) == before
    assert model_width(nn.Conv2d(3, 4, 3)) is None and suggest_lr(nn.Conv2d(3, 4, 3), LoRA(alpha=32)).lr == 4e-4


def test_task_modules_use_it_print_it_and_log_it(tmp_path):
    case = CASES["sequence-classification"]
    module = TaskModule(BERT, "sequence-classification", label_names=NAMES)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=2, logger=CSVLogger(tmp_path, name="", version=""))
    run.fit(module, Data(case))
    expected = suggest_lr(module, LoRA(r=2), run.global_step)
    assert {g["initial_lr"] for g in run.optimizers[0].param_groups} == {expected.lr}
    assert module.suggested == expected and module.hparams.lr is None  # the next fit has its own length
    logged = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert logged["lr"] == expected.lr and logged["lr_derivation"] == expected.derivation


def test_the_finder_replaces_it(tmp_path):
    module = TaskModule(BERT, "sequence-classification", label_names=NAMES)
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=6, early_stop_threshold=None)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), finder, max_epochs=1)
    run.fit(module, Data(CASES["sequence-classification"]))
    found = finder.optimal_lr.suggestion()
    assert found is None or module.hparams.lr == found


class Foreign(L.LightningModule):
    """Somebody else's module."""

    def __init__(self, optimizer, rate: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.rate = net(8), optimizer, rate

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=self.rate)


@pytest.mark.parametrize(
    ("optimizer", "times", "said"),
    [
        (torch.optim.AdamW, 1.0, ""),
        (torch.optim.AdamW, 5.0, ""),
        (torch.optim.AdamW, 20.0, "is 20 times the default"),
        (torch.optim.Adam, 0.05, "is 1/20 of the default"),
        (torch.optim.SGD, 20.0, ""),
    ],
)
def test_foreign_modules_hear_of_rates_far_off(tmp_path, optimizer, times, said):
    usual = suggest_lr(net(8), AdaLoRA(), 3).lr
    run = trainer(tmp_path, PEFT(AdaLoRA(init_r=3, target_r=2)), max_epochs=-1, max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Foreign(optimizer, usual * times), plain_loader())
    messages = [str(w.message) for w in caught if "learning rate" in str(w.message)]
    assert len(messages) == (1 if said else 0) and all(said in message for message in messages)
