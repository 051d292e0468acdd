"""Run Lightning's own tests with `PEFT(FullFineTuning())` in every Trainer, and print what differs. Run by hand.

Full fine-tuning promises to change nothing that Lightning does without it, and these tests say what Lightning does.
They come with a checkout of Lightning of the installed release, and the environment is its own:

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python -m venv suite && . suite/bin/activate
    pip install -c .ci/constraints.txt -e . "lightning[extra]" pytest pytest-timeout pytest-rerunfailures \\
        pytest-random-order cloudpickle scikit-learn onnx onnxruntime onnxscript psutil pandas fastapi uvicorn \\
        tensorboard httpx requests
    python -m tests.ecosystem.lightning_suite ../pytorch-lightning [FOLDER …]

Every test runs with the callback. What fails is run once more by itself, with the callback and without it, so that
neither tests that fail anyway nor those that fail now and then are counted. `REASONS` says which differences are in the
nature of the callback; the others are news, and the exit code is 1. Outcomes are kept in `--results` as they come, and
a run that is interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.ecosystem.everywhere import complete_file, read_notes

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("checkpointing", "callbacks", "models", "trainer", "tuner", "core", "loops")
PACKAGES = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}

#: tests of checkpoints of old versions, which are downloaded from elsewhere
LEFT_OUT = "tests_pytorch/checkpointing/test_legacy_checkpoints.py"

#: differences that are in the nature of the callback: a part of the test's id, and the reason
REASONS: dict[str, str] = {
    "test_callback_connector.py::test_checkpoint_callbacks_are_last": "compares the list of all callbacks",
    "test_callback_connector.py::test_attach_model_callbacks": "compares the list of all callbacks",
    "test_callback_connector.py::test_configure_external_callbacks": "compares the list of all callbacks",
    "test_checkpoint_connector.py::test_hpc_restore_attempt": (
        "a file that is missing is a FileNotFoundError as well, but says so in other words, with the files that are"
        " there"
    ),
    "test_trainer.py::test_model_checkpoint_only_weights": (
        "a resume from weights alone is refused with CheckpointError, which says how to go on, where Lightning raises"
        " KeyError"
    ),
    "test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": (
        "watches TorchCheckpointIO.save_checkpoint, in the place of which SafeCheckpointIO writes local files"
    ),
}


class Suite:
    """The tests of a checkout, as one package of Lightning is tested by them."""

    def __init__(self, tests: Path, results: Path, package: str, timeout: int) -> None:
        self.tests = tests
        self.results = results
        self.package = package
        self.timeout = timeout

    def outcomes(self, name: str, targets: Sequence[str], with_peft: bool) -> dict[str, dict[str, str]]:
        """How each test of some targets ended, as far as known, and else by running it."""
        name = f"{name}-{'with' if with_peft else 'without'}"
        notes = self.results / f"{name}.jsonl"
        log = self.results / f"{name}.log"
        # A test that takes the process down leaves others that have not run yet.
        while not complete_file(notes).exists():
            known = len(read_notes(notes))
            self._pytest(notes, log, targets, with_peft)
            if len(read_notes(notes)) == known and not complete_file(notes).exists():
                raise SystemExit(f"pytest ended before it ran a test: see {log}")
        return read_notes(notes)

    def _pytest(self, notes: Path, log: Path, targets: Sequence[str], with_peft: bool) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "tests.ecosystem.everywhere", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "--ignore", LEFT_OUT]
        command += ["--outcomes", str(notes), "--package", self.package]
        command += ["--timeout", str(self.timeout), "--timeout-method", "thread", *targets]
        if with_peft:
            command.append("--with-peft")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.tests)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("a") as file:
            subprocess.run(command, cwd=self.tests, env=environment, stdout=file, stderr=subprocess.STDOUT)


def rewritten(checkout: Path, folder: Path, package: str) -> Path:
    """The tests of a checkout, or a copy of them that imports the other package of Lightning."""
    if package == "lightning.pytorch":
        return checkout / "tests"
    for source in (checkout / "tests" / "tests_pytorch").rglob("*"):
        target = folder / "tests" / source.relative_to(checkout / "tests")
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".py":
            text = source.read_text().replace("lightning.pytorch", package)
            target.write_text(text.replace("lightning.fabric", PACKAGES[package]))
        else:
            target.write_bytes(source.read_bytes())
    (folder / "pyproject.toml").write_bytes((checkout / "pyproject.toml").read_bytes())
    return folder / "tests"


def failures(notes: dict[str, dict[str, str]]) -> list[str]:
    return [test for test, note in notes.items() if note["outcome"] in ("failed", "died")]


def reason_for(test: str) -> str | None:
    return next((reason for part, reason in REASONS.items() if part in test), None)


def report(suite: Suite, folders: Sequence[str]) -> bool:
    """Print the table and all differences; whether each of them has its reason."""
    print("| folder | cases | skipped | fail with the callback | without it too | differ |\n|" + " --- |" * 6)
    found: dict[str, str] = {}
    for folder in folders:
        notes = suite.outcomes(folder, [f"tests_pytorch/{folder}"], with_peft=True)
        suspects = failures(notes)
        without_too, differ = [], []
        if suspects:
            by_themselves = [test.removeprefix("tests/") for test in suspects]
            alone = suite.outcomes(f"{folder}-again", by_themselves, with_peft=True)
            without = suite.outcomes(f"{folder}-again", by_themselves, with_peft=False)
            without_too = failures(without)
            differ = [test for test in failures(alone) if test not in without_too]
            found |= {test: alone[test]["reason"] for test in differ}
        skipped = sum(note["outcome"] == "skipped" for note in notes.values())
        numbers = (len(notes), skipped, len(suspects), len(without_too), len(differ))
        print(f"| {folder} | " + " | ".join(map(str, numbers)) + " |", flush=True)
    print(f"\n{len(found)} tests fail with the callback alone.")
    for test, error in found.items():
        print(f"- {test}: {reason_for(test) or f'NEW: {error}'}")
    if tuple(folders) == FOLDERS:
        for part in REASONS:
            if not any(part in test for test in found):
                print(f"- {part}: no longer differs, its reason can go")
    return all(reason_for(test) for test in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Lightning of the installed release")
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="folders of tests/tests_pytorch")
    parser.add_argument("--results", type=Path, help="where outcomes are kept; a temporary folder by default")
    parser.add_argument("--package", choices=PACKAGES, default="lightning.pytorch")
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = (options.results or Path(temporary) / "results").absolute()
        results.mkdir(parents=True, exist_ok=True)
        tests = rewritten(options.checkout.absolute(), Path(temporary), options.package)
        suite = Suite(tests, results, options.package, options.timeout)
        good = report(suite, options.folders)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
