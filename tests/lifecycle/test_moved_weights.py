"""Frozen weights that a module moves itself, as the teachers of BYOL, MoCo and DINO: saved, and resumed exactly."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    LoRA,
    MergeOnFitEnd,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
    state_names,
    unmerge,
)
from tests.contract.battery import same
from tests.lifecycle.test_changing_parameters import tensors
from tests.models import plain_loader, trainer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Teaches(L.LightningModule):
    """A student, and a teacher that follows it: what the student trains in full, by name."""

    def __init__(self, seed: int = 0, seed_of_teacher: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.student = network()
        if seed_of_teacher is not None:
            torch.manual_seed(seed_of_teacher)
        self.teacher = (copy.deepcopy(self.student) if seed_of_teacher is None else network()).requires_grad_(False)

    def training_step(self, batch, index):
        answer = self.student(batch[0])
        with torch.no_grad():
            target = self.teacher(batch[0])
        return nn.functional.cross_entropy(answer, batch[1]) + nn.functional.mse_loss(answer, target)

    def on_train_batch_end(self, outputs, batch, index):
        students = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            self.move(parameter, students[name])

    def move(self, teacher, student):
        teacher.data = 0.9 * teacher.data + 0.1 * student.data

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self.teacher(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class InPlace(Teaches):
    """As many write it, past the version counter."""

    def move(self, teacher, student):
        teacher.data.mul_(0.9).add_(student.data, alpha=0.1)


class Counted(Teaches):
    """As others write it."""

    @torch.no_grad()
    def move(self, teacher, student):
        teacher.lerp_(student, 0.1)


class WholeTeacher(Teaches):
    """The teacher is adapted like the student, and follows it parameter by parameter."""

    def on_train_batch_end(self, outputs, batch, index):
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            self.move(teacher, student)


class MovesItsBase(Teaches):
    """What moves is the base of an adapted layer: it shrinks at every step."""

    def on_train_batch_end(self, outputs, batch, index):
        self.student[0].weight.data *= 0.99


STUDENT = LoRA(r=2, target_modules="student.0", modules_to_save="student.2")
BOTH = LoRA(r=2, target_modules=["student.*", "teacher.*"])
#: module, method, and what of the teacher moves
CASES = {
    "rebound": (Teaches, STUDENT, {"teacher.2.weight", "teacher.2.bias"}),
    "in place": (InPlace, STUDENT, {"teacher.2.weight", "teacher.2.bias"}),
    "counted": (Counted, STUDENT, {"teacher.2.weight", "teacher.2.bias"}),
    "whole": (WholeTeacher, BOTH, set()),
    "base": (MovesItsBase, STUDENT, {"student.0.weight"}),
}
cases = pytest.mark.parametrize("case", CASES)


def fit(folder, module, method, *callbacks, resume=None, epochs=3, **options):
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, **options)
    run = trainer(folder, PEFT(method), *callbacks, saver, max_epochs=epochs)
    run.fit(module, plain_loader(), plain_loader(), ckpt_path=resume)
    return run


@cases
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    kind, method, moved = CASES[case]
    fit(tmp_path, module := kind(), method)
    assert moved <= set(state_names(module))
    # `0.9 x + 0.1 x` is not always x: what has moved by rounding alone travels as well
    assert not any(name.startswith("student.2") for name in state_names(module))
    for name in ("epoch=0", "epoch=1"):
        fit(tmp_path / "again", resumed := kind(), method, resume=tmp_path / f"{name}.ckpt")
        assert same(tensors(resumed), tensors(module)), name


@cases
@pytest.mark.parametrize("options", [{"save_weights_only": True}, {"monitor": "val_loss", "mode": "max"}], ids=str)
def test_every_file_brings_what_moved(case, options, tmp_path):
    """Weights alone, the last, the best of several; into the module's class, an instance, and beside `Trainer.test`."""
    kind, method, _ = CASES[case]
    run = fit(tmp_path, module := kind(), method, **options)
    expected = tensors(module)
    last = tmp_path / "last.ckpt"
    assert same(tensors(load_from_checkpoint(kind, last)), expected)
    load_adapter(fresh := kind(), last)
    assert same(tensors(fresh), expected)
    loss = run.test(module, plain_loader(), verbose=False)
    assert run.test(kind(), plain_loader(), ckpt_path=last, verbose=False) == loss
    save_adapter(fresh, tmp_path / "a.safetensors")
    load_adapter(again := kind(), tmp_path / "a.safetensors")
    assert same(tensors(again), expected)


@cases
def test_merged_at_the_end(case, tmp_path):
    """The best weights come back, those that moved among them, and a file of the merged module is as small."""
    kind, method, _ = CASES[case]
    saver = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max")
    run = fit(tmp_path, module := kind(), method, saver, MergeOnFitEnd())
    load_adapter(best := kind(), saver.best_model_path)
    names = set(adapter_state_dict(best))
    run.save_checkpoint(tmp_path / "merged.ckpt")
    assert set(torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]) == names
    assert same(adapter_state_dict(module), adapter_state_dict(best))
    x = torch.randn(4, 8)
    merge(best)
    assert torch.equal(module.student(x), best.student(x)) and torch.equal(module.teacher(x), best.teacher(x))
    load_adapter(other := kind(), tmp_path / "merged.ckpt")
    unmerge(module)
    assert same(tensors(module), tensors(other))


def test_a_teacher_with_a_start_of_its_own(tmp_path):
    """Random weights that a file brings anyway need not be those of the run that wrote it; all others must."""
    fit(tmp_path, module := Teaches(seed_of_teacher=1), STUDENT)
    load_adapter(other := Teaches(seed_of_teacher=2), tmp_path / "last.ckpt")
    assert same(tensors(other), tensors(module))
    fit(tmp_path / "a", resumed := Teaches(seed_of_teacher=2), STUDENT, resume=tmp_path / "epoch=0.ckpt")
    assert same(tensors(resumed), tensors(module))
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(Teaches(seed=3, seed_of_teacher=1), tmp_path / "last.ckpt")


def test_a_file_from_before_it_moved_cannot_be_loaded_after(tmp_path):
    """There is no copy of the start; in a module built anew the file is right."""
    inject(module := Teaches(), STUDENT)
    save_adapter(module, tmp_path / "start.safetensors")
    run = trainer(tmp_path, PEFT(STUDENT), max_epochs=1)
    run.fit(module, plain_loader())
    before = tensors(module)
    with pytest.raises(CheckpointError, match=r"teacher.2.*moved.*Build the model again"):
        load_adapter(module, tmp_path / "start.safetensors")
    assert same(tensors(module), before)
    load_adapter(Teaches(), tmp_path / "start.safetensors")


def test_other_frozen_weights_in_a_file_are_refused(tmp_path):
    """Of another shape, or unknown to the module."""
    fit(tmp_path, Teaches(), STUDENT)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, value, words in (
        ("teacher.2.weight", torch.zeros(2, 2), "other shapes"),
        ("teacher.9.weight", torch.zeros(2, 2), "in excess teacher.9.weight"),
    ):
        state = content["state_dict"] | {name: value}
        section = content["lightning_peft"] | {"keys": list(state)}
        module = Teaches()
        before = tensors(module)
        with pytest.raises(CheckpointError, match=words):
            load_adapter(module, {"state_dict": state, "lightning_peft": section})
        assert same(tensors(module), before)


def test_what_does_not_move_is_in_no_file(tmp_path):
    """Neither casts nor moves to another device are movement."""
    inject(module := Teaches(), STUDENT)
    assert not state_names(module)
    module.bfloat16()
    assert not state_names(module)


def test_beside_weight_averaging(tmp_path):
    """Frozen weights that are averaged with themselves are rounded, and in no file; the teacher is, as it moves."""
    fit(tmp_path / "a", module := Teaches(), STUDENT, EMAWeightAveraging(decay=0.9))
    content = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    names = {"teacher.2.weight", "teacher.2.bias"}
    assert set(content["state_dict"]) == names | {n for n in adapter_state_dict(module) if n.startswith("student")}
    load_adapter(Teaches(), tmp_path / "a" / "last.ckpt")
    # averaging that has not begun: the average still holds the teacher of the start
    late = EMAWeightAveraging(decay=0.9, update_starting_at_step=1000)
    fit(tmp_path / "b", Teaches(), STUDENT, late, epochs=1)
    load_adapter(other := Teaches(), tmp_path / "b" / "last.ckpt")
    assert not state_names(other)
