"""What a file may choose: values, and classes of a few known packages. It never chooses code.

Checkpoints, adapter folders and the configs found beside them come from anywhere. These rules hold for what they say:

* Options that let a library run foreign code are left out, at any depth (`without_code`).
* An import path must name a class that one of the known packages defines (`known_class`). The text is looked at first,
  so that nothing is imported to find out.
* A text is a text: where jsonargparse would read it as YAML, it may not hold an option of the kinds above, because
  these would be obeyed (`with_known_classes`).
* Of the options for reading data, those are taken that say how a table is written (`check_loading`).
* Values are of a size and depth that a person could have written (`check_extent`).
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

#: Options that let transformers run code from a folder or from the hub, let torch unpickle anything, or let peft import
#: the modules that an adapter's configuration names.
CODE_OPTIONS = frozenset(
    {
        *("trust_remote_code", "code_revision", "auto_map", "custom_generate", "custom_pipelines"),
        *("use_kernels", "allow_all_kernels", "kernel_config"),
        *("adapter_kwargs", "_adapter_model_path"),
        "weights_only",
    }
)
#: those of them that mean nothing else anywhere
_REMOTE_CODE = frozenset({"trust_remote_code", "code_revision", "auto_map"})
#: options that name an implementation; one with a slash in its name is compiled code from the hub
_IMPLEMENTATIONS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
#: options of ``from_pretrained`` that name a folder to write to, or a machine that all traffic goes through
PLACE_OPTIONS = frozenset({"cache_dir", "offload_folder", "proxies"})
#: options of the Trainer and its callbacks, loggers and profilers that name a file or folder to write to
PLACES = ("default_root_dir", "dirpath", "save_dir", "root_dir", "log_dir", "output_dir", "path", "dir")
#: Options of `datasets.load_dataset` that a file may give: which part of a data set, and how a table is written. Others
#: name further files, addresses and folders.
LOAD_OPTIONS = frozenset(
    {
        *("name", "revision", "split", "columns", "column_names", "field", "encoding", "encoding_errors"),
        *("sep", "delimiter", "quotechar", "quoting", "doublequote", "escapechar", "comment", "lineterminator"),
        *("header", "names", "index_col", "usecols", "skiprows", "skipinitialspace", "skip_blank_lines", "nrows"),
        *("decimal", "thousands", "na_values", "keep_default_na", "true_values", "false_values", "on_bad_lines"),
        *("keep_linebreaks", "sample_by"),
    }
)

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
    # made for trying things out; they download, write where they are told, and start commands
    *("lightning.pytorch.demos", "pytorch_lightning.demos", "torch.testing", "transformers.testing_utils"),
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
            dropped = _chooses_code(key, part) if options is None else option_name(key) in options
            if not dropped:
                kept[key] = without_code(part, options)
        return kept
    if type(value) in (list, tuple):  # and no named tuple, as torch.Size is one
        return type(value)([without_code(part, options) for part in value])
    return value


def without_places(value: Any) -> Any:
    """A copy of plain values without the options that name a folder to write to, or a machine to go through.

    >>> without_places({"dtype": "float16", "cache_dir": "/home/me"})
    {'dtype': 'float16'}
    """
    if isinstance(value, Mapping):
        return {key: without_places(part) for key, part in value.items() if option_name(key) not in PLACE_OPTIONS}
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


def option_name(key: Any) -> str:
    """The option that a key means: jsonargparse takes ``a.b`` for the option b of a, and ``b+`` for further values.

    >>> option_name("logger.save_dir"), option_name("callbacks+")
    ('save_dir', 'callbacks')
    """
    return str(key).rpartition(".")[2].removesuffix("+")


def _chooses_code(key: Any, value: Any) -> bool:
    if option_name(key) in _IMPLEMENTATIONS:
        return not isinstance(value, str) or "/" in value
    return option_name(key) in CODE_OPTIONS


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


def _is_path_into_known(path: Any) -> bool:
    """Whether a text has the form of an import path into a known package."""
    parts = path.split(".") if isinstance(path, str) else []
    return len(parts) > 1 and parts[0] in PACKAGES and all(part.isidentifier() for part in parts)


def _reads_as_known(path: Any) -> bool:
    """Whether the text of a path leads to a public place in a known package, and to none of those that call."""
    if not _is_path_into_known(path) or any(part.startswith("_") for part in path.split(".")):
        return False
    if any(f"{path}.".startswith(f"{calling}.") for calling in _CALLING_PATHS):
        return False
    root = under_imported_name(path).split(".")[0]
    return root in sys.modules or _is_installed(root)  # else it could be a folder in the working directory


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
        CheckpointError: something else than a class of a known package, or a spelling that hides one or an option.
    """
    if isinstance(value, (list, tuple)):
        return [with_known_classes(part, where, way_out, _below(place, number)) for number, part in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, where, way_out, place)
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


def _check_text(text: str, where: str, way_out: str, place: str) -> None:
    """Refuse a text that jsonargparse would take for more than a text.

    Wherever a class takes a function, it imports what the text names. Wherever anything else than a text is expected,
    it reads the text as YAML: ``'{"trust_remote_code": true}'`` gives that permission.
    """
    if _names_a_function(text):
        raise CheckpointError(
            f"{where}: {short(_below(place, text), 200)} is an import path. Of functions, a file may name those of"
            f" torch.nn.functional only, because others could run code. {way_out}"
        )
    try:
        reading = _reading(text)
        option = _hidden_option(reading)
    except (ValueError, RecursionError):  # too many values, or too deep
        option = "too many values"
    if option is not None:
        raise CheckpointError(
            f"{where}: {short(_below(place, text), 200)} is a text with {short(option, 60)} in it, which would be read"
            f" as an option. {way_out}"
        )
    if reading != text:
        with_known_classes(reading, where, way_out, place)


def _names_a_function(text: str) -> bool:
    """Whether a text is an import path into a known package, and of nothing that can be harmless."""
    if not _is_path_into_known(text) or _FUNCTIONS.fullmatch(text) or _DTYPES.fullmatch(text):
        return False
    return not _reads_as_known(text) or not isinstance(_imported(under_imported_name(text)), type)


def _reading(text: str) -> Any:
    """What jsonargparse reads in a text where something else than a text is expected."""
    from jsonargparse import get_loader
    from yaml import YAMLError

    try:
        return get_loader("yaml")(text)
    except YAMLError:
        return text


def _hidden_option(reading: Any) -> str | None:
    """The first option in the reading of a text that a file may not give, or not in this form; None without one.

    Raises:
        ValueError: the reading is larger than anything that a person writes.
    """
    check_extent(reading)
    obeyed = {*CODE_OPTIONS, *_IMPLEMENTATIONS, *PLACE_OPTIONS, *PLACES, *_SPEC, "load_kwargs"}
    waiting = [reading]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            for key, value in part.items():
                # the template "{path}" reads as a mapping too, with a key and nothing behind it
                if value is not None and option_name(key) in obeyed:
                    return str(key)
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return None


def check_loading(arguments: Any, where: str, way_out: str) -> None:
    """Refuse options for reading data that name further files, addresses or folders, at any depth.

    Args:
        arguments: the arguments of a data module, or what holds them.
        where: the file, for the message.
        way_out: what the user can do to have them.

    Raises:
        CheckpointError: ``load_kwargs`` with any other option than those in `LOAD_OPTIONS`.
    """
    if isinstance(arguments, (list, tuple)):
        for part in arguments:
            check_loading(part, where, way_out)
    if not isinstance(arguments, Mapping):
        return
    for key, value in arguments.items():
        if key != "load_kwargs":
            check_loading(value, where, way_out)
        elif value is not None and not (isinstance(value, Mapping) and LOAD_OPTIONS.issuperset(value)):
            raise CheckpointError(
                f"{where}: load_kwargs={short(repr(value), 120)} has other options than those that say how a table is"
                f" written ({', '.join(sorted(LOAD_OPTIONS)[:6])}, …). {way_out}"
            )


def check_extent(value: Any, most: int = 200_000, deepest: int = 200) -> None:
    """Refuse plain values with very many parts, or parts inside themselves: a short file can say both.

    Whoever copies such values, or prints them in a message, would take all time and memory.

    Raises:
        ValueError: there are more than ``most`` parts, or more than ``deepest`` inside each other.
    """
    waiting, count = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, Mapping):
            parts: Iterable[Any] = part.values()
            count += len(part)
        elif isinstance(part, (list, tuple, set, frozenset)):
            parts = part
            count += len(part)
        else:
            continue
        if count > most:
            raise ValueError(f"it has more than {most} values")
        if depth > deepest:
            raise ValueError(f"it has values more than {deepest} deep inside each other")
        waiting += [(inner, depth + 1) for inner in parts]


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
