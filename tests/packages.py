"""Runs tests under the other package of Lightning, alone or with both packages imported.

Lightning makes one package from the other by replacing the name in the sources. The same is done here with the tests:
a copy of them imports ``pytorch_lightning`` where the original imports ``lightning.pytorch``.

By hand: python -m tests.packages alone tests/lifecycle -x
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: what the copied tests run before anything else: the other package is not there, or it is imported as well
_ALONE = """
import sys

class _Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning" or name.startswith("lightning."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Refuse())
"""
_BOTH = """
import lightning.pytorch
import pytorch_lightning
"""
MODES = {"alone": _ALONE, "both": _BOTH}


def copy_tests(folder: Path, mode: str) -> None:
    """Write the tests into ``folder`` as they would be written by a user of ``pytorch_lightning``."""
    for name in ("lightning_peft", "configs", "examples", "README.md", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for source in (ROOT / "tests").rglob("*"):
        target = folder / source.relative_to(ROOT)
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".py":
            target.symlink_to(source)
            continue
        text = source.read_text()
        text = text.replace("lightning.pytorch", "pytorch_lightning").replace("lightning.fabric", "lightning_fabric")
        target.write_text(text)
    conftest = folder / "tests" / "conftest.py"
    conftest.write_text(MODES[mode] + conftest.read_text())


def run(mode: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with ``arguments`` on the copied tests; paths are relative to the repository."""
    copy_tests(folder, mode)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        done = run(sys.argv[1], Path(place), *sys.argv[2:])
    print(done.stdout, done.stderr, sep="")
    sys.exit(done.returncode)
