"""What a module does in its own code: builds its network again, knows a part under two names, leaves adapters out."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    BitFit,
    FullFineTuning,
    LoRA,
    TrainingError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    trainable_names,
)
from lightning_peft.trainer.session import Session
from tests.contract.battery import same
from tests.models import plain_loader, trainer


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Base(L.LightningModule):
    """A loss and an optimizer for a network of any shape."""

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Early(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()


class Rebuilds(Base):
    """Builds a new network at every call of ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.calls = 0

    def configure_model(self):
        self.calls += 1
        self.net = build()


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


class NetworkFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = Parts()
        self.backbone = self.net.backbone


class PartFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        parts = Parts()
        self.backbone = parts.backbone
        self.net = parts


def fit(folder, module, *callbacks, resume=None):
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer(folder, *callbacks, saver, max_epochs=3).fit(module, plain_loader(), ckpt_path=resume)
    return module


def test_weight_averaging_beside_a_network_that_is_built_again(tmp_path):
    """WeightAveraging calls ``configure_model`` itself before Lightning does: adapters go into either network."""

    def averaged(module, folder, resume=None):
        return fit(folder, module, PEFT(LoRA(r=2)), EMAWeightAveraging(decay=0.5), resume=resume)

    module = averaged(Rebuilds(), tmp_path / "a")
    assert module.calls == 2 and "configure_model" not in vars(module)
    assert same(adapter_state_dict(module), adapter_state_dict(averaged(Early(), tmp_path / "b")))
    content = torch.load(tmp_path / "a" / "epoch=0.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(trainable_names(module))
    resumed = averaged(Rebuilds(), tmp_path / "c", resume=tmp_path / "a" / "epoch=0.ckpt")
    assert same(adapter_state_dict(module), adapter_state_dict(resumed))


@pytest.mark.parametrize("kind", [NetworkFirst, PartFirst])
@pytest.mark.parametrize("method", [LoRA(r=2), LoRA(r=2, modules_to_save="head"), BitFit(), FullFineTuning()])
def test_a_part_under_two_names(kind, method, tmp_path):
    """Which name comes first makes no difference to a resume, to reloading, or beside weight averaging."""
    module = fit(tmp_path, kind(), PEFT(method))
    resumed = fit(tmp_path / "b", kind(), PEFT(method), resume=tmp_path / "epoch=0.ckpt")
    loaded = kind()
    load_adapter(loaded, tmp_path / "epoch=2.ckpt")
    for other in (resumed, loaded, load_from_checkpoint(kind, tmp_path / "epoch=2.ckpt")):
        assert same(adapter_state_dict(module), adapter_state_dict(other))

    def averaged(folder, resume=None):
        return fit(tmp_path / folder, kind(), PEFT(method), EMAWeightAveraging(decay=0.5), resume=resume)

    whole = averaged("c")
    resumed = averaged("d", resume=tmp_path / "c" / "epoch=0.ckpt")
    assert same(adapter_state_dict(whole), adapter_state_dict(resumed))


@pytest.mark.parametrize("kind", [NetworkFirst, PartFirst])
@pytest.mark.parametrize("name", ["backbone.0", "net.backbone.0"])
def test_patterns_may_mean_either_name(kind, name):
    targeted, saved = kind(), kind()
    inject(targeted, LoRA(r=2, target_modules=name))
    assert len(trainable_names(targeted)) == 2 and all("backbone.0.delta" in n for n in trainable_names(targeted))
    inject(saved, LoRA(r=2, target_modules="head", modules_to_save=name))
    assert len([n for n in trainable_names(saved) if "backbone.0" in n]) == 2


@pytest.mark.parametrize("lost", ["net.backbone.0.delta.lora_A", "net.head.delta.lora_B"])
def test_a_tensor_that_is_missing_under_all_its_names_is_an_error(lost):
    module = PartFirst()
    inject(module, LoRA(r=2))
    Session.on(module).keep_small("trainable")
    state = module.state_dict()
    module.load_state_dict(state)
    del state[lost.removeprefix("net.") if "backbone" in lost else lost]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{lost}"):
        module.load_state_dict(state)


@pytest.mark.parametrize("automatic", [True, False])
def test_adapters_that_do_not_reach_the_loss_are_named(automatic, tmp_path):
    class Beside(Early):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def training_step(self, batch, index):
            with torch.no_grad():
                hidden = self.net[:2](batch[0])
            loss = nn.functional.cross_entropy(self.net[2](hidden), batch[1])
            return loss if automatic else self.manual_backward(loss)

    with pytest.raises(TrainingError, match=r"does not depend on any of the 2 trained tensors \(net\.0\.delta\.lora_A"):
        trainer(tmp_path, PEFT(LoRA(target_modules="0"))).fit(Beside(), plain_loader())
