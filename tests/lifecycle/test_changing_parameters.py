"""Parameters that start or stop training in mid-fit, are replaced, or pruned: their files load, and resume exactly."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    FullFineTuning,
    LoRA,
    TrainingError,
    adapter_state_dict,
    load_adapter,
    load_from_checkpoint,
    trainable_names,
)
from tests.contract.battery import same
from tests.models import plain_loader, trainer


class Net(L.LightningModule):
    """A backbone and a head; the optimizer holds all parameters, so that those that are frozen may join later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Unfreezes(Net):
    """Trains a layer of its base from the second epoch on."""

    def on_train_epoch_start(self):
        self.backbone[2].requires_grad_(self.current_epoch >= 1)


class Stops(Net):
    """Trains a layer of its base, and then its head, in the first epoch alone."""

    def on_train_epoch_start(self):
        self.backbone[2].requires_grad_(self.current_epoch < 1)
        self.head.requires_grad_(self.current_epoch < 1)
        if self.current_epoch >= 1:
            self.zero_grad()  # Adam goes on with a gradient that is left


class Replaces(Net):
    """Puts another head in the place of the frozen one, of the same shape."""

    replaced = False

    def on_train_epoch_start(self):
        if self.current_epoch < 1 or self.replaced:
            return
        self.replaced = True
        if self.current_epoch > 1:  # a run that was resumed: the head of the file has been loaded
            self.head.requires_grad_()
            return
        optimizer = self.optimizers().optimizer
        for parameter in self.head.parameters():
            optimizer.state.pop(parameter, None)
        torch.manual_seed(7)
        self.head = nn.Linear(8, 3)
        optimizer.param_groups[0]["params"] = list(self.parameters())


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a module computes with."""
    return {n: t.detach().clone() for n, t in (*module.named_parameters(), *module.named_buffers())}


def fit(folder, module, *callbacks, epochs=4, resume=None, **options):
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, **options)
    trainer(folder, *callbacks, saver, max_epochs=epochs).fit(module, plain_loader(), ckpt_path=resume)
    return module


@pytest.mark.parametrize("kind", [Unfreezes, Stops, Replaces])
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules="backbone.0"), FullFineTuning()], ids=["lora", "full"])
def test_files_load_and_resume_exactly(kind, method, tmp_path):
    module = fit(tmp_path, kind(), PEFT(method))
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path / f"again{epoch}", kind(), PEFT(method), resume=path)
        assert same(tensors(resumed), tensors(module)), epoch
    reloaded = load_from_checkpoint(kind, tmp_path / "last.ckpt")
    assert same(tensors(reloaded), tensors(module))


def test_weights_alone_load_as_well(tmp_path):
    method = LoRA(r=2, target_modules="backbone.0", modules_to_save="head")
    module = fit(tmp_path, Unfreezes(), PEFT(method), save_weights_only=True)
    assert "backbone.2.weight" in trainable_names(module)
    fresh = Unfreezes()
    load_adapter(fresh, tmp_path / "last.ckpt")
    assert same(tensors(fresh), tensors(module))


def test_backbone_finetuning_before_the_callback(tmp_path):
    """The adapters train from the start, the base when it is unfrozen; as far as Lightning resumes exactly."""

    def callbacks():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False), PEFT(method)

    class Filters(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    method = LoRA(r=2, target_modules="backbone.0", modules_to_save="head")
    module = fit(tmp_path, Filters(), *callbacks())
    assert "backbone.2.weight" in trainable_names(module)
    resumed = fit(tmp_path / "again", Filters(), *callbacks(), resume=tmp_path / "epoch=0.ckpt")
    assert same(tensors(resumed), tensors(module))
    assert same(tensors(load_from_checkpoint(Filters, tmp_path / "last.ckpt")), tensors(module))
    late = fit(tmp_path / "late", Filters(), *callbacks(), resume=tmp_path / "epoch=2.ckpt")
    assert set(adapter_state_dict(late)) >= set(trainable_names(late))  # Lightning does not unfreeze it again


def test_backbone_finetuning_after_the_callback_is_refused(tmp_path):
    method = LoRA(r=2, target_modules="backbone.0", modules_to_save="head")

    class Filters(Net):
        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    callbacks = PEFT(method), BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    with pytest.raises(TrainingError, match=r"BackboneFinetuning has frozen 2 of 4 .*put it before PEFT"):
        fit(tmp_path, Filters(), *callbacks)


def test_an_adapted_layer_that_is_replaced_in_mid_fit_is_refused_when_a_file_is_written(tmp_path):
    class Loses(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.backbone[0] = nn.Linear(8, 8)

    with pytest.raises(TrainingError, match=r"'backbone.0' is no longer the layer that was adapted"):
        fit(tmp_path, Loses(), PEFT(LoRA(r=2, target_modules="backbone.0")))
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"epoch=0.ckpt", "last.ckpt"}


def pruning(**options) -> L.Callback:
    return ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False, **options)


def test_what_is_pruned_loads_and_resumes_as_without_the_callback(tmp_path):
    expected = fit(tmp_path / "without", Net(), pruning())
    module = fit(tmp_path / "with", Net(), PEFT(FullFineTuning()), pruning())
    assert same(tensors(expected), tensors(module)) and int((module.head.weight == 0).sum()) > 8
    reloaded = load_from_checkpoint(Net, tmp_path / "with" / "last.ckpt")
    load_adapter(loaded := Net(), tmp_path / "with" / "last.ckpt")
    expected = load_from_checkpoint(Net, tmp_path / "with" / "epoch=3.ckpt")
    assert same(tensors(reloaded), tensors(expected)) and same(tensors(loaded), tensors(expected))
    plain = fit(tmp_path / "a", Net(), pruning(), resume=tmp_path / "without" / "epoch=1.ckpt")
    resumed = fit(tmp_path / "b", Net(), PEFT(FullFineTuning()), pruning(), resume=tmp_path / "with" / "epoch=1.ckpt")
    assert same(tensors(plain), tensors(resumed))


def test_pruning_frozen_weights_is_refused_at_setup(tmp_path):
    module = Net()
    with pytest.raises(TrainingError, match=r"ModelPruning changes the frozen weights.*FullFineTuning"):
        fit(tmp_path, module, PEFT(LoRA(r=2)), pruning())
    assert not hasattr(module.head, "delta") and not (tmp_path / "last.ckpt").exists()


def test_masks_in_a_file_are_one_clear_error(tmp_path):
    """With ``make_pruning_permanent=False`` a file holds what no new module has; Lightning itself cannot load it."""
    fit(tmp_path, Net(), PEFT(FullFineTuning()), pruning(make_pruning_permanent=False))
    with pytest.raises(CheckpointError, match="backbone"):
        load_from_checkpoint(Net, tmp_path / "last.ckpt")
