"""One method on one network of `patterns`: how it is put in, trained and looked at."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

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
    inject,
    merge,
    trainable_names,
    unload,
)
from tests.contract.battery import same
from tests.foreign.patterns import PATTERNS, Pattern
from tests.models import frozen_copy


@dataclass(frozen=True)
class Entry:
    """A method, its family, the kinds of layers that it may refuse, and those that it may adapt but not merge."""

    method: Method
    family: str = "weights"
    may_refuse: frozenset[str] = field(default=frozenset())
    may_not_merge: frozenset[str] = field(default=frozenset())


def _entry(method: Method, *may_refuse: str, may_not_merge: tuple[str, ...] = ()) -> Entry:
    return Entry(method, may_refuse=frozenset(may_refuse), may_not_merge=frozenset(may_not_merge))


_NOT_SCALED = ("scale-free", "embedding", "rnn", "experts", "other", "foreign-odd")
# a scaled output is not always that of a scaled weight
_OWN_FORWARD = ("own", "own-conv", "scale-free", "foreign", "foreign-odd")
_LINEAR_ONLY = ("conv", "own-conv", "scale-free", "embedding", "rnn", "experts", "other", "foreign-odd")
METHODS: dict[str, Entry] = {
    "lora": _entry(LoRA(r=2)),
    "pissa": _entry(LoRA(r=2, init="pissa"), "rnn"),
    "dora": _entry(DoRA(r=2), "rnn"),
    "lorafa": _entry(LoRAFA(r=2), "rnn"),
    "vera": _entry(VeRA(r=4), *_LINEAR_ONLY),
    "deltalora": _entry(DeltaLoRA(r=2, start_step=1), "rnn"),
    "adalora": _entry(AdaLoRA(init_r=3, target_r=2), "rnn"),
    "ia3": _entry(IA3(feedforward_modules=[]), *_NOT_SCALED, may_not_merge=_OWN_FORWARD),
    "ia3_input": _entry(IA3(), *_NOT_SCALED, "foreign", may_not_merge=_OWN_FORWARD),
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

    def merges(self, model: nn.Module) -> bool:
        """Merge, or see it refused clearly and without effect where that is allowed; whether it was merged."""
        reason, adapted = self.pattern.no_merge, self.output(model)
        if self.entry.family != "weights":
            reason = "merge"
        elif reason is None and self.pattern.kind not in self.entry.may_not_merge:
            merge(model)
            return True
        try:
            merge(model)
        except MergeError as error:
            assert re.search(reason or type(self.layer(model)).__name__, str(error)), error
            assert torch.equal(self.output(model), adapted)
            return False
        assert reason is None, "merging was not refused"
        return True

    def layer(self, model: nn.Module) -> nn.Module:
        """The first module that the method adapts."""
        targets = getattr(self.pattern, self.entry.family)
        return model.get_submodule(targets if isinstance(targets, str) else targets[0])

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
            assert first in str(error) or type(self.layer(model)).__name__ in str(error), error
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


def case_of(pattern: str, method: str) -> Case:
    """A case by the names of its parts."""
    return Case(PATTERNS[pattern], METHODS[method])


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


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
            "buffers": {key for key, _ in module._buffers.items()},
            "hooks": {kind: [id(hook) for hook in getattr(module, kind).values()] for kind in HOOKS},
            "flags": [p.requires_grad for p in module._parameters.values() if p is not None],
        }
    return found


def close(a: Tensor, b: Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
