"""Run by two processes: write the folders of shards in `tests/golden/format1`, or resume from them under FSDP2.

python tests/distributed/format1.py write|resume FOLDER
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_peft import save_adapter
from tests.distributed.members import strategy
from tests.format1_cases import CASES, FOLDER, Trained, fit

TWO = {"devices": 2, "num_sanity_val_steps": 0}


class ShardsAfterOneEpoch(L.Callback):
    """Writes a folder of shards, and the whole adapter of that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, run: L.Trainer, module: Trained) -> None:
        """The first epoch is over."""
        if run.current_epoch == 0:
            run.save_checkpoint(self.folder / "shards")
            save(run, module, self.folder / "shards_adapter.safetensors")


def save(run: L.Trainer, module: Trained, path: Path) -> None:
    """Both processes gather the adapter, one keeps it."""
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(module, path if run.is_global_zero else Path(scratch) / path.name)
    run.strategy.barrier()


def write(name: str, folder: Path) -> None:
    """Shards after one epoch; the adapter then, and after another."""
    module = Trained(name)
    run = fit(module, folder, ShardsAfterOneEpoch(folder / name), strategy=strategy("shards"), **TWO)
    save(run, module, folder / name / "shards_end.safetensors")


def resume(name: str, folder: Path) -> None:
    """The second epoch, from shards and from the checkpoint of one process; the adapter after it."""
    for start in ("shards", "checkpoint.ckpt"):
        module = Trained(name)
        run = fit(module, folder, ckpt_path=FOLDER / name / start, strategy=strategy("shards"), **TWO)
        save(run, module, folder / name / f"{start}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    act = {"write": write, "resume": resume}[sys.argv[1]]
    for case in CASES:
        if CASES[case].shards:
            act(case, Path(sys.argv[2]))
