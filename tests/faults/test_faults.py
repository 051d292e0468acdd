"""Short versions of the scripts beside this file, and what they cannot reach: a full disk, a read-only folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    PEFT,
    CheckpointError,
    LoRA,
    WriteError,
    adapter_state_dict,
    inject,
    load_adapter,
    save_adapter,
    save_merged,
)
from lightning_peft.replacing import replacing, replacing_folder, sweep
from tests.contract.battery import same, shake
from tests.faults.fuzz import fuzz
from tests.faults.fuzz_runs import fuzz_runs
from tests.faults.kill import TEMPORARY, kill
from tests.faults.workload import Net, rows
from tests.models import trainer


@pytest.mark.slow
def test_killed_runs_and_writes():
    """Checkpoints that are there load, a resume equals the run that nobody killed, nothing is half-written."""
    found = kill(9, seed=1, show=lambda line: None)
    assert sum(n for what, n in found.items() if what != "temporary files left") == 9


def test_hostile_and_broken_files():
    """Refused in one sentence, or harmless; see `tests.faults.fuzz`."""
    found, wrong = fuzz(160, seed=5)
    assert wrong == []
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 120


@pytest.mark.slow
def test_runs_from_a_stranger():
    """Nothing of theirs runs, is looked for, or removes a file of ours; see `tests.faults.fuzz_runs`."""
    found, wrong = fuzz_runs(120, seed=6)
    assert wrong == []
    assert not any(found["did", kind] for kind in ("executed", "imported", "removed", "written"))
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 50


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def big() -> nn.Module:
    """A network whose adapter takes 265 kB."""
    net = Net(256).net
    inject(net, LoRA(r=64))
    return net


def left_over(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(TEMPORARY)]


def test_full_disk(small_disk, tmp_path):
    """The first file stays as it is, the second is refused, and nothing takes room that nobody sees."""
    net = big()
    shake(net)
    save_adapter(net, small_disk / "a.safetensors")
    kept = (small_disk / "a.safetensors").read_bytes()
    run = trainer(tmp_path, PEFT(LoRA(r=64)), max_steps=1)
    run.fit(Net(256), rows())
    writes = {
        "a.safetensors": lambda: save_adapter(net, small_disk / "a.safetensors"),
        "a.ckpt": lambda: run.save_checkpoint(small_disk / "a.ckpt"),
        "merged": lambda: save_merged(net, small_disk / "merged"),
    }
    for name, write in writes.items():
        with pytest.raises(WriteError, match=rf"{name} could not be written: No space left on device. Nothing that"):
            write()
        assert [p.name for p in small_disk.iterdir()] == ["a.safetensors"]
    assert (small_disk / "a.safetensors").read_bytes() == kept
    load_adapter(Net(256).net, small_disk / "a.safetensors")


def test_read_only_folder(tmp_path, monkeypatch):
    net = big()
    save_adapter(net, tmp_path / "a.safetensors")
    kept = (tmp_path / "a.safetensors").read_bytes()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for function in ("os.replace", "tempfile.mkstemp"):
        with monkeypatch.context() as patch:
            patch.setattr(function, refuse)
            with pytest.raises(WriteError, match=r"Read-only file system.*a folder that you may change"):
                save_adapter(net, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == kept and not left_over(tmp_path)


def test_checkpoints_need_no_other_folder(tmp_path, monkeypatch):
    """Lightning's own writer goes through the system's folder for temporary files, which may be on another disk."""
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_steps=1)
    run.fit(Net(), rows())
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    run.save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(Net(), tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o044


def test_left_overs_are_swept(tmp_path):
    """What a killed process left goes with the next write; what is being written, or is young, stays."""
    dead, folder, young = (tmp_path / f".{name}.x{TEMPORARY}" for name in ("a", "b", "c"))
    other = tmp_path / ".mine.tmp"
    for file in (dead, young, other):
        file.write_text("x")
    folder.mkdir()
    old = time.time() - 3600
    for place in (dead, folder, other):
        os.utime(place, (old, old))
    with replacing(tmp_path / "d") as temporary:
        os.utime(temporary, (old, old))
        sweep(tmp_path)
        temporary.write_text("done")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "d"])


def test_an_earlier_export_is_replaced_whole(tmp_path):
    """Weights of the earlier one would be loaded in place of the new; other files of the user stay."""
    place = tmp_path / "merged"
    place.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "notes.md"):
        (place / name).write_text("old")
    with replacing_folder(place) as temporary:
        (temporary / "model.safetensors").write_text("new")
    assert sorted(p.name for p in place.iterdir()) == ["model.safetensors", "notes.md"]
    with pytest.raises(WriteError, match="it is a file; give a folder"), replacing_folder(place / "notes.md"):
        pass


def test_a_checksum_over_the_tensors(tmp_path):
    """A bit that flips in a tensor is noticed; older files have no checksum, and load."""
    net = big()
    shake(net)
    path = tmp_path / "a.safetensors"
    save_adapter(net, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    section = json.loads(metadata["lightning_peft"])
    del section["checksum"]
    old = {**metadata, "lightning_peft": json.dumps(section)}
    save_file(load_file(path), tmp_path / "old.safetensors", metadata=old)
    fresh = Net(256).net
    load_adapter(fresh, tmp_path / "old.safetensors")
    assert same(adapter_state_dict(fresh), adapter_state_dict(net))
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its content does not give the checksum written with it"):
        load_adapter(Net(256).net, path)


def test_diverged_values_are_refused(tmp_path):
    net = big()
    with torch.no_grad():
        net[0].delta.lora_A[0, 0] = float("nan")
    save_adapter(net, tmp_path / "a.safetensors")
    for source in (tmp_path / "a.safetensors", adapter_state_dict(net)):
        fresh = big()
        before = {n: t.clone() for n, t in fresh.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in 0.delta.lora_A: the training diverged"):
            load_adapter(fresh, source)
        assert same(before, fresh.state_dict())
