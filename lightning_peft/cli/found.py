"""The config that fit saved beside a checkpoint, for commands that are given the checkpoint alone.

Nobody has asked for this file by name, and it may have come with the checkpoint from anywhere. So it describes a model,
data and a Trainer, chooses no code, and has nothing written outside the folder it lies in. A config that the user gives
with ``--config`` is not looked at in this way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from lightning_peft.cli.configs import check_config
from lightning_peft.errors import CheckpointError
from lightning_peft.untrusted import (
    PLACES,
    check_extent,
    check_loading,
    option_name,
    short,
    with_known_classes,
    without_code,
    without_places,
)

#: the parts that are taken; others, as ``weights_only``, belong to the call
_PARTS = ("seed_everything", "peft", "model", "data", "trainer", "test_after_fit")


def read_found(file: Path, *, loggers: bool) -> str:
    """The config as text in YAML, with what it may say.

    Args:
        file: the config.
        loggers: whether its loggers are used. A measurement of a finished run is no further run to be tracked.

    Raises:
        CheckpointError: it names code, or a place outside its folder.
    """
    check_config(str(file))
    try:
        found = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except Exception as error:  # YAML of any content
        raise CheckpointError(f"{file} cannot be read: {short(error)}") from None
    try:
        check_extent(found)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}. {_way_out(file)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is no config: it should be a mapping of options. {_way_out(file)}")
    config = {part: found[part] for part in _PARTS if found.get(part) is not None}
    for part in ("model", "data", "trainer"):
        if not isinstance(config.setdefault(part, {}), Mapping):
            raise CheckpointError(f"{file}: {part} should be a mapping of options. {_way_out(file)}")
    config = with_known_classes(without_code(config), str(file), _way_out(file))
    config["model"] = without_places(config["model"])
    config["data"] = without_places(config["data"])
    check_loading(config["data"], f"{file}: data", _way_out(file))
    _refuse_further_files(config, file)
    folder = file.parent.absolute()
    root = config["trainer"].get("default_root_dir") or "."
    if found.get("output_dir") is not None:
        root = None  # the config's places stand below the run's folder
    config["trainer"] = _placed(config["trainer"], "trainer", root, folder, file)
    config["trainer"]["default_root_dir"] = str(folder)  # where fit wrote this file
    if not loggers:
        config["trainer"]["logger"] = False
    config = {part: value for part, value in config.items() if value != {}}
    # every text is quoted, so that it is read back as what it is
    return yaml.safe_dump(config, default_style='"', allow_unicode=True)


def _way_out(file: Path) -> str:
    return f"The file was found beside the checkpoint. If you trust it, give it yourself: --config {file}"


def _refuse_further_files(config: Mapping[str, Any], file: Path) -> None:
    """Where a class is expected, jsonargparse reads a text that names a file as a further config."""
    waiting = [("peft", config.get("peft")), *config.get("trainer", {}).items()]
    for part in ("model", "data"):
        arguments = config.get(part, {}).get("init_args") or {}
        waiting += [(name, value) for name, value in arguments.items() if not _is_source(name, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]
        elif isinstance(value, str) and option_name(key) not in PLACES and os.path.isfile(value):
            raise CheckpointError(f"{file}: {key}={short(repr(value), 120)} names a further file. {_way_out(file)}")


def _is_source(name: str, value: Any) -> bool:
    """Whether an argument of a model or of data is a file by its nature, or what is in such a file."""
    if name == "model":
        return not isinstance(value, str) or value.endswith(".gguf")
    return name in ("data", "predict_data", "tokenizer", "label_names") or name.endswith("_column")


def _placed(value: Any, key: str, root: Any, folder: Path, file: Path) -> Any:
    """A part of the Trainer's options, in which every place to write to lies in the run's folder."""
    if isinstance(value, Mapping):
        return {k: _placed(part, k, root, folder, file) for k, part in value.items()}
    if isinstance(value, list):
        return [_placed(part, key, root, folder, file) for part in value]
    if not isinstance(value, str):
        return value
    name = option_name(key)
    if name == "filename" and (os.path.isabs(value) or ".." in Path(value).parts):
        place = None
    elif name in PLACES:
        place = _place(value, root if root is None or isinstance(root, str) else ".", folder)
    else:
        return value
    if place is None:
        raise CheckpointError(
            f"{file}: {key}={short(repr(value), 120)} lies outside the run's folder {folder}. {_way_out(file)}"
        )
    return place if name != "filename" else value


def _place(value: str, root: str | None, folder: Path) -> str | None:
    """Where a path of the config lies in the run's folder, also if that was moved since; None if it lies elsewhere.

    Args:
        value: the path.
        root: what the config calls the run's folder; None if relative paths stand below that folder.
        folder: the run's folder.
    """
    if "://" in value or "::" in value or "\0" in value:
        return None
    old, path = os.path.abspath(root or "."), os.path.abspath(value)
    if os.path.normpath(value) == ".":  # the default of loggers
        place = folder
    elif root is None:
        place = folder / value
    elif path == old or path.startswith(old.rstrip(os.sep) + os.sep):
        place = folder / os.path.relpath(path, old)
    else:
        place = Path(path)
    return str(place) if place.resolve().is_relative_to(folder.resolve()) else None
