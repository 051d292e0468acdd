"""Fits over two processes: every family under DDP and sharded, equal to one process, resumed exactly, moved about."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import distributed

from lightning_peft import (
    PEFT,
    CheckpointError,
    FullFineTuning,
    LoRA,
    adapter_state_dict,
    load_adapter,
    load_from_checkpoint,
)
from lightning_peft.files import read
from lightning_peft.model.adapters import Adapters
from tests.contract.battery import same
from tests.distributed.members import METHODS, Member
from tests.models import Plain, frozen_copy, loader, plain_loader, trainer

pytestmark = pytest.mark.slow
HOWS = ("ddp", "file", "shards")
HERE = Path(__file__).parent


def launch(root: Path, *arguments: object) -> str:
    """Run a script; its output, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # Lightning asks for a free port and takes it a moment later: two runs that start at once may get the same one.
    with (Path(tempfile.gettempdir()) / "lightning_peft_tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(
            [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=500
        )
    assert result.returncode == 0, (result.stdout[-1000:], result.stderr[-4000:])
    return result.stdout


def launch_nodes(root: Path, port: int, *arguments: object) -> None:
    """Run a script on two machines that are one: two `torchrun`, each with a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--rdzv_id=peft", *map(str, arguments)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], [text[-3000:] for text in said]


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
    module = load_from_checkpoint(Member, path)
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


def test_sharded_corners(root, tmp_path):
    """Late networks, the meta device, the core on a sharded module, refusals, plain checkpoints: see `sharded.py`."""
    assert "plain" in launch(root, HERE / "sharded.py", tmp_path)


def test_fsdp_on_the_cpu(root, tmp_path):
    """Everything of FSDP that can be made to run here: see `fsdp.py`."""
    assert "lora False" in launch(root, HERE / "fsdp.py", tmp_path)


def test_two_machines(root, tmp_path, alone):
    """Two machines through torchrun, with DDP and shards: as one process."""
    launch_nodes(root, int(os.environ["MASTER_PORT"]), HERE / "run.py", tmp_path, "ddp,shards", "lora")
    for how in ("ddp", "shards"):
        for key, value in torch.load(tmp_path / how / "lora" / "adapter.pt", weights_only=True).items():
            torch.testing.assert_close(value, alone["lora"][key], atol=1e-5, rtol=1e-3, msg=key)


class Leave(Callback):
    """Ends a child's process group: gloo's threads abort now and then in a Python that ends before them."""

    def setup(self, *_, **__):
        atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def in_children(tmp_path, start):
    """A fit in child processes: the parent's module stays bare."""
    module, saver = Plain(), ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(LoRA(r=2)), saver, Leave(), devices=2, strategy=start)
    run.fit(module, plain_loader(), plain_loader())
    assert Adapters.find(module) is None
    return module, run, saver.best_model_path


def test_spawned_processes_say_where_the_result_is(tmp_path, capfd):
    """One warning, with the file to load."""
    _, _, path = in_children(tmp_path, "ddp_spawn")
    said = capfd.readouterr().err
    assert said.count("the module in the parent process has no adapters") == 1
    assert f"load_adapter(module, {path!r})" in said


def test_notebook(tmp_path):
    """Fresh adapters in new children are not those that were trained: refused until the file is given."""
    module, run, path = in_children(tmp_path, "ddp_fork")
    with pytest.raises(Exception, match="adapters here are fresh ones"):
        run.test(module, plain_loader(), verbose=False)
    by_path = run.test(module, plain_loader(), ckpt_path="best", verbose=False)
    load_adapter(module, path)
    assert run.test(module, plain_loader(), verbose=False) == by_path


def test_all_weights_come_back_from_children(tmp_path, capfd):
    """Lightning brings the state of the module back, which is all of it under full fine-tuning: nothing to warn of."""
    module, saver = Plain(), ModelCheckpoint(tmp_path)
    run = trainer(tmp_path, PEFT(FullFineTuning()), saver, Leave(), devices=2, strategy="ddp_fork")
    run.fit(module, plain_loader(), plain_loader())
    assert same(torch.load(saver.best_model_path, weights_only=True)["state_dict"], frozen_copy(module))
    by_path = run.test(module, plain_loader(), ckpt_path=saver.best_model_path, verbose=False)
    assert run.test(module, plain_loader(), verbose=False) == by_path
    assert "in child processes" not in capfd.readouterr().err


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
