"""VeRA against peft's numbers, and the sharing of its matrices."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import VeRA, adapter_state_dict, inject, load_adapter, merge, save_adapter, state_names, summarize
from tests.golden_case import Golden, adapter_parameters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden(attention):
    """Including the random matrices: they are peft's, drawn from the same seed."""
    case = Golden("vera_qv_llama", attention)
    h, model = case.meta["hyperparameters"], case.model()
    seed = h["projection_prng_key"]
    method = VeRA(r=h["r"], d_initial=h["d_initial"], init_seed=seed, target_modules=case.meta["adapted_modules"])
    inject(model, method)
    shared = model.get_submodule(case.meta["adapted_modules"][0]).delta.shared
    for leaf in ("vera_A", "vera_B"):
        torch.testing.assert_close(getattr(shared, leaf).data, case.tensors[f"adapter.base_model.{leaf}"])
    parameters = adapter_parameters(case, model)
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    case.check(model, parameters)
    merge(model)
    for key, weight in case.part("output.merged_weight").items():
        torch.testing.assert_close(model.get_submodule(key).weight.data, weight, atol=2e-6, rtol=0)


def test_one_pair_of_matrices(tmp_path):
    """One pair for all layers, named and saved once, also after copying; r + out numbers train per layer."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 6), nn.Linear(6, 4))
    net = copy.deepcopy(plain)
    inject(net, VeRA(r=5))
    assert state_names(net) == ["0.delta.shared.vera_A", "0.delta.shared.vera_B"]
    assert net[0].delta.shared.vera_A.shape == (5, 16) and net[0].delta.shared.vera_B.shape == (16, 5)
    assert summarize(net)["trainable"] == 3 * 5 + 16 + 6 + 4
    other = copy.deepcopy(net)
    assert other[0].delta.shared is other[2].delta.shared is not net[0].delta.shared
    for layer in net:
        layer.delta.vera_b.data.normal_()
    save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), net(x)) and len(adapter_state_dict(net)) == 8


def test_nothing_of_the_input_is_kept():
    """Frozen matrices need no gradient: the pass keeps the branch's own activations, not the layer's input."""
    net = nn.Sequential(nn.Linear(64, 8))
    inject(net, VeRA(r=4))
    x, kept = torch.randn(32, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        net(x)
    assert torch.Size([32, 64]) not in kept and torch.Size([32, 4]) in kept
