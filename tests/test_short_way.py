"""The short way of low-rank layers equals the plain formula: values, gradients, what is kept, where it steps aside."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_peft import LoRA, LoRAFA, inject, trainable_names
from lightning_peft.lowrank import LowRankLinear, fast
from lightning_peft.lowrank.fast import is_plain_execution
from lightning_peft.lowrank.inputs import parts_of
from tests.models import MODELS, batch


class Block(nn.Module):
    """A norm, three projections of its output, a gate: every kind of input a language model has."""

    def __init__(self, bias: bool = False, norm: str = "rms", width: int = 6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.norm = nn.LayerNorm(width) if norm == "layer" else None
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=bias), nn.Linear(width, 4, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.gate_proj, self.up_proj = nn.Linear(width, 5, bias=bias), nn.Linear(width, 5, bias=bias)
        self.down_proj = nn.Linear(5, width, bias=bias)

    def normed(self, x):
        if self.norm is not None:
            return self.norm(x)
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x):
        h = self.normed(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + q.tanh() * v + k.sum(-1, keepdim=True)
        h = self.normed(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Inputs take the way of large ones, whatever their size."""
    monkeypatch.setattr(fast, "SMALL", -1)


@pytest.fixture(params=["large", "small"])
def either_way(request, large, monkeypatch):
    """Inputs take one of the two faster ways, whatever their size."""
    if request.param == "small":
        monkeypatch.setattr(fast, "SMALL", 10**9)


def block(method=None, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Identity(), Block(**options)).double()
    inject(net, method or LoRA(r=2, alpha=3))
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return net


def plainly(net: nn.Module) -> nn.Module:
    """A copy that takes the plain formula."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, LowRankLinear):
            module._adapter.fast = False
    return net


def grads(net: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    out = (call or net)(x)
    return [out, *torch.autograd.grad(out.pow(2).sum(), [x, *(p for p in net.parameters() if p.requires_grad)])]


def same(a, b, **tolerance):
    for ours, right in zip(a, b, strict=True):
        torch.testing.assert_close(ours, right, **tolerance)


@pytest.mark.parametrize("length", [3, 40], ids=["short", "long"])  # the two layouts of low-rank products
@pytest.mark.parametrize("method", [LoRA(r=2, alpha=3), LoRAFA(r=2)], ids=str)
def test_a_backward_pass_inside_autocast_of_a_forward_pass_outside_it(method, length):
    """As manual optimization under bf16-mixed may do: computed as the forward pass was, to the same numbers."""
    net = block(method).float()
    x = torch.randn(2, length, 6, requires_grad=True)
    tensors = [x, *(p for p in net.parameters() if p.requires_grad)]
    outside = torch.autograd.grad(net(x).pow(2).sum(), tensors)
    loss = net(x).pow(2).sum()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(loss, tensors)
    same(inside, outside)
    assert all(g.dtype is torch.float32 for g in inside)


def test_second_derivatives_inside_autocast_of_a_forward_pass_outside_it():
    """As the plain formula has them, which autocast rounds to bfloat16."""
    net, x = block().float(), torch.randn(2, 3, 6, requires_grad=True)
    found = []
    for each in (net, plainly(net)):
        tensors = [x, *(p for p in each.parameters() if p.requires_grad)]
        loss = each(x).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append([first, *torch.autograd.grad(first.pow(2).sum(), tensors)])
        outside = torch.autograd.grad(each(x).pow(2).sum(), x, create_graph=True)[0].pow(2).sum()
        scales = [g.abs().max() for g in torch.autograd.grad(outside, tensors)]
    for ours, plain, scale in zip(found[0][1:], found[1][1:], scales, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours / scale, plain / scale, atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norm": "layer"}], ids=["rms", "bias", "layer"])
@pytest.mark.parametrize("method", [LoRA(r=2, alpha=3), LoRAFA(r=2), LoRA(r=1, rank_pattern={"k_proj": 3})], ids=str)
def test_values_and_gradients(method, options, either_way):
    net, x = block(method, **options), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    same(grads(net, x), grads(plainly(net), x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plainly(net)(x), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        assert net(x).isfinite().all()


#: rows in one product; rows in parts; each text a part of its own
SHAPES = {"few": (3, 6), "rows": (64, 6), "texts": (2, 32, 6)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradcheck(norm, shape):
    """First and second derivatives, with respect to the input and to every factor."""
    net = block(LoRA(r=1, alpha=3), norm=norm)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = trainable_names(net)
    factors = [net.get_parameter(n) for n in names]

    def call(x, *values):
        return net(x)

    assert torch.autograd.gradcheck(call, (x, *factors), fast_mode=x.numel() > 18)
    assert torch.autograd.gradgradcheck(call, (x, *factors), fast_mode=x.numel() > 18)


@pytest.mark.parametrize(
    "shape", [(6,), (0, 6), (0, 4, 6), (2, 0, 6), (1, 16, 6), (2, 3, 4, 6), (5, 40, 6), (80, 4, 6)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_any_shape(shape, bias, either_way):
    """One row, none, many, in any number of dimensions; gradients that are expanded or transposed."""
    net, x = block(bias=bias), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    same(grads(net, x), grads(plainly(net), x))
    for loss in (torch.Tensor.sum, lambda y: (y.mT @ y).sum() if y.ndim > 1 else y.sum()):
        found = [
            torch.autograd.grad(loss(m[1].up_proj(x.mT.contiguous().mT if x.ndim > 1 else x)), x)
            for m in (net, plainly(net))
        ]
        same(*found)


def test_a_frozen_factor_cannot_be_differentiated_twice():
    net, x = block(LoRAFA(r=2)), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_only_some_outputs_are_used():
    """Projections that are called out of turn, twice, with another input, or whose output goes nowhere."""
    net, x = block(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def use(net, pattern):
        b, other = net[1], x * 2
        outputs = {
            "alone": lambda: b.k_proj(other),
            "twice": lambda: b.q_proj(other) + b.q_proj(other) + b.v_proj(other),
            "crossed": lambda: b.q_proj(x.sin()) * b.v_proj(other) + b.k_proj(other).sum(),
            "dropped": lambda: (b.q_proj(other), b.k_proj(other), b.v_proj(other))[2],
            "first": lambda: (b.v_proj(other), b.q_proj(other))[0],
        }
        return outputs[pattern]()

    for pattern in ("alone", "twice", "crossed", "dropped", "first"):
        wanted = torch.autograd.grad(use(plainly(net), pattern).pow(2).sum(), x)
        same(torch.autograd.grad(use(net, pattern).pow(2).sum(), x), wanted)


def test_outputs_may_be_written_into(either_way):
    """Code that scales or adds to a projection's output in place, and a second pass over a kept graph."""
    net, x = block(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(net):
        h = x * 1
        q, k, v = net[1].q_proj(h), net[1].k_proj(h), net[1].v_proj(h)
        q *= 2
        v += h
        return (q * v).sum() + k.mul_(3).sum()

    out, wanted = call(net), torch.autograd.grad(call(plainly(net)), x)
    for _ in range(2):
        same(torch.autograd.grad(out, x, retain_graph=True), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outer", [nullcontext, torch.autograd.graph.save_on_cpu], ids=["bare", "offload"])
def test_checkpointing(reentrant, outer, either_way):
    net, x = block(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def call(module):
        out = checkpoint(module, x, use_reentrant=reentrant)
        out.pow(2).sum().backward()
        found = [x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
        x.grad = None
        return found

    with outer():
        ours = call(net)
    same(ours, call(plainly(net)))


def test_hooks_that_change_what_is_saved_are_respected():
    """A hook may pack a tensor into anything: nothing is read past it."""
    net, x = block(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    asked = []

    def unpack(packed):
        asked.append(1)
        return packed / 2

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 2, unpack):
        out = net(x)
        assert not asked
    found = torch.autograd.grad(out.pow(2).sum(), x)
    same(found, grads(plainly(net), x)[1:2])


def test_what_steps_aside(either_way):
    """Hooks on the factors, function transforms and autocast take the plain formula, with equal results."""
    net, x = block(), torch.randn(3, 6, dtype=torch.float64)
    seen = []
    wanted = plainly(net)(x)
    net[1].k_proj.delta.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    torch.testing.assert_close(net(x), wanted)
    assert len(seen) == 1
    values = {n: net.get_parameter(n).detach() for n in trainable_names(net)}
    by_name = torch.func.grad(lambda v: torch.func.functional_call(net, v, (x,)).pow(2).sum())(values)
    each = torch.func.vmap(lambda row: net(row))(x)
    net(x).pow(2).sum().backward()
    for name, grad in by_name.items():
        torch.testing.assert_close(grad, net.get_parameter(name).grad)
    torch.testing.assert_close(each, wanted)
    assert is_plain_execution()
    net, other = net.float(), plainly(net).float()
    with torch.autocast("cpu", torch.bfloat16):
        same([net(x.float())], [other(x.float())], atol=0.02, rtol=0.02)  # bfloat16 has two or three digits
    assert net.to("meta")(x.float().to("meta")).is_meta


def test_one_of_several_layers_in_a_checkpoint():
    net, x = block(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(m):
        b, h = m[1], x * 1
        out = b.q_proj(h).pow(2).sum() + checkpoint(b.k_proj, h, use_reentrant=False).pow(2).sum()
        return torch.autograd.grad(out, [x, *b.q_proj.delta.parameters(), *b.k_proj.delta.parameters()])

    same(call(net), call(plainly(net)))


def set_dropout(m):
    m.k_proj.delta.dropout = 0.999999
    m.train()


CHANGES = {
    "disabled": lambda m: m.k_proj._adapter.switch(m.k_proj, False),
    "bias": lambda m: m.k_proj.bias.add_(1),
    "other bias": lambda m: setattr(m.k_proj, "bias", nn.Parameter(torch.ones(4).double(), False)),
    "scaling": lambda m: setattr(m.k_proj.delta, "scaling", 9.0),
    "other factor": lambda m: setattr(m.k_proj.delta, "lora_B", nn.Parameter(torch.ones(4, 2).double())),
    "hook on the layer": lambda m: m.k_proj.register_forward_hook(lambda module, args, out: out * 2),
    "hook on the factors": lambda m: m.k_proj.delta.register_forward_hook(lambda module, args, out: out * 2),
    "dropout": set_dropout,
    "unfrozen": lambda m: m.k_proj.weight.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_between_two_layers_count(change, either_way):
    """Whatever is changed in one layer after another that reads the same input was called."""
    net, x = block(bias=True), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for m in (copy.deepcopy(net)[1], plainly(net)[1]):
        q = m.q_proj(x)
        with torch.no_grad():
            change(m)
        torch.manual_seed(0)
        out = q.sum() * m.k_proj(x) + m.v_proj(x).sum()
        given = [x, *(p for p in m.k_proj.parameters() if p.requires_grad), m.q_proj.delta.lora_A]
        found.append([out, *torch.autograd.grad(out.sum(), given, allow_unused=True, materialize_grads=True)])
    same(*found)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batched_gradients(shape, either_way):
    """Many gradients in one backward pass (``is_grads_batched``)."""
    net, x = block(LoRA(r=1)), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for m in (net, plainly(net)):
        y = m(x)
        many = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).view(2, *shape)
        found.append(torch.autograd.grad(y, x, many, is_grads_batched=True))
    same(*found)


def test_changed_inputs_are_not_rebuilt():
    """An input, or a part of it, that was written into behind autograd's back; casts that round more than the input."""
    net, part = block(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    layer, gain = net[1].down_proj, torch.rand(5, dtype=torch.float64)
    for whole in (True, False):
        h = part * 1
        x = gain * h
        with torch.no_grad():
            (x if whole else h)[:, :2] = 0
        found = [
            torch.autograd.grad(m(given).pow(2).sum(), m.delta.lora_A)
            for m, given in ((layer, x), (plainly(net)[1].down_proj, x.detach()))
        ]
        same(*found)
    rounded = gain.float() * (part.float() * 1.1).to(torch.bfloat16)
    assert rounded.dtype is torch.float32 and parts_of(rounded).full[0] is rounded
    normed = nn.LayerNorm(5).bfloat16()(part.bfloat16())
    assert parts_of(normed).full[0] is normed


def test_other_bases_and_selective_checkpoints(either_way):
    """A weight made at each call; a checkpoint that keeps the products, which may then not be written into."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    net = block(bias=True)
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    options = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(keep)}
    same(grads(net, x, lambda x: checkpoint(net, x, **options)), grads(plainly(net), x))
    spectral = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 6))).double().eval()
    inject(spectral, LoRA(r=2, target_modules="0"))
    same(grads(spectral, x), grads(plainly(spectral), x))


def test_a_frozen_adapter_may_be_differentiated_twice():
    net, x = block(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for m in (net.requires_grad_(False), plainly(net)):
        (first,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x))
    same(*found)


def test_inputs_are_rebuilt_not_kept():
    """RMSNorm, layer norm and gated products are taken apart exactly; other inputs are kept as they are."""
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) * 1
    b = Block(norm="layer").double().requires_grad_(False)
    for made, parts in (
        (b.norm(x), 5),
        (Block.normed(Block().double().requires_grad_(False), x), 3),
        (F.silu(x) * (x + 1), 2),
        (F.gelu(x), 1),
        (x * x.sum(), 1),
    ):
        found = parts_of(made)
        assert sum(found.counts()) == parts
        torch.testing.assert_close(found.recompute(made.dtype), made, rtol=1e-12, atol=1e-12)
        g = torch.randn(4, 6, dtype=torch.float64)
        wanted = g @ made.reshape(-1, 6)
        for dlow in (g, g.view(4, 2, 3).transpose(0, 1)):
            torch.testing.assert_close(found.gradient_of_A(dlow), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_less_is_kept(kind):
    """Bytes alive between forward and backward, whoever holds them: at most 5 % over the frozen floor on a decoder."""
    import peft

    from tests.benchmarks.contestants import floor
    from tests.benchmarks.measure import counts

    data = batch(kind)
    step = lambda net: net(**data).loss  # noqa: E731
    frozen = MODELS[kind]().requires_grad_(False).eval()
    net = MODELS[kind]().eval()
    inject(net, LoRA(r=2))
    names = [name for name, module in net.named_modules() if isinstance(module, LowRankLinear)]
    theirs = peft.get_peft_model(MODELS[kind]().eval(), peft.LoraConfig(r=2, target_modules=names)).eval()
    ours, plain, peft_, least = (counts(n, step) for n in (net, plainly(net), theirs, floor(frozen)))
    assert ours["flops"] == plain["flops"]
    most = 0.65 if kind == "llama" else 0.75
    assert ours["dispatches"] - least["dispatches"] <= most * (peft_["dispatches"] - least["dispatches"])
    assert ours["kept"] < plain["kept"] and (kind == "bert" or ours["kept"] < 1.05 * least["kept"])


def test_backward_inside_autocast():
    """Manual optimization may call backward where autocast is on, though the forward was outside it."""
    net = block(bias=True).float()
    x = torch.randn(2, 40, 6, requires_grad=True)
    given = [x, *(p for p in net.parameters() if p.requires_grad)]
    for create_graph in (False, True):
        outside = torch.autograd.grad(net(x).pow(2).sum(), given, create_graph=create_graph)
        loss = net(x).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(loss, given, create_graph=create_graph)
        same(inside, outside)
