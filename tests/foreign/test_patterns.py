"""What foreign code does with its layers, under every method: each network of `patterns` goes through a whole life."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import (
    PEFTError,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
    trainable_names,
    unload,
    unmerge,
)
from tests.contract.battery import same, shake
from tests.foreign.cases import HOOKS, METHODS, Case, anatomy, close
from tests.foreign.patterns import PATTERNS
from tests.models import frozen_copy

CASES = {
    f"{pattern_name}-{method_name}": Case(pattern, entry)
    for pattern_name, pattern in PATTERNS.items()
    for method_name, entry in METHODS.items()
    if getattr(pattern, entry.family) is not None and not (pattern.kind == "attention" and method_name == "ia3_input")
}
ACCEPTED = [pytest.param(case, id=name) for name, case in CASES.items() if case.pattern.refused is None]
REFUSED = [pytest.param(case, id=name) for name, case in CASES.items() if case.pattern.refused is not None]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name(case):
    model = case.pattern.build()
    before, base = anatomy(model), case.output(model)
    with pytest.raises(PEFTError, match=case.pattern.refused) as caught:
        inject(model, case.method)
    assert "fc" in str(caught.value)
    assert anatomy(model) == before and torch.equal(case.output(model), base)


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_adapted_layer_stays_itself(case):
    """Same objects, classes, names, references and hooks; a plain state dict fits; `unload` leaves no trace."""
    model = case.pattern.build()
    if case.may_refuse and case.refuses(model):
        return
    before, plain, base = anatomy(model), frozen_copy(model), case.output(model)
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    inject(model, case.method)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, old in before.items():
        module = modules[name]
        assert id(module) == old["object"], name
        assert isinstance(module, old["class"]), name
        for attribute in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(module), attribute) == getattr(old["class"], attribute), name
        added = set(module.__dict__) - old["attributes"]
        if not name:
            added -= {"_lightning_peft", "forward"}  # the record of the injection; a root that reads keeps its class
        assert len(added) <= 1 and all(attribute.startswith("_") for attribute in added), (name, added)
        for kind in HOOKS:
            assert set(old["hooks"][kind]) <= {id(hook) for hook in getattr(module, kind).values()}, (name, kind)
    assert type(model) is before[""]["class"]
    now = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert {name: now.get(name) for name in names} == names
    assert [name for name in now if name not in names and ".delta." not in f".{name}"] == []
    if case.method.identity_at_init:
        close(case.output(model), base, max(1e-5, case.pattern.atol / 10))
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert unexpected == [] and [name for name in missing if ".delta." not in f".{name}"] == []
    shake(model)
    case.output(model)
    case.output(model, grad=True)
    unload(model)
    assert anatomy(model) == before
    assert same(frozen_copy(model), plain) and torch.equal(case.output(model), base)


@pytest.mark.parametrize("case", ACCEPTED)
def test_it_trains_and_switches_and_merges(case):
    """Every tensor gets a gradient; off it is the base; merged it is the same function, and unmerging undoes that."""
    model = case.adapted()
    if model is None:
        return
    # torch computes some layers in another way where nothing needs a gradient
    base = case.output(case.pattern.build().requires_grad_(False))
    assert case.train(model) == []
    shake(model)
    adapted = case.output(model)
    assert (adapted - base).abs().max() > 1e-4
    close(case.output(model, grad=True).detach(), adapted, max(1e-5, case.pattern.atol / 10))
    with disabled(model):
        assert torch.equal(case.output(model), base)
    assert torch.equal(case.output(model), adapted)
    objects = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    if not case.merges(model):
        return
    close(case.output(model), adapted, case.pattern.atol)
    close(case.output(model, grad=True).detach(), adapted, case.pattern.atol)
    with disabled(model):
        assert torch.equal(case.output(model), base)
    unmerge(model)
    for name, parameter in model.named_parameters():
        assert id(parameter) == objects[name][0] and torch.equal(parameter, objects[name][1]), name
    assert torch.equal(case.output(model), adapted)
    merge_and_unload(model)
    close(case.output(model), adapted, case.pattern.atol)
    plain = case.pattern.build()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())


def plainly(copied, case: Case) -> bool:
    """Whether the network without adapters survives a way of copying; then the adapted one must."""
    model = case.pattern.build().requires_grad_(False)
    expected = case.output(model)
    try:
        return torch.equal(case.output(copied(model)), expected)
    except (RuntimeError, TypeError, AttributeError, pickle.PicklingError, RecursionError):
        return False


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("case", ACCEPTED)
def test_copies_and_files_give_the_same_output(case, tmp_path):
    """Deep copies and pickles stand for themselves, and the saved adapter fits a fresh network."""
    model = case.adapted()
    if model is None:
        return
    shake(model)
    adapted = case.output(model)
    case.output(model, grad=True)  # leaves nothing behind that could not be copied
    for copied in (copy.deepcopy, pickled):
        if not plainly(copied, case):
            continue
        try:
            other = copied(model)
        except (PEFTError, pickle.PicklingError):
            assert case.pattern.may_not_pickle and copied is pickled
            continue
        assert torch.equal(case.output(other), adapted)
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
        assert trainable_names(other) == trainable_names(model)
        shake(other)
        assert torch.equal(case.output(model), adapted), "the copy shares tensors with the original"
        unload(other)
        assert list(other.state_dict()) == list(case.pattern.build().state_dict())
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = case.pattern.build()
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(case.output(fresh), adapted)
    assert same(adapter_state_dict(fresh), adapter_state_dict(model))
