"""The PEFT callback in a LightningModule that knows nothing of it."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
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
    TrainingError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
    trainable_names,
)
from tests.contract.battery import same, shake
from tests.models import Foreign, Plain, frozen_copy, loader, plain_loader, trainer


def fitted(tmp_path, *callbacks, module=None, **options):
    module = module or Plain()
    run = trainer(tmp_path, PEFT(LoRA(r=4)), *callbacks, **options)
    run.fit(module, plain_loader(), plain_loader())
    return module, run


def test_second_base_receives_the_adapter(tmp_path):
    """A checkpoint of the whole module goes into another module, into the bare network, and back through a file."""
    saver = ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    module, _run = fitted(tmp_path, saver)
    x = next(iter(plain_loader()))[0]
    load_adapter(module, saver.best_model_path)
    expected = module.eval().net(x)

    class Other(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = Plain().net

    bare, other = Plain().net.eval(), Other().eval()
    load_adapter(bare, saver.best_model_path)
    save_adapter(bare, tmp_path / "bare.safetensors")
    load_adapter(other, tmp_path / "bare.safetensors")
    assert torch.equal(bare(x), expected) and torch.equal(other.backbone(x), expected)
    assert set(adapter_state_dict(other)) == {"backbone." + n for n in adapter_state_dict(bare)}


def test_frozen_statistics_do_not_drift(tmp_path):
    """Batch norm keeps its statistics whatever mode the module is put into; a reload gives equal outputs."""

    class Restless(Plain):
        def on_train_epoch_start(self):
            self.train()

    module = Restless()
    before = frozen_copy(module.net[1])
    saver = ModelCheckpoint(tmp_path / "c", save_weights_only=True)
    trainer(tmp_path, PEFT(LoRA()), saver).fit(module, plain_loader())
    assert same(before, frozen_copy(module.net[1]))
    again = load_from_checkpoint(Restless, saver.best_model_path)
    for m in (module, again):
        m.eval()
    x = next(iter(plain_loader()))[0]
    assert torch.equal(module.net(x), again.net(x))


def test_moved_statistics_travel(tmp_path):
    """In a plain loop in train mode the statistics do move; then they are part of the adapter."""
    net = Plain().net
    inject(net, LoRA())
    net.train()
    net(torch.randn(8, 8))
    assert "1.running_mean" in adapter_state_dict(net)
    save_adapter(net, tmp_path / "a.safetensors")
    fresh = Plain().net
    load_adapter(fresh, tmp_path / "a.safetensors")
    x = torch.randn(4, 8)
    assert torch.equal(net.eval()(x), fresh.eval()(x))


@pytest.mark.parametrize("method", [LoRA(r=2, modules_to_save="head"), FullFineTuning()], ids=["lora", "full"])
def test_a_module_of_several_parts(tmp_path, method):
    """Backbone and head side by side: the LightningModule itself is the network; its own parameters are frozen, too."""

    class Parts(Plain):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(1))

        def training_step(self, batch, index):
            self.seen += 1
            return nn.functional.cross_entropy(self.head(self.net(batch[0])) * self.scale, batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", nn.functional.cross_entropy(self.head(self.net(batch[0])) * self.scale, batch[1]))

    module, saver = Parts(), ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(method), MergeOnFitEnd("last"), saver)
    run.fit(module, plain_loader(), plain_loader())
    content = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert set(content) == set(adapter_state_dict(module)) and {"head.weight", "seen"} <= set(content)
    assert ("scale" in content) == method.complete
    loss = run.validate(module, plain_loader(), ckpt_path="best", verbose=False)[0]["val_loss"]
    again = load_from_checkpoint(Parts, saver.best_model_path)
    assert trainer(tmp_path).validate(again, plain_loader(), verbose=False)[0]["val_loss"] == pytest.approx(loss)


class Late(L.LightningModule):
    """Builds its network in ``configure_model``, as sharding strategies ask for."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.calls = 0

    def configure_model(self):
        self.calls += 1
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    training_step = Plain.training_step
    validation_step = Plain.validation_step
    test_step = Plain.test_step
    configure_optimizers = Plain.configure_optimizers


def test_configure_model_is_injected_at_its_end(tmp_path):
    module, saver = Late(), ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(LoRA()), EMAWeightAveraging(), saver)
    run.fit(module, plain_loader(), plain_loader())
    assert module.calls >= 1 and "configure_model" not in module.__dict__
    loss = run.validate(module, plain_loader(), ckpt_path="best", verbose=False)[0]["val_loss"]
    again = load_from_checkpoint(Late, saver.best_model_path)
    assert trainer(tmp_path).validate(again, plain_loader(), verbose=False)[0]["val_loss"] == pytest.approx(loss)
    pickle.loads(pickle.dumps(again))
    merge(module)
    trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader())  # from unmerged weights


def test_validate_and_predict_before_fit(tmp_path):
    module, run = Plain(), trainer(tmp_path, PEFT(LoRA()))
    run.validate(module, plain_loader(), verbose=False)
    assert len(run.predict(module, plain_loader())) == 4
    run.fit(module, plain_loader())
    assert len(trainable_names(module)) == 4


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)])
def test_weight_averaging_must_come_later(tmp_path, averaging):
    with pytest.raises(TrainingError, match=r"Put PEFT first"):
        trainer(tmp_path, averaging, PEFT(LoRA())).fit(Plain(), plain_loader())
    trainer(tmp_path, PEFT(LoRA()), averaging, max_epochs=3).fit(Plain(), plain_loader())


def test_swa_with_a_late_network_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="configure_model"):
        trainer(tmp_path, PEFT(LoRA()), StochasticWeightAveraging(1e-3)).fit(Late(), plain_loader())


def test_ema_resumes_with_both_states(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}")
    straight, first, second = Plain(), Plain(), Plain()
    trainer(tmp_path, PEFT(LoRA()), EMAWeightAveraging(decay=0.9), max_epochs=2).fit(straight, plain_loader())
    trainer(tmp_path, PEFT(LoRA()), EMAWeightAveraging(decay=0.9), saver, max_epochs=1).fit(first, plain_loader())
    trainer(tmp_path, PEFT(LoRA()), EMAWeightAveraging(decay=0.9), max_epochs=2).fit(
        second, plain_loader(), ckpt_path=tmp_path / "c" / "epoch=0.ckpt"
    )
    assert same(adapter_state_dict(straight), adapter_state_dict(second))


def test_module_built_in_setup_is_too_late(tmp_path):
    class TooLate(Late):
        configure_model = L.LightningModule.configure_model

        def setup(self, stage):
            Late.configure_model(self)

    for method in (LoRA(), FullFineTuning()):
        with pytest.raises(ConfigError, match=r"`__init__` or `configure_model`, not in `setup`"):
            trainer(tmp_path, PEFT(method)).fit(TooLate(), plain_loader())

    class HalfLate(Plain):
        def setup(self, stage):
            self.net.append(nn.Linear(3, 3))

    with pytest.raises(TrainingError, match=r"appeared after the adapters were injected: net.4"):
        trainer(tmp_path, PEFT(LoRA())).fit(HalfLate(), plain_loader())


def test_optimizer_must_hold_the_adapters(tmp_path):
    class Early(Plain):
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

        def configure_optimizers(self):
            return self.optimizer

    with pytest.raises(TrainingError, match=r"4 of 4 trainable tensors are in no optimizer .*configure_optimizers"):
        trainer(tmp_path, PEFT(LoRA())).fit(Early(), plain_loader())


def test_init_from_starts_a_new_fit(tmp_path):
    module, _run = fitted(tmp_path)
    save_adapter(module, tmp_path / "a.safetensors")
    for callback in (
        PEFT(init_from=str(tmp_path / "a.safetensors")),
        PEFT(LoRA(r=4), init_from=tmp_path / "a.safetensors"),
    ):
        second = Plain()
        trainer(tmp_path, callback).validate(second, plain_loader(), verbose=False)
        assert same(adapter_state_dict(module), adapter_state_dict(second))
        fit = trainer(tmp_path, callback, max_epochs=1)
        fit.fit(second, plain_loader())
        assert fit.global_step == 4 and not same(adapter_state_dict(module), adapter_state_dict(second))
    with pytest.raises(CheckpointError, match=r"r=4 \(here 2\)"):
        trainer(tmp_path, PEFT(LoRA(r=2), init_from=tmp_path / "a.safetensors")).fit(Plain(), plain_loader())
    with pytest.raises(ConfigError, match="needs a method"):
        trainer(tmp_path, PEFT()).fit(Plain(), plain_loader())


def test_full_checkpoints_on_request(tmp_path):
    saver, module = ModelCheckpoint(tmp_path / "c"), Plain()
    run = trainer(tmp_path, PEFT(LoRA(), save="full"), saver)
    run.fit(module, plain_loader())
    content = torch.load(saver.best_model_path, weights_only=True)
    assert set(content["state_dict"]) == set(module.state_dict()) and "net.0.weight" in content["state_dict"]
    fresh = Plain()
    load_adapter(fresh, saver.best_model_path)
    assert same(adapter_state_dict(fresh), adapter_state_dict(module))
    run.test(module, plain_loader(), ckpt_path=saver.best_model_path, verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("lightning_peft"), "plain checkpoint"),
        (
            lambda c: c["lightning_peft"].update(format_version=99, library_version="9.0"),
            "format 99, written by .* 9.0",
        ),
        (lambda c: c["lightning_peft"]["methods"][0]["config"].update(r=3), r"r=3 \(here 4\)"),
        (lambda c: c["lightning_peft"]["methods"][0].update(type="Magic"), "unknown here. Known: "),
        (lambda c: c["state_dict"].popitem(), "lacks net"),
        (lambda c: c["state_dict"].update(x=torch.ones(1)), "in excess x"),
    ],
    ids=["plain", "newer", "rank", "method", "missing", "extra"],
)
def test_resume_refuses_what_does_not_fit(tmp_path, change, message):
    module, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "b.ckpt")
    before = frozen_copy(module.net)
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, PEFT(LoRA(r=4))).fit(module, plain_loader(), ckpt_path=tmp_path / "b.ckpt")
    assert same(before, frozen_copy(module.net))


def test_resume_on_another_base_is_refused(tmp_path):
    _module, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for other, message in ((Plain(seed=1), "sampled weights differ"), (Plain(width=24), "names or shapes differ")):
        with pytest.raises(CheckpointError, match=rf"another base model \(fingerprint .*{message}"):
            trainer(tmp_path, PEFT(LoRA(r=4))).fit(other, plain_loader(), ckpt_path=tmp_path / "a.ckpt")


def test_truncated_and_unsafe_files(tmp_path):
    module, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    save_adapter(module, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        data = (tmp_path / name).read_bytes()
        cut = tmp_path / ("cut" + name[1:])
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match=r"truncated|broken"):
            load_adapter(Plain(), cut)
    torch.save({"state_dict": {}, "lightning_peft": {}, "x": Plain}, tmp_path / "unsafe.ckpt")
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        load_adapter(Plain(), tmp_path / "unsafe.ckpt")
    with pytest.raises(CheckpointError, match=r"does not exist. There is: a.ckpt"):
        load_adapter(Plain(), tmp_path / "b.ckpt")


def test_merge_callback(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    module, run = fitted(tmp_path, saver, MergeOnFitEnd(dirpath=str(tmp_path / "out")))
    with pytest.raises(MergeError, match="merged already"):
        merge(module)
    x = next(iter(plain_loader()))[0]
    expected = module.eval().net(x)
    plain = Plain().net.eval()
    from safetensors.torch import load_file

    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(plain(x), expected)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    run.save_checkpoint(tmp_path / "merged.ckpt")  # still the adapter, not merged weights
    fresh = Plain()
    load_adapter(fresh, tmp_path / "merged.ckpt")
    torch.testing.assert_close(fresh.eval().net(x), expected)


def test_merge_callback_alone_says_what_is_missing(tmp_path):
    with pytest.raises(MergeError, match=r"Add PEFT\(LoRA"):
        trainer(tmp_path, MergeOnFitEnd()).fit(Plain(), plain_loader())
    with pytest.raises(ConfigError, match="choose 'best' or 'last'"):
        MergeOnFitEnd("first")


def test_tuners_and_repeated_fits(tmp_path):
    module = Plain()
    module.lr = 1e-3
    run = trainer(tmp_path, PEFT(LoRA()), MergeOnFitEnd("last"), LearningRateFinder(num_training_steps=5))
    run.fit(module, plain_loader())
    Tuner(trainer(tmp_path, PEFT(LoRA()), max_epochs=1)).lr_find(module, plain_loader(), num_training=5)
    names = trainable_names(module)
    trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader())
    assert trainable_names(module) == names and len(names) == 4
    with pytest.raises(ConfigError, match="adapted already"):
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, plain_loader())


def test_copies_of_a_fitted_module_are_independent(tmp_path):
    module, _ = fitted(tmp_path)
    module.trainer = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        shake(other)
        state: dict = {"state_dict": other.state_dict()}
        other.on_save_checkpoint(state)
        assert same(state["state_dict"], adapter_state_dict(other))
        assert not same(adapter_state_dict(other), adapter_state_dict(module))


def test_a_foreign_trainer_is_named(tmp_path):
    class Trainer:
        callbacks = ()

    with pytest.raises(TrainingError, match=r"Trainer is not a Trainer of "):
        PEFT(LoRA()).setup(Trainer(), Plain(), "fit")


def test_compiled_network_inside(tmp_path):
    """Names of a network behind torch.compile carry _orig_mod; the file fits a plain one all the same."""
    module = Plain()
    module.net = torch.compile(module.net, backend="eager")
    saver = ModelCheckpoint(tmp_path / "c")
    trainer(tmp_path, PEFT(LoRA()), saver, max_epochs=1).fit(module, plain_loader())
    plain = Plain()
    load_adapter(plain, saver.best_model_path)
    x = next(iter(plain_loader()))[0]
    torch.testing.assert_close(plain.eval().net(x), module.eval().net(x))
    trainer(tmp_path, PEFT(LoRA()), max_epochs=2).fit(plain, plain_loader(), ckpt_path=saver.best_model_path)


def test_no_match_shows_candidates(tmp_path):
    with pytest.raises(NoMatchError, match=r"q_prj.*It can adapt: .*Linear.*attention.self.query"):
        trainer(tmp_path, PEFT(LoRA(target_modules="q_prj"))).fit(Foreign(), loader("bert"))
