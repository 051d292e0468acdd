"""Every feature of Lightning that meets adapters, a row each: what is here runs here, the others name their test."""

from __future__ import annotations

import ast
import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    LogAdapter,
    LoRA,
    MergeOnFitEnd,
    TrainabilityCheck,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    trainable_names,
)
from tests.contract.battery import same, shake, state_copy
from tests.lifecycle.test_optional_parts import Sgd
from tests.models import Plain, frozen_copy, plain_loader, trainer

#: feature -> the test that shows it, where that is not in this file
ELSEWHERE = {
    "ddp": "distributed/test_strategies.py::test_equal_to_one_process",
    "nothing to train": "lifecycle/test_callback.py::test_no_match_shows_candidates",
    "precision plugins": "lifecycle/test_precision.py::test_precision",
    "bitsandbytes plugin": "lifecycle/test_precision.py::test_bitsandbytes_precision",
    "quantised base": "methods/test_qlora.py",
    "compiled network": "lifecycle/test_callback.py::test_compiled_network_inside",
    "compiled method": "contract/test_contract.py::test_compile",
    "ema": "lifecycle/test_callback.py::test_ema_resumes_with_both_states",
    "averaging order": "lifecycle/test_callback.py::test_weight_averaging_must_come_later",
    "gradient checkpointing": "contract/test_contract.py::test_gradient_checkpointing",
    "gradient checkpointing of a task": "test_module.py::test_gradient_checkpointing_gives_the_same_step",
    "train and eval mode": "test_module.py::test_base_mode",
    "frozen batch norm": "lifecycle/test_callback.py::test_frozen_statistics_do_not_drift",
    "every checkpoint": "contract/test_trainer.py::test_every_checkpoint_is_the_adapter",
    "resume": "contract/test_trainer.py::test_resume_is_exact",
    "learning-rate finder, batch-size finder, Tuner": "lifecycle/test_finders.py::test_finders",
    "several fits": "lifecycle/test_callback.py::test_tuners_and_repeated_fits",
    "manual optimization": "lifecycle/test_optional_parts.py::test_manual_optimization",
    "loss scaling": "lifecycle/test_optional_parts.py::test_trainability_skips_steps_the_scaler_skipped",
    "copies": "lifecycle/test_callback.py::test_copies_of_a_fitted_module_are_independent",
    "the other package of Lightning": "lifecycle/test_packages.py::test_the_life_cycle_under_pytorch_lightning",
    "both packages": "lifecycle/test_packages.py::test_our_classes_derive_from_those_of_the_imported_packages",
    "a module of the other package": "lifecycle/test_packages.py::"
    "test_a_module_of_one_package_in_a_trainer_of_the_other_is_one_sentence",
    "configure_model": "lifecycle/test_callback.py::test_configure_model_is_injected_at_its_end",
}


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_elsewhere(place, root):
    file, _, name = place.partition("::")
    tree = ast.parse((root / "tests" / file).read_text())
    assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def fit(path, *callbacks, module=None, method=None, **options):
    """A module fitted with LoRA, and its Trainer; the base must not have moved."""
    module = Sgd() if module is None else module
    before = frozen_copy(module)
    run = trainer(path, PEFT(method or LoRA(r=4)), *callbacks, **options)
    run.fit(module, plain_loader(), plain_loader())
    with disabled(module):
        for name, tensor in module.named_parameters():
            assert ".delta." in name or torch.equal(before[name], tensor)
    return module, run


def test_accumulation(tmp_path):
    """Two batches of four are a batch of eight, by the Trainer's option and by the scheduler callback."""
    runs = []
    for size, options, callbacks in (
        (8, {}, []),
        (4, {"accumulate_grad_batches": 2}, []),
        (4, {}, [GradientAccumulationScheduler({0: 2})]),
    ):
        torch.manual_seed(0)
        module = Sgd()
        trainer(tmp_path, PEFT(LoRA()), *callbacks, **options).fit(module, plain_loader(batch_size=size))
        runs.append(adapter_state_dict(module))
    for other in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("how", "bound"), [("norm", 1e-3), ("value", 1e-4)])
def test_clipping(tmp_path, how, bound):
    """One step of plain descent at rate 0.1 moves the adapter by no more than the bound."""
    module, start = Sgd(), []

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(state_copy(pl_module))

    fit(tmp_path, Start(), module=module, max_steps=1, gradient_clip_val=bound, gradient_clip_algorithm=how)
    moved = [(value - start[0][n]).flatten() for n, value in adapter_state_dict(module).items()]
    size = torch.cat(moved).norm() if how == "norm" else torch.cat(moved).abs().max()
    torch.testing.assert_close(size, torch.tensor(0.1 * bound), atol=1e-7, rtol=1e-3)


def test_compiled_in_place(tmp_path):
    """`net.compile()` keeps all names."""
    module = Sgd()
    module.net.compile(backend="eager")
    module, _ = fit(tmp_path, TrainabilityCheck(), module=module)
    assert all("_orig_mod" not in n for n in adapter_state_dict(module))
    load_adapter(Sgd(), {"state_dict": adapter_state_dict(module), **section_of(module)})
    torch._dynamo.reset()


def section_of(module):
    content: dict = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    return {"lightning_peft": content["lightning_peft"]}


def test_swa(tmp_path):
    """The averaged adapter ends up in the module, beside an untouched base; its file is small."""
    module, run = fit(tmp_path, StochasticWeightAveraging(0.1, swa_epoch_start=1), max_epochs=4)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(content["state_dict"], adapter_state_dict(module))


def test_summary_counts(tmp_path):
    module, _ = fit(tmp_path, ModelSummary(max_depth=3), enable_model_summary=True)
    from lightning.pytorch.utilities.model_summary import summarize as counted

    ours = sum(t.numel() for t in adapter_state_dict(module).values())
    assert counted(module).trainable_parameters == ours


def test_checkpoint_modes(tmp_path):
    """Links, steps, no metric, weights only; weights alone cannot be resumed, and the error says what can."""
    savers = [
        ModelCheckpoint(tmp_path / "a", save_last="link", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path / "b", save_weights_only=True, save_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "c", monitor="val_loss", mode="max", enable_version_counter=False),
    ]
    module, run = fit(tmp_path, *savers)
    keys = set(adapter_state_dict(module))
    files = list(tmp_path.rglob("*.ckpt"))
    assert len(files) >= 5 and (tmp_path / "a" / "last.ckpt").is_symlink()
    assert all(set(torch.load(f, weights_only=True)["state_dict"]) == keys for f in files)
    with pytest.raises(CheckpointError, match=r"weights only.*init_from"):
        trainer(tmp_path, PEFT(LoRA(r=4))).fit(Sgd(), plain_loader(), ckpt_path=savers[1].best_model_path)
    run.validate(module, plain_loader(), ckpt_path=savers[1].best_model_path, verbose=False)


def test_on_exception(tmp_path):
    """The file of a broken run is small and taken up by the next one; one written before injection is a plain one."""

    class Break(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise RuntimeError("power cut")

    saver = OnExceptionCheckpoint(tmp_path / "e")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, saver, Break(), enable_checkpointing=True)
    module, content = Sgd(), torch.load(saver.ckpt_path, weights_only=True)
    run = trainer(tmp_path, PEFT(LoRA(r=4)), OnExceptionCheckpoint(tmp_path / "e"), enable_checkpointing=True)
    run.fit(module, plain_loader())
    assert set(content["state_dict"]) == set(adapter_state_dict(module)) and run.global_step == 8

    class Early(L.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("no data")

    early = OnExceptionCheckpoint(tmp_path / "early")
    with pytest.raises(RuntimeError, match="no data"):
        trainer(tmp_path, Early(), PEFT(LoRA(r=4)), early, enable_checkpointing=True).fit(Sgd(), plain_loader())
    with pytest.raises(CheckpointError, match="before adapters were injected"):
        trainer(tmp_path, PEFT(LoRA(r=4))).fit(Sgd(), plain_loader(), ckpt_path=early.ckpt_path)


def test_early_stopping_and_other_callbacks(tmp_path):
    """Stops, merges the best; its state is resumed with the rest. The PEFT callback itself keeps no state."""
    stop = EarlyStopping("val_loss", patience=1, mode="max")
    saver = ModelCheckpoint(tmp_path / "c", monitor="val_loss", mode="max")
    log = CSVLogger(tmp_path)
    _, run = fit(tmp_path, stop, saver, MergeOnFitEnd(), Timer(), LearningRateMonitor(), max_epochs=9, logger=log)
    assert run.current_epoch < 9
    content = torch.load(saver.best_model_path, weights_only=True)
    assert any("EarlyStopping" in k for k in content["callbacks"]) and not any(
        "PEFT" in k for k in content["callbacks"]
    )


@pytest.mark.parametrize("inference_mode", [True, False])
def test_predict_then_train(tmp_path, inference_mode):
    """Nothing that prediction or validation made is left in the way of a backward."""
    module = Sgd()
    run = trainer(tmp_path, PEFT(LoRA()), MergeOnFitEnd("last"), inference_mode=inference_mode)
    run.fit(module, plain_loader(), plain_loader())
    merged = torch.cat(run.predict(module, plain_loader()))
    trainer(tmp_path, PEFT(LoRA()), inference_mode=inference_mode).predict(module, plain_loader())
    before = state_copy(module)
    trainer(tmp_path, PEFT(LoRA()), max_epochs=1).fit(module, plain_loader(), plain_loader())
    assert merged.shape == (32, 3) and not same(before, adapter_state_dict(module))


@pytest.mark.parametrize("option", [{"fast_dev_run": True}, {"barebones": True, "max_epochs": 1}])
def test_runs_that_leave_nothing(tmp_path, option):
    """fast_dev_run and barebones train and write nothing."""
    callbacks = [PEFT(LoRA()), LogAdapter()]
    if "fast_dev_run" in option:
        callbacks.append(MergeOnFitEnd(dirpath=str(tmp_path / "merged")))
    module = Sgd()
    L.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **option).fit(module, plain_loader())
    assert not list(tmp_path.iterdir()) and len(trainable_names(module)) == 4


def test_trainer_options(tmp_path):
    """Limits, anomaly detection, reloading, an overfit batch, validation inside an epoch, a longer second fit."""
    options = {"detect_anomaly": True, "overfit_batches": 2, "reload_dataloaders_every_n_epochs": 1}
    module, run = fit(
        tmp_path, val_check_interval=1, num_sanity_val_steps=2, max_steps=3, deterministic=True, **options
    )
    before = state_copy(module)
    run.fit_loop.epoch_loop.max_steps, run.fit_loop.max_epochs = 6, 9
    run.fit(module, plain_loader(), plain_loader())
    assert run.global_step == 6 and not same(before, adapter_state_dict(module))


def test_callbacks_of_the_module(tmp_path):
    """A module may bring its own PEFT callback; it then replaces the Trainer's."""

    class Own(Sgd):
        def configure_callbacks(self):
            return [PEFT(LoRA(r=2))]

    for callbacks in ([], [PEFT(LoRA(r=4))]):
        module = Own()
        trainer(tmp_path, *callbacks, max_epochs=1).fit(module, plain_loader())
        assert adapter_state_dict(module)["net.0.delta.lora_A"].shape == (2, 8)


def test_a_plain_class_does_not_load_silently(tmp_path):
    """Lightning's own strict `load_from_checkpoint` knows nothing of adapters: it fails instead of giving the base."""
    saver = ModelCheckpoint(tmp_path / "c")
    fit(tmp_path, saver, module=Plain())
    with pytest.raises(RuntimeError, match="Missing key"):
        Plain.load_from_checkpoint(saver.best_model_path)


def test_fabric(tmp_path):
    """The functional core under Fabric: set up, train, save and load what `adapter_state_dict` gives."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = Sgd().net
    inject(net, LoRA(r=2))
    model, optimizer = fabric.setup(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))
    for x, y in fabric.setup_dataloaders(plain_loader()):
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    kept = set(adapter_state_dict(net))
    fabric.save(tmp_path / "a.ckpt", {"adapter": adapter_state_dict(net), "steps": 4})
    fabric.save(tmp_path / "b.ckpt", {"model": model}, filter={"model": lambda name, _: name in kept})
    content = fabric.load(tmp_path / "a.ckpt")
    assert same(content["adapter"], torch.load(tmp_path / "b.ckpt", weights_only=True)["model"])
    fresh = Sgd().net
    inject(fresh, LoRA(r=2))
    load_adapter(fresh, content["adapter"])
    assert same(adapter_state_dict(fresh), adapter_state_dict(net))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(net))):
        shake(net)
        assert not same(adapter_state_dict(other), adapter_state_dict(net))
