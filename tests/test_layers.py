"""Every low-rank method on every kind of layer against its closed form, in float64: output, gradients, merge, count."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    ConfigError,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRAFA,
    NoMatchError,
    VeRA,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
    summarize,
    trainable_names,
    unload,
    unmerge,
)
from tests.layers import KINDS, build, call, places, reference

METHODS = {
    "lora": LoRA(r=3, alpha=5, target_modules="m"),
    "rslora": LoRA(r=3, alpha=5, use_rslora=True, target_modules="m"),
    "gaussian": LoRA(r=3, init="gaussian", target_modules="m"),
    "orthogonal": LoRA(r=4, init="orthogonal", target_modules="m"),
    "pissa": LoRA(r=3, alpha=5, init="pissa", target_modules="m"),
    "olora": LoRA(r=3, alpha=5, init="olora", target_modules="m"),
    "dora": DoRA(r=3, alpha=5, target_modules="m"),
    "lorafa": LoRAFA(r=3, alpha=5, target_modules="m"),
    "vera": VeRA(r=6, target_modules="m"),
    "deltalora": DeltaLoRA(r=3, alpha=5, update_ratio=0.7, target_modules="m"),
    "adalora": AdaLoRA(init_r=3, target_r=2, target_modules="m"),
}


def shaken(net: nn.Module, method) -> None:
    """Values far from the start; Delta-LoRA in the middle of a run, with a weight that has moved."""
    g = torch.Generator().manual_seed(1)
    for part in range(2):
        if part and isinstance(method, DeltaLoRA):
            method.after_step(net, method.start(None) + 1, None)
        for p in net.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_closed_form(method, kind, tmp_path):
    net, inputs = build(kind)
    plain = copy.deepcopy(net)
    if isinstance(method, VeRA) and not method.adapts(net["m"]):
        with pytest.raises(NoMatchError, match=r"It can adapt|none of the types"):
            inject(net, method)
        return
    inject(net, method)
    torch.testing.assert_close(
        call(net["m"], inputs), call(plain["m"], inputs), atol=1e-9, rtol=0
    )  # starts at the base
    shaken(net, method)
    out, factors = call(net["m"], inputs), places(net)
    expected = reference(plain, factors, inputs)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    assert (out - call(plain["m"], inputs)).abs().max() > 1e-2
    trained = [p for n, p in net.named_parameters() if n in set(trainable_names(net))]
    wanted = torch.autograd.grad((expected**2).sum(), trained, retain_graph=True)
    for ours, right, p in zip(torch.autograd.grad((out**2).sum(), trained), wanted, trained, strict=True):
        if kind == "embedding" and p is getattr(net["m"].delta, "lora_A", None):
            assert not ours[:, 0].any()  # the padding row sends no gradient, as in the base
            ours[:, 0] = right[:, 0]
        if kind == "embedding" and p is getattr(net["m"].delta, "lora_E", None):
            continue  # stands before A, so the padding row sends it nothing either
        torch.testing.assert_close(ours, right, atol=1e-9, rtol=1e-9)
    objects = dict(net.named_parameters())
    merge(net)
    torch.testing.assert_close(call(net["m"], inputs), expected, atol=1e-10, rtol=1e-10)
    unmerge(net)
    assert all(p is objects[n] for n, p in net.named_parameters()) and torch.equal(call(net["m"], inputs), out)
    save_adapter(net, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(plain)
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(call(fresh["m"], inputs), out)
    unload(net)
    assert {n: id(p) for n, p in net.named_parameters()}.keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(call(net["m"], inputs), call(plain["m"], inputs))


COUNTS = {  # r·(in·kernel + out) for each matrix
    "linear": 3 * (5 + 7),
    "transformers_conv1d": 3 * (6 + 9),
    "embedding": 3 * (11 + 7),
    "conv1d": 3 * (4 * 3 + 6),
    "conv2d_grouped": 3 * (2 * 9 + 6),
    "conv2d_depthwise": 3 * (1 * 9 + 12),
    "conv3d": 3 * (4 * 6 + 6),
    "attention": 3 * (8 + 24) + 3 * (8 + 8),
    "attention_other_widths": 3 * (8 + 8) + 2 * 3 * (5 + 8) + 3 * (8 + 8),
    "experts": 3 * (3 * (4 + 6) + 3 * (6 + 4)),
}
OUTPUTS = {"linear": 7, "transformers_conv1d": 9, "conv2d_grouped": 6, "attention": 32, "experts": 3 * (6 + 4)}


@pytest.mark.parametrize("kind", COUNTS)
def test_counts(kind):
    for method, extra in ((LoRA, 0), (DoRA, OUTPUTS.get(kind)), (DeltaLoRA, 0)):
        if extra is not None:
            net, _ = build(kind)
            inject(net, method(r=3, target_modules="m"))
            assert summarize(net)["trainable"] == COUNTS[kind] + extra


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_dropout_at_a_weight_is_refused(kind):
    net, _ = build(kind)
    with pytest.raises(ConfigError, match="set dropout=0 or exclude_modules='m'"):
        inject(net, LoRA(dropout=0.1, target_modules="m"))


# ---- torch's attention ---------------------------------------------------------------------------------------------
def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.ModuleDict({"enc": nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)}).eval()


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), DoRA(r=2), LoRA(r=2, target_modules="attention"), VeRA(r=4), AdaLoRA(init_r=2, target_r=2), IA3()],
    ids=["all", "dora", "attention", "vera", "adalora", "ia3"],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])], ids=["full", "padded"])
def test_fast_path_sees_the_adapter(method, grad, mask):
    """In eval mode torch's encoder reads the parameters and calls no attention module; also with nested tensors."""
    torch.manual_seed(0)
    net, x = encoder(), torch.randn(2, 5, 8)
    inject(net, method)
    assert any(".self_attn." in n for n in trainable_names(net))
    for p in net.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    with torch.set_grad_enabled(grad):
        live = net["enc"](x, src_key_padding_mask=mask)
    net.train()
    slow = net["enc"](x, src_key_padding_mask=mask)
    net.eval()
    merge(net)
    with torch.no_grad():
        folded = net["enc"](x, src_key_padding_mask=mask)
    if mask is not None:  # the fast path pads its result with zeros
        live, slow, folded = (t[~mask] for t in (live, slow, folded))
    torch.testing.assert_close(live, folded, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(slow, folded, atol=2e-5, rtol=1e-4)


def test_out_proj_alone():
    """Naming the output projection adapts just that, and it is alive although nobody calls it."""
    net, inputs = build("attention")
    before = call(net["m"], inputs)
    inject(net, LoRA(r=2, target_modules="out_proj"))
    assert trainable_names(net) == ["m.out_proj.delta.lora_A", "m.out_proj.delta.lora_B"]
    net["m"].out_proj.delta.lora_B.data.normal_()
    assert not torch.allclose(call(net["m"], inputs), before)
    call(net["m"], inputs).sum().backward()
    assert net["m"].out_proj.delta.lora_A.grad.any()


def test_out_proj_excluded():
    net, _ = build("attention")
    inject(net, LoRA(r=2, target_modules="m", exclude_modules="out_proj"))
    assert trainable_names(net) == ["m.delta.in_proj_weight.lora_A", "m.delta.in_proj_weight.lora_B"]


# ---- fused projections ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["attention", "c_attn"])
@pytest.mark.parametrize("method", [LoRA, DoRA, LoRAFA, DeltaLoRA])
@pytest.mark.parametrize("parts", [["q", "v"], ["k"], ["v", "q", "k"]])
def test_fused_parts(kind, method, parts):
    """Each part has its own factors; the rows of the others stay those of the base."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    if kind == "c_attn":
        net, name = nn.ModuleDict({"c_attn": Conv1D(24, 8)}).double(), "c_attn"
    else:
        net, name = build("attention")[0], "m"
    options = {"exclude_modules": "out_proj"} if name == "m" else {}
    plain = copy.deepcopy(net)
    inject(net, method(r=2, alpha=3, target_modules=name, fused_parts=parts, **options))
    delta = next(iter(places(net).values()))
    assert delta.lora_A.shape == (2 * len(parts), 8) and delta.lora_B.shape == (8 * len(parts), 2)
    delta.lora_B.data.normal_()
    weight = plain["c_attn"].weight.T if name == "c_attn" else plain["m"].in_proj_weight
    expected = weight.clone()
    for i, part in enumerate(p for p in "qkv" if p in parts):
        row = "qkv".index(part) * 8
        change = 1.5 * delta.lora_B[i * 8 : i * 8 + 8] @ delta.lora_A[i * 2 : i * 2 + 2]
        expected[row : row + 8] += change
    if method is DoRA:
        expected = expected * (delta.lora_magnitude / expected.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(delta.combine(weight), expected)
    if name == "c_attn":
        x = torch.randn(3, 8, dtype=torch.float64)
        torch.testing.assert_close(net[name](x), x @ expected.T + plain[name].bias)
    if method is LoRAFA:
        delta.lora_B.grad = grad = torch.randn_like(delta.lora_B)
        wanted = [
            grad[i * 8 : i * 8 + 8] @ torch.linalg.pinv(a @ a.T + 1e-8 * torch.eye(2).double()) / 1.5**2
            for i, a in enumerate(delta.lora_A.detach().split(2))
        ]
        delta.project()
        torch.testing.assert_close(delta.lora_B.grad, torch.cat(wanted))


def test_fused_parts_need_a_fused_projection():
    with pytest.raises(ConfigError, match="none of the 1 targets is a fused"):
        inject(nn.ModuleDict({"q_proj": nn.Linear(4, 12)}), LoRA(fused_parts=["q"]))
    with pytest.raises(ConfigError, match="name some of q, k, v"):
        LoRA(fused_parts=["x"])
    with pytest.raises(ConfigError, match="cannot go with fused_parts"):
        inject(nn.ModuleDict({"qkv": nn.Linear(4, 12)}), LoRA(r=2, fused_parts=["q"], init="pissa"))


# ---- mixtures of experts -------------------------------------------------------------------------------------------
EXPERTS = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4}, "gpt_oss": {"num_local_experts": 4}}


@pytest.mark.parametrize("kind", EXPERTS)
def test_real_mixtures(kind):
    """transformers' stacked experts, in both layouts: every factor trains, merged equals forward."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, "vocab_size": 61}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0, **EXPERTS[kind])
    torch.manual_seed(0)
    model, ids = transformers.AutoModelForCausalLM.from_config(config), torch.randint(1, 61, (2, 20))
    inject(model, LoRA(r=2, target_modules="experts"))
    experts = model.model.layers[0].mlp.experts
    up = experts.delta.gate_up_proj
    assert up.lora_A.shape == (4, 2, 32) and up.lora_B.shape[2] == 2  # A takes the hidden size, whatever the layout
    up.lora_B.data.normal_(), experts.delta.down_proj.lora_B.data.normal_()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().amax((1, 2)).all() for p in experts.delta.parameters())  # every expert was asked
    model.eval()
    live = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, live, atol=2e-5, rtol=1e-3)


# ---- modules and tensors that are shared ---------------------------------------------------------------------------
def test_a_module_under_two_names():
    """Both names run the adapted module; it is counted, saved and merged once."""
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.ModuleList([shared])})
    inject(net, LoRA(r=2, target_modules="a"))
    assert net["a"] is net["b"][0] is net["c"][0] and summarize(net)["trainable"] == 16
    net["a"].delta.lora_B.data.normal_()
    x = torch.randn(2, 4)
    out = net["b"](x)
    assert torch.equal(out, net["a"](x)) and not torch.equal(out, shared._base_forward(x))
    assert len(adapter_state_dict(net)) == 2
    merge(net)
    torch.testing.assert_close(net["b"](x), out)
    unload(net)
    assert net["a"] is net["b"][0] is net["c"][0] is shared


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]], ids=str)
def test_tied_embeddings(targets):
    """Each side takes its own correction, forward and merged; the other keeps the tensor; unmerging ties them again."""
    torch.manual_seed(0)
    net, ids = Tied().double(), torch.tensor([[1, 2, 8]])
    weight = net.embed.weight
    inject(net, LoRA(r=2, target_modules=targets))
    change = {}
    for name in targets:
        delta = net.get_submodule(name).delta
        delta.lora_A.data.normal_(), delta.lora_B.data.normal_()
        change[name] = delta.product().T if name == "embed" else delta.product()
    expected = (weight + change.get("embed", 0))[ids] @ (weight + change.get("head", 0)).T
    torch.testing.assert_close(net(ids), expected)
    merge(net)
    torch.testing.assert_close(net(ids), expected)
    unmerge(net)
    assert net.embed.weight is net.head.weight is weight
    state = adapter_state_dict(net)
    assert len(state) == 2 * len(targets) and not any("weight" in n for n in state)
