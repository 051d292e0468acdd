"""What is killed: a small training run, the write of one checkpoint, a merge and a save; the same each time."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, LoRA, MergeOnFitEnd, adapter_state_dict, inject, save_adapter, save_merged
from tests.contract.battery import shake
from tests.models import bert, trainer

EPOCHS, WIDTH = 6, 48
MANY = 10**9
#: what adapters are filled with in turn, so that a mixture of two saves shows
VALUES = (0.25, 0.5)


class Net(L.LightningModule):
    """A perceptron, wide enough that a checkpoint takes more than one write."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def rows() -> DataLoader:
    """32 rows in batches of 8."""
    g = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(32, 8, generator=g), torch.randint(0, 3, (32,), generator=g)), 8)


def fit(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
    """A run with a checkpoint an epoch and ``last.ckpt``, merged and written at the end; what it trained."""
    net = Net()
    saver = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=-1, enable_version_counter=False)
    run = trainer(folder, PEFT(LoRA(r=4)), saver, MergeOnFitEnd("last", str(folder / "merged")), max_epochs=EPOCHS)
    run.fit(net, rows(), ckpt_path=resume)
    return {n: t.clone() for n, t in adapter_state_dict(net).items()}


@cache
def finished() -> L.Trainer:
    """A run that is over and can still write its checkpoint."""
    run = trainer(Path(tempfile.gettempdir()), PEFT(LoRA(r=64)), max_steps=1)
    run.fit(Net(256), rows())
    return run


@cache
def pair() -> list[nn.Module]:
    """Two networks whose adapters are full of one value each."""
    nets = []
    for value in VALUES:
        net = Net(256).net
        inject(net, LoRA(r=64))
        fill(net, value)
        nets.append(net)
    return nets


def fill(net: nn.Module, value: float) -> None:
    """Set all that trains to one value."""
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.fill_(value)


@cache
def classifier() -> nn.Module:
    """A transformers model, whose export is several files."""
    net = bert()
    inject(net, LoRA(r=2))
    shake(net)
    return net


def write_checkpoint(folder: Path, times: int = MANY) -> None:
    """Two checkpoints in turn, onto one name; each is full of one value."""
    for i in range(times):
        fill(finished().lightning_module, VALUES[i % 2])
        finished().save_checkpoint(folder / "last.ckpt")


def write_adapters(folder: Path, times: int = MANY) -> None:
    """Two adapters in turn, onto one name."""
    for i in range(times):
        save_adapter(pair()[i % 2], folder / "adapter.safetensors")


def write_merged(folder: Path, times: int = MANY) -> None:
    """Two merged models in turn, into one folder."""
    for i in range(times):
        save_merged(pair()[i % 2], folder / "merged")


def write_exports(folder: Path, times: int = MANY) -> None:
    """A merged transformers model with several files, into one folder."""
    for _ in range(times):
        save_merged(classifier(), folder / "merged")


#: what may be killed
WORK = {"fit": fit, "checkpoint": write_checkpoint, "adapter": write_adapters, "merged": write_merged}
WORK["export"] = write_exports
try:  # folders of peft's format, where this version writes them
    from lightning_peft import export_peft  # type: ignore[attr-defined]
except (ImportError, AttributeError):
    pass
else:

    def write_peft(folder: Path, times: int = MANY) -> None:
        """Two adapters in turn, as folders of peft."""
        for i in range(times):
            export_peft(pair()[i % 2], folder / "peft")

    WORK["peft"] = write_peft


def warm_up(folder: Path) -> None:
    """Do everything once, so that a forked child neither imports nor builds."""
    for i, work in enumerate(WORK.values()):
        work(folder / f"warm{i}", **({} if work is fit else {"times": 1}))
