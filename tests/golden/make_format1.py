"""Writes `tests/golden/format1`: files of format 1 for every method, and what the models gave.

Run once, with version 0.1.0, before adapted layers kept their class (that is, while a wrapper with a ``base`` stood in
their place). Kept for provenance: run with a later version it would write other files, so it refuses to.

    PYTHONPATH=. python tests/golden/make_format1.py
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
import transformers
from safetensors.torch import load_file, save_file

import lightning_peft
from lightning_peft import Pfeiffer, inject, save_adapter, trainable_names
from lightning_peft.method import brief, registry
from tests.format1_cases import CASES, FOLDER, STEPS, Trained, fit, numbers


class AfterOneEpoch(L.Callback):
    """Writes a checkpoint where `ModelCheckpoint` would, and what else is wanted of that moment.

    `ModelCheckpoint` itself would leave the path of this machine in the file.
    """

    def __init__(self, checkpoint: Path, adapter: Path | None = None) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.outputs: torch.Tensor | None = None

    def on_train_epoch_end(self, run: L.Trainer, module: Trained) -> None:
        """The first epoch is over."""
        if run.current_epoch > 0:
            return
        run.save_checkpoint(self.checkpoint)
        if self.adapter is not None:
            save_adapter(module, self.adapter)
            self.outputs = outputs(module)


def outputs(module: Trained) -> torch.Tensor:
    """Of a copy: bitsandbytes repacks its weights for good when it is called in eval mode."""
    return module.case.outputs(copy.deepcopy(module.network))


def main() -> None:
    """All cases."""
    if lightning_peft.__version__ != "0.1.0" or not hasattr(lightning_peft, "Adapted"):
        raise SystemExit("This is to be run with version 0.1.0: the files are of format 1.")
    known = {name for name, kind in registry().items() if kind.__module__.startswith("lightning_peft.")}
    used = {type(method).__name__ for case in CASES.values() for method in case.methods}
    if known != used:
        raise SystemExit(f"No case for {known - used}.")
    shutil.rmtree(FOLDER, ignore_errors=True)
    for title in ("news", "mail"):
        write_adapter_to_fuse(title)
    for name in CASES:
        print(name, flush=True)
        write(name)
    subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "distributed" / "format1.py", "write", FOLDER], check=True
    )
    (FOLDER / "written_with.json").write_text(json.dumps(description(), indent=2) + "\n")


def write_adapter_to_fuse(title: str) -> None:
    """One of the adapters that the case of AdapterFusion mixes."""
    network = CASES["adapter_fusion"].network()
    inject(network, Pfeiffer(reduction_factor=4))
    trained = set(trainable_names(network))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in trained:
                parameter.copy_(numbers(title + name, tuple(parameter.shape)))
    save_adapter(network, FOLDER / "adapter_fusion" / f"{title}.safetensors")


def write(name: str) -> None:
    """The files of one case."""
    folder, case = FOLDER / name, CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    module = Trained(name)
    base = outputs(module)
    half = AfterOneEpoch(folder / "checkpoint.ckpt", folder / "adapter.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        fit(module, Path(scratch), half)
        if case.whole:
            fit(Trained(name), Path(scratch), AfterOneEpoch(folder / "whole.ckpt"), save="full")
    save_adapter(module, folder / "end.safetensors")
    found = {"base": base, "half": half.outputs, "end": outputs(module)}
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "outputs.safetensors")
    for a, b in (("base", "half"), ("half", "end")):
        assert (found[a] - found[b]).abs().max() > 1e-3, f"{name}: {a} and {b} give the same outputs"
    before, after = load_file(folder / "adapter.safetensors"), load_file(folder / "end.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before), name


def description() -> dict:
    """What the folder was written with."""
    cases = {}
    for name, case in CASES.items():
        files = sorted(str(path.relative_to(FOLDER / name)) for path in (FOLDER / name).rglob("*") if path.is_file())
        cases[name] = {"methods": [brief(method) for method in case.methods], "files": files}
    return {
        "lightning_peft": lightning_peft.__version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
        "transformers": transformers.__version__,
        "steps": {"half": STEPS, "end": 2 * STEPS},
        "cases": cases,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
