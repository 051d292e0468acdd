"""What a file may choose: values, and classes of a few known packages. It never chooses code.

Checkpoints, adapter folders and the configs found beside them come from anywhere. Three rules hold for what they say:

* Options that let a library run foreign code are left out, at any depth (`without_code`).
* An import path must name a class that one of the known packages defines (`known_class`). The text is looked at first,
  so that nothing is imported to find out.
* Text that goes into a message or onto the screen is made harmless (`lightning_peft.errors.printable`).

What the user gives in the call itself, as an argument, a flag or with ``--config``, is not asked about any of this.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from lightning_peft.errors import CheckpointError, printable

#: options that let transformers run code from a folder or from the hub, or let torch unpickle anything
CODE_OPTIONS = frozenset(
    {
        *("trust_remote_code", "code_revision", "auto_map", "custom_generate", "custom_pipelines"),
        *("use_kernels", "allow_all_kernels", "kernel_config"),
        "weights_only",
    }
)
#: those of them that mean nothing else anywhere
_REMOTE_CODE = frozenset({"trust_remote_code", "code_revision", "auto_map"})
#: options that name an implementation; one with a slash in its name is compiled code from the hub
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
#: options of ``from_pretrained`` that name a folder to write to
PLACE_OPTIONS = frozenset({"cache_dir", "offload_folder"})

#: where a checkpoint of Lightning keeps the constructor's arguments; the last two in old files
PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams", "module_arguments")

#: the packages whose classes a file may name
PACKAGES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "lightning_peft")
#: Lightning is published under two names; what was written with one is read with the other
_LIGHTNING_NAMES = ("lightning.pytorch", "pytorch_lightning")
#: what such a class must be: the package that defines the base class, and the name of the base class
_BASES = {
    *("torch.Module", "torch.Optimizer", "torch.LRScheduler"),
    *("lightning.LightningModule", "lightning.LightningDataModule", "lightning.Callback", "lightning.Logger"),
    *("lightning.Strategy", "lightning.Accelerator", "lightning.Precision", "lightning.Profiler"),
    *("lightning.CheckpointIO", "lightning.ClusterEnvironment", "lightning.LayerSync"),
    "lightning_peft.Method",
}
#: classes of that kind that call whatever function they are given
_CALLERS = ("LambdaCallback", "ScriptModule", "RecursiveScriptModule", "RemoteModule")
#: functions that a file may name: those that compute with tensors, and the data of a shipped example
_FUNCTIONS = re.compile(r"torch\.nn\.functional\.[a-z_0-9]+|sklearn\.datasets\.load_digits")
_DTYPES = re.compile(r"torch\.[a-z]*(float|int|bool|complex|half|double|long)[a-z0-9_]*")
#: where a class is looked for that is named without its package
_SHORT = (
    *("lightning_peft", "lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies"),
    *("lightning.pytorch.profilers", "torch.optim", "torch.optim.lr_scheduler"),
)
#: functions and modules of the known packages that run or unpickle what their arguments name
_CALLING_PATHS = (
    *("torch.load", "torch.save", "torch.hub", "torch.ops", "torch.classes", "torch.package", "torch.serialization"),
    *("torch.jit", "torch.utils.cpp_extension", "torch.utils.model_zoo", "torch.multiprocessing"),
    *("torch.distributed.run", "torch.distributed.launcher", "torch.distributed.elastic"),
    *("transformers.dynamic_module_utils", "transformers.pipeline", "lightning_peft.cli"),
)
#: the keys of a mapping that stands for an object
_SPEC = {"class_path", "init_args", "dict_kwargs"}


def without_code(value: Any, options: frozenset[str] | None = None) -> Any:
    """A copy of plain values without the options that choose code.

    Args:
        value: plain values.
        options: names of the options; None for all that a library of ours knows.

    >>> without_code({"dtype": "float16", "deep": [{"trust_remote_code": True, "n": 1}]})
    {'dtype': 'float16', 'deep': [{'n': 1}]}
    """
    if isinstance(value, Mapping):
        kept = {}
        for key, part in value.items():
            dropped = _chooses_code(key, part) if options is None else key in options
            if not dropped:
                kept[key] = without_code(part, options)
        return kept
    if type(value) in (list, tuple):  # and no named tuple, as torch.Size is one
        return type(value)([without_code(part, options) for part in value])
    return value


def without_places(value: Any) -> Any:
    """A copy of plain values without the options that name a folder to write to.

    >>> without_places({"dtype": "float16", "cache_dir": "/home/me"})
    {'dtype': 'float16'}
    """
    if isinstance(value, Mapping):
        return {key: without_places(part) for key, part in value.items() if key not in PLACE_OPTIONS}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    return value


def settle_parameters(content: Any) -> None:
    """Leave out, in place, what a checkpoint's constructor arguments say about running code.

    Raises:
        ValueError: the arguments are no mapping.
    """
    if not isinstance(content, dict):
        return
    for key in PARAMETERS:
        if key not in content:
            continue
        if not isinstance(content[key], Mapping) or not all(isinstance(name, str) for name in content[key]):
            raise ValueError(f"its {key} are no arguments by name")
        check_extent(content[key])
        arguments = {name: value for name, value in content[key].items() if name not in _REMOTE_CODE}
        content[key] = {name: _settled(name, value) for name, value in arguments.items()}
    if not isinstance(content.get("hparams_type"), str):  # Lightning would call anything else
        content.pop("hparams_type", None)


def _settled(name: str, value: Any) -> Any:
    """One constructor argument. A class of the user's own may call its arguments as it likes."""
    return without_code(value, None if name in ("model", "model_kwargs") else _REMOTE_CODE)


def _chooses_code(key: Any, value: Any) -> bool:
    if key in _IMPLEMENTATIONS:
        return not isinstance(value, str) or "/" in value
    return isinstance(key, str) and key in CODE_OPTIONS


def known_class(path: Any, where: str, way_out: str) -> type:
    """The class at an import path that stands in a file.

    Args:
        path: the import path.
        where: what names it, for the message: a file and the place in it.
        way_out: what the user can do to have another class, for the message.

    Raises:
        CheckpointError: the path leads elsewhere than to a class that a known package defines. Then nothing has been
            imported that does not belong to these packages.

    >>> known_class("torch.optim.SGD", "a.ckpt: optimizer", "Give optimizer=... .").__name__
    'SGD'
    >>> known_class("torch.hub.os.system", "a.ckpt: optimizer", "Give optimizer=... .")
    Traceback (most recent call last):
    lightning_peft.errors.CheckpointError: a.ckpt: optimizer names 'torch.hub.os.system'. Of what a file names, only...
    """
    found = _imported(under_imported_name(path)) if _reads_as_known(path) else None
    if not isinstance(found, type) or not _is_defined_in_a_known_package(found) or not _is_of_a_known_kind(found):
        raise CheckpointError(
            f"{where} names {short(repr(path), 120)}. Of what a file names, only classes of {', '.join(PACKAGES)} are"
            f" used, because anything else could run code. {way_out}"
        )
    return found


def _reads_as_known(path: Any) -> bool:
    """Whether the text of a path begins with a known package and goes on with names."""
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or parts[0] not in PACKAGES:
        return False
    if any(f"{path}.".startswith(f"{calling}.") for calling in _CALLING_PATHS):
        return False
    root = under_imported_name(path).split(".")[0]
    if root not in sys.modules and not _is_installed(root):
        return False  # a folder of this name could lie in the working directory
    return all(part.isidentifier() and not part.startswith("__") for part in parts)


def under_imported_name(path: str) -> str:
    """The path under the name by which Lightning is imported here, if the file was written with its other name."""
    for name, other in (_LIGHTNING_NAMES, _LIGHTNING_NAMES[::-1]):
        if path.startswith(f"{name}.") and name not in sys.modules and other in sys.modules:
            return other + path.removeprefix(name)
    return path


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return False
    return True


def _imported(path: str) -> Any:
    """The attribute of a module, or None. Only the last part may be an attribute, so no path leads through a class."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # there is no such module, or it needs something that is not here
        return None


def _is_defined_in_a_known_package(found: type) -> bool:
    """A module of a known package may hold classes of others: ``torch.optim.optimizer.defaultdict``."""
    return found.__module__.split(".")[0] in PACKAGES


def _is_of_a_known_kind(found: type) -> bool:
    """Whether it is a module, an optimizer, a callback, ...; and not one whose purpose is to call functions."""
    bases = set()
    for base in found.__mro__:
        if base.__name__ in _CALLERS:
            return False
        package = base.__module__.split(".")[0].replace("pytorch_lightning", "lightning")
        bases.add(f"{package}.{base.__name__}")
    return bool(bases & _BASES)


def check_function(path: Any, where: str, way_out: str) -> None:
    """Refuse the import path of a function that stands in a file, unless all it can do is to compute.

    Raises:
        CheckpointError: any other function.
    """
    if not isinstance(path, str) or not _FUNCTIONS.fullmatch(path):
        known_class(path, where, way_out)


def with_known_classes(value: Any, where: str, way_out: str, place: str = "") -> Any:
    """A copy of plain values in which every ``class_path``, at any depth, is the full path of a class that may be used.

    Args:
        value: plain values as YAML or a checkpoint holds them.
        where: the file, for the message.
        way_out: what the user can do to have another class.
        place: where in the file ``value`` stands.

    Raises:
        CheckpointError: something else than a class of a known package, or a spelling that hides one.
    """
    if isinstance(value, (list, tuple)):
        return [with_known_classes(part, where, way_out, _below(place, number)) for number, part in enumerate(value)]
    if isinstance(value, str) and _names_a_function(value):
        # wherever a class takes a function, jsonargparse would import it
        raise CheckpointError(
            f"{where}: {short(_below(place, value), 200)} is an import path. Of functions, a file may name those of"
            f" torch.nn.functional only, because others could run code. {way_out}"
        )
    if not isinstance(value, Mapping):
        return value
    for key in value:
        # jsonargparse takes "a.class_path" for the class_path of a
        if isinstance(key, str) and "." in key and set(key.split(".")) & _SPEC:
            raise CheckpointError(f"{where}: {short(_below(place, key))} is no plain name. {way_out}")
    copied = {}
    for key, part in value.items():
        is_path = key == "class_path"  # looked at below, together with its arguments
        copied[key] = part if is_path else with_known_classes(part, where, way_out, _below(place, key))
    if "class_path" in value:
        kind = _class_of(value, where, way_out, place)
        copied["class_path"] = f"{kind.__module__}.{kind.__qualname__}"
    return copied


def _names_a_function(text: str) -> bool:
    """Whether a text is an import path into a known package, and of nothing that can be harmless."""
    if not _reads_as_known(text) or _FUNCTIONS.fullmatch(text) or _DTYPES.fullmatch(text):
        return False
    return not isinstance(_imported(text), type)


def check_extent(value: Any, most: int = 200_000) -> None:
    """Refuse plain values with very many parts, or parts inside themselves: a short file can say both.

    Raises:
        ValueError: there are more than ``most`` parts.
    """
    waiting, count = [value], 0
    while waiting:
        part = waiting.pop()
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most} values")
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part


def _class_of(spec: Mapping[str, Any], where: str, way_out: str, place: str) -> type:
    """The class of a mapping with ``class_path`` and ``init_args``, after a look at both."""
    path = spec["class_path"]
    title = f"{where}: {place or 'class_path'}"
    if isinstance(path, str) and path.isidentifier():
        path = next((f"{module}.{path}" for module in _SHORT if _is_in(module, path)), path)
    kind = known_class(path, title, way_out)
    for arguments in ("init_args", "dict_kwargs"):
        options = spec.get(arguments) or {}
        if not isinstance(options, Mapping) or not all(isinstance(k, str) and k.isidentifier() for k in options):
            raise CheckpointError(f"{title}: {arguments} are no options by name. {way_out}")
        check_functions(kind, options, title, way_out)
    if not set(spec) <= _SPEC:
        raise CheckpointError(f"{title} has more than a class_path and its init_args. {way_out}")
    return kind


def _is_in(module: str, name: str) -> bool:
    """Whether a module of a known package has a class of this name."""
    return isinstance(_imported(under_imported_name(f"{module}.{name}")), type)


def _below(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def check_functions(kind: type, options: Mapping[str, Any], where: str, way_out: str) -> None:
    """Look at the arguments of a class that are import paths of functions.

    A class names such arguments in ``import_fields``, each with a test whether a value of it is an import path.

    Raises:
        CheckpointError: a function that could do anything.
    """
    fields: Mapping[str, Callable[[Any], bool]] = getattr(kind, "import_fields", {})
    for name, is_path in fields.items():
        if name in options and is_path(options[name]):
            check_function(options[name], f"{where}: {name}", way_out)


@contextmanager
def only_known_imports(also: Iterable[str] = ()) -> Iterator[None]:
    """Let jsonargparse import nothing but from the known packages.

    `with_known_classes` sees every class in a file. jsonargparse imports more: wherever a class takes a function, any
    text in its place is an import path. Only jsonargparse knows which places these are.

    Args:
        also: further packages or paths, which the user has named in this call.
    """
    from jsonargparse import _common, set_parsing_settings

    settings = _common.parsing_settings
    before = dict(settings)
    set_parsing_settings(import_path_denylist=["*", *_CALLING_PATHS], import_path_allowlist=[*PACKAGES, *also])
    try:
        yield
    finally:
        settings.update(before)


def short(text: object, length: int = 300) -> str:
    """A text from a file, which may be of any length and hold anything, for a message of one line."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= length else f"{line[:length]}…"
