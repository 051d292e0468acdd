"""DoRA against peft's numbers; closed forms on all layers are in tests/test_layers.py."""

import pytest
import torch
from torch import nn

from lightning_peft import DoRA, inject, merge, summarize
from tests.golden_case import Golden, adapter_parameters

CASES = ["dora_bias_bert", "dora_qv_llama"]


def adapted(case: Golden):
    h, model = case.meta["hyperparameters"], case.model()
    inject(model, DoRA(r=h["r"], alpha=h["alpha"], target_modules=case.meta["adapted_modules"]))
    return model, adapter_parameters(case, model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, attention):
    case = Golden(name, attention)
    model, parameters = adapted(case)
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    case.check(model, parameters)


@pytest.mark.parametrize("name", CASES)
def test_golden_merged(name):
    case = Golden(name)
    model, _ = adapted(case)
    merge(model)
    for key, weight in case.part("output.merged_weight").items():
        torch.testing.assert_close(model.get_submodule(key).weight.data, weight, atol=2e-6, rtol=0)
    atol = case.meta["tolerance"]["suggested_atol"]
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=atol, rtol=0)


def test_magnitude_starts_at_the_norm_of_each_row():
    """In float32 also beside a bfloat16 base."""
    net = nn.Sequential(nn.Linear(6, 9)).bfloat16()
    inject(net, DoRA(r=2))
    magnitude = net[0].delta.lora_magnitude
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude.data, net[0].weight.float().norm(dim=1))


def test_dropout_leaves_the_base_alone():
    """Only the low-rank branch sees dropped inputs: with B at zero nothing changes while training."""
    net = nn.Sequential(nn.Linear(20, 9))
    x = torch.randn(4, 20)
    before = net(x)
    inject(net, DoRA(r=2, dropout=0.5))
    net.train()
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=0)
    net[0].delta.lora_B.data.normal_()
    assert not torch.equal(net(x), net(x))
