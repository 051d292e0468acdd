"""Read files while another process writes them without pause: ``python -m tests.faults.readers --loads 16000``.

Every file has a name of its own that it gets by renaming, so at any moment a whole one is there. No read may find it
damaged, missing, or half of one save and half of another.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lightning_peft import import_peft, load_adapter, load_from_checkpoint
from lightning_peft.cli.peek import peek
from lightning_peft.trainer.checkpoint_io import SafeCheckpointIO
from tests.faults import workload
from tests.faults.kill import quiet, uniform
from tests.faults.workload import WORK, Net


def _load_adapter(folder: Path) -> None:
    net = Net(256).net
    load_adapter(net, folder / "adapter.safetensors")
    uniform(p for p in net.parameters() if p.requires_grad)


def _load_checkpoint(folder: Path) -> None:
    net = load_from_checkpoint(Net(256), folder / "last.ckpt")
    uniform(p for p in net.parameters() if p.requires_grad)


def _resume(folder: Path) -> None:
    content = SafeCheckpointIO().load_checkpoint(folder / "last.ckpt")
    uniform(content["state_dict"].values())


def _inspect(folder: Path) -> None:
    for name in ("adapter.safetensors", "last.ckpt"):
        if (folder / name).exists():
            assert len(peek(folder / name).tensors) == 6


def _import_peft(folder: Path) -> None:
    net = Net(256).net
    import_peft(net, folder / "peft")
    uniform(p for p in net.parameters() if p.requires_grad)


#: what is written, and who reads it meanwhile
READERS: dict[str, list[Callable[[Path], None]]] = {
    "adapter": [_load_adapter, _inspect],
    "checkpoint": [_load_checkpoint, _resume, _inspect],
    "peft": [_import_peft],
}


@contextlib.contextmanager
def writing(kind: str, folder: Path, processes: int = 1) -> Iterator[None]:
    """Let processes write one kind of file into a folder, from before the body begins until it ends."""
    WORK[kind](folder, times=1)
    children = []
    try:
        for _ in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    WORK[kind](folder)
                finally:
                    os._exit(1)
            children.append(child)
        yield
        for child in children:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"writing {kind} failed by itself"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def read_beside_a_writer(kind: str, folder: Path, loads: int) -> None:
    """Read that many times; raises at the first read that fails."""
    with writing(kind, folder):
        for i in range(loads):
            READERS[kind][i % len(READERS[kind])](folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=16_000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(READERS), default=list(READERS))
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # no pool of threads: a fork would lose it
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            workload.warm_up(Path(folder) / "warm")
            start = time.monotonic()
            read_beside_a_writer(kind, Path(folder), options.loads)
            print(f"{kind}: {options.loads} loads in {time.monotonic() - start:.0f} s, 0 damaged, 0 mixed")


if __name__ == "__main__":
    main()
