"""Short versions of the scripts beside this file, and what they cannot reach: a full disk, a read-only folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
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
    export_peft,
    import_peft,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    save_merged,
)
from lightning_peft.cli.peek import peek
from lightning_peft.replacing import replacing, replacing_folder, sweep
from tests.contract.battery import same, shake
from tests.faults.fuzz import fuzz
from tests.faults.fuzz_runs import fuzz_runs
from tests.faults.kill import TEMPORARY, in_child, kill
from tests.faults.readers import READERS, read_beside_a_writer, writing
from tests.faults.workload import VALUES, Net, pair, rows, write_checkpoint
from tests.models import trainer


@pytest.mark.slow
def test_killed_runs_and_writes():
    """Checkpoints that are there load, a resume equals the run that nobody killed, nothing is half-written."""
    found = kill(9, seed=1, show=lambda line: None)
    assert sum(n for what, n in found.items() if what != "temporary files left") == 9


@pytest.mark.parametrize("kind", list(READERS))
def test_readers_beside_a_writer(tmp_path, kind):
    """Header and tensors are read from one file, though another takes its name at every moment."""
    read_beside_a_writer(kind, tmp_path, 60)


def saved_while_it_is_mapped(monkeypatch, save):
    """Call ``save`` once, when a reader has read a file's header and is about to map its tensors."""
    from_file, pending = torch.UntypedStorage.from_file, [save]

    def late(*arguments, **options):
        if pending:
            pending.pop()()
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", late)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_header_and_tensors_come_from_one_file(tmp_path, monkeypatch, suffix):
    path, other = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    if suffix == "ckpt":
        write_checkpoint(tmp_path, times=1)
        (tmp_path / "last.ckpt").rename(path)
        write_checkpoint(tmp_path, times=2)
        (tmp_path / "last.ckpt").rename(other)
    else:
        for net, place in zip(pair(), (path, other), strict=True):
            save_adapter(net, place)
    saved_while_it_is_mapped(monkeypatch, lambda: os.replace(other, path))
    net = Net(256).net
    load_adapter(net, path)
    assert not other.exists()
    assert {float(p.detach().mean()) for p in net.parameters() if p.requires_grad} == {VALUES[0]}


def test_configuration_and_tensors_come_from_one_export(tmp_path, monkeypatch):
    """A folder has two files: they are read again if another export came in between."""
    export_peft(pair()[0], tmp_path)
    second = Net(256).net
    inject(second, LoRA(r=32, alpha=8))
    shake(second)
    saved_while_it_is_mapped(monkeypatch, lambda: export_peft(second, tmp_path))
    net = Net(256).net
    import_peft(net, tmp_path)
    assert same(adapter_state_dict(net), adapter_state_dict(second))


def test_an_inspected_file_may_be_replaced(tmp_path, monkeypatch):
    """Its size is that of the file whose header was read."""
    small = Net(256).net
    inject(small, LoRA(r=2))
    save_adapter(big(), tmp_path / "a")
    save_adapter(small, tmp_path / "b")
    loads = json.loads

    def late(*arguments, **options):
        if (tmp_path / "b").exists():
            os.replace(tmp_path / "b", tmp_path / "a")
        return loads(*arguments, **options)

    monkeypatch.setattr(json, "loads", late)
    assert {t.shape[0] for n, t in peek(tmp_path / "a").tensors.items() if n.endswith("lora_A")} == {64}
    assert {t.shape[0] for n, t in peek(tmp_path / "a").tensors.items() if n.endswith("lora_A")} == {2}


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_export_that_was_interrupted_says_so(tmp_path, monkeypatch, lost):
    monkeypatch.setattr("lightning_peft.formats.folder._PAUSE", 0.001)
    export_peft(pair()[0], tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / f".x{TEMPORARY}").mkdir()
    with pytest.raises(CheckpointError, match="another process is writing into it, or was interrupted"):
        import_peft(Net(256).net, tmp_path)


def test_two_writers_of_one_folder_leave_no_mixture(tmp_path):
    """They exchange their files one after the other."""
    with writing("peft", tmp_path, processes=2):
        for _ in range(60):
            READERS["peft"][0](tmp_path)
    export_peft(pair()[0], tmp_path / "peft")
    READERS["peft"][0](tmp_path)


def test_hostile_and_broken_files():
    """Refused in one sentence, or harmless; see `tests.faults.fuzz`."""
    found, wrong = fuzz(160, seed=5)
    assert wrong == []
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 120


@pytest.mark.parametrize("seed", ["names of an optimizer: 105:418", "places of adapters: 106:229", "a field: 201:77"])
def test_cases_that_were_wrong_once(seed):
    numbers, case = seed.rsplit(" ", 1)[1].split(":")
    assert fuzz(1, int(numbers), int(case))[1] == []


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


def test_a_full_disk_leaves_the_earlier_export(small_disk):
    net, place = big(), small_disk / "merged"
    save_merged(net, place)
    kept = (place / "model.safetensors").read_bytes()
    shake(net)
    for export in (save_merged, export_peft):
        with pytest.raises(WriteError, match=r"No space left on device. Nothing that was there is lost; free some"):
            export(net, place)
        assert [p.name for p in place.iterdir()] == ["model.safetensors"]
        assert (place / "model.safetensors").read_bytes() == kept


def test_read_only_folder(tmp_path, monkeypatch):
    net = big()
    save_adapter(net, tmp_path / "a.safetensors")
    kept = (tmp_path / "a.safetensors").read_bytes()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for function in ("os.replace", "tempfile.mkdtemp"):
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


@pytest.mark.parametrize("write", [save_adapter, save_merged, export_peft])
def test_every_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch, write):
    """safetensors writes a file of its own and renames it: that one is to be flushed, not the one it replaces."""
    flushed = set()
    fsync = os.fsync

    def watched(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    for _ in range(2):
        write(big(), tmp_path / "a")
        for path in (tmp_path, *tmp_path.rglob("*")):
            assert path.stat().st_ino in flushed, path


def test_a_save_that_is_killed_leaves_nothing_that_is_not_swept(tmp_path):
    """The system kills the process when its file grows over a limit: in the midst of the write by safetensors."""

    def killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_adapter(net, tmp_path / "a.safetensors")

    net = big()
    assert in_child(killed) == -signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    os.utime(left, (time.time() - 3600,) * 2)
    save_adapter(net, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


#: three and four bytes a letter; with ".safetensors" 252 and 255 bytes, of the 255 that a name may have
LONG = {"three bytes": "長" * 80, "four bytes": "🦙" * 60 + "abc"}


@pytest.mark.parametrize("stem", LONG.values(), ids=list(LONG))
def test_names_as_long_as_the_file_system_allows(tmp_path, stem):
    """The file system counts bytes, not letters."""
    net, path = big(), tmp_path / f"{stem}.safetensors"
    save_adapter(net, path)
    load_adapter(Net(256).net, path)
    run = trainer(tmp_path, PEFT(LoRA(r=64)), max_steps=1)
    run.fit(Net(256), rows())
    run.save_checkpoint(tmp_path / f"{stem}.ckpt")
    load_adapter(Net(256), tmp_path / f"{stem}.ckpt")
    for write in (save_merged, export_peft):
        for _ in range(2):
            write(net, tmp_path / f"{stem}.folder")
    with pytest.raises(WriteError, match=r"File name too long.*give a shorter name"):
        save_adapter(net, tmp_path / f"{stem}long.safetensors")
    assert not left_over(tmp_path)


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    """Some mounted ones refuse to change any; that is no reason to lose a checkpoint."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    net = big()
    save_adapter(net, tmp_path / "a.safetensors")
    load_adapter(Net(256).net, tmp_path / "a.safetensors")
    for write in (save_merged, export_peft):
        write(net, tmp_path / write.__name__)
    run = trainer(tmp_path, PEFT(LoRA(r=64)), max_steps=1)
    run.fit(Net(256), rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(Net(256), tmp_path / "a.ckpt")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=["EINVAL", "ENOTSUP"])
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, number):
    """Some in the network refuse every flush; one that reports a fault of the disk is believed."""

    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    net = big()
    for write in (save_adapter, save_merged, export_peft):
        write(net, tmp_path / write.__name__)
    load_adapter(Net(256).net, tmp_path / "save_adapter")
    number = errno.EIO
    with pytest.raises(WriteError, match="Input/output error"):
        save_adapter(net, tmp_path / "save_adapter")


def test_files_have_the_usual_permissions(tmp_path):
    earlier = os.umask(0o027)
    try:
        for write in (save_adapter, save_merged, export_peft):
            write(big(), tmp_path / write.__name__)
    finally:
        os.umask(earlier)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


@pytest.mark.parametrize("name", ["gone.ckpt", "gone/inside", "長" * 90], ids=["file", "folder", "too long"])
def test_a_missing_checkpoint_is_also_a_missing_file(tmp_path, name):
    (tmp_path / "there.ckpt").touch()
    path = tmp_path / name

    def run(verb):
        module = Net()
        start = trainer(tmp_path, PEFT(LoRA(r=2)), max_steps=1, barebones=False)
        getattr(start, verb)(module, rows(), ckpt_path=str(path))

    reads = {
        "fit": lambda: run("fit"),
        "test": lambda: run("test"),
        "load_adapter": lambda: load_adapter(Net(), path),
        "load_from_checkpoint": lambda: load_from_checkpoint(Net(), path),
        "init_from": lambda: PEFT(init_from=str(path)).ensure(Net(), "fit"),
        "inspect": lambda: peek(path),
    }
    for what, read in reads.items():
        for kind in (CheckpointError, FileNotFoundError):
            with pytest.raises(kind, match="does not exist") as caught:
                read()
            assert caught.value.errno == errno.ENOENT, what
            assert ("There is: there.ckpt" in str(caught.value)) == (path.parent == tmp_path)


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
        (workshop,) = set(left_over(tmp_path)) - {young}
        os.utime(workshop, (old, old))
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
