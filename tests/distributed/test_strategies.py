"""Fits over two processes: every family under DDP and sharded, equal to one process, resumed exactly, moved about."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import PEFT, CheckpointError, adapter_state_dict, load_adapter, load_from_checkpoint
from lightning_peft.files import read
from tests.distributed.members import METHODS, Member
from tests.models import loader, trainer

pytestmark = pytest.mark.slow
HOWS = ("ddp", "file", "shards")
HERE = Path(__file__).parent


def launch(root: Path, *arguments: object) -> str:
    """Run a script; its output, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, (result.stdout[-1000:], result.stderr[-4000:])
    return result.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory, root):
    """What the runs left."""
    folder = tmp_path_factory.mktemp("out")
    launch(root, HERE / "run.py", folder, ",".join(HOWS))
    return folder


@pytest.fixture(scope="module")
def alone():
    """The adapters of runs in one process, with the same rows in each step."""
    found = {}
    for name, method in METHODS.items():
        module = Member()
        trainer(None, PEFT(method), gradient_clip_val=0.5).fit(module, loader("bert"))
        found[name] = adapter_state_dict(module)
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", HOWS)
def test_equal_to_one_process(out, alone, how, name):
    """Two processes with two rows each move the adapter as one process with four; the file holds just that."""
    trained = torch.load(out / how / name / "adapter.pt", weights_only=True)
    assert trained.keys() == alone[name].keys()
    for key, value in trained.items():
        torch.testing.assert_close(value, alone[name][key], atol=1e-5, rtol=1e-3, msg=key)
    path = out / how / name / "epoch=1.ckpt"
    assert path.is_dir() == (how == "shards")
    state, info = read(path)
    assert set(state) == set(info["keys"]) == set(trained)
    module = load_from_checkpoint(Member, path) if path.is_file() else Member()
    load_adapter(module, path)
    for key, value in adapter_state_dict(module).items():
        assert torch.equal(value, trained[key]), key


@pytest.mark.parametrize("how", HOWS)
def test_resumed_in_one_process(out, alone, how, tmp_path):
    """Files and folders of shards go on in one process, optimizer states and all."""
    module = Member()
    fit = trainer(tmp_path, PEFT(METHODS["adalora"]), gradient_clip_val=0.5)
    fit.fit(module, loader("bert"), ckpt_path=out / how / "adalora" / "epoch=0.ckpt")
    for key, value in adapter_state_dict(module).items():
        torch.testing.assert_close(value, alone["adalora"][key], atol=1e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("how", HOWS)
def test_what_the_helpers_wrote(out, how):
    """All rows in order; the counts of the whole model, from one process."""
    rows = [json.loads(line)["row"] for line in (out / f"{how}.jsonl").read_text().splitlines()]
    assert rows == loader("bert").dataset.ids[:, 0].tolist()
    (file,) = (out / "logs" / how).rglob("hparams.yaml")
    text = file.read_text()
    assert "method: LoRA" in text and "trainable: 1795" in text


def test_a_broken_folder_is_one_error(out, tmp_path):
    """A shard is missing, cut, or the index holds code."""

    def copy(name):
        return Path(shutil.copytree(out / "shards" / "lora" / "epoch=1.ckpt", tmp_path / name))

    lost, cut, unsafe, outside = (copy(n) for n in ("lost", "cut", "unsafe", "outside"))
    next(lost.glob("*.distcp")).unlink()
    shard = next(cut.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    (unsafe / ".metadata").write_bytes(pickle.dumps(os.system))
    index = pickle.loads((outside / ".metadata").read_bytes())
    for storage in index.storage_data.values():
        storage.relative_path = "../" + storage.relative_path
    (outside / ".metadata").write_bytes(pickle.dumps(index))
    for folder, words in ((lost, "incomplete"), (cut, "incomplete"), (unsafe, "is not loaded"), (outside, "outside")):
        with pytest.raises(CheckpointError, match=words):
            load_adapter(Member(), folder)
