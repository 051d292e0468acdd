"""The section ``lightning_peft`` in a file of ours: what it says of itself, checked and with typed fields.

`Section.parse` is the only place that reads the keys of a section. It needs no torch, so that ``lightning-peft
inspect`` starts fast.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.errors import CheckpointError
from lightning_peft.format1 import FORMAT_VERSION
from lightning_peft.paths import SECTION
from lightning_peft.untrusted import short

#: parts of a section that must be there, and their types
_SHAPE = {
    "network": str,
    "methods": list,
    "modules_to_save": list,
    "new_modules": list,
    "keys": list,
    "trainable": list,
    "base": dict,
}
_NAME_LISTS = ("modules_to_save", "new_modules", "keys", "trainable")
_BASE = {"structure": str, "values": str, "sketch": str, "class": str, "dtype": str, "parameters": int}


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a base model; see `lightning_peft.fingerprint.fingerprint`.

    Attributes:
        structure: a hash of the names and shapes of its parameters.
        values: a short hash of the sketch; empty where no value could be read.
        sketch: four bfloat16 values of each frozen parameter, in hex.
        class_name, source, dtype, parameters: for people: its class, where it came from, its precision, its size.
    """

    structure: str
    values: str
    sketch: str
    class_name: str
    source: str
    dtype: str
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        parts = dataclasses.asdict(self)
        parts["class"] = parts.pop("class_name")
        return parts

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> Fingerprint:
        """From what `as_dict` gave, after it was checked."""
        source = str(parts.get("source") or "")
        return cls(source=source, class_name=parts["class"], **{key: parts[key] for key in _BASE if key != "class"})


@dataclass(frozen=True)
class SavedMethod:
    """One method in a file: the name of its class, its fields, and the modules it adapts."""

    type: str
    config: dict[str, Any]
    targets: list[str]


@dataclass(frozen=True)
class Section:
    """What a file says of the adapter in it.

    Attributes:
        where: the file, for messages.
        network: path of the network in the module that was saved, with a dot at its end; empty if they are the same.
        methods: in order.
        modules_to_save, new_modules: trained in full; those of them that were new, by names in the network.
        keys, trainable: names of the adapter's tensors, and of those that train.
        base: what the adapter was trained beside.
        labels: names of the classes, where the model has names for them.
        full: whether the file holds the base as well.
        library_version, versions, format_version: what wrote it.
        resume: what only a resume needs; checked where it is used.
    """

    where: str
    network: str
    methods: list[SavedMethod]
    modules_to_save: list[str]
    new_modules: list[str]
    keys: list[str]
    trainable: list[str]
    base: Fingerprint
    labels: list[str] | None = None
    full: bool = False
    library_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    resume: Any = None

    @classmethod
    def parse(cls, info: Any, where: str) -> Section:
        """The section of a file.

        Raises:
            CheckpointError: it is of a newer format, or a part of it is missing or of another type.
        """
        broken = _broken_parts(info, where)
        if broken:
            raise CheckpointError(f"{where}: its {SECTION!r} section is damaged ({short(', '.join(broken))}).")
        return cls(
            where=where,
            network=info["network"],
            methods=[SavedMethod(m["type"], m["config"], m["targets"]) for m in info["methods"]],
            modules_to_save=info["modules_to_save"],
            new_modules=info["new_modules"],
            keys=info["keys"],
            trainable=info["trainable"],
            base=Fingerprint.from_dict(info["base"]),
            labels=info.get("labels"),
            full=info.get("save") == "full",
            library_version=str(info.get("library_version")),
            versions=info.get("versions") or {},
            format_version=info["format_version"],
            resume=info.get("resume"),
        )

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a file: primitives only."""
        info = {
            "format_version": self.format_version,
            "library_version": self.library_version,
            "versions": self.versions,
            "network": self.network,
            "methods": [dataclasses.asdict(method) for method in self.methods],
            "modules_to_save": self.modules_to_save,
            "new_modules": self.new_modules,
            "keys": self.keys,
            "trainable": self.trainable,
            "base": self.base.as_dict(),
            "labels": self.labels,
            "save": "full" if self.full else "trainable",
        }
        if self.resume is not None:
            info["resume"] = self.resume
        return info

    @property
    def targets(self) -> list[str]:
        """The modules that any of the methods adapts."""
        return [name for method in self.methods for name in method.targets]

    @property
    def optimizer_names(self) -> list[Any] | None:
        """For each optimizer and each of its groups the names of its tensors; None in a file without them."""
        return self.resume.get("optimizers") if isinstance(self.resume, Mapping) else None

    def name_under(self, path: str, name: str) -> str:
        """The name of a tensor when the network is at another path.

        Tensors that a LightningModule kept beside its network keep their names.
        """
        return path + name[len(self.network) :] if name.startswith(self.network) else name

    def under(self, path: str) -> Section:
        """The same with the network at another path."""
        keys = [self.name_under(path, name) for name in self.keys]
        trainable = [self.name_under(path, name) for name in self.trainable]
        return dataclasses.replace(self, network=path, keys=keys, trainable=trainable)

    def without_base(self) -> Section:
        """Of the adapter alone: neither the base's own weights nor what a resume needs."""
        return dataclasses.replace(self, full=False, resume=None)


def some(names: Collection[str], count: int = 4) -> str:
    """The first few names."""
    shown = sorted(short(name, 120) for name in names)
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")


def _broken_parts(info: Any, where: str) -> list[str]:
    """Names of the parts that are missing or not of the type they should be.

    Raises:
        CheckpointError: the section is of a newer format.
    """
    if not isinstance(info, Mapping):
        return [f"a {type(info).__name__}, no mapping"]
    version = info.get("format_version")
    if not isinstance(version, int) or version < 1:
        return [f"format_version={short(repr(version))}"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format {version}, written by lightning_peft {short(info.get('library_version'))}; this one"
            f" reads up to format {FORMAT_VERSION}. Upgrade: pip install -U lightning-peft."
        )
    broken = [key for key, kind in _SHAPE.items() if not isinstance(info.get(key), kind)]
    broken += [key for key in _NAME_LISTS if key not in broken and not _are_names(info[key])]
    if "base" not in broken:
        broken += [f"base.{key}" for key, kind in _BASE.items() if not isinstance(info["base"].get(key), kind)]
        if not re.fullmatch(r"(?:[0-9a-f]{4})*", str(info["base"].get("sketch"))):
            broken.append("base.sketch")
    if "methods" not in broken:
        broken += [f"methods[{i}]" for i, method in enumerate(info["methods"]) if not _is_method(method)]
    if info.get("save", "trainable") not in ("trainable", "full"):
        broken.append("save")
    if info.get("labels") is not None and not _are_names(info["labels"]):
        broken.append("labels")
    if not isinstance(info.get("versions") or {}, Mapping):
        broken.append("versions")
    return broken


def _is_method(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not _are_names(entry.get("targets")):
        return False
    return isinstance(entry.get("type"), str) and isinstance(entry.get("config"), dict)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
