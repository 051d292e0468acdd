"""Objects in checkpoints: those that a module's own hook adds, and hyper-parameters that are objects."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    FullFineTuning,
    LoRA,
    MergeOnFitEnd,
    PEFTError,
    adapter_state_dict,
    load_adapter,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from lightning_peft.objects import load_plain, object_in
from lightning_peft.trainer import checkpoint_io
from tests.contract.battery import same
from tests.models import Plain, frozen_copy, plain_loader, trainer


class Scale:
    """An object such as libraries keep: it must come back as it was."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Keeps(Plain):
    """Adds objects to its checkpoints, and takes back what is there."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.scale: Scale | None = Scale(2.0)
        self.seen = 0

    def on_train_epoch_end(self):
        self.seen += 1

    def on_save_checkpoint(self, checkpoint):
        checkpoint |= {"scale": self.scale, "table": {"rows": np.arange(3)}, "seen": self.seen}
        checkpoint["hyper_parameters"]["loss"] = nn.CrossEntropyLoss()

    def on_load_checkpoint(self, checkpoint):
        self.scale, self.seen = checkpoint.get("scale"), checkpoint["seen"]


class Demands(Keeps):
    """Cannot do without its object."""

    def on_load_checkpoint(self, checkpoint):
        self.scale = checkpoint["scale"]


def saver(folder, **options):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


def elsewhere(monkeypatch):
    """As in a process that has written no file."""
    monkeypatch.setattr(checkpoint_io, "_written", set())


def fitted(folder, method=None, kind=Keeps, **options):
    module = kind()
    run = trainer(folder, PEFT(method or LoRA()), saver(folder), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, plain_loader(), plain_loader())
    return module, run


def test_one_warning_says_what_is_written(tmp_path, recwarn):
    trainer(tmp_path, PEFT(LoRA()), saver(tmp_path)).fit(Keeps(), plain_loader())
    said = [str(w.message) for w in recwarn if "hold objects" in str(w.message)]
    assert len(said) == 1
    for part in (
        "scale (tests.lifecycle.test_objects.Scale)",
        "table (numpy.ndarray)",
        "hyper_parameters.loss (torch.",
    ):
        assert part in said[0]
    assert "seen" not in said[0] and "trainer.fit(…, weights_only=False)" in said[0]


@pytest.mark.parametrize("method", [LoRA(), FullFineTuning()], ids=["LoRA", "FullFineTuning"])
def test_readers_take_the_adapter_and_build_nothing(method, tmp_path, capsys, monkeypatch):
    """Also those that know the file from this process: an adapter needs no objects."""
    module, _ = fitted(tmp_path, method)
    file = tmp_path / "epoch=1.ckpt"
    monkeypatch.setattr(Scale, "__setstate__", lambda self, state: pytest.fail("an object was built"), raising=False)
    network = copy.deepcopy(Plain().net)
    if isinstance(method, LoRA):
        load_adapter(network, file)
        assert {f"net.{n}" for n in adapter_state_dict(network)} == set(adapter_state_dict(module))
    with pytest.warns(UserWarning, match=r"on_load_checkpoint is not called, .* weights_only=False\)"):
        again = load_from_checkpoint(Keeps(), file)
    assert same(frozen_copy(again), frozen_copy(module)) and again.scale.factor == 2.0
    assert main(["inspect", str(file)]) == 0 and type(method).__name__ in capsys.readouterr().out
    monkeypatch.undo()
    assert load_from_checkpoint(Keeps(), file, weights_only=False).seen == 2


def test_the_best_of_this_process_comes_with_its_objects(tmp_path):
    """``ckpt_path="best"`` reads a file of which this process wrote every byte; MergeOnFitEnd needs weights alone."""
    module, best = Demands(), ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(tmp_path, PEFT(LoRA()), MergeOnFitEnd(), best)
    run.fit(module, plain_loader(), plain_loader())
    module.scale = None
    run.test(module, plain_loader(), ckpt_path="best", verbose=False)
    assert module.scale.factor == 2.0
    changed = torch.load(best.best_model_path, weights_only=False) | {"more": 1}
    torch.save(changed, best.best_model_path)
    with pytest.warns(UserWarning, match="are not built"), pytest.raises(CheckpointError, match=r"asks for .* scale"):
        run.test(module, plain_loader(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("method", [LoRA(), FullFineTuning()], ids=["LoRA", "FullFineTuning"])
def test_a_later_process_resumes_without_them(method, tmp_path, monkeypatch):
    module, _ = fitted(tmp_path, method)
    elsewhere(monkeypatch)
    monkeypatch.setattr(Scale, "__setstate__", lambda self, state: pytest.fail("an object was built"), raising=False)
    resumed, run = Keeps(), trainer(tmp_path, PEFT(method))
    with pytest.warns(UserWarning) as said:
        run.fit(resumed, plain_loader(), plain_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(frozen_copy(resumed), frozen_copy(module)) and resumed.seen == 2 and resumed.scale is None
    (line,) = [str(w.message) for w in said if "are not built" in str(w.message)]
    assert "scale (tests.lifecycle.test_objects.Scale)" in line and "trainer.fit(…, weights_only=False)" in line


def test_a_later_process_resumes_with_them_if_the_user_trusts_the_file(tmp_path, monkeypatch):
    module, _ = fitted(tmp_path)
    elsewhere(monkeypatch)
    resumed = Keeps()
    options = {"ckpt_path": tmp_path / "epoch=0.ckpt", "weights_only": False}
    trainer(tmp_path, PEFT(LoRA())).fit(resumed, plain_loader(), plain_loader(), **options)
    assert same(frozen_copy(resumed), frozen_copy(module)) and resumed.scale.factor == 2.0


def test_a_hook_that_demands_its_object_is_one_error(tmp_path, monkeypatch):
    fitted(tmp_path, kind=Demands)
    elsewhere(monkeypatch)
    with pytest.raises(CheckpointError, match=r"Demands\.on_load_checkpoint asks for .*scale .*weights_only=False"):
        trainer(tmp_path, PEFT(LoRA())).fit(Demands(), plain_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


class Remembers(Callback):
    """Its own state is an object."""

    def state_dict(self):
        return {"folder": Path("somewhere")}


def test_states_that_a_resume_needs_are_not_dropped(tmp_path, monkeypatch):
    run = trainer(tmp_path, PEFT(LoRA()), Remembers(), saver(tmp_path))
    run.fit(Plain(), plain_loader())
    elsewhere(monkeypatch)
    again = trainer(tmp_path, PEFT(LoRA()), Remembers())
    with pytest.raises(CheckpointError, match=r"callbacks\.Remembers \(pathlib.*trainer\.fit\(…, weights_only=False"):
        again.fit(Plain(), plain_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    load_adapter(Plain(), tmp_path / "epoch=0.ckpt")


class Payload:
    """Leaves a file behind when it is built."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["state_dict", "lightning_peft", "epoch", "state_dict.0.delta.lora_A", "extra"])
def test_an_object_in_place_of_an_adapter_is_refused(place, tmp_path):
    fitted(tmp_path, kind=Plain)
    content = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    part, _, name = place.partition(".")
    if name:
        content[part][f"net.{name}"] = Payload(tmp_path / "EXECUTED")
    else:
        content[part] = Payload(tmp_path / "EXECUTED")
    torch.save(content, tmp_path / "bad.ckpt")
    if place == "extra":
        load_adapter(Plain(), tmp_path / "bad.ckpt")
    else:
        with pytest.raises(CheckpointError, match=r"holds an object of (posix|nt)\.system"):
            load_adapter(Plain(), tmp_path / "bad.ckpt")
    assert not (tmp_path / "EXECUTED").exists()


def test_everything_but_objects_is_read_as_torch_reads_it(tmp_path):
    """Views, shared storages, types, empty tensors, plain values of every kind."""
    base = torch.randn(4, 6)
    tensors = [base.t(), base[1:, ::2], torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(3)]
    tensors += [
        nn.Parameter(torch.ones(1)),
        torch.tensor([1 + 2j]),
        torch.tensor([True]),
        torch.tensor(7, dtype=torch.uint8),
    ]
    plain = {"a": [1, (2.5, None)], "b": b"\0\xff", "c": 1j, "d": {1, "x"}, "e": torch.Size([2]), "f": torch.float16}
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": dict(enumerate(tensors)), "g": torch.device("cpu")}
    content |= plain | {"h": 2**200, "i": -1, "j": "ü", "epoch": 1}
    torch.save(content, tmp_path / "plain.ckpt")
    torch.save(content | {"object": Scale(1.0), "list": [Scale(2.0)]}, tmp_path / "more.ckpt")
    expected, found = torch.load(tmp_path / "plain.ckpt", weights_only=True), load_plain(tmp_path / "more.ckpt")
    kind = "tests.lifecycle.test_objects.Scale"
    assert found.left_out == {"object": kind, "list": kind}
    first, second = expected.pop("state_dict"), found.pop("state_dict")
    assert expected == found and [t.dtype for t in first.values()] == [t.dtype for t in second.values()]
    assert all(torch.equal(second[i], t) and second[i].stride() == t.stride() for i, t in first.items())
    assert second[0].untyped_storage().data_ptr() == second[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [np.float64(1), nn.ReLU(), Path("a"), lambda: 1, [{"a": Scale(1.0)}], int, {Scale}])
def test_what_weights_only_does_not_read_back(value):
    assert object_in(value) is not None
    with torch.serialization.safe_globals([Scale]):
        assert object_in([Scale(1.0)]) is None


# ---- hyper-parameters that are objects ------------------------------------------------------------------------------
class Lossy(Plain):
    """Its loss is an argument with a default."""

    def __init__(self, width: int = 16, loss: nn.Module | None = None) -> None:
        super().__init__(width)
        self.loss = loss or nn.CrossEntropyLoss()
        self.save_hyperparameters(logger=False)


def test_an_argument_that_was_left_out_never_falls_back_to_its_default(tmp_path):
    module = Lossy(loss=nn.MultiMarginLoss())
    run = trainer(tmp_path, PEFT(LoRA()), saver(tmp_path))
    with pytest.warns(UserWarning, match=r"loss are objects .*load_from_checkpoint\(Lossy\(…\), path\)"):
        run.fit(module, plain_loader())
    file = tmp_path / "epoch=1.ckpt"
    content = torch.load(file, weights_only=True)
    kind = "torch.nn.modules.loss.MultiMarginLoss"
    assert content["lightning_peft"]["left_out"] == {"hyper_parameters": {"loss": kind}}
    with pytest.raises(
        CheckpointError, match=rf"built with: loss \({kind}\).*load_from_checkpoint\(Lossy\(…\), path\)"
    ):
        load_from_checkpoint(Lossy, file)
    for again in (load_from_checkpoint(Lossy(), file), load_from_checkpoint(Lossy, file, loss=nn.MultiMarginLoss())):
        assert same(adapter_state_dict(again), adapter_state_dict(module))
    assert isinstance(again.loss, nn.MultiMarginLoss)


class Settings(dict):
    """All hyper-parameters in one object, as a DictConfig of OmegaConf is."""


class Configured(Plain):
    """Its only argument has a default, which a reload must not fall back to."""

    def __init__(self, config: dict | None = None) -> None:
        super().__init__(**(config or {}))

    def on_save_checkpoint(self, checkpoint):
        checkpoint |= {"hyper_parameters": Settings(width=8), "hparams_name": "config", "hparams_type": Settings}


def test_arguments_in_one_object_never_fall_back_to_their_defaults(tmp_path):
    fitted(tmp_path, FullFineTuning(), lambda: Configured({"width": 8}))
    file = tmp_path / "epoch=1.ckpt"
    with pytest.raises(
        CheckpointError, match=r"config \(.*Settings\).* load_from_checkpoint\(Configured, path, config=…"
    ):
        load_from_checkpoint(Configured, file)
    assert load_from_checkpoint(Configured, file, config={"width": 8}).net[0].out_features == 8


def test_full_fine_tuning_writes_hyper_parameters_as_lightning_does(tmp_path):
    """Lightning's own ``load_from_checkpoint`` gives them back or refuses the file, as it does without PEFT."""
    module = Lossy(loss=nn.MultiMarginLoss())
    trainer(tmp_path, PEFT(FullFineTuning()), saver(tmp_path)).fit(module, plain_loader())
    file = tmp_path / "epoch=1.ckpt"
    again = Lossy.load_from_checkpoint(file, weights_only=False)
    assert isinstance(again.loss, nn.MultiMarginLoss) and same(frozen_copy(again), frozen_copy(module))
    with pytest.raises(Exception, match="MultiMarginLoss"):
        Lossy.load_from_checkpoint(file)
    with pytest.raises(CheckpointError, match=r"built with: loss .* if you trust the file, weights_only=False"):
        load_from_checkpoint(Lossy, file)
    assert isinstance(load_from_checkpoint(Lossy, file, weights_only=False).loss, nn.MultiMarginLoss)
    assert same(frozen_copy(load_from_checkpoint(Lossy(), file)), frozen_copy(module))


class Own(Lossy):
    """A class that reads files in its own way, as libraries have them."""

    @classmethod
    def load_from_checkpoint(cls, path, **options):
        options.setdefault("weights_only", False)
        return super().load_from_checkpoint(path, **options)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["hyper_parameters"]["loss"] = self.loss


def test_a_class_that_unpickles_is_not_let_at_a_file_with_objects(tmp_path):
    trainer(tmp_path, PEFT(LoRA()), saver(tmp_path)).fit(Own(loss=nn.MultiMarginLoss()), plain_loader())
    file = tmp_path / "epoch=1.ckpt"
    for given in ({}, {"loss": nn.MultiMarginLoss()}):
        with pytest.raises(CheckpointError, match=r"load_from_checkpoint\(Own\(…\), path\)"):
            load_from_checkpoint(Own, file, **given)
    assert isinstance(load_from_checkpoint(Own, file, weights_only=False).loss, nn.MultiMarginLoss)


class Unsaved(Plain):
    """Says nothing of its arguments to its files."""

    def __init__(self, table) -> None:
        super().__init__()
        self.hparams.clear()
        self.table = [table["rows"]]


def test_an_argument_that_no_file_holds_is_named(tmp_path):
    trainer(tmp_path, PEFT(LoRA()), saver(tmp_path)).fit(Unsaved({"rows": 1}), plain_loader())
    file = tmp_path / "epoch=1.ckpt"
    with pytest.raises(PEFTError, match=r"does not hold table.*load_from_checkpoint\(Unsaved\(…\), path\).*table=…"):
        load_from_checkpoint(Unsaved, file)
    assert load_from_checkpoint(Unsaved, file, table={"rows": 2}).table == [2]
