"""Run by two processes: fits under every strategy, and from one to another. Files it leaves are looked at elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import (
    PEFT,
    CheckpointError,
    LogAdapter,
    MergeOnFitEnd,
    PredictionWriter,
    TrainabilityCheck,
    adapter_state_dict,
    load_adapter,
)
from tests.contract.battery import same
from tests.distributed.members import METHODS, Member, strategy
from tests.models import Rows, loader, trainer

OUT = Path(next(iter(sys.argv[1:]), "."))  # none where doctests are looked for
START = time.time()


def say(*words: object) -> None:
    """A line with the time, so that a slow part shows."""
    print(f"[{time.time() - START:5.1f} s, rank {os.environ.get('LOCAL_RANK', 0)}]", *words, flush=True)


def run(how: str, *callbacks: L.Callback, epochs: int = 2, **options: object) -> L.Trainer:
    """A Trainer over both processes."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    shape = {"devices": 2 // nodes, "num_nodes": nodes}
    return trainer(
        OUT, *callbacks, strategy=strategy(how), max_epochs=epochs, num_sanity_val_steps=0, **shape, **options
    )


def rows(batch_size: int = 2) -> DataLoader:
    """Two rows a process and step: the four that the run in one process has (Lightning's own sampler shuffles)."""
    data, rank = Rows("bert"), int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, 2, rank, shuffle=False))


def life(how: str, name: str) -> None:
    """Fit, resume, merge, load."""
    method, folder = METHODS[name], OUT / how / name
    straight, second = Member(), Member()
    saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    fit = run(how, PEFT(method), TrainabilityCheck(), saver, gradient_clip_val=0.5)
    fit.fit(straight, rows())
    trained = adapter_state_dict(straight)
    if fit.is_global_zero:
        torch.save(trained, folder / "adapter.pt")
    again = run(how, PEFT(method), MergeOnFitEnd("last"), gradient_clip_val=0.5)
    again.fit(second, rows(), ckpt_path=folder / "epoch=0.ckpt")
    assert same(trained, adapter_state_dict(second)), "resume is not exact"
    merged = again.test(second, rows(), verbose=False)[0]["test_loss"]
    best = again.test(second, rows(), ckpt_path=folder / "epoch=1.ckpt", verbose=False)[0]["test_loss"]
    assert abs(merged - best) < 1e-5, (merged, best)
    load_adapter(second, folder / "epoch=0.ckpt")
    load_adapter(second, folder / "epoch=1.ckpt")
    assert same(trained, adapter_state_dict(second)), "load_adapter"
    say(how, name, f"test_loss {best:.6f}")


def helpers(how: str) -> None:
    """Callbacks that work across processes; files that do not fit."""
    module, folder = Member(), OUT / how / "lora"
    writer = PredictionWriter(str(OUT / f"{how}.jsonl"))
    predict = run(how, PEFT(METHODS["lora"]), writer, use_distributed_sampler=True)
    predict.predict(module, loader("bert", batch_size=2), ckpt_path=folder / "epoch=1.ckpt")
    log = CSVLogger(OUT / "logs", how)
    run(how, PEFT(METHODS["lora"]), LogAdapter(), logger=log, epochs=1).fit(Member(), rows())
    for wrong, other, words in (
        (Member(seed=1), METHODS["lora"], "another base model"),
        (Member(), METHODS["ia3"], "was trained with LoRA, the model has IA3"),
    ):
        try:
            run(how, PEFT(other)).fit(wrong, rows(), ckpt_path=folder / "epoch=0.ckpt")
        except CheckpointError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


def moves(start: str, end: str, name: str) -> None:
    """Resume under another strategy: the same result."""
    module = Member()
    fit = run(end, PEFT(METHODS[name]), gradient_clip_val=0.5)
    fit.fit(module, rows(), ckpt_path=OUT / start / name / "epoch=0.ckpt")
    expected = torch.load(OUT / start / name / "adapter.pt", weights_only=True)
    for key, value in adapter_state_dict(module).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-3, msg=f"{start} -> {end}, {name}: {key}")
    say(start, "->", end, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    hows = sys.argv[2].split(",")
    for how in hows:
        for name in METHODS if len(sys.argv) < 4 else sys.argv[3].split(","):
            life(how, name)
        helpers(how)
    for start in hows:
        for end in hows:
            if start != end:
                moves(start, end, "lora")
    say("done")
