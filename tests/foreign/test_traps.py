"""What else happens to layers: they are sharded, converted, parametrized, replicated, copied, traced, tied."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_peft import (
    PEFT,
    Houlsby,
    LoRA,
    MergeOnFitEnd,
    PEFTError,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    adapter_state_dict,
    disabled,
    inject,
    merge,
    trainable_names,
    unload,
    unmerge,
)
from tests.contract.battery import same, shake
from tests.foreign.cases import Case, anatomy, case_of, close
from tests.foreign.patterns import PATTERNS, Hold, OwnAttention, ReadsWeight, transparent
from tests.lifecycle.test_optional_parts import Sgd
from tests.models import frozen_copy, llama, plain_loader, trainer

#: networks whose layers hold their weight as a parameter, of every way in which the correction is made
HELD = [
    "plain",
    "masked",
    "cosine",
    "scaled",
    "std_conv",
    "same_conv",
    "graph_linear",
    "reads_weight",
    "reads_and_calls",
    "reads_table",
    "reads_facts",
    "embedding",
    "conv2d",
]
#: the same and layers with several weights
COMPUTED = [*HELD, "asks_attention", "lstm", "gru_cell", "experts"]


def adapted(pattern: str, method: str = "lora") -> tuple[nn.Module, Case]:
    """A network with an adapter whose values are far from their start."""
    case = case_of(pattern, method)
    model = case.adapted()
    assert model is not None
    shake(model)
    return model, case


# ---- the weight outside a forward ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("pattern", HELD)
def test_outside_a_forward_the_weight_is_the_parameter(pattern, method):
    """Before a pass, behind it, behind one that broke off, switched off, merged and unmerged."""
    case = case_of(pattern, method)
    model = case.adapted()
    if model is None:
        return
    layer = case.layer(model)

    def check() -> None:
        assert layer.weight is layer._parameters["weight"]
        assert getattr(layer, "bias", None) is layer._parameters.get("bias")

    original = layer.weight
    assert isinstance(original, nn.Parameter)
    shake(model)
    check()
    case.output(model, grad=True).sum().backward()
    check()
    with pytest.raises((RuntimeError, IndexError, TypeError, AssertionError)):
        model(torch.zeros(2, 3, 13))
    check()
    case.output(model)
    with disabled(model):
        check()
    if case.merges(model):
        check()
        unmerge(model)
    check()
    assert layer.weight is original


@pytest.mark.parametrize("pattern", HELD)
def test_initialising_writes_into_the_parameter(pattern):
    model, case = adapted(pattern)
    layer = case.layer(model)
    parameter = layer._parameters["weight"]
    nn.init.zeros_(layer.weight)
    assert not parameter.any()
    nn.init.constant_(layer.weight, 0.25)
    plain = case.pattern.build()
    nn.init.constant_(case.layer(plain).weight, 0.25)
    with disabled(model):
        assert torch.equal(case.output(model), case.output(plain))
    assert layer._parameters["weight"] is parameter


@pytest.mark.parametrize("pattern", HELD)
def test_a_weight_can_be_set_and_deleted(pattern):
    """Set to itself it counts the adapter once; a new one is the new base; deleted it is gone, as in torch."""
    model, case = adapted(pattern)
    layer, expected = case.layer(model), case.output(model)
    layer.weight = layer.weight
    assert torch.equal(case.output(model), expected)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    close(case.output(model), expected, 1e-6)
    new = nn.Parameter(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(9)))
    layer.weight = new
    assert layer.weight is new and layer._parameters["weight"] is new
    plain = case.pattern.build()
    case.layer(plain).weight = new
    with disabled(model):
        assert torch.equal(case.output(model), case.output(plain))
    with pytest.raises(TypeError):
        layer.weight = torch.zeros_like(new)
    del layer.weight
    assert "weight" not in layer._parameters and not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight
    layer.register_parameter("weight", None)
    assert layer.weight is None


@pytest.mark.parametrize("pattern", HELD)
def test_a_state_dict_can_be_assigned(pattern):
    """``assign=True`` sets parameters by their attributes; conversion may swap what they hold."""
    model, case = adapted(pattern)
    plain = case.pattern.build()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = frozen_copy(plain)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert unexpected == [] and all(".delta." in f".{name}" for name in missing)
    assert torch.equal(case.layer(model).weight, case.layer(plain).weight)
    with disabled(model):
        close(case.output(model), case.output(plain), 1e-6)
    assert not torch.equal(case.output(model), case.output(plain))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        weight = case.layer(model).weight
        model.to(torch.float64)
        assert case.layer(model).weight is weight and weight.dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_read_weight_has_the_dtype_of_the_parameter():
    """A parent in bfloat16 meets no float32, although the factors are."""

    class Notes(ReadsWeight):
        def hidden(self, x):
            weight = self.fc.weight
            self.seen = (weight.dtype, weight.device, weight.shape)
            return F.linear(x, weight)

    model = Notes().bfloat16()
    inject(model, LoRA(r=2, target_modules="fc"))
    assert model.fc.delta.lora_A.dtype == torch.float32
    out = model(torch.randn(2, 6).bfloat16())
    assert out.dtype == torch.bfloat16 and model.seen == (torch.bfloat16, torch.device("cpu"), torch.Size([5, 6]))
    out.sum().backward()
    assert model.fc.delta.lora_B.grad.any()


def test_reading_facts_is_not_reading_the_weight():
    """Dropout acts on activations, so no warning says that it cannot; where the weight is read, one does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(PATTERNS["reads_facts"].build(), LoRA(dropout=0.1, target_modules="fc"))
    with pytest.warns(UserWarning, match=r"dropout=0.1"):
        inject(PATTERNS["reads_weight"].build(), LoRA(dropout=0.1, target_modules="fc"))


def test_a_new_layer_of_the_class_of_an_adapted_one_is_plain():
    """Code that enlarges or splits layers makes them by ``type(layer)(…)``."""
    model, x = PATTERNS["plain"].build(), torch.randn(3, 6)
    inject(model, LoRA(r=2, target_modules="fc"))
    made = type(model.fc)(6, 5)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    assert list(made.state_dict()) == ["weight", "bias"] and torch.equal(copy.deepcopy(made)(x), made(x))


def test_an_adapted_layer_can_be_replaced():
    """By code that builds a new head; the rest goes on."""
    model, x = PATTERNS["reads_two"].build(), torch.randn(3, 6)
    inject(model, LoRA(r=2, target_modules=["linear1", "linear2"]))
    shake(model)
    model.linear2 = nn.Linear(8, 6)
    with torch.no_grad():
        close(model(x), model.linear2(torch.relu(model.linear1(x))), 1e-6)


def test_classes_are_shared_and_those_of_torch_stay_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    members = dict(vars(nn.Linear))
    inject(model, LoRA(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is type(model[1]) and type(model[0]) is not nn.Linear and type(model[2]) is nn.Linear
    assert dict(vars(nn.Linear)) == members
    assert [m for m in model.modules() if isinstance(m, nn.Linear)] == list(model)


# ---- references and hooks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera", "houlsby", "pfeiffer"])
def test_hooks_set_earlier_see_the_corrected_output(method):
    """Forward hooks, pre-hooks and full backward hooks, before and behind, and hooks over all modules."""
    model, seen = PATTERNS["plain"].build(), {}
    model.fc.register_forward_pre_hook(lambda m, args: seen.update(input=args[0]))
    model.fc.register_forward_hook(lambda m, args, out: seen.update(output=out))
    model.fc.register_full_backward_hook(lambda m, gave, got: seen.update(gradient=got[0]))
    model.fc.register_full_backward_pre_hook(lambda m, got: seen.update(ahead=got[0]))
    inject(model, case_of("plain", method).method)
    shake(model)
    everywhere = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: everywhere.append((m, out)))
    x = torch.randn(3, 6)
    try:
        out = model(x)
    finally:
        handle.remove()
    assert torch.equal(model.head(torch.tanh(seen["output"])), out) and seen["input"] is x
    assert any(m is model.fc and o is seen["output"] for m, o in everywhere)
    seen["output"].retain_grad()
    out.square().sum().backward()
    assert torch.equal(seen["gradient"], seen["ahead"])
    torch.testing.assert_close(seen["gradient"], seen["output"].grad)


def test_a_hook_can_be_taken_off_later():
    model = PATTERNS["plain"].build()
    handle = model.fc.register_forward_hook(lambda m, args, out: out * 2)
    inject(model, LoRA(r=2, target_modules="fc"))
    shake(model)
    x = torch.randn(3, 6)
    doubled = model.fc(x)
    handle.remove()
    torch.testing.assert_close(model.fc(x) * 2, doubled)
    unload(model)
    assert not model.fc._forward_hooks


@pytest.mark.parametrize("method", [Houlsby(target_modules="m"), Pfeiffer(target_modules="m")])
def test_an_adapted_sequential_is_still_a_sequence(method):
    """Its length, its parts, slices, and parts added later."""
    parts = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model, x = Hold(parts), torch.randn(3, 6)
    expected = [parts[0], parts[1], parts[2]]
    inject(model, method)
    shake(model)
    assert model.m is parts and len(parts) == 3 and list(parts) == expected and parts[-1] is expected[2]
    front = parts[:2]
    assert isinstance(front, nn.Sequential) and list(front) == expected[:2]
    assert torch.equal(front(x), torch.tanh(expected[0](x)))
    before = model(x)
    parts.append(nn.ReLU())
    assert len(parts) == 4 and isinstance(parts[3], nn.ReLU) and not torch.equal(model(x), before)
    parts.pop(3)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("pattern", COMPUTED)
def test_a_layer_can_be_copied_alone(pattern):
    """As `nn.TransformerEncoder` does with its layer."""
    model, case = adapted(pattern)
    layer = case.layer(model)
    seen = []
    handle = layer.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    case.output(model)
    handle.remove()
    if not seen:
        return  # a layer that is only read
    args, kwargs, out = seen[0]
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(layer)(*args, **kwargs), out)


class TwoNamesTask(L.LightningModule):
    """Registers a part of its network a second time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = Sgd().net
        self.backbone = net[0]
        self.net = net

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]) + self.backbone(batch[0]).sum(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("name", ["backbone", "net.fc"])
def test_either_name_of_a_module_may_be_given(name):
    model = PATTERNS["two_names"].build()
    inject(model, LoRA(r=2, target_modules=name))
    assert isinstance(model.net.fc.delta, nn.Module) and not hasattr(model.net.head, "delta")


def test_a_module_under_two_names_resumes(tmp_path):
    whole, first, second = TwoNamesTask(), TwoNamesTask(), TwoNamesTask()
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(whole, plain_loader())
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    run.fit(first, plain_loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(second, plain_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(adapter_state_dict(second), adapter_state_dict(whole))


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def mesh():
    """One process that believes it is a group."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "pattern", ["plain", "masked", "reads_weight", "reads_and_calls", "asks_attention", "graph_linear"]
)
def test_fully_shard(mesh, pattern):
    """Sharded, it computes the same, and the shards hold the base; `unload` leaves a sharded layer of its class."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    model, case = adapted(pattern)
    kind = type(case.layer(case.pattern.build()))
    expected, base = case.output(model), case.output(case.pattern.build())
    plain = {n: p.clone() for n, p in case.pattern.build().named_parameters()}
    layer = case.layer(model)
    reads = pattern.startswith("reads")  # a parent that reads holds the weights in its own group
    if not reads:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    close(case.output(model), expected, 1e-6)
    case.output(model, grad=True).sum().backward()
    trained = [p for n, p in model.named_parameters() if n in set(trainable_names(model))]
    assert all(isinstance(p.grad, DTensor) and p.grad.full_tensor().any() for p in trained)
    model._apply(lambda tensor: tensor)  # torch looks for new parameters then
    for name, value in plain.items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value), name
    close(case.output(model), expected, 1e-6)
    unload(model)
    assert reads or (isinstance(layer, FSDPModule) and isinstance(layer, kind))
    assert reads or (type(layer).__name__ == f"FSDP{kind.__name__}" and type(layer).__mro__[2] is kind)
    assert not any(".delta." in name for name in model.state_dict())
    close(case.output(model), base, 1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby"])
def test_factors_in_a_group_of_their_own(mesh, method):
    """A group has one dtype, so float32 factors beside a base in bfloat16 are sharded apart."""
    from torch.distributed.fsdp import fully_shard

    case = case_of("plain", method)
    model, x = case.pattern.build().bfloat16(), torch.randn(3, 6).bfloat16()
    inject(model, case.method)
    shake(model)
    expected = model(x)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fully_shard(model.fc.delta, mesh=mesh)
    fully_shard(model.fc, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() == set(trainable_names(model))
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-2, rtol=1e-2)


# ---- conversion ----------------------------------------------------------------------------------------------------
class Packed(nn.Linear):
    """What a conversion puts in the place of a linear layer."""


def convert(parent: nn.Module) -> None:
    """Replace every linear layer, as `BitsandbytesPrecision` and torchao do."""
    for name, child in parent.named_children():
        if isinstance(child, nn.Linear):
            new = Packed(child.in_features, child.out_features)
            new.weight, new.bias = child.weight, child.bias
            setattr(parent, name, new)
        else:
            convert(child)


def convert_with_plugin(module: nn.Module) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    BitsandbytesPrecision("nf4", dtype=torch.float32).convert_module(module)


@pytest.mark.parametrize("how", [convert, convert_with_plugin])
@pytest.mark.parametrize("again", [True, False])
def test_a_conversion_that_replaces_adapted_layers_is_an_error(tmp_path, how, again):
    """Their adapters are gone with them: said when training starts, with or without the method given again."""

    class Stops(Sgd):
        def training_step(self, batch, index):
            raise AssertionError("training started without the adapters")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Stops()
    inject(module, LoRA(r=2))
    how(module)
    callback = PEFT(LoRA(r=2)) if again else PEFT()
    with pytest.raises(PEFTError, match=r"(?s)(net\.|')0\b.*(replaced|convert|gone|no longer)"):
        trainer(tmp_path, callback).fit(module, plain_loader())


# ---- weights that become computed later ----------------------------------------------------------------------------
class Same(nn.Module):
    def forward(self, weight):
        return weight.clone()


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("pattern", ["plain", "reads_facts", "conv2d", "embedding"])
def test_a_parametrization_registered_later(pattern):
    """It gets the base's weight without the correction, which goes on acting; both can be taken off again."""
    model, case = adapted(pattern)
    layer, before = case.layer(model), case.output(model)
    weight = layer.weight.detach().clone()
    with disabled(model):
        base = case.output(model)
    parametrize.register_parametrization(layer, "weight", Same())
    assert torch.equal(layer.parametrizations.weight.original, weight)
    close(case.output(model), before, 1e-5)
    with disabled(model):
        assert torch.equal(case.output(model), base)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)
    close(case.output(model), before, 1e-5)
    unload(model)
    assert torch.equal(case.output(model), base)


def test_a_parametrization_scales_the_base_alone():
    model = PATTERNS["plain"].build()
    inject(model, LoRA(r=2, target_modules="fc"))
    shake(model)
    x = torch.randn(3, 6)
    base, change = F.linear(x, model.fc.weight), model.fc(x) - F.linear(x, model.fc.weight, model.fc.bias)
    parametrize.register_parametrization(model.fc, "weight", Twice())
    close(model.fc(x), 2 * base + change + model.fc.bias, 1e-5)


def test_unloading_below_a_parametrization():
    """Either the layer is parametrized and nothing else afterwards, or nothing has changed and the error says why."""
    model = PATTERNS["plain"].build()
    inject(model, LoRA(r=2, target_modules="fc"))
    shake(model)
    parametrize.register_parametrization(model.fc, "weight", Twice())
    x = torch.randn(3, 6)
    before, weight = model.fc(x), model.fc.parametrizations.weight.original
    try:
        unload(model)
    except PEFTError as error:
        assert "fc" in str(error) and "parametriz" in str(error)
        assert torch.equal(model.fc(x), before)
        return
    assert parametrize.is_parametrized(model.fc, "weight") and isinstance(model.fc, nn.Linear)
    torch.testing.assert_close(model.fc(x), F.linear(x, 2 * weight, model.fc.bias))
    parametrize.remove_parametrizations(model.fc, "weight")
    assert type(model.fc) is nn.Linear and not any("delta" in n for n in model.state_dict())


@pytest.mark.parametrize("pattern", ["plain", "conv2d"])
def test_pruning_after_injection(pattern):
    """The mask falls on the base's weight; the correction goes on; both leave."""
    model, case = adapted(pattern)
    layer, original = case.layer(model), case.layer(model).weight
    prune.l1_unstructured(layer, "weight", 0.4)
    assert layer.weight_orig is original
    plain = case.pattern.build()
    prune.l1_unstructured(case.layer(plain), "weight", 0.4)
    with disabled(model):
        assert torch.equal(case.output(model), case.output(plain))
    assert (case.output(model) - case.output(plain)).abs().max() > 1e-2
    case.output(model, grad=True).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    prune.remove(layer, "weight")
    with disabled(model):
        assert torch.equal(case.output(model), case.output(plain))
    unload(model)
    assert type(layer) is type(case.layer(plain)) and torch.equal(case.output(model), case.output(plain))


def test_old_weight_norm_after_injection():
    """It computes a plain attribute at each call."""
    model = PATTERNS["plain"].build()
    inject(model, LoRA(r=2, target_modules="fc"))
    shake(model)
    x = torch.randn(3, 6)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.fc)
    close(model(x), before, 1e-5)
    nn.utils.remove_weight_norm(model.fc)
    close(model(x), before, 1e-5)


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("make", ["weight_norm", "spectral_norm", "pruned"])
def test_merging_at_the_end_says_at_the_start_that_it_cannot(tmp_path, make, written):
    """Where a weight is computed, MergeOnFitEnd warns before training, or with ``dirpath`` refuses to train."""

    class Computed(Sgd):
        steps = 0

        def __init__(self) -> None:
            super().__init__()
            self.net[0] = {
                "weight_norm": nn.utils.parametrizations.weight_norm,
                "spectral_norm": nn.utils.spectral_norm,
                "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
            }[make](self.net[0])

        def on_train_start(self):
            self.said = [str(w.message) for w in said]

        def training_step(self, batch, index):
            self.steps += 1
            return super().training_step(batch, index)

    module = Computed()
    finish = MergeOnFitEnd("last", dirpath=str(tmp_path / "merged") if written else None)
    run = trainer(tmp_path, PEFT(LoRA(r=2, target_modules="0")), finish, max_epochs=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if written:
            with pytest.raises(PEFTError, match=r"computed|parametri|weight_norm|spectral_norm|prun"):
                run.fit(module, plain_loader())
            assert module.steps == 0
            return
        run.fit(module, plain_loader())
    assert module.steps and any("MergeOnFitEnd" in s and "0" in s for s in module.said)


# ---- a forward on the instance -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby"])
def test_a_forward_put_on_the_instance_after_injection(method):
    """The adapter goes on acting; `unload` leaves a working layer, or refuses and changes nothing."""
    case = case_of("plain", method)
    model = case.pattern.build()
    base = case.output(model)
    inject(model, case.method)
    shake(model)
    adapted_output = case.output(model)
    transparent(model.fc)
    assert torch.equal(case.output(model), adapted_output) and model.fc.calls == 1
    with disabled(model):
        assert torch.equal(case.output(model), base)
    try:
        unload(model)
    except PEFTError as error:
        assert "fc" in str(error) and "forward" in str(error)
        assert torch.equal(case.output(model), adapted_output)
        return
    calls = model.fc.calls
    assert torch.equal(case.output(model), base) and model.fc.calls == calls + 1
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("later", [False, True])
def test_hooks_of_accelerate(later):
    """As ``device_map`` and offloading set them."""
    hooks = pytest.importorskip("accelerate.hooks")
    case = case_of("plain", "lora")
    model = case.pattern.build()
    base = case.output(model)
    for after in (False, True):
        if after == later:
            hooks.add_hook_to_module(model.fc, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
        if not after:
            inject(model, case.method)
    assert torch.equal(case.output(model), base) and case.train(model) == []
    out = case.output(model)
    merge(model)
    close(case.output(model), out, 1e-4)
    unmerge(model)
    with disabled(model):
        assert torch.equal(case.output(model), base)
    try:
        unload(model)
    except PEFTError as error:  # a forward that came later leads to the adapted one
        assert later and "fc" in str(error) and "forward" in str(error)
        hooks.remove_hook_from_module(model.fc)
        assert torch.equal(case.output(model), out)
        unload(model)
    else:
        hooks.remove_hook_from_module(model.fc)
    assert torch.equal(case.output(model), base) and type(model.fc) is nn.Linear


# ---- replicas and threads ------------------------------------------------------------------------------------------
def replicate(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` makes for a device: parameters become plain attributes of copies."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    tensors = {tensor: tensor.clone() for tensor in (*model.parameters(), *model.buffers())}
    for module, replica in copies.items():
        replica._former_parameters = {}
        for key, child in module._modules.items():
            if child is not None:
                setattr(replica, key, copies[child])
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None:
                continue
            setattr(replica, key, tensors[value])
            if key in module._parameters:
                replica._former_parameters[key] = tensors[value]
    return copies[model]


REPLICATED = [
    "plain",
    "masked",
    "reads_weight",
    "reads_and_calls",
    "reads_table",
    "conv2d",
    "same_conv",
    "graph_linear",
]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("pattern", [*REPLICATED, "asks_attention", "experts", "old_weight_norm"])
def test_replicas_compute_the_same(pattern, method):
    """Their gradients reach the factors, and the original goes on as before."""
    case = case_of(pattern, method)
    model = case.adapted()
    if model is None:
        return
    shake(model)
    expected = case.output(model)
    replica = replicate(model)
    out = case.output(replica, grad=True)
    close(out.detach(), expected, 1e-6)
    out.sum().backward()
    idle = [
        n for n, p in model.named_parameters() if n in trainable_names(model) and (p.grad is None or not p.grad.any())
    ]
    assert [n for n in idle if not n.endswith("bias")] == []
    assert torch.equal(case.output(model), expected)


@pytest.mark.parametrize(
    "method", [Houlsby(reduction_factor=2, target_modules="m"), PrefixTuning(num_virtual_tokens=2)]
)
def test_replicas_of_other_families(method):
    torch.manual_seed(0)
    model, x = Hold(OwnAttention()).eval(), torch.randn(2, 5, 8)
    inject(model, method)
    shake(model)
    expected = model(x)
    out = replicate(model)(x)
    close(out, expected, 1e-6)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("pattern", ["plain", "masked", "reads_weight", "reads_and_calls", "asks_attention", "lstm"])
def test_threads_do_not_disturb_each_other(pattern):
    """As in a server: passes overlap, with gradients and without."""
    model, case = adapted(pattern)
    expected = case.output(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda i: case.output(model, grad=bool(i % 2)).detach(), range(64)))
    finally:
        sys.setswitchinterval(interval)
    for out in outputs:
        close(out, expected, 1e-6)


# ---- functional calls, traces, averages ----------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", COMPUTED)
def test_functional_call(pattern):
    """Base and adapter tensors can be handed in by name; the module keeps its own."""
    model, case = adapted(pattern)
    expected, inputs = case.output(model), case.pattern.inputs()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    call = torch.func.functional_call
    close(call(model, parameters, inputs), expected, 1e-6)
    zeros = {n: torch.zeros_like(p) if n.endswith("lora_B") else p for n, p in parameters.items()}
    zeros |= {n: torch.zeros_like(p) for n, p in parameters.items() if n.endswith("lora_A")}
    close(call(model, zeros, inputs), case.output(case.pattern.build()), 1e-5)
    names = set(trainable_names(model))
    trained = {n: p for n, p in parameters.items() if n in names}
    gradients = torch.func.grad(lambda given: call(model, parameters | given, inputs).square().sum())(trained)
    model.zero_grad()
    case.output(model, grad=True).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(case.output(model), expected)


COMPILED = [
    "plain",
    "masked",
    "std_conv",
    "graph_linear",
    "reads_weight",
    "reads_and_calls",
    "reads_facts",
    "hooks_change",
]


@pytest.mark.parametrize(
    ("pattern", "method"),
    [(p, "lora") for p in [*COMPILED, "asks_attention", "experts", "mlp_block"]]
    + [("masked", "dora"), ("reads_weight", "ia3"), ("mlp_block", "houlsby"), ("loops_children", "pfeiffer")],
)
def test_one_graph(pattern, method):
    """`torch.compile` takes the network whole, and gives outputs and gradients of an eager pass."""
    model, case = adapted(pattern, method)
    inputs, names = case.pattern.inputs(), trainable_names(model)
    expected = case.output(model)
    case.output(model, grad=True).sum().backward()
    gradients = {n: model.get_parameter(n).grad.clone() for n in names}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    close(out.detach(), expected, 1e-5)
    out.sum().backward()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).grad, gradients[name], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("pattern", "method"),
    [(p, "lora") for p in ["plain", "masked", "reads_weight", "conv2d", "asks_attention", "mlp_block"]]
    + [("mlp_block", "houlsby")],
)
def test_export(pattern, method):
    model, case = adapted(pattern, method)
    program = torch.export.export(model, case.pattern.inputs())
    close(program.module()(*case.pattern.inputs()).detach(), case.output(model), 1e-5)
    assert set(trainable_names(model)) <= set(program.state_dict)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby"])
def test_a_symbolic_trace_keeps_adapted_layers_whole(method):
    """torch.fx takes layers of torch as they are, by the module that their class names (torchvision's extractors)."""
    model, case = adapted("plain", method)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["fc", "head"]
    assert torch.equal(case.output(traced), case.output(model))


@pytest.mark.parametrize("pattern", ["plain", "masked", "reads_weight", "lstm", "asks_attention"])
def test_averaged_models(pattern):
    """The copy averages base and factors, and computes with the averages."""
    model, case = adapted(pattern)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    shake(model)
    average.update_parameters(model)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, (first[name] + model.get_parameter(name)) / 2)
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(case.output(average), case.output(fresh))
    assert not torch.equal(case.output(average), case.output(model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "pattern", ["plain", "masked", "reads_weight", "reads_and_calls", "std_conv", "asks_attention"]
)
def test_recomputed_activations(pattern, reentrant):
    """A pass that is run again in backward reads the same weights."""
    model, case = adapted(pattern)
    names, grads = trainable_names(model), []
    for again in (False, True):
        model.zero_grad()
        (x,) = case.pattern.inputs()
        x = x.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        out.square().sum().backward()
        grads.append({n: model.get_parameter(n).grad.clone() for n in names})
    for name in names:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", COMPUTED)
def test_inference_mode_leaves_nothing_behind(pattern):
    model, case = adapted(pattern)
    with torch.inference_mode():
        model(*case.pattern.inputs())
    case.output(model, grad=True).sum().backward()
    assert all(model.get_parameter(n).grad is not None for n in trainable_names(model))


@pytest.mark.parametrize(
    "pattern", ["plain", "masked", "reads_weight", "std_conv", "asks_attention", "lstm", "gru_cell"]
)
def test_a_pass_leaves_no_graph_behind(pattern):
    """Nothing on the modules keeps the corrected weight or what it was made of."""
    model, case = adapted(pattern)
    case.output(model, grad=True)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = value if isinstance(value, (list, tuple)) else [value]
            graph = [v for v in held if isinstance(v, Tensor) and v.grad_fn is not None]
            assert not graph, (name, key)
    copy.deepcopy(model)


# ---- whole modules in files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["plain", "masked", "reads_weight", "lstm", "asks_attention", "mlp_block"])
def test_whole_modules_are_saved(pattern):
    model, case = adapted(pattern)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(case.output(other), case.output(model))
    assert anatomy(other).keys() == anatomy(model).keys()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), model.state_dict())


@pytest.mark.slow
def test_a_pickle_is_read_by_another_process(tmp_path, root):
    """It has to make the classes anew."""
    expected = {}
    for pattern in ("plain", "masked", "mlp_block"):
        model, case = adapted(pattern, "houlsby" if pattern == "mlp_block" else "lora")
        torch.save((model, *case.pattern.inputs()), tmp_path / pattern)
        expected[pattern] = case.output(model)
    script = (
        "import sys, torch\nfor path in sys.argv[1:]:\n    model, x = torch.load(path, weights_only=False)\n"
        "    torch.save(model(x).detach(), path + '.out')"
    )
    paths = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, cwd=root)
    for name, value in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.out", weights_only=True), value)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), Houlsby(), PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2)],
    ids=lambda m: type(m).__name__,
)
def test_the_config_names_the_class_of_the_model(tmp_path, method):
    model = llama()
    inject(model, method)
    assert type(model).__name__ == "LlamaForCausalLM" and type(model.model).__name__ == "LlamaModel"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# ---- tying and resizing --------------------------------------------------------------------------------------------
class Words(nn.Module):
    """A table of words and a head that can share its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("targets", [["table"], ["head"], ["table", "head"]], ids=str)
def test_tying_after_injection(targets):
    """Both sides hold one parameter, and each keeps its own correction."""
    torch.manual_seed(0)
    model, ids = Words(), torch.tensor([[1, 4, 10]])
    inject(model, LoRA(r=2, target_modules=targets))
    shake(model)
    model.head.weight = model.table.weight
    assert model.head.weight is model.table.weight is model.head._parameters["weight"]
    change = {n: model.get_submodule(n).delta for n in targets}
    rows = model.table.weight
    if "table" in change:
        rows = rows + change["table"].scaling * (change["table"].lora_B @ change["table"].lora_A).T
    columns = model.table.weight
    if "head" in change:
        columns = columns + change["head"].scaling * change["head"].lora_B @ change["head"].lora_A
    close(model(ids), torch.tanh(rows[ids]) @ columns.T, 1e-5)
    with disabled(model):
        assert torch.equal(model(ids), torch.tanh(model.table.weight[ids]) @ model.table.weight.T)
    unload(model)
    assert model.head.weight is model.table.weight


def test_transformers_ties_weights_after_injection():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 5, 9]])
    inject(model, LoRA(r=2, target_modules=["embed_tokens", "q_proj"]))
    shake(model)
    before = model(ids).logits
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_resizing_takes_the_rows_of_the_base(targets):
    """The rows carry no correction; ids that were known give what they gave."""
    model, ids = llama(), torch.tensor([[1, 5, 9]])
    rows, columns = (model.get_submodule(n).weight.detach().clone() for n in ("model.embed_tokens", "lm_head"))
    inject(model, LoRA(r=2, target_modules=targets))
    shake(model)
    expected = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(model.model.embed_tokens.weight[:61], rows)
    assert torch.equal(model.lm_head.weight[:61], columns)
    try:
        found = model(ids).logits
        model(torch.tensor([[1, 65, 9]]))
    except PEFTError as error:  # an adapter of the old size cannot go on, and says which
        assert any(name in str(error) for name in targets)
        return
    if targets == ["q_proj"]:
        torch.testing.assert_close(found[..., :61], expected)


def test_names_do_not_say_how_a_layer_is_adapted():
    model, _ = adapted("plain")
    factors = ["fc.delta.lora_A", "fc.delta.lora_B"]
    assert list(adapter_state_dict(model)) == factors
    assert list(model.state_dict()) == ["fc.weight", "fc.bias", *factors, "head.weight", "head.bias"]
