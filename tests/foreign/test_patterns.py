"""What foreign code does with its layers, under every method: each network of `patterns` goes through a whole life."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    DeltaLoRA,
    DoRA,
    Houlsby,
    LoRA,
    LoRAFA,
    MergeError,
    Method,
    PEFTError,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    trainable_names,
    unload,
    unmerge,
)
from tests.contract.battery import same, shake
from tests.foreign.patterns import PATTERNS, Pattern
from tests.models import frozen_copy


@dataclass(frozen=True)
class Entry:
    """A method, its family, and the kinds of layers that it may refuse."""

    method: Method
    family: str = "weights"
    may_refuse: frozenset[str] = field(default=frozenset())


def _entry(method: Method, *may_refuse: str) -> Entry:
    return Entry(method, may_refuse=frozenset(may_refuse))


_NOT_SCALED = ("scale-free", "embedding", "rnn", "experts", "other", "foreign-odd")
_LINEAR_ONLY = ("conv", "scale-free", "embedding", "rnn", "experts", "other", "foreign-odd")
METHODS: dict[str, Entry] = {
    "lora": _entry(LoRA(r=2)),
    "pissa": _entry(LoRA(r=2, init="pissa"), "rnn"),
    "dora": _entry(DoRA(r=2), "rnn"),
    "lorafa": _entry(LoRAFA(r=2), "rnn"),
    "vera": _entry(VeRA(r=4), *_LINEAR_ONLY),
    "deltalora": _entry(DeltaLoRA(r=2, start_step=1), "rnn"),
    "adalora": _entry(AdaLoRA(init_r=3, target_r=2), "rnn"),
    "ia3": _entry(IA3(feedforward_modules=[]), *_NOT_SCALED),
    "ia3_input": _entry(IA3(), *_NOT_SCALED, "foreign"),
    "houlsby": Entry(Houlsby(reduction_factor=2), "bottleneck"),
    "pfeiffer": Entry(Pfeiffer(reduction_factor=2, non_linearity="tanh"), "bottleneck"),
    "prefix": Entry(PrefixTuning(num_virtual_tokens=3), "prefix"),
    "ptuning_v2": Entry(PTuningV2(num_virtual_tokens=2, positions="keep"), "prefix"),
    "prompt": Entry(PromptTuning(num_virtual_tokens=3), "prompt"),
    "ptuning": Entry(PTuning(num_virtual_tokens=2, encoder="mlp"), "prompt"),
}


@dataclass
class Case:
    """One method on one network."""

    pattern: Pattern
    entry: Entry

    @property
    def method(self) -> Method:
        """The method, with the targets that the network names for its family."""
        targets = getattr(self.pattern, self.entry.family)
        if targets == "":
            return self.entry.method
        options = {"target_modules": targets}
        if isinstance(self.entry.method, IA3) and self.entry.method.feedforward_modules:
            options["feedforward_modules"] = targets
        return dataclasses.replace(self.entry.method, **options)

    @property
    def may_refuse(self) -> bool:
        """Whether a clear refusal is as good as success."""
        return self.pattern.may_refuse or self.pattern.kind in self.entry.may_refuse

    def output(self, model: nn.Module, grad: bool = False) -> Tensor:
        """What the network gives for its inputs."""
        with torch.set_grad_enabled(grad):
            return model(*self.pattern.inputs())

    def adapted(self) -> nn.Module | None:
        """The network with the method in it; None where the method may refuse and did so clearly."""
        model = self.pattern.build()
        if self.may_refuse and self.refuses(model):
            return None
        inject(model, self.method)
        return model

    def refuses(self, model: nn.Module) -> bool:
        """Whether the method refuses; then the message names the module or its class, and nothing has changed."""
        before, values = anatomy(model), frozen_copy(model)
        try:
            inject(model, self.method)
        except PEFTError as error:
            targets = getattr(self.pattern, self.entry.family)
            first = targets if isinstance(targets, str) else targets[0]
            named = {first, f"{type(model.get_submodule(first)).__name__}"}
            assert any(name in str(error) for name in named), error
            assert anatomy(model) == before and same(frozen_copy(model), values)
            return True
        unload(model)
        return False

    def train(self, model: nn.Module, steps: int = 3) -> list[str]:
        """Train on a linear function of the output; the names of trained tensors that got no gradient."""
        model.train()
        optimizer = torch.optim.AdamW(self.method.param_groups(model, 1e-2, 0.0))
        idle = set(trainable_names(model))
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            out = self.output(model, grad=True)
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
            for name, parameter in model.named_parameters():
                # a gradient that is rounding noise is none
                if name in idle and parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
                    idle.discard(name)
            optimizer.step()
            self.method.after_step(model, step, None)
        model.eval()
        return sorted(name for name in idle if not name.endswith(self.pattern.no_gradient or "\n"))


CASES = {
    f"{pattern_name}-{method_name}": Case(pattern, entry)
    for pattern_name, pattern in PATTERNS.items()
    for method_name, entry in METHODS.items()
    if getattr(pattern, entry.family) is not None and not (pattern.kind == "attention" and method_name == "ia3_input")
}
ACCEPTED = [pytest.param(case, id=name) for name, case in CASES.items() if case.pattern.refused is None]
REFUSED = [pytest.param(case, id=name) for name, case in CASES.items() if case.pattern.refused is not None]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def anatomy(model: nn.Module) -> dict[str, dict]:
    """What other code can see of each module, under every name that it has."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {
            "object": id(module),
            "class": type(module),
            "attributes": set(module.__dict__),
            "parts": {key: id(part) for key, part in module._modules.items()},
            "parameters": {key: id(p) for key, p in module._parameters.items()},
            "buffers": set(module._buffers),
            "hooks": {kind: [id(hook) for hook in getattr(module, kind).values()] for kind in _HOOKS},
            "flags": [p.requires_grad for p in module._parameters.values() if p is not None],
        }
    return found


def close(a: Tensor, b: Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


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
        assert len(added) <= 1 and all(attribute.startswith("_") for attribute in added), (name, added)
        for kind in _HOOKS:
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
    if case.entry.family != "weights" or case.pattern.no_merge:
        with pytest.raises(MergeError, match=case.pattern.no_merge if case.entry.family == "weights" else "merge"):
            merge(model)
        assert torch.equal(case.output(model), adapted)
        return
    objects = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    merge(model)
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
        other = copied(model)
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
