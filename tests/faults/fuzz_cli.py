"""The same for the command line: ``lightning-peft test --ckpt_path FILE``; fewer, for each case parses a config."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import tempfile
from pathlib import Path

import torch

from lightning_peft.cli import main
from tests.cli.test_wrong_configs import BASE, ROWS
from tests.faults import hostile


def bad_checkpoint(dice: random.Random, sound: Path, path: Path, marker: Path) -> str:
    """Broken bytes, or content that only an attacker writes."""
    if dice.random() < 0.5:
        change = dice.choice(hostile.BYTES)
        path.write_bytes(change(dice, bytearray(sound.read_bytes())))
        return change.__name__
    checkpoint = torch.load(sound, weights_only=True)
    if dice.random() < 0.5:
        change = dice.choice(hostile.CONTENT)
        change(dice, checkpoint["state_dict"], checkpoint[hostile.SECTION])
    else:
        change = dice.choice(hostile.PICKLED)
        change(dice, checkpoint, marker)
    torch.save(checkpoint, path)
    return change.__name__


def fuzz_cli(runs: int, seed: int) -> tuple[collections.Counter, list[str]]:
    """Counts by outcome, and what went wrong: another status than 0 or 2, no single line of error, code that ran."""
    found: collections.Counter = collections.Counter()
    wrong: list[str] = []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as top:
        os.chdir(top)
        try:
            Path("base.yaml").write_text(BASE)
            Path("rows.csv").write_text(ROWS)
            assert _run(["fit", "--config", "base.yaml", "--trainer.enable_checkpointing", "true"])[0] == 0
            sound, bad, marker = next(Path().rglob("*.ckpt")), Path("bad.ckpt"), Path(top, "EXECUTED")
            for i in range(runs):
                done = bad_checkpoint(random.Random(f"{seed}:{i}"), sound, bad, marker)
                status, said = _run(["test", "--config", "base.yaml", "--ckpt_path", "bad.ckpt"])
                lines = [line for line in said.splitlines() if line.startswith("lightning-peft: error: ")]
                good = (status == 2 and len(lines) == 1) or status == 0
                if not good or "Traceback" in said or marker.exists():
                    wrong.append(f"{i}: lightning-peft test, {done}: status {status}, {said[-300:]}")
                found[
                    "lightning-peft test", {0: "harmless", 2: "refused"}.get(status, "WRONG") if good else "WRONG"
                ] += 1
        finally:
            os.chdir(before)
    return found, wrong


def _run(words: list[str]) -> tuple[int | str, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            return main(words), said.getvalue()
        except Exception as error:  # what a user would see as a traceback
            return type(error).__name__, f"{said.getvalue()}{error}"
