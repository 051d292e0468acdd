"""One code base for the two packages that Lightning is published as, `lightning.pytorch` and `pytorch_lightning`.

Both hold the same code, but a class of one is a stranger to the other: a Trainer of `pytorch_lightning` refuses a
module of `lightning.pytorch`, and a LightningCLI of either accepts subclasses of its own `Callback` only. So the bases
of our classes are decided here, once, when the first of these classes is asked for:

* the packages that are imported by then are served (a class derives from both `Callback`s if both are imported);
* if neither is imported yet, all that are installed are, because the user's own import may come a line later;
* a Trainer of a package that is imported afterwards is refused by `package_of`, which says what to do.

Code that looks at objects of Lightning asks with `every`, and code that needs a function of Lightning takes it from
the package of the Trainer, with `package_of`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import MissingPackageError, TrainingError

#: the preferred one first
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_OLDEST = "2.6"
_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def _find_packages() -> tuple[ModuleType, ...]:
    """The packages to serve: those that are imported, or else those that are installed.

    Raises:
        MissingPackageError: there is none, or those there are are too old.
    """
    found = [sys.modules[name] for name in _NAMES if sys.modules.get(name) is not None]
    problems = []
    if not found:
        # The package that is imported last lends its logger to both, so the preferred one comes last.
        for name in reversed(_NAMES):
            try:
                found.insert(0, import_module(name))
            except ImportError as error:
                problems.append(str(error))
    served = [package for package in found if not _is_too_old(package)]
    problems += [f"{package.__name__} is {package.__version__}" for package in found if _is_too_old(package)]
    if not served:
        raise MissingPackageError(
            f"This part of lightning_peft needs Lightning {_OLDEST} or newer ({'; '.join(problems)}): pip install -U"
            " lightning (or pytorch-lightning). `inject`, `load_adapter`, `merge` and their like work without it."
        )
    return tuple(served)


def _is_too_old(package: ModuleType) -> bool:
    from packaging.version import Version  # comes with Lightning

    return Version(package.__version__) < Version(_OLDEST)


PACKAGES = _find_packages()

# Both packages share these functions, which can be used once one of the packages is imported.
from lightning_utilities.core.rank_zero import rank_zero_info as rank_zero_info  # noqa: E402
from lightning_utilities.core.rank_zero import rank_zero_only as rank_zero_only  # noqa: E402
from lightning_utilities.core.rank_zero import rank_zero_warn as rank_zero_warn  # noqa: E402


def every(path: str) -> tuple[type, ...]:
    """A class of Lightning in each of the packages, for `isinstance` and `issubclass`.

    >>> [kind.__name__ for kind in every("strategies.FSDPStrategy")][0]
    'FSDPStrategy'
    """
    return tuple(attrgetter(path)(package) for package in PACKAGES)


def _base(path: str) -> type:
    """The class at ``path``, or one that derives from the class of either package."""
    classes = every(path)
    if len(classes) == 1:
        return classes[0]
    return type(classes[0].__name__, classes, {"__module__": __name__, "__doc__": classes[0].__doc__})


#: hooks of a LightningModule that Lightning leaves alone unless a module overrides them
_OPTIONAL_HOOKS = (
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "configure_sharded_model",
    "on_validation_model_train",
    "on_test_model_train",
)


def _module_base() -> type:
    """The base of our LightningModules.

    A package finds out whether a module overrides a hook by comparing its code with that of the package's own class.
    Where both packages are served, a hook that is inherited from the class of the other one would seem overridden:
    the names of the packages in its messages differ. So the common class has no such hooks.
    """
    base = _base("LightningModule")
    if len(PACKAGES) > 1:
        for hook in _OPTIONAL_HOOKS:
            setattr(base, hook, None)
    return base


if TYPE_CHECKING:
    import lightning.pytorch as L
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import BasePredictionWriter
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    restricted_classmethod = classmethod
else:
    #: the package that our own commands train with
    L = PACKAGES[0]
    Callback = _base("Callback")
    LightningDataModule = _base("LightningDataModule")
    LightningModule = _module_base()
    BasePredictionWriter = _base("callbacks.BasePredictionWriter")
    TorchCheckpointIO = _base("plugins.io.TorchCheckpointIO")
    #: a class method that may not be called on an instance
    restricted_classmethod = L.utilities.model_helpers._restricted_classmethod


def package_of(trainer: Any) -> Any:
    """The package whose Trainer this is: ``package_of(trainer).strategies.FSDPStrategy``.

    Raises:
        TrainingError: the Trainer is of a package that our classes do not serve.
    """
    for package in PACKAGES:
        if isinstance(trainer, package.Trainer):
            return package
    raise TrainingError(why_unknown(type(trainer), "Trainer"))


def package_of_class(kind: type) -> Any:
    """The package that a class of modules or data modules derives from; the first one if it derives from both."""
    return next(p for p in PACKAGES if issubclass(kind, (p.LightningModule, p.LightningDataModule)))


def why_unknown(kind: type, what: str) -> str:
    """Why a class is not taken for a Trainer or LightningModule, and what to do."""
    served = [package.__name__ for package in PACKAGES]
    for base in kind.__mro__:
        other = next((name for name in _NAMES if base.__module__.startswith(f"{name}.")), None)
        if other is None or other in served:
            continue
        if _is_too_old(sys.modules[other]):
            return (
                f"{kind.__name__} is a {what} of {other} {sys.modules[other].__version__}; lightning_peft needs"
                f" {_OLDEST} or newer."
            )
        return (
            f"{kind.__name__} is a {what} of {other}, and the classes of lightning_peft were made for {served[0]}"
            f" because {other} was not imported yet. Import {other}, or the library that brings it, before"
            " lightning_peft."
        )
    return f"{kind.__module__}.{kind.__qualname__} is not a {what} of {' or '.join(served)}."


def fabric_module(package: Any, path: str) -> Any:
    """A module of the Fabric that belongs to a package: ``fabric_module(L, "strategies.fsdp")``."""
    return import_module(f"{_FABRIC[package.__name__]}.{path}")


def is_overridden(hook: str, module: Any) -> bool:
    """Whether a LightningModule defines a hook itself."""
    return package_of_class(type(module)).utilities.model_helpers.is_overridden(hook, module)
