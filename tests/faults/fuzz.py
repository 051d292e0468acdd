"""Give every entry point files that are broken or hostile: ``python -m tests.faults.fuzz --cases 10000``.

For each file: nothing runs, nothing is looked for among the sender's modules, nothing is written or removed elsewhere,
nothing loads that is not what was saved, the error is one of ours in one sentence, and the model is bit for bit what it
was. Whole runs, with their configs and callbacks, are in `tests.faults.fuzz_runs`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft import (
    PEFT,
    AdapterFusion,
    Houlsby,
    LoRA,
    PEFTError,
    combine,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_peft.files import read
from lightning_peft.model.adapters import MARK
from tests.contract.battery import shake
from tests.faults import hostile
from tests.faults.watch import Watch
from tests.faults.workload import Net, rows
from tests.models import trainer

WIDTH, SECONDS = 12, 20


class Good:
    """Sound files of one network, and what they are good for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder / "EXECUTED"
        net = Net(WIDTH)
        run = trainer(folder, PEFT(LoRA(r=2)), max_epochs=1)
        run.fit(net, rows())
        shake(net)
        save_adapter(net, folder / "lora.safetensors")
        run.save_checkpoint(folder / "lora.ckpt")
        fresh = Net(WIDTH)
        inject(fresh, Houlsby(target_modules=["net.0", "net.2"]))
        shake(fresh)
        save_adapter(fresh, folder / "houlsby.safetensors")
        self.checkpoint = torch.load(folder / "lora.ckpt", weights_only=True)
        self.inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        self.output = net.eval().net(self.inputs)
        self.fused = self.fuse(folder / "houlsby.safetensors")

    def fuse(self, path: Path) -> torch.Tensor:
        """What a network with a fusion of the sound file and the given one puts out."""
        net = Net(WIDTH)
        inject(net, AdapterFusion({"a": str(self.folder / "houlsby.safetensors"), "b": str(path)}))
        return net.eval().net(self.inputs).detach()

    def state(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Content of a sound file, to change."""
        return copy.deepcopy(read(self.folder / name))


def frozen(module: nn.Module) -> tuple:
    """Everything about a module that an error must not have changed."""
    tensors = {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    kinds = [(n, type(m).__name__, sorted(m._forward_hooks), MARK in m.__dict__) for n, m in module.named_modules()]
    return tensors, kinds, [p.requires_grad for p in module.parameters()]


def unchanged(before: tuple, after: tuple) -> bool:
    """Whether two snapshots are equal, NaN included."""
    equal = before[0].keys() == after[0].keys()
    return equal and before[1:] == after[1:] and all(torch.equal(t, after[0][n]) for n, t in before[0].items())


# ---- entry points: the module that must not change, what to call, and what the module puts out after a success -------
def _fresh(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    return net, lambda: load_adapter(net, path), lambda: net.eval().net(good.inputs)


def _adapted(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    inject(net, LoRA(r=2))
    return net, lambda: load_adapter(net, path), lambda: net.eval().net(good.inputs)


def _reload(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    return net, lambda: load_from_checkpoint(net, path), lambda: net.eval().net(good.inputs)


def _init_from(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    return net, lambda: PEFT(init_from=str(path)).ensure(net, "fit"), lambda: net.eval().net(good.inputs)


def _resume(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    inject(net, LoRA(r=2))
    run = trainer(good.folder, PEFT(LoRA(r=2)), max_epochs=1, barebones=False)
    return net, lambda: run.fit(net, rows(), ckpt_path=path), lambda: net.eval().net(good.inputs)


def _test(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    inject(net, LoRA(r=2))
    run = trainer(good.folder, PEFT(LoRA(r=2)))
    return net, lambda: run.test(net, rows(), ckpt_path=path, verbose=False), lambda: net.eval().net(good.inputs)


def _combine(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net, made = Net(WIDTH), {}

    def call() -> None:
        made.update(combine([good.folder / "lora.safetensors", path], how="cat"))

    def output() -> torch.Tensor:
        load_adapter(net, made)
        return net.eval().net(good.inputs)

    return net, call, output


def _fusion(good: Good, path: Path) -> tuple[nn.Module, Callable, Callable]:
    net = Net(WIDTH)
    method = lambda: AdapterFusion({"a": str(good.folder / "houlsby.safetensors"), "b": str(path)})  # noqa: E731
    return net, lambda: inject(net, method()), lambda: net.eval().net(good.inputs)


ENTRIES = {
    "load_adapter": _fresh,
    "load_adapter into an adapted model": _adapted,
    "load_from_checkpoint": _reload,
    "PEFT(init_from)": _init_from,
    "Trainer.fit(ckpt_path)": _resume,
    "Trainer.test(ckpt_path)": _test,
    "combine": _combine,
    "AdapterFusion": _fusion,
}


def bad_file(good: Good, dice: random.Random, source: str, path: Path, resume: bool) -> str:
    """Write a bad file made from a sound one; returns what was done to it."""
    kinds = ["bytes", "content"] if source.endswith(".safetensors") else ["bytes", "content", "pickle", "legacy"]
    kind = dice.choice(kinds)
    if kind == "bytes":
        change = dice.choice(hostile.BYTES)
        path.write_bytes(change(dice, bytearray((good.folder / source).read_bytes())))
        return f"bytes {change.__name__}"
    if source.endswith(".safetensors"):
        state, info = good.state(source)
        change = dice.choice(hostile.CONTENT)
        change(dice, state, info)
        try:
            hostile.write_safetensors(path, state, info, dice)
        except (TypeError, ValueError, UnicodeEncodeError):  # bytes, lone surrogates, complex: not in this format
            path.write_bytes(b"")
        return f"content {change.__name__}"
    if kind == "pickle" and dice.random() < 0.1:
        hostile.write_bomb(path, dice)
        return "pickle bomb"
    checkpoint = copy.deepcopy(good.checkpoint)
    changes = (
        hostile.CONTENT if kind == "content" else hostile.PICKLED + [hostile.resume_part, hostile.resume_field] * resume
    )
    change = dice.choice(changes)
    if kind == "content":
        change(dice, checkpoint["state_dict"], checkpoint[hostile.SECTION])
    else:
        change(dice, checkpoint, good.marker)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=kind != "legacy")
    return f"{'content' if kind == 'content' else 'pickle'} {change.__name__}"


def judge(good: Good, entry: str, done: str, path: Path) -> str:
    """Call an entry point with a bad file; returns ``refused`` or ``harmless``, raises for anything else."""
    module, call, output = ENTRIES[entry](good, path)
    before = frozen(module)
    signal.alarm(SECONDS)
    try:
        call()
    except PEFTError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, f"{len(str(error))} characters: {str(error)[:3000]}"
        assert unchanged(before, frozen(module)), f"the model changed: {error}"
        return "refused"
    finally:
        signal.alarm(0)
        assert not good.marker.exists(), "code was run"
    if done.startswith("bytes"):
        wanted = good.fused if entry == "AdapterFusion" else good.output
        assert torch.allclose(output(), wanted, atol=1e-5), "another adapter than was saved"
    elif "method_field" not in done:  # that may be a sound file of another, useless method: alpha=1e308
        assert torch.isfinite(output()).all(), "an adapter of no use"
    return "harmless"


def fuzz(runs: int, seed: int, first: int = 0) -> tuple[collections.Counter, list[str]]:
    """So many bad files; counts by entry point and outcome, and what went wrong."""
    found: collections.Counter = collections.Counter()
    wrong: list[str] = []
    signal.signal(signal.SIGALRM, _too_long)
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory() as top:
        good = Good(Path(top))
        watch = Watch([Path(top)], ("evil_module", "transformers_modules"))
        tempfile.tempdir = top
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(first, first + runs):
            dice = random.Random(f"{seed}:{i}")
            entry = dice.choice(list(ENTRIES))
            lora = ["lora.ckpt"] if entry in _CHECKPOINTS else ["lora.ckpt", "lora.safetensors"]
            source = dice.choice(["houlsby.safetensors"] if entry == "AdapterFusion" else lora)
            name = dice.choice(("bad", "bad", "bad", "b\u202ead", "\U0001f600", ".", "b\nad"))
            path = good.folder / f"{name}{Path(source).suffix}"
            done = bad_file(good, dice, source, path, entry == "Trainer.fit(ckpt_path)")
            problems = []
            outcome = "WRONG"
            with watch.on() as seen:
                try:
                    outcome = judge(good, entry, done, path)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:
                    problems.append(f"{type(error).__name__}: {str(error)[:300]}")
            for kind, what in seen.items():
                found["did", kind] += len(what)
                problems += [f"{kind}: {one}" for one in what[:3]]
            found[entry, "WRONG" if problems else outcome] += 1
            wrong += [f"{i}: {entry}, {done} of {source}: {problem}" for problem in problems]
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
            if grown > 300:
                wrong.append(f"{i}: {entry}, {done} of {source}: {grown:.0f} MB taken")
                memory += int(grown * 1024)
            path.unlink(missing_ok=True)
        tempfile.tempdir = usual
    return found, wrong


_CHECKPOINTS = ("load_from_checkpoint", "Trainer.fit(ckpt_path)", "Trainer.test(ckpt_path)")


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--files", type=int, help="adapter files and checkpoints for the functions (55 %%)")
    parser.add_argument("--runs", type=int, help="whole runs, folders and configs (43 %%)")
    parser.add_argument("--cli", type=int, help="checkpoints for the command line (2 %%)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    options = parser.parse_args()
    from tests.faults.fuzz_cli import fuzz_cli
    from tests.faults.fuzz_runs import fuzz_runs
    from tests.faults.kill import quiet

    # a size out of a file must not take the machine's memory, whatever else goes wrong
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    cli = options.cases // 50 if options.cli is None else options.cli
    runs = options.cases * 43 // 100 if options.runs is None else options.runs
    files = options.cases - cli - runs if options.files is None else options.files

    quiet()
    torch.set_num_threads(1)
    start = time.monotonic()
    found: collections.Counter = collections.Counter()
    wrong: list[str] = []
    if files:
        more, also = fuzz(files, options.seed, options.first)
        found, wrong = found + more, wrong + also
    if runs:
        more, also = fuzz_runs(runs, options.seed, options.first)
        found, wrong = found + more, wrong + also
    if cli:
        more, also = fuzz_cli(cli, options.seed)
        found, wrong = found + more, wrong + also
    entries = sorted({entry for entry, _ in found if entry != "did"})
    for entry in entries:
        counts = {outcome: found[entry, outcome] for outcome in ("refused", "harmless", "WRONG")}
        print(f"  {entry:<48}" + "".join(f"{n:6} {outcome}" for outcome, n in counts.items() if n))
    total = sum(n for (entry, _), n in found.items() if entry != "did")
    did = ", ".join(f"{found['did', kind]} {kind}" for kind in ("executed", "imported", "removed", "written"))
    print(f"{total} cases in {time.monotonic() - start:.0f} s: {did} elsewhere; {len(wrong)} wrong")
    print("\n".join(wrong))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
