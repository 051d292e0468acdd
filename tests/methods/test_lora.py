"""LoRA against peft's numbers and the closed form."""

import math

import pytest
import torch
from torch import nn

from lightning_peft import (
    ConfigError,
    LoRA,
    inject,
    merge,
    summarize,
    trainable_names,
    unmerge,
)
from tests.golden_case import Golden

CASES = ["lora_qv_bert", "lora_qv_llama", "lora_all_linear_llama", "lora_conv1d_gpt2", "lora_embedding_llama"]


def inject_golden(case: Golden) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The case's model with LoRA and its adapter values; the case's keys to our parameters."""
    h, model = case.meta["hyperparameters"], case.model()
    inject(model, LoRA(r=h["r"], alpha=h["alpha"], target_modules=case.meta["adapted_modules"]))
    parameters = {}
    for key, value in case.part("adapter").items():
        name, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        ours = getattr(model.get_submodule(name).delta, leaf.replace("embedding_", ""))
        ours.data.copy_(value)
        parameters[key] = ours
    return model, parameters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, attention):
    case = Golden(name, attention)
    model, parameters = inject_golden(case)
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    case.check(model, parameters)


@pytest.mark.parametrize("name", CASES)
def test_golden_merged(name):
    case = Golden(name)
    model, _ = inject_golden(case)
    merge(model)
    for key, weight in case.part("output.merged_weight").items():
        torch.testing.assert_close(model.get_submodule(key).base.weight.data, weight, atol=2e-6, rtol=0)
    atol = case.meta["tolerance"]["suggested_atol"]
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Embedding(11, 7, padding_idx=0)],
    ids=["linear", "no_bias", "embedding"],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_closed_form_float64(layer, rslora):
    """y = Wx + b + s·BAx, in float64, forward and merged; merging swaps the parameter and back."""
    net = nn.Sequential(layer).double()
    original = net[0].weight
    inject(net, LoRA(r=3, alpha=5, target_modules="0", use_rslora=rslora))
    delta = net[0].delta
    assert delta.lora_A.dtype == delta.lora_B.dtype == torch.float64
    for p in (delta.lora_A, delta.lora_B):
        p.data.normal_()
    s = 5 / (math.sqrt(3) if rslora else 3)
    product = s * delta.lora_B @ delta.lora_A
    if isinstance(layer, nn.Embedding):
        x = torch.tensor([[0, 4, 10]])
        expected = layer(x) + product.T[x]
    else:
        x = torch.randn(4, 5, dtype=torch.float64)
        expected = layer(x) + x @ product.T
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
    merge(net)
    assert net[0].base.weight is not original
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
    unmerge(net)
    assert net[0].base.weight is original


def test_bf16_merge_rounds_once():
    """The float32 sum is cast to bfloat16 once; peft's safe merge casts the product first."""
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    weight = net[0].weight.float()
    inject(net, LoRA(r=4))
    net[0].delta.lora_B.data.normal_()
    expected = (weight + net[0].delta.product()).bfloat16()
    merge(net)
    assert torch.equal(net[0].base.weight, expected)


def test_patterns_and_biases():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    inject(
        net,
        LoRA(r=2, alpha=4, target_modules=["a", "b"], rank_pattern={"b": 3}, alpha_pattern={"b": 9}, bias="lora_only"),
    )
    assert net["a"].delta.lora_A.shape == (2, 4) and net["b"].delta.lora_A.shape == (3, 4)
    assert net["a"].delta.scaling == 2 and net["b"].delta.scaling == 3
    assert [n for n in trainable_names(net) if n.endswith("bias")] == ["a.base.bias", "b.base.bias"]


def test_start_values():
    """A is uniform within 1/√in as in nn.Linear, B is zero; the same name gives the same numbers in any set."""
    wide = nn.ModuleDict({"a": nn.Linear(400, 8), "b": nn.Linear(400, 8)})
    inject(wide, LoRA(r=8))
    a = wide["a"].delta.lora_A
    bound = 1 / math.sqrt(400)
    assert a.abs().max() <= bound and abs(float(a.detach().std()) - bound / math.sqrt(3)) < 0.05 * bound
    assert not wide["a"].delta.lora_B.any() and not torch.equal(a, wide["b"].delta.lora_A)
    single = nn.ModuleDict({"a": nn.Linear(400, 8), "b": nn.Linear(400, 8)})
    inject(single, LoRA(r=8, target_modules="a"))
    assert torch.equal(single["a"].delta.lora_A, a)


def test_dropout_only_while_training():
    net = nn.Sequential(nn.Linear(50, 4))
    inject(net, LoRA(dropout=0.5))
    net[0].delta.lora_B.data.normal_()
    x = torch.ones(1, 50)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LoRA\(r=0\): r must be at least 1"),
        ({"dropout": 1.5}, "dropout must be between 0.0 and 1.0"),
        ({"init": "zeros"}, r"LoRA\(init='zeros'\): choose one of kaiming"),
        ({"bias": "some"}, "choose one of none, all, lora_only"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**fields)
