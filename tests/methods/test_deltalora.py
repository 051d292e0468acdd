"""Delta-LoRA against golden steps in float64, and exact resumes."""

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    ConfigError,
    DeltaLoRA,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from tests.contract.battery import same
from tests.golden_case import Golden, adapter_parameters
from tests.models import Foreign, frozen_copy, loader, logits, trainer

#: the battery runs a few steps at a high rate: let the weight follow within them, and not threefold
BATTERY_FIELDS = {"start_step": 1, "update_ratio": 0.5, "alpha": 4}


def test_golden_steps():
    """Every step's factors and weight; W moves for the first time in step K + 2, and is never written."""
    case = Golden("deltalora_5_steps")
    h, model = case.meta["hyperparameters"], case.model().double()
    inputs, base = case.part("input"), frozen_copy(model)
    method = DeltaLoRA(r=h["r"], alpha=h["alpha"], update_ratio=h["lambda"], start_step=h["K"])
    inject(model, method)
    parameters = adapter_parameters(case, model)
    atol = case.meta["tolerance"]["suggested_atol"]

    def close(ours, key):
        torch.testing.assert_close(ours, case.tensors[key], atol=atol, rtol=0)

    close(model(inputs["x"]), "output.adapted")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=h["lr"])
    for step in range(1, h["steps"] + 1):
        optimizer.zero_grad()
        loss = (model(inputs["x"]) - inputs["target"]).pow(2).mean()
        close(loss, f"step{step}.loss")
        loss.backward()
        optimizer.step()
        method.after_step(model, step, h["steps"])
        for key, p in parameters.items():
            close(p.data, f"step{step}.adapter.{key}")
        for name in h["targets"]:
            delta = model.get_submodule(name).delta
            moved = delta.fold(base[f"{name}.weight"]) - delta.scaling * delta.lora_B @ delta.lora_A
            close(moved, f"step{step}.weight.{name}")
            changed = (moved - base[f"{name}.weight"]).abs().max() > 1e-12
            assert changed == (step >= h["first_step_changing_W"])
    close(model(inputs["x"]), "output.final")
    merge(model)
    for name, weight in case.part("output.merged_weight").items():
        torch.testing.assert_close(model.get_submodule(name).weight.data, weight, atol=atol, rtol=0)
    unload(model)
    assert same(base, model.state_dict())


class Cut(L.Callback):
    """Ends a planned run after some epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = trainer.current_epoch == self.epochs - 1


@pytest.mark.parametrize("start", [4, 27], ids=["followed_before_the_cut", "follows_after_it"])
def test_fifty_steps_resumed(start, tmp_path):
    """Ten epochs of five steps equal four, a resume from the file on a fresh base, and six more: every bit."""
    method, plan = DeltaLoRA(r=2, start_step=start), {"max_epochs": 10}
    straight, first, second = Foreign(lr=1e-3), Foreign(lr=1e-3), Foreign(lr=1e-3)
    trainer(tmp_path, PEFT(method), **plan).fit(straight, loader("bert", 20))
    assert straight.trainer.global_step == 50
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_epochs=1)
    trainer(tmp_path, PEFT(method), saver, Cut(4), **plan).fit(first, loader("bert", 20))
    assert first.trainer.global_step == 20
    trainer(tmp_path, PEFT(method), **plan).fit(second, loader("bert", 20), ckpt_path=tmp_path / "cut.ckpt")
    assert same(adapter_state_dict(straight), adapter_state_dict(second))
    assert float(second.net.bert.pooler.dense.delta.follow) == 2.0
    save_adapter(second, tmp_path / "a.safetensors")
    fresh, plain = Foreign(), Foreign()
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh.net, "bert"), logits(straight.net, "bert"))
    with disabled(second):
        assert torch.equal(logits(second.net, "bert"), logits(plain.net, "bert"))


def test_the_weight_follows_in_short_runs_too():
    """By default from a quarter of the run on, at the latest from the paper's 500 steps on."""
    starts = [DeltaLoRA().start(steps) for steps in (72, 10_000, None)]
    assert starts == [18, 500, 500] and DeltaLoRA(start_step=27).start(50) == 27


def test_a_new_fit_goes_on_following(tmp_path):
    """The weight of a saved adapter has moved already: a fit from it must not move it back at step K + 1."""
    net = nn.Sequential(nn.Linear(4, 4))
    method = DeltaLoRA(r=2, start_step=1)
    inject(net, method)
    for step in (1, 2, 3):
        net[0].delta.lora_B.data.normal_()
        method.after_step(net, step, 3)
    x = torch.randn(3, 4)
    other = copy.deepcopy(net)
    for step in (1, 2, 3):
        method.after_step(other, step, 3)
        assert torch.equal(other(x), net(x))


def test_the_factor_is_no_parameter_and_files_hold_it_as_ever(tmp_path):
    """A tensor without dimensions cannot be sharded; in files it has had this name and shape since the first one."""
    net = nn.Sequential(nn.Linear(4, 4))
    other = copy.deepcopy(net)
    inject(net, DeltaLoRA(r=2, start_step=0))
    assert all(parameter.ndim for parameter in net.parameters())
    DeltaLoRA(r=2, start_step=0).after_step(net, 1, 1)
    state = adapter_state_dict(net)
    names = ("lora_A", "lora_B", "snapshot_A", "snapshot_B", "follow")
    assert set(state) == {f"0.delta.{name}" for name in names}
    assert state["0.delta.follow"].shape == () and state["0.delta.follow"] == 2.0
    save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path / "a.safetensors")
    assert same(adapter_state_dict(other), state)
    with disabled(net):
        pass
    assert same(adapter_state_dict(net), state)


def test_gradients_reach_the_input_through_the_moved_weight():
    """The difference is a constant for A and B, but part of the weight for the layer's input."""
    net = nn.Sequential(nn.Linear(4, 5)).double()
    inject(net, DeltaLoRA(r=2, update_ratio=3.0, start_step=0))
    delta = net[0].delta
    delta.lora_B.data.normal_()
    DeltaLoRA(update_ratio=3.0, start_step=0).after_step(net, 1, None)
    delta.lora_B.data.normal_()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    net(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(6, 5, dtype=torch.float64) @ delta.fold(net[0].weight))


def test_short_runs_and_dropout():
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, DeltaLoRA())
    with pytest.warns(UserWarning, match="trains as plain LoRA in this run of 100 steps"):
        DeltaLoRA(start_step=500).after_step(net, 1, 100)
    with pytest.raises(ConfigError, match=r"DeltaLoRA\(dropout=0.1\)"):
        DeltaLoRA(dropout=0.1)
