"""LoRA against peft's numbers and the closed form."""

import copy
import json
import math
import re

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import (
    PEFT,
    ConfigError,
    LoRA,
    TrainingError,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    state_names,
    summarize,
    trainable_names,
    unload,
    unmerge,
)
from tests.golden_case import FOLDER, Golden, adapter_parameters
from tests.models import Plain, plain_loader, trainer

CASES = [
    "lora_qv_bert",
    "lora_qv_llama",
    "lora_all_linear_llama",
    "lora_conv1d_gpt2",
    "lora_embedding_llama",
    "rslora_qkvo_llama",
    "lora_conv2d_toy",
    "lora_conv2d_dilated_circular",
    "lora_conv2d_grouped_flat",
    "lora_mha_cross_padded",
    "lora_mha_encoder_layers",
]


def inject_golden(case: Golden) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The case's model with LoRA and its adapter values; the case's keys to our parameters."""
    h, model = case.meta["hyperparameters"], case.model()
    rslora = case.meta["method"] == "rslora"
    inject(model, LoRA(r=h["r"], alpha=h["alpha"], use_rslora=rslora, target_modules=case.meta["adapted_modules"]))
    return model, adapter_parameters(case, model)


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
    weights = {n: p.data for n, p in model.named_parameters()}
    for key, weight in case.part("output.merged_weight").items():
        ours = weights[key] if key in weights else weights[f"{key}.weight"]
        torch.testing.assert_close(ours, weight, atol=2e-6, rtol=0)
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
    net = nn.Sequential(copy.deepcopy(layer)).double()
    base, original = copy.deepcopy(net[0]), net[0].weight
    inject(net, LoRA(r=3, alpha=5, target_modules="0", use_rslora=rslora))
    delta = net[0].delta
    assert delta.lora_A.dtype == delta.lora_B.dtype == torch.float64
    for p in (delta.lora_A, delta.lora_B):
        p.data.normal_()
    s = 5 / (math.sqrt(3) if rslora else 3)
    product = s * delta.lora_B @ delta.lora_A
    if isinstance(layer, nn.Embedding):
        x = torch.tensor([[0, 4, 10]])
        expected = base(x) + product.T[x]
    else:
        x = torch.randn(4, 5, dtype=torch.float64)
        expected = base(x) + x @ product.T
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
    merge(net)
    assert net[0].weight is not original
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
    unmerge(net)
    assert net[0].weight is original


def test_bf16_merge_rounds_once():
    """The float32 sum is cast to bfloat16 once; peft's safe merge casts the product first."""
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    weight = net[0].weight.float()
    inject(net, LoRA(r=4))
    net[0].delta.lora_B.data.normal_()
    expected = (weight + net[0].delta.product()).bfloat16()
    merge(net)
    assert torch.equal(net[0].weight, expected)


def test_patterns_and_biases():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    inject(
        net,
        LoRA(r=2, alpha=4, target_modules=["a", "b"], rank_pattern={"b": 3}, alpha_pattern={"b": 9}, bias="lora_only"),
    )
    assert net["a"].delta.lora_A.shape == (2, 4) and net["b"].delta.lora_A.shape == (3, 4)
    assert net["a"].delta.scaling == 2 and net["b"].delta.scaling == 3
    assert [n for n in trainable_names(net) if n.endswith("bias")] == ["a.bias", "b.bias"]


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
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern={'q': 0}.*would add nothing.*exclude_modules='q'"),
        ({"alpha_pattern": {"q": -1.0}}, "must be at least 0.0"),
        ({"lr_ratio": 0.5}, "lr_ratio must be at least 1"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**fields)


# ---- start values that come from the weight ------------------------------------------------------------------------
def test_golden_pissa():
    """s·B·A and what it leaves of the weight; the output is the base's."""
    case = Golden("pissa_llama")
    h, model = case.meta["hyperparameters"], case.model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    inject(model, LoRA(r=h["r"], alpha=h["alpha"], init="pissa", target_modules=case.meta["adapted_modules"]))
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    atol = case.meta["tolerance"]["suggested_atol"]
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=atol, rtol=0)
    for name, delta_weight in case.part("output.delta_weight").items():
        module = model.get_submodule(name)
        ours = module.delta.scaling * module.delta.lora_B @ module.delta.lora_A
        torch.testing.assert_close(ours, delta_weight, atol=1e-5, rtol=0)
        residual = case.tensors[f"output.residual_weight.{name}"]
        torch.testing.assert_close(module.weight - ours, residual, atol=1e-5, rtol=0)
        assert torch.equal(module.weight, before[f"{name}.weight"])  # the base itself is not touched
    assert set(state_names(model)) == {f"{n}.delta.start_{x}" for n in case.meta["adapted_modules"] for x in ("A", "B")}


def test_olora_is_the_qr_decomposition():
    net = nn.Sequential(nn.Linear(6, 9)).double()
    weight = net[0].weight.detach().clone()
    inject(net, LoRA(r=4, alpha=4, init="olora"))
    Q, R = torch.linalg.qr(weight)
    torch.testing.assert_close(net[0].delta.lora_B @ net[0].delta.lora_A, Q[:, :4] @ R[:4])


def test_orthogonal_starts_at_zero_though_neither_factor_is():
    net = nn.Sequential(nn.Linear(6, 9)).double()
    inject(net, LoRA(r=4, init="orthogonal"))
    A, B = net[0].delta.lora_A, net[0].delta.lora_B
    assert A.abs().min() > 0 and B.abs().min() > 0 and (B @ A).abs().max() < 1e-15


def test_starts_that_cannot_be():
    net = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(ConfigError, match=r"'0' \(9 × 6\) has no 8 directions to start from"):
        inject(net, LoRA(r=8, init="pissa"))
    with pytest.raises(ConfigError, match="r must be even; it is 3"):
        inject(net, LoRA(r=3, init="orthogonal"))
    assert [type(m) for m in net] == [nn.Linear]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_product_travels(init, tmp_path):
    """Trained from the weight, saved small, reloaded on a fresh base bit for bit; the fingerprint stays the base's."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
    net, x = copy.deepcopy(plain), torch.randn(5, 20)
    inject(net, LoRA(r=2, init=init))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).pow(2).sum().backward()
        optimizer.step()
    save_adapter(net, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(plain)
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), net(x))
    with disabled(net):
        assert torch.equal(net(x), plain(x))
    unload(net)
    assert torch.equal(net(x), plain(x))


# ---- LoRA+ ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["loraplus_groups_bert_classifier", "loraplus_groups_llama"])
def test_loraplus_groups(name):
    """The same tensors at the same rates as peft's optimizer."""
    meta = json.loads((FOLDER / f"{name}.json").read_text())
    h, spec = meta["hyperparameters"], meta["model"]
    config = transformers.AutoConfig.for_model(spec["model_type"], **spec["config"])
    model = getattr(transformers, spec["auto_class"]).from_config(config)
    method = LoRA(
        r=h["r"],
        target_modules=h["targets"],
        lr_ratio=h["ratio"],
        lr_embedding=h["lr_embedding"],
        bias=h.get("bias", "none"),
        modules_to_save=h.get("trained_modules"),
    )
    inject(model, method)
    names = {id(p): n for n, p in model.named_parameters()}
    ours = {
        g["name"]: (pytest.approx(g["lr"]), g["weight_decay"], {names[id(p)] for p in g["params"]})
        for g in method.param_groups(model, h["lr"], h["weight_decay"])
    }
    theirs = {
        g["group"]: (g["lr"], g["weight_decay"], {_ours(n) for n in g["parameters"]})
        for g in meta["groups"]
        if g["parameters"]
    }
    assert ours == theirs


def _ours(name: str) -> str:
    """Our name of one of peft's tensors."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.lora_(embedding_)?([AB])(\.weight)?$", r".delta.lora_\2", name)


class Optimized(Plain):
    """Plain, with an optimizer given from outside."""

    def __init__(self, groups) -> None:
        super().__init__()
        self.groups = groups

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.groups(self), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))]


def test_loraplus_needs_its_groups(tmp_path):
    """One group for all would drop the ratio silently: an error that shows the line; a warm-up from 0 is fine."""
    method = LoRA(r=2, lr_ratio=16.0)
    plain = Optimized(lambda module: [p for p in module.parameters() if p.requires_grad])
    with pytest.raises(TrainingError, match=r"AdamW\(method.param_groups\(self, lr=1e-4"):
        trainer(tmp_path, PEFT(method)).fit(plain, plain_loader())
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(plain_again := Optimized(plain.groups), plain_loader())
    assert plain_again.trainer.global_step == 8
    grouped = Optimized(lambda module: method.param_groups(module, 1e-2, 0.0))
    trainer(tmp_path, PEFT(method)).fit(grouped, plain_loader())
    rates = {g["name"]: g["initial_lr"] for g in grouped.trainer.optimizers[0].param_groups}
    assert rates == {"A": 1e-2, "B": pytest.approx(0.16)}
