"""``PEFT(FullFineTuning())`` changes nothing that Lightning does without it: the same weights, files and freedoms."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_peft import PEFT, FullFineTuning, LoRA, TrainabilityCheck, adapter_state_dict, load_from_checkpoint
from tests.contract.battery import same
from tests.models import frozen_copy, plain_loader, trainer


class Net(L.LightningModule):
    """A backbone, a head, and something that a state dict holds beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.seen = 0

    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = int(state)

    def training_step(self, batch, index):
        self.seen += len(batch[0])
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Unused(Net):
    """A layer that no optimizer holds, and that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.Adam([*self.backbone.parameters(), *self.head.parameters()], lr=1e-2)


class Pair(L.LightningModule):
    """Two networks that train against each other, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(8, 8), nn.Linear(8, 1)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()

    def training_step(self, batch, index):
        x = batch[0]
        of_generator, of_critic = self.optimizers()
        self.toggle_optimizer(of_generator)
        self.step(of_generator, lambda: -self.critic(self.generator(x)).mean())
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_critic)
        self.step(of_critic, lambda: (self.critic(self.generator(x).detach()) - self.critic(x)).tanh().mean())
        self.untoggle_optimizer(of_critic)

    def configure_optimizers(self):
        first = torch.optim.Adam(self.generator.parameters(), lr=1e-2)
        second = torch.optim.Adam(self.critic.parameters(), lr=1e-2)
        return first, second


def full() -> L.Callback:
    return PEFT(FullFineTuning())


def gradual() -> L.Callback:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)


def fit(folder, kind, callbacks, resume=None):
    """The module after four epochs, and the folder with a file of each."""
    module = kind()
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, *[make() for make in callbacks], saver, max_epochs=4)
    run.fit(module, plain_loader(), ckpt_path=resume)
    return module


CASES = {
    "plain": (Net, [], [full]),
    "unused": (Unused, [], [full]),
    "pair": (Pair, [], [full]),
    "BackboneFinetuning after": (Net, [gradual], [full, gradual]),
    "BackboneFinetuning before": (Net, [gradual], [gradual, full]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_and_files_as_without_it(case, tmp_path):
    """Whatever is resumed: a file written with it or without it, before the backbone trains and after."""
    kind, without, with_it = CASES[case]
    expected = fit(tmp_path / "without", kind, without)
    module = fit(tmp_path / "with", kind, with_it)
    assert same(frozen_copy(expected), frozen_copy(module))
    for epoch in (0, 2):
        name = f"epoch={epoch}.ckpt"
        files = [torch.load(tmp_path / folder / name, weights_only=True) for folder in ("without", "with")]
        assert same(files[0]["state_dict"], files[1]["state_dict"])
        # Lightning itself does not unfreeze a backbone again when it resumes after that; here as there.
        plain = fit(tmp_path / "again", kind, without, resume=tmp_path / "without" / name)
        for source in ("without", "with"):
            resumed = fit(tmp_path / "again", kind, with_it, resume=tmp_path / source / name)
            assert same(frozen_copy(plain), frozen_copy(resumed)), (epoch, source)


def test_its_files_reload(tmp_path):
    module = fit(tmp_path, Net, [full])
    again = load_from_checkpoint(Net, tmp_path / "epoch=3.ckpt")
    assert same(frozen_copy(module), frozen_copy(again)) and again.seen == module.seen == 128
    assert set(adapter_state_dict(again)) == {n for n, _ in module.named_parameters()}


def test_parameters_outside_every_optimizer_are_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match=r"2 of 8 trainable tensors are in no optimizer \(extra.weight, extra.bias, …\)"
    ):
        fit(tmp_path, Unused, [full])


def test_what_is_frozen_between_two_fits_stays_frozen(tmp_path):
    module = Net()
    trainer(tmp_path, full(), max_epochs=1).fit(module, plain_loader())
    module.backbone.requires_grad_(False)
    before = frozen_copy(module.backbone)
    trainer(tmp_path, full(), max_epochs=1).fit(module, plain_loader())
    assert same(before, frozen_copy(module.backbone))


def test_parameters_may_appear_in_the_setup_of_the_module(tmp_path):
    class Late(Net):
        def setup(self, stage):
            torch.manual_seed(1)
            self.head = nn.Linear(8, 3)
            self.bias = nn.Parameter(torch.zeros(1))

        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.bias.square().sum()

    expected = fit(tmp_path / "without", Late, [])
    module = fit(tmp_path / "with", Late, [full])
    assert same(frozen_copy(expected), frozen_copy(module))
    content = torch.load(tmp_path / "with" / "epoch=3.ckpt", weights_only=True)
    assert same(content["state_dict"], frozen_copy(module))


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(r=2)])
def test_no_optimizer_is_a_warning(method, tmp_path):
    """With every method, as Lightning itself warns; the files can be resumed all the same."""

    class Still(Net):
        def configure_optimizers(self):
            return None

    module, again = Still(), Still()
    saver = ModelCheckpoint(tmp_path, filename="a")
    with pytest.warns(UserWarning, match="returned no optimizer"):
        trainer(tmp_path, PEFT(method), TrainabilityCheck(), saver, max_epochs=1).fit(module, plain_loader())
    trainer(tmp_path, PEFT(method), max_epochs=2).fit(again, plain_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert same(adapter_state_dict(module), adapter_state_dict(again))
