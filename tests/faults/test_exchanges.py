"""Exports into a folder that exists: on a mount, below a read-only folder, where a renaming fails, after a kill."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_peft import (
    PEFT,
    LoRA,
    MergeOnFitEnd,
    PEFTError,
    WriteError,
    export_peft,
    import_peft,
    inject,
    save_merged,
)
from lightning_peft.replacing import replacing_folder
from tests.contract.battery import shake
from tests.faults.kill import TEMPORARY, in_child
from tests.models import Foreign, bert, loader, logits, trainer

#: a sharded export of some years ago, and a file of the user's own
EARLIER = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "tokenizer.json": "old",
    "model_notes.safetensors": "mine",
}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new", "more/part.json": "new"}
#: the names under which a library looks for weights, with or without a configuration
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
RENAMINGS = 9  # five earlier files away, four new ones in


def adapted(seed: int) -> nn.Module:
    """A classifier whose adapters change its outputs."""
    net = bert(seed)
    inject(net, LoRA(r=2))
    shake(net)
    return net


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def export(folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        write_files(temporary, NEW)


def read_files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def left_over(folder: Path) -> list[Path]:
    return list(folder.rglob(f"*{TEMPORARY}"))


@pytest.fixture
def earlier(tmp_path):
    folder = tmp_path / "merged"
    write_files(folder, EARLIER)
    return folder


@pytest.fixture
def volume(tmp_path):
    """A mount point that can be written, in a folder that cannot: as a container sees a volume."""
    parent = tmp_path / "read_only"
    parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none"]
    if subprocess.run([*mount, str(parent)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    place = parent / "volume"
    place.mkdir()
    subprocess.run([*mount, str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)
    subprocess.run(["umount", str(parent)], check=True)


def save_merged_twice(place: Path) -> None:
    for seed in (0, 1):
        net = adapted(seed)
        save_merged(net, place)
        merged = AutoModelForSequenceClassification.from_pretrained(place).eval()
        torch.testing.assert_close(logits(merged, "bert"), logits(net, "bert"))
    assert not left_over(place)


def export_peft_twice(place: Path) -> None:
    for seed in (0, 1):
        net = adapted(seed)
        export_peft(net, place)
        again = bert(seed)
        import_peft(again, place)
        assert torch.equal(logits(again, "bert"), logits(net, "bert"))
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


exporters = pytest.mark.parametrize("export_twice", [save_merged_twice, export_peft_twice])


@exporters
def test_an_export_onto_a_volume(volume, export_twice):
    """The mount point cannot be renamed, and nothing can be written beside it."""
    export_twice(volume)
    assert [p.name for p in volume.parent.iterdir()] == ["volume"]


@exporters
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY], ids=["EXDEV", "EBUSY"])
def test_an_export_where_only_files_inside_can_be_renamed(tmp_path, monkeypatch, number, export_twice):
    """The same where no file system can be mounted."""
    place = tmp_path / "volume"
    place.mkdir()
    replace = os.replace

    def on_a_mount(source, destination):
        if place not in Path(source).parents or place not in Path(destination).parents:
            raise OSError(number, os.strerror(number))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", on_a_mount)
    export_twice(place)


def state_of(folder: Path) -> str:
    """What a reader finds who opens the folder now."""
    names = {name: text for name, text in read_files(folder).items() if TEMPORARY not in name}
    if not any(name in names for name in WEIGHTS):
        return "unfinished"
    if names == EARLIER:
        return "old"
    if names == {**NEW, "model_notes.safetensors": "mine"}:
        return "new"
    return f"a mixture: {names}"


def test_at_no_moment_a_mixture(earlier, monkeypatch):
    """Look into the folder before and after each renaming."""
    seen = []
    replace = os.replace

    def watched(source, destination):
        seen.append(state_of(earlier))
        replace(source, destination)
        seen.append(state_of(earlier))

    monkeypatch.setattr(os, "replace", watched)
    export(earlier)
    assert [state for i, state in enumerate(seen) if seen[i - 1 : i] != [state]] == ["old", "unfinished", "new"]
    assert state_of(earlier) == "new" and not left_over(earlier)


def failing(first: int, last: int, number: int):
    """`os.replace` that fails from its first to its last call, which are counted from 1."""
    replace, calls = os.replace, 0

    def refuse(source, destination):
        nonlocal calls
        calls += 1
        if first <= calls <= last:
            raise OSError(number, os.strerror(number), str(source))
        replace(source, destination)

    return refuse


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EACCES], ids=["EXDEV", "EBUSY", "EACCES"])
def test_whichever_renaming_fails_the_earlier_export_is_back(earlier, monkeypatch, number):
    for which in range(1, RENAMINGS + 1):
        with (
            monkeypatch.context() as patch,
            pytest.raises(WriteError, match="Nothing that was there is lost") as caught,
        ):
            patch.setattr(os, "replace", failing(which, which, number))
            export(earlier)
        assert caught.value.errno == number
        assert state_of(earlier) == "old" and not left_over(earlier)
    monkeypatch.setattr(os, "replace", failing(RENAMINGS + 1, RENAMINGS + 1, number))
    export(earlier)
    assert state_of(earlier) == "new" and not left_over(earlier)


def test_files_that_cannot_be_renamed_back_are_copied_back(earlier, monkeypatch):
    for function in ("replace", "rename"):
        monkeypatch.setattr(os, function, failing(8, 99, errno.EXDEV))
    with pytest.raises(WriteError, match="Nothing that was there is lost"):
        export(earlier)
    assert state_of(earlier) == "old" and not left_over(earlier)


def test_where_nothing_can_be_put_back_the_message_says_what_is_where(earlier, monkeypatch):
    """The disk turns read-only in the midst of the exchange."""
    monkeypatch.setattr(os, "replace", failing(8, 99, errno.EROFS))
    monkeypatch.setattr(shutil, "move", failing(1, 99, errno.EROFS))
    with pytest.raises(WriteError, match="Its earlier files could not be put back either") as caught:
        export(earlier)
    (workshop,) = left_over(earlier)
    assert f"They are in {workshop / 'old'}; move them to {earlier}" in str(caught.value)
    assert state_of(earlier) == "unfinished"
    assert read_files(workshop / "old") == {name: text for name, text in EARLIER.items() if text == "old"}


def test_where_a_first_export_cannot_be_removed_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(2, 99, errno.EROFS))
    monkeypatch.setattr(shutil, "move", failing(1, 99, errno.EROFS))
    with pytest.raises(WriteError, match="Some files of the unfinished export are in it and could not be removed"):
        export(tmp_path)
    assert state_of(tmp_path) == "unfinished" and not left_over(tmp_path)


def test_a_killed_exchange_keeps_the_earlier_files_until_the_next(earlier):
    """The killed export is swept by a write that succeeds, not by one that fails."""

    def killed():
        count = itertools.count(1)
        replace = os.replace
        os.replace = lambda *paths: os._exit(0) if next(count) > 7 else replace(*paths)
        export(earlier)

    assert in_child(killed) == 0
    assert state_of(earlier) == "unfinished"
    (workshop,) = left_over(earlier)
    os.utime(workshop, (time.time() - 3600,) * 2)
    with pytest.raises(WriteError), replacing_folder(earlier):
        raise OSError(errno.ENOSPC, "full")
    assert left_over(earlier) == [workshop] and (workshop / "old" / "config.json").exists()
    export(earlier)
    assert state_of(earlier) == "new" and not left_over(earlier)


def test_only_weights_of_the_same_kind_are_replaced(tmp_path):
    """An adapter for peft, written beside the base model, leaves that alone."""
    write_files(tmp_path, {"config.json": "mine", "model.safetensors": "mine", "adapter_model.bin": "old"})
    export_peft(adapted(0), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == (tmp_path / "config.json").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "adapter_model.bin").exists()


def test_a_merged_model_is_not_written_beside_an_adapter_for_peft(tmp_path):
    """`from_pretrained` would load that adapter onto the merged model."""
    export_peft(adapted(0), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(PEFTError, match=r"holds an adapter for peft .* Give another folder"):
        save_merged(adapted(0), tmp_path)
    callbacks = [PEFT(LoRA(r=2)), MergeOnFitEnd("last", str(tmp_path))]
    with pytest.raises(PEFTError, match=r"holds an adapter for peft .* Give another folder"):
        trainer(tmp_path / "run", *callbacks, max_steps=1).fit(Foreign(), loader("bert"))
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "run"}


def test_a_folder_is_not_replaced_by_a_file(earlier):
    (earlier / "model.safetensors").mkdir()
    (earlier / "model.safetensors" / "mine").write_text("mine")
    with pytest.raises(WriteError, match=r"model.safetensors is a folder, and a file of the export has that name"):
        export(earlier)
    assert read_files(earlier) == {**EARLIER, "model.safetensors/mine": "mine"}
