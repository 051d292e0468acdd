"""Hides every installed package but a few and what those require, as if nothing else had been installed."""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires


def plain(name: str) -> str:
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: tuple[str, ...], without: str) -> set[str]:
    """The distributions that pip brings with ``names``, but for ``without``."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = plain(waiting.pop())
        if name in found or name == without:
            continue
        found.add(name)
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:  # required on another system
            continue
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]
    return found


class Installed:
    """Finds what Python finds, but for packages of hidden distributions."""

    def __init__(self, visible: set[str]) -> None:
        self.visible = visible
        self.hidden = set()
        for package, distributions in packages_distributions().items():
            if not {plain(name) for name in distributions} & visible:
                self.hidden.add(package)
        self.hidden.discard("lightning_peft")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return PathFinder.find_spec(name, path, target)

    def find_distributions(self, context):
        for distribution in PathFinder.find_distributions(context):
            if plain(distribution.metadata["Name"]) in self.visible:
                yield distribution


def hide_all_but(*names: str, without: str = "") -> None:
    """From now on only ``names`` and what they require can be imported; call it before anything is."""
    finder = Installed(installed_with(names, without))
    sys.meta_path[:] = [finder if entry is PathFinder else entry for entry in sys.meta_path]
