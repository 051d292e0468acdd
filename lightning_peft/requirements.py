"""Packages that only some parts of the library need. Each is asked for by name, where it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_peft.errors import MissingPackageError

#: the extra of this distribution that installs a package, and the package's name on PyPI where that is another one
_EXTRAS = {
    "transformers": "task",
    "datasets": "task",
    "PIL": "task",
    "jsonargparse": "cli",
    "docstring_parser": "cli",
    "rich": "cli",
}
_PYPI_NAMES = {"PIL": "pillow", "docstring_parser": "docstring-parser"}


def require_package(name: str, user: str) -> Any:
    """Import a package, or a module in one, that ``user`` needs.

    Raises:
        MissingPackageError: it is not installed; the message says how to install it.

    >>> require_package("json", "This example").dumps([1])
    '[1]'
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is installed, and something that it needs itself is not
            raise
        raise MissingPackageError(
            f"{user} needs {_PYPI_NAMES.get(package, package)}, which is not installed:"
            f" pip install 'lightning-peft[{_EXTRAS[package]}]'."
        ) from None
