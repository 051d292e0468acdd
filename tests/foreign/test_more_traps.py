"""Further things that foreign code does with adapted layers, each met by a hostile reader."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import ConfigError, Houlsby, LoRA, disabled, inject, merge, unload
from tests.contract.battery import shake


def checked(model: nn.Module, x: Tensor, method=None) -> nn.Module:
    """Injected: the base at the start, then another function, which merging keeps; off it is the base again."""
    base = model(x)
    inject(model, method or LoRA(r=2, target_modules="fc"))
    torch.testing.assert_close(model(x), base)
    shake(model)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3, "the adapter does not act"
    with disabled(model):
        assert torch.equal(model(x), base)
    merge(model)
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)
    return model


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_a_scripted_part_elsewhere_does_no_harm():
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 6), torch.jit.script(nn.LayerNorm(6))

        def forward(self, x):
            return self.norm(self.fc(x))

    checked(Scripted(), X)


class Alias(nn.Module):
    """Reads a tensor of a layer deep below through a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.fc = nn.Linear(6, 6)

    def forward(self, x):
        layer = self.model.fc
        return F.linear(x, layer.weight)


class Closure(nn.Module):
    """Reads in a function inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return (lambda rows: F.linear(rows, self.fc.weight))(x)


class Reads:
    """A mixin behind `nn.Module`."""

    def forward(self, x):
        return F.linear(x, self.fc.weight)


class Mixed(nn.Module, Reads):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    forward = Reads.forward


class Recursive(nn.Module):
    """Calls itself before it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, again: bool = True):
        if again:
            x = self(x.flip(0), False)
        return F.linear(x, self.fc.weight)


@pytest.mark.parametrize("kind", [Alias, Closure, Mixed, Recursive])
@pytest.mark.parametrize("nested", [False, True])
def test_readers_are_found(kind, nested):
    checked(nn.Sequential(kind()) if nested else kind(), X)


class Clamps(nn.Module):
    """Writes into the weight before it calls the layer, as a constrained layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        self.fc.weight.data.clamp_(min=0)
        return self.fc(x)


def test_writes_reach_the_parameter():
    """The frozen weight is what the module makes of it, as without adapters."""
    model = Clamps()
    base = model(X)
    inject(model, LoRA(r=2, target_modules="fc"))
    torch.testing.assert_close(model(X), base)
    with torch.no_grad():
        model.fc.weight.sub_(0.1)
    shake(model)
    model(X)
    assert (model.fc.weight >= 0).all()


class CheckpointedLinear(nn.Linear):
    """Computes in a checkpoint inside its forward."""

    def part(self, x):
        return F.linear(x, self.weight * 2)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


class CheckpointedReader(nn.Module):
    """A parent that reads in a checkpoint inside its forward, and calls the layer there as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def part(self, x):
        return F.linear(x, self.fc.weight) + self.fc(x)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["layer", "reader"])
def test_checkpoints_inside_a_forward(kind, reentrant):
    """What runs again in the backward pass reads the same weights as before."""
    model = nn.Sequential(CheckpointedLinear(6, 6) if kind == "layer" else CheckpointedReader())
    model[0].reentrant = reentrant
    inject(model, LoRA(r=2, target_modules="0" if kind == "layer" else "0.fc"))
    shake(model)
    x = X.clone().requires_grad_()
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    part = model[0].part
    expected = part(x) if kind == "reader" else None
    model(x).pow(2).sum().backward()
    found = [tensor.grad for tensor in trained]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    layer = model[0] if kind == "layer" else model[0].fc
    delta = layer.delta
    weight = layer.weight + delta.product()
    x2 = X.clone().requires_grad_()
    out = F.linear(x2, weight * 2) + layer.bias * 0
    if kind == "reader":
        out = F.linear(x2, weight) + F.linear(x2, weight, layer.bias)
    wanted = torch.autograd.grad(out.pow(2).sum(), [x2, delta.lora_A, delta.lora_B])
    assert expected is None or expected.shape == out.shape
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-4)


class Walks(nn.Linear):
    """A layer with a forward of its own that loops over its parts."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.act = nn.Tanh()

    def forward(self, x):
        y = F.linear(x, self.weight)
        for part in self.children():
            y = part(y)
        return y


def test_a_layer_that_walks_over_its_parts():
    model = nn.ModuleDict({"fc": Walks()})
    x = torch.randn(6, 6)
    layer = model["fc"]
    base = layer(x)
    inject(model, LoRA(r=2))
    torch.testing.assert_close(layer(x), base)
    shake(model)
    assert not torch.allclose(layer(x), base)
    with disabled(model):
        assert torch.equal(layer(x), base)
    model.double()
    assert layer.delta.lora_A.dtype is torch.float64
    assert not layer.eval().delta.training and layer.train().delta.training


def test_callers_may_ask_for_the_arguments():
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x):
            known = inspect.signature(self.block.forward).parameters
            given = {"shift": 1.0, "other": 2.0}
            return self.block(x=x, **{name: value for name, value in given.items() if name in known})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, shift=0.0):
            return self.fc(input=x) + shift

    model = Filters()
    base = model(X)
    inject(model, Houlsby(target_modules="block", reduction_factor=2))
    torch.testing.assert_close(model(X), base)
    assert list(inspect.signature(model.block.forward).parameters) == ["x", "shift"]


def test_a_parent_that_has_an_attribute_of_our_names_may_read():
    class Names(nn.Module):
        merged = False

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return F.linear(x, self.fc.weight)

    checked(nn.Sequential(Names()), X)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_computed_recurrent_weights_are_refused(make):
    for norm in (nn.utils.parametrizations.weight_norm, lambda m, n: nn.utils.weight_norm(m, n)):
        model = nn.Sequential(norm(make(6, 4), "weight_hh_l0"))
        with pytest.raises(ConfigError, match=r"'0'.*weight_hh_l0 is computed"):
            inject(model, LoRA(r=2, target_modules="0"))


@pytest.mark.parametrize("kind", ["lstm", "loop", "encoder"])
def test_threads_leave_the_model_whole(kind):
    """Right outputs in every thread, and afterwards the same model."""
    torch.manual_seed(0)
    if kind == "lstm":
        model, x, method = nn.Sequential(nn.LSTM(6, 6)), torch.randn(4, 3, 6), LoRA(r=2, target_modules="0")
    elif kind == "loop":
        model, x, method = nn.Sequential(Walks()), torch.randn(3, 6), Houlsby(target_modules="0", reduction_factor=2)
    else:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        model, x, method = nn.Sequential(layer), torch.randn(2, 3, 8), Houlsby(reduction_factor=2)

    def first(outputs):
        return outputs[0] if isinstance(outputs, tuple) else outputs

    base = first(model(x)).detach()
    inject(model, method)
    shake(model)
    inputs = [x * (i + 1) for i in range(4)]
    expected = [first(model(each)).detach() for each in inputs]
    with ThreadPoolExecutor(4) as threads:
        for i, out in enumerate(threads.map(lambda i: first(model(inputs[i % 4])).detach(), range(120))):
            torch.testing.assert_close(out, expected[i % 4])
    assert "delta" in model.state_dict().__str__()
    copy.deepcopy(model)
    unload(model)
    assert torch.equal(first(model(x)), base)


def test_an_interrupted_forward_leaves_no_window_open():
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.stop = nn.Linear(6, 6), False

        def forward(self, x):
            y = F.linear(x, self.fc.weight)
            if self.stop:
                raise KeyboardInterrupt
            return y

    model = Stops()
    base = model(X)
    inject(model, LoRA(r=2, target_modules="fc"))
    shake(model)
    model.stop = True
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.stop = False
    with disabled(model):
        assert torch.equal(model(X), base)
    assert model.fc.weight is model.fc._parameters["weight"]
