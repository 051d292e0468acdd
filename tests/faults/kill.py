"""Kill runs and writes at random moments, and look at what is left: ``python -m tests.faults.kill --runs 100``.

A process with everything imported forks a child for each case, so that no case pays for an interpreter.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightning_peft import load_adapter, load_from_checkpoint
from lightning_peft.files import read
from tests.faults import workload
from tests.faults.workload import WORK

#: what merging adds to each weight: scaling 16/64, times 64 products of two equal values
_MERGED = (16 * 0.25**2, 16 * 0.5**2)
TEMPORARY = ".lightning_peft.tmp"


def in_child(job: Callable[[], object], kill_after: float | None = None) -> int:
    """Run a job in a forked process; kill it after some seconds. Returns its status, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one(kind: str, folder: Path, delay: float, expected: Path) -> str:
    """Start, kill, examine. Returns how far it had come; raises if anything is lost."""
    status = in_child(lambda: WORK[kind](folder), delay)
    assert status in (0, -signal.SIGKILL), f"{kind} failed by itself ({status})"
    visible = [p for p in folder.rglob("*") if p.is_file() and not _temporary(p, folder)]
    for path in visible:
        if path.suffix in (".ckpt", ".safetensors") and "merged" not in path.parts and "peft" not in path.parts:
            read(path)  # complete, sums included
    return EXAMINE[kind](folder, expected)


def _temporary(path: Path, folder: Path) -> bool:
    return any(part.endswith(TEMPORARY) for part in path.relative_to(folder).parts)


def _examine_run(folder: Path, expected: Path) -> str:
    """Every checkpoint loads, and a resume from the newest ends in the tensors of the run that nobody killed."""
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    for path in found:
        load_from_checkpoint(workload.Net(), path)
    result = folder / "result.pt"
    newest = str(found[-1]) if found else None
    assert in_child(lambda: torch.save(workload.fit(folder, newest), result)) == 0, "the resume failed"
    ours, theirs = torch.load(result), torch.load(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours), "another result"
    return f"{len(found)} checkpoints" if found else "no checkpoint yet"


def _examine_checkpoint(folder: Path, _: Path) -> str:
    path = folder / "last.ckpt"
    if not path.exists():
        return "nothing yet"
    net = workload.Net(256)
    load_adapter(net, path)
    uniform(p for p in net.parameters() if p.requires_grad)
    return "complete"


def uniform(tensors: Iterable[torch.Tensor]) -> None:
    """Raise unless one and the same of the two values is everywhere."""
    values = {value for tensor in tensors for value in tensor.detach().unique().tolist()}
    assert values in [{value} for value in workload.VALUES], f"a mixture: {values}"


def _examine_adapter(folder: Path, _: Path) -> str:
    path = folder / "adapter.safetensors"
    if not path.exists():
        return "nothing yet"
    net = workload.Net(256).net
    load_adapter(net, path)
    uniform(p for p in net.parameters() if p.requires_grad)
    return "complete"


def _examine_merged(folder: Path, _: Path) -> str:
    from safetensors.torch import load_file

    path = folder / "merged" / "model.safetensors"
    if not path.exists():
        assert not (folder / "merged").exists(), "an empty folder"
        return "nothing yet"
    state, base = load_file(path), workload.Net(256).net.state_dict()
    assert state.keys() == base.keys()
    means = {round(float((state[n] - base[n]).mean()), 3) for n in state if n.endswith("weight")}
    assert len(means) == 1 and means < {*_MERGED}, f"a mixture: {means}"
    return "complete"


def _examine_export(folder: Path, _: Path) -> str:
    """A folder either loads with the merged weights, or says that it is none."""
    from transformers import AutoModelForSequenceClassification as Auto

    place = folder / "merged"
    if not (place / "model.safetensors").exists():
        return "between two exports" if place.exists() else "nothing yet"
    assert (place / "config.json").exists(), "weights alone"
    net = Auto.from_pretrained(place)
    assert not any(torch.isnan(p).any() for p in net.parameters())
    return "complete"


def _examine_peft(folder: Path, _: Path) -> str:
    from safetensors.torch import load_file

    place = folder / "peft"
    if not (place / "adapter_model.safetensors").exists():
        return "between two exports" if place.exists() else "nothing yet"
    assert (place / "adapter_config.json").exists(), "weights alone"
    state = load_file(place / "adapter_model.safetensors")
    uniform(state.values())
    return "complete"


EXAMINE = {
    "fit": _examine_run,
    "checkpoint": _examine_checkpoint,
    "adapter": _examine_adapter,
    "merged": _examine_merged,
    "export": _examine_export,
    "peft": _examine_peft,
}


def kill(runs: int, seed: int, show: Callable[[str], object] = print) -> collections.Counter:
    """Kill that many times; what was found, by kind. Raises at the first thing lost."""
    dice, found = random.Random(seed), collections.Counter()
    kinds = [k for k in ("fit", "fit", "checkpoint", "fit", "adapter", "merged", "fit", "export", "peft") if k in WORK]
    quiet()
    with tempfile.TemporaryDirectory() as top:
        expected = Path(top) / "expected.pt"
        torch.set_num_threads(1)  # no pool of threads: a fork would lose it
        workload.warm_up(Path(top))
        start = time.monotonic()
        torch.save(workload.fit(Path(top) / "whole"), expected)
        whole = time.monotonic() - start
        for i in range(runs):
            kind = kinds[i % len(kinds)]
            folder = Path(top) / f"run{i}"
            folder.mkdir()
            delay = dice.uniform(0.02, 1.0) * (whole if kind == "fit" else 0.6)
            state = one(kind, folder, delay, expected)
            left = sum(1 for p in folder.rglob(f".*{TEMPORARY}"))
            found[f"{kind}: {state}"] += 1
            found["temporary files left"] += left
            show(f"{i + 1:4} {kind:<10} killed after {delay:5.2f} s: {state}" + (f", {left} temporary" if left else ""))
    return found


def quiet() -> None:
    """Silence what the libraries say about each of many runs."""
    import logging

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    found = kill(options.runs, options.seed)
    left = found.pop("temporary files left")
    print(
        f"\n{options.runs} kills in {time.monotonic() - start:.0f} s: {sum(found.values())} survived, 0 lost;"
        f" {left} temporary files left behind, clearly named"
    )
    for what, count in sorted(found.items()):
        print(f"  {count:4} {what}")


if __name__ == "__main__":
    main()
