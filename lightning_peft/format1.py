"""Files of format 1, in which a wrapper stood around each adapted module and showed in names: ``fc.base.bias``.

Since format 2 a layer is adapted in place, and its tensors keep their names: ``fc.bias``. Files are brought to these
names as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # sections are read without torch

FORMAT_VERSION = 2


def upgraded(state: Mapping[str, Tensor], info: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the section of a file under the names of format 2; those of other formats as they are."""
    if not _is_format1(info):
        return dict(state), dict(info)
    return {name_in_format2(name, info): tensor for name, tensor in state.items()}, upgraded_section(info)


def upgraded_section(info: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a file with the names of format 2."""
    if not _is_format1(info):
        return dict(info)
    new = {**info, "format_version": FORMAT_VERSION}
    for key in ("keys", "trainable"):
        if isinstance(info.get(key), list):
            new[key] = [name_in_format2(name, info) for name in info[key]]
    resume = info.get("resume")
    if isinstance(resume, dict):
        new["resume"] = {**resume, **_upgraded_resume(resume, info)}
    return new


def name_in_format2(name: Any, info: Mapping[str, Any]) -> Any:
    """A name without the wrappers' own part ``base``, which stands once behind each module the file lists as a target.

    Any other ``base`` is a part of the model.

    >>> info = {"format_version": 1, "network": "net.", "methods": [{"targets": ["base.fc"]}]}
    >>> name_in_format2("net.base.fc.base.bias", info)
    'net.base.fc.bias'
    """
    if not _is_format1(info) or not isinstance(name, str):
        return name
    prefix = info["network"] if name.startswith(info["network"]) else ""
    targets = {target for method in info["methods"] for target in method["targets"]}
    kept: list[str] = []
    for part in name.removeprefix(prefix).split("."):
        module = ".".join(kept)
        if part == "base" and module in targets:
            targets.remove(module)
        else:
            kept.append(part)
    return prefix + ".".join(kept)


def _upgraded_resume(resume: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The names of the optimizers' tensors, and those by which methods keep what only a resume needs."""
    new: dict[str, Any] = {}
    if isinstance(resume.get("optimizers"), list):
        new["optimizers"] = _renamed(resume["optimizers"], info)
    if isinstance(resume.get("methods"), list):
        new["methods"] = []
        for state in resume["methods"]:
            if isinstance(state, dict):
                state = {name_in_format2(name, info): value for name, value in state.items()}
            new["methods"].append(state)
    return new


def _renamed(names: Any, info: Mapping[str, Any]) -> Any:
    """Names in lists of lists."""
    if isinstance(names, list):
        return [_renamed(each, info) for each in names]
    return name_in_format2(names, info)


def _is_format1(info: Mapping[str, Any]) -> bool:
    """Whether this is a section of format 1 that has what renaming needs; a damaged one is refused elsewhere."""
    if info.get("format_version") != 1 or not isinstance(info.get("network"), str):
        return False
    methods = info.get("methods")
    if not isinstance(methods, list):
        return False
    for method in methods:
        targets = method.get("targets") if isinstance(method, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            return False
    return True
