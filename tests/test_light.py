"""With torch, safetensors and one of the two Lightning packages alone, the callbacks work; the rest is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lightning_peft import MissingPackageError, lightning_packages

ROOT = Path(__file__).parent.parent
PACKAGES = {"lightning.pytorch": ("lightning", "pytorch-lightning"), "pytorch_lightning": ("pytorch-lightning", "")}


def python(code: str, *arguments: object) -> str:
    """What a new process prints, which sees nothing but the named packages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


LIFE = """
import sys
from tests.hiding import hide_all_but
name, distribution, without, folder = sys.argv[1:]
hide_all_but("torch", "safetensors", distribution, without=without)

import torch
from importlib import import_module
from torch import nn
from lightning_peft import (
    PEFT, LoRA, LogAdapter, MergeOnFitEnd, TrainabilityCheck, adapter_state_dict, export_peft, load_adapter,
    load_from_checkpoint, save_adapter, save_merged, unmerge,
)
L = import_module(name)


class Net(L.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, index):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(epochs, resume=None):
    saver = L.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="loss")
    callbacks = [PEFT(LoRA(r=2)), TrainabilityCheck(), MergeOnFitEnd(), LogAdapter(), saver]
    logger = L.loggers.CSVLogger(folder)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=logger, callbacks=callbacks)
    module = Net()
    rows = torch.arange(64.0).view(16, 4) / 64
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), ckpt_path=resume)
    x = torch.ones(1, 4)
    merged = module.net(x)
    unmerge(module)
    torch.testing.assert_close(module.net(x), merged)
    return module


def equal(one, other):
    one, other = adapter_state_dict(one), adapter_state_dict(other)
    assert set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


whole = fit(3)
equal(whole, fit(3, f"{folder}/epoch=0.ckpt"))
equal(whole, load_from_checkpoint(Net, f"{folder}/epoch=2.ckpt"))
save_adapter(whole, f"{folder}/adapter.safetensors")
fresh = Net()
load_adapter(fresh, f"{folder}/adapter.safetensors")
equal(whole, fresh)
export_peft(whole, f"{folder}/peft")
save_merged(whole, f"{folder}/merged")
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_fit_resume_merge_and_reload_need_one_lightning_package(name, tmp_path):
    imported = set(python(LIFE, name, *PACKAGES[name], tmp_path).splitlines()[-1].split())
    other = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning"}[name]
    assert not imported & {other, "transformers", "datasets", "wandb", "jsonargparse", "rich", "PIL"}
    assert name.partition(".")[0] in imported


ASKED = """
import sys
from tests.hiding import hide_all_but
hide_all_but("torch", "safetensors", "pytorch-lightning")

from lightning_peft import ImageDataModule, MissingPackageError, TaskModule
from lightning_peft.cli import main
folder = sys.argv[1]


def image():
    from lightning_peft.data.image import _open
    _open(f"{folder}/a.png")


def tokenizer():
    from lightning_peft.data.tokenise import load_tokenizer
    load_tokenizer("bert-base-uncased")


def init_text():
    from lightning_peft.methods.prompt_tuning import token_ids
    token_ids("Classify:", None)


for ask in (
    lambda: TaskModule("bert-base-uncased", "sequence-classification", num_labels=2).configure_model(),
    lambda: ImageDataModule(f"{folder}/images").setup("fit"),
    tokenizer,
    init_text,
    image,
):
    try:
        ask()
    except MissingPackageError as error:
        print(error)
sys.stderr = sys.stdout
for command in ("fit", "compare"):
    assert main([command, "--config", "quickstart.yaml"]) == 2
for command in (["methods"], ["inspect", sys.argv[2]]):
    assert main(command) == 0, command
"""


@pytest.mark.slow
def test_what_else_is_needed_is_asked_for_by_name(tmp_path):
    """With the command that installs it; the commands that need nothing more run."""
    from torch import nn

    from lightning_peft import LoRA, inject, save_adapter

    network = nn.Sequential(nn.Linear(4, 4))
    inject(network, LoRA(r=2))
    save_adapter(network, tmp_path / "a.safetensors")
    said = python(ASKED, tmp_path, tmp_path / "a.safetensors")
    for part in (
        "TaskModule(model='bert-base-uncased') needs transformers, which is not installed",
        "ImageDataModule needs datasets, which",
        "tokenizer='bert-base-uncased' needs transformers, which",
        "PromptTuning(init_text='Classify:') needs transformers, which",
        f"The image file {tmp_path}/a.png needs pillow, which is not installed: pip install 'lightning-peft[task]'.",
        "error: lightning-peft fit needs jsonargparse, which is not installed: pip install 'lightning-peft[cli]'.",
        "error: lightning-peft compare needs jsonargparse, which",
    ):
        assert part in said, (part, said)


def test_an_old_lightning_is_named(monkeypatch):
    """A package that is too old is not served; alone, it is one clear error."""
    old = types.ModuleType("pytorch_lightning")
    old.__version__ = "2.2.1"
    served = lightning_packages.PACKAGES[0]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", old)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", served)
    assert lightning_packages._find_packages() == (served,)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingPackageError, match=r"needs Lightning 2\.6 or newer \(pytorch_lightning is 2\.2\.1\)"):
        lightning_packages._find_packages()
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(MissingPackageError, match=r"pytorch_lightning.*pip install -U lightning"):
        lightning_packages._find_packages()
