"""LightningModules back from adapter checkpoints."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files import load_checkpoint, locate
from lightning_peft.folders import as_file
from lightning_peft.lightning_packages import (
    every,
    fabric_module,
    package_of_class,
    rank_zero_warn,
    why_unknown,
)
from lightning_peft.model.adapters import Adapters
from lightning_peft.objects import arguments_left_out, left_out
from lightning_peft.requirements import require_package
from lightning_peft.saving.checkpoint import adapter_state_dict, inject_saved, load_saved
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.trainer.objects import arguments, does_something, listed
from lightning_peft.trainer.session import Session
from lightning_peft.untrusted import (
    check_functions,
    check_loading,
    known_class,
    only_known_imports,
    settle_parameters,
    short,
    with_known_classes,
    without_places,
)

if TYPE_CHECKING:
    import lightning.pytorch as L

#: functions of Lightning that build a module from stored arguments
_BUILDERS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
Module = TypeVar("Module", bound="L.LightningModule")
Built = TypeVar("Built", bound="L.LightningModule | L.LightningDataModule")


def load_from_checkpoint(cls_or_module: type[Module] | Module, path: str | os.PathLike, **kwargs: Any) -> Module:
    """A module with its trained adapter, from a checkpoint that holds only the adapter.

    Args:
        cls_or_module: a LightningModule class, built from the hyper-parameters in the checkpoint, or an instance,
            which is adapted in place.
        path: a checkpoint written with the `PEFT` callback, a file or a folder of shards.
        kwargs: constructor arguments that replace or complete the stored ones (for a class). ``weights_only=False``
            also builds the objects in a file that you trust, which can run code.

    Returns:
        The module: built by itself (the base weights come from its constructor or ``configure_model``), adapted as
        the checkpoint describes, loaded strictly.

    Raises:
        CheckpointError: the checkpoint does not fit; nothing is half-loaded silently.
    """
    with as_file(locate(path)) as file:
        return _from_file(cls_or_module, file, kwargs)


def _from_file(cls_or_module: type[Module] | Module, file: Path, kwargs: dict[str, Any]) -> Module:
    saved = SavedAdapter.read(file)  # one clear error for a plain, broken or unsafe file before anything is built
    if isinstance(cls_or_module, every("LightningModule")):
        weights_only = kwargs.pop("weights_only", None)
        if kwargs:
            raise PEFTError(f"Constructor arguments ({', '.join(kwargs)}) go with a class, not with an instance.")
        module = cls_or_module
        _call_own_hook(module, _content(module, file, weights_only))
    else:
        module = _build(cls_or_module, file, kwargs)
    if saved.section.full:
        _load_whole(module, saved)
    elif Adapters.find(module) is None or not _is_loaded(module, saved.tensors):
        load_saved(module, saved)
    Session.on(module).keep_small("trainable")
    return module


def _content(module: L.LightningModule, file: Path, weights_only: bool | None) -> dict[str, Any]:
    if weights_only is False:  # the user trusts the file
        return _read(package_of_class(type(module)), file, "cpu", weights_only)
    return load_checkpoint(file)


def _call_own_hook(module: L.LightningModule, content: dict[str, Any]) -> None:
    """Call the module's ``on_load_checkpoint``, unless what it may ask for was not read.

    An instance has what its constructor gave it, and would lose that to a hook that finds nothing in the file.
    """
    lost = left_out(content)
    if not lost:
        type(module).on_load_checkpoint(module, content)
    elif does_something(type(module).on_load_checkpoint):
        rank_zero_warn(
            f"{type(module).__name__}.on_load_checkpoint is not called, because the checkpoint holds objects, which are"
            f" not built: {listed(lost)}. If you trust the file: load_from_checkpoint(instance, path,"
            " weights_only=False)."
        )


def _load_whole(module: L.LightningModule, saved: SavedAdapter) -> None:
    """All weights of a file that holds the base as well; the module's own may be random."""
    adapters = Adapters.find(module) or inject_saved(module, saved.section, values=False)
    tensors = saved.fitted_whole(adapters)
    adapters.make_way(tensors, whole=True)
    Session.on(module).keep_small("full")
    module.load_state_dict(tensors)


def _build(kind: type[Module], file: Path, kwargs: dict[str, Any]) -> Module:
    if not (isinstance(kind, type) and issubclass(kind, every("LightningModule"))):
        raise PEFTError(why_unknown(kind if isinstance(kind, type) else type(kind), "LightningModule"))
    if kwargs.pop("strict", True) is not True:
        raise PEFTError("strict=False would hide missing adapter tensors; the frozen weights may be missing anyway.")
    kwargs.setdefault("map_location", "cpu")
    with warnings.catch_warnings():  # strict=False warns of the frozen weights; the strict load follows
        warnings.filterwarnings("ignore", message="Found keys that are", category=UserWarning)
        if _loads_in_its_own_way(kind):
            _check_own_way(kind, file, kwargs)
            return kind.load_from_checkpoint(file, strict=False, **kwargs)
        return rebuild(kind, file, strict=False, **kwargs)


def _loads_in_its_own_way(kind: type) -> bool:
    """Whether the user's class has a ``load_from_checkpoint`` of its own."""
    owner = next(base for base in kind.__mro__ if "load_from_checkpoint" in vars(base))
    return owner.__module__.split(".")[0] not in ("lightning", "pytorch_lightning", "lightning_peft")


def _check_own_way(kind: type, file: Path, given: Mapping[str, Any]) -> None:
    """Look at a file before a class reads it in its own way, which may unpickle anything."""
    content = _read(package_of_class(kind), file, "cpu", given.get("weights_only"))
    _check_complete(kind, content, str(file), given)
    lost = left_out(content)
    if lost:
        raise CheckpointError(
            f"{file} holds objects, and {kind.__name__}.load_from_checkpoint reads files in a way of its own, which may"
            f" build them: {listed(lost)}. Build the module and load into it: load_from_checkpoint({kind.__name__}(…),"
            " path). If you trust the file: load_from_checkpoint(…, weights_only=False)."
        )


# ---- from constructor arguments in a file --------------------------------------------------------------------------
def rebuild(
    kind: type[Built],
    path: Any,
    map_location: Any = None,
    hparams_file: str | os.PathLike | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Built:
    """Build a module or data module as its ``load_from_checkpoint`` does, where nothing in the file chooses code.

    Args:
        kind: the class to build.
        path: a checkpoint; an open file or a URL is read with ``weights_only=True`` unless told otherwise.
        map_location: as for `torch.load`.
        hparams_file: constructor arguments that replace the stored ones, in a file that the user trusts.
        strict: whether all weights must be there; the module's own choice by default.
        weights_only: False lets a file unpickle anything, which can run code.
        kwargs: constructor arguments that replace or complete the stored ones.

    Raises:
        CheckpointError: the stored arguments name code that is not loaded, or do not build the class.
    """
    package = package_of_class(kind)
    saving = package.core.saving
    content = _read(package, path, map_location or saving._default_map_location, weights_only)
    if hparams_file is not None:
        content.pop(kind.CHECKPOINT_HYPER_PARAMS_KEY, None)
    _settle_arguments(kind, content, str(path), kwargs)
    if hparams_file is None:
        _check_complete(kind, content, str(path), kwargs)
    if hparams_file is not None:
        is_csv = str(hparams_file).endswith(".csv")
        load = saving.load_hparams_from_tags_csv if is_csv else saving.load_hparams_from_yaml
        content[kind.CHECKPOINT_HYPER_PARAMS_KEY] = load(hparams_file)
    stored = content.setdefault(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    stored.update(kwargs)
    made_by_parser = "_instantiator" in stored
    options = {"strict": strict} if issubclass(kind, every("LightningModule")) else {}
    try:
        with only_known_imports(_named(kind, kwargs)) if made_by_parser else nullcontext():
            built = saving._load_state(kind, content, **options, **kwargs)
    except PEFTError:
        raise
    except Exception as error:
        _explain(kind, path, error, stored.keys(), made_by_parser)
        raise
    if isinstance(built, every("LightningModule")):
        device = next((t.device for t in content["state_dict"].values() if isinstance(t, Tensor)), None)
        built = built.to(device) if device is not None else built
    return built


def _read(package: Any, path: Any, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    """The content of a checkpoint, in the form that this version of Lightning writes."""
    is_local = isinstance(path, (str, os.PathLike)) and ("://" not in str(path) or str(path).startswith("pkg://"))
    if is_local and weights_only is not False:
        content = load_checkpoint(locate(path), map_location, mmap=False)
    else:
        load = fabric_module(package, "utilities.cloud_io")._load
        content = load(path, map_location=map_location, weights_only=weights_only is not False)
        settle_parameters(content)
    try:
        return package.utilities.migration.utils._pl_migrate_checkpoint(content, path if is_local else None)
    except Exception as error:  # a version or a part that is not what it says
        raise CheckpointError(f"{path} is no checkpoint of Lightning, or a damaged one: {short(error)}") from error


def _check_complete(kind: type[Any], content: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> None:
    """Make sure that no argument falls back to its default because the checkpoint does not hold what it was.

    Raises:
        CheckpointError: one was an object when the checkpoint was written, and is not given.
    """
    key = kind.CHECKPOINT_HYPER_PARAMS_KEY
    there = {*content.get(key, ()), *given}  # a module's own hook may have put back what was left out
    lost = {}
    for name, path in arguments_left_out(content, key).items():
        if name not in there and _takes(kind, content, name):
            lost[name] = path
    if key in left_out(content):  # all of them are one object, such as a DictConfig of OmegaConf
        name = str(content.get(kind.CHECKPOINT_HYPER_PARAMS_NAME) or key)
        if name not in given:
            lost[name] = left_out(content)[key]
    if not lost:
        return
    trusted = ", or, if you trust the file, weights_only=False" if left_out(content) else ""
    raise CheckpointError(
        f"{where} does not give what {kind.__name__} was built with: {listed(lost)}. Objects stay out of checkpoints,"
        f" or are not read, because they could run code. Build the module and load into it:"
        f" load_from_checkpoint({kind.__name__}(…), path). Or give them: load_from_checkpoint({kind.__name__}, path,"
        f" {arguments(lost)}){trusted}."
    )


def _takes(kind: type, content: Mapping[str, Any], name: str) -> bool:
    """Whether a class would be given a stored hyper-parameter: by its name, among others, or all as one argument."""
    parameters = inspect.signature(kind.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    whole = content.get(kind.CHECKPOINT_HYPER_PARAMS_NAME)
    return takes_any or name in parameters or (isinstance(whole, str) and whole in parameters)


def _settle_arguments(kind: type[Any], content: dict[str, Any], where: str, given: Mapping[str, Any]) -> None:
    """Make sure, in place, that stored arguments import nothing but classes of known packages."""
    ours = hasattr(kind, "import_fields")  # TaskModule and the data modules; others' arguments are their own affair
    for key in (kind.CHECKPOINT_HYPER_PARAMS_KEY, "hparams", "module_arguments"):
        if key not in content:
            continue
        stored = {name: value for name, value in content[key].items() if name not in given}
        if "_instantiator" in stored:
            require_package("jsonargparse", f"{where} was written by LightningCLI: building the module from it")
            _settle_instantiator(kind, stored, where)
            for name in list(stored):  # in the order of the file, so that a refusal always names the same one
                if name not in ("_instantiator", "_class_path"):
                    way_out = f"Give it in the call: load_from_checkpoint(…, {name}=…)."
                    stored |= with_known_classes({name: stored[name]}, where, way_out)
        if ours:
            check_functions(kind, stored, where, "Give it in the call: load_from_checkpoint(…, NAME=…).")
            check_loading(stored, where, "Give it in the call: load_from_checkpoint(…, load_kwargs=…).")
            stored = without_places(stored)
        content[key] = stored


def _settle_instantiator(kind: type[Any], stored: dict[str, Any], where: str) -> None:
    """LightningCLI notes which function builds the module, and of which class it was."""
    builder = stored["_instantiator"]
    if not isinstance(builder, str) or builder not in _BUILDERS:
        raise CheckpointError(
            f"{where} names the function {short(repr(builder), 120)} to build the module with, which is not called"
            " because it could be any code. Build the module yourself, then load_adapter(module, path)."
        )
    # The file may have been written with the other package of Lightning.
    stored["_instantiator"] = f"{package_of_class(kind).__name__}.cli.instantiate_module"
    path = stored.get("_class_path")
    if path is None or _is_the_class(path, kind):
        return
    way_out = "If you trust it, call load_from_checkpoint of that class."
    named = known_class(path, f"{where}: the class", way_out)
    if not issubclass(named, kind):
        raise CheckpointError(f"{where} was written by a {named.__name__}, not by a {kind.__name__}. {way_out}")
    stored["_class_path"] = f"{named.__module__}.{named.__qualname__}"


def _is_the_class(path: Any, kind: type) -> bool:
    """Whether an import path means the class that the user has named; nothing is imported to find out."""
    module, _, name = str(path).rpartition(".")
    return getattr(sys.modules.get(module), name, None) is kind


def _named(kind: type, given: Mapping[str, Any]) -> list[str]:
    """The packages that the user names in the call, in which jsonargparse may import."""
    found = [kind.__module__.split(".")[0]]
    waiting: list[Any] = list(given.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str) and "." in value and value.split(".")[0].isidentifier():
            found.append(value.split(".")[0])
    return [name for name in found if name != "jsonargparse"]


def _explain(kind: type, path: Any, error: Exception, known: Collection[str], made_by_parser: bool) -> None:
    """Say what a constructor complains of, where the file is to blame rather than the user's class."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = []
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in variable
        if needed and name not in known:
            missing.append(name)
    if missing and not made_by_parser:
        raise PEFTError(
            f"{path} does not hold {', '.join(missing)}, which {kind.__name__} cannot be built without. Build the"
            f" module and load into it: load_from_checkpoint({kind.__name__}(…), path). Or give what is missing:"
            f" load_from_checkpoint({kind.__name__}, path, {arguments(missing)})."
        ) from error
    if made_by_parser or hasattr(kind, "import_fields"):
        raise CheckpointError(
            f"{path}: its hyper-parameters do not build a {kind.__name__}: {short(error)} Give other ones:"
            " load_from_checkpoint(…, NAME=…)."
        ) from error


def _is_loaded(module: L.LightningModule, state: Mapping[str, Tensor]) -> bool:
    """Whether a module that adapts itself has taken the values already."""
    ours = adapter_state_dict(module)
    return all(
        n in ours and t.shape == ours[n].shape and torch.equal(ours[n].cpu(), t.to(ours[n].dtype))
        for n, t in state.items()
    )
