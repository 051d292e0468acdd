"""``lightning-peft inspect``: method, targets, counts, base, versions and tensors of a saved adapter."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import Parser
from lightning_peft.cli.peek import Peek, Stored, peek
from lightning_peft.errors import CheckpointError, printable
from lightning_peft.paths import locate, size
from lightning_peft.saving.section import Section
from lightning_peft.untrusted import short

_LABEL = 10
#: letters of one text that are shown
_LONGEST = 4000
#: fields told elsewhere, or without meaning once it is trained
_ELSEWHERE = ("target_modules", "modules_to_save")
_QUIET_PEFT = {
    *("target_modules", "modules_to_save", "peft_type", "base_model_name_or_path", "task_type", "auto_mapping"),
    *("inference_mode", "megatron_core", "qalora_group_size", "init_lora_weights"),
}


def main(words: Sequence[str]) -> None:
    """Print what the file says of itself; nothing in it is run, and no tensor is read."""
    parser = Parser("inspect", "Say what a checkpoint, an adapter file or an adapter folder holds.")
    parser.add_argument("CKPT", help=".ckpt, adapter.safetensors, or a folder with an adapter (of peft's, too)")
    path = locate(parser.parse_args(words).CKPT)
    found = peek(path)
    try:
        rows = _peft_rows(found) if found.section is None else _rows(found, Section.parse(found.section, str(path)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its section is damaged ({type(error).__name__}: {short(error)}).") from None
    print(f"{printable(str(path))}{_size_of(path)}")
    for label, texts in rows:
        _print(label, texts)


def _rows(found: Peek, section: Section) -> list[tuple[str, list[str]]]:
    """Label and lines."""
    base, trainable, targets = section.base, set(section.trainable), section.targets
    rows: list[tuple[str, list[str]]] = []
    for method in section.methods:
        rows.append(("method", [method.type, _fields(method.config, _ELSEWHERE)]))
    rows.append(("targets", [f"{len(targets)} modules", *_folded(targets)] if targets else ["none"]))
    if section.modules_to_save:
        new = set(section.new_modules)
        rows.append(("in full", [n + (" (new)" if n in new else "") for n in section.modules_to_save]))
    count = sum(t.numel for n, t in found.tensors.items() if n in trainable)
    rows.append(("trained", [f"{count:,} parameters beside a base of {base.parameters:,}"]))
    source = f"from {base.source}" if base.source else "source unknown"
    rows.append(("base", [f"{base.class_name}, {base.dtype}", source, f"fingerprint {base.values}"]))
    versions = [f"lightning_peft {section.library_version}", f"format {section.format_version}"]
    versions += [f"{name} {version}" for name, version in section.versions.items()]
    versions += [f"lightning {found.facts['lightning']}"] if "lightning" in found.facts else []
    rows.append(("versions", [", ".join(versions)]))
    if "global_step" in found.facts:
        resume = "can be resumed" if found.facts["optimizer"] else "weights only"
        rows.append(("run", [f"step {found.facts['global_step']:,}, epoch {found.facts.get('epoch')}; {resume}"]))
    rows.append(_tensors(found.tensors, section.network))
    return rows


def _peft_rows(found: Peek) -> list[tuple[str, list[str]]]:
    config = found.facts["peft"]
    kept = {k: v for k, v in config.items() if v not in (None, False, "", "none") and v not in ([], {})}
    targets = config.get("target_modules") or []
    rows = [("method", [f"{config.get('peft_type')} of peft (import_peft reads it)", _fields(kept, _QUIET_PEFT)])]
    rows.append(("targets", [targets] if isinstance(targets, str) else sorted(targets) or ["none"]))
    if config.get("modules_to_save"):
        rows.append(("in full", sorted(set(config["modules_to_save"]))))
    rows.append(("base", [str(config.get("base_model_name_or_path") or "unknown"), f"task {config.get('task_type')}"]))
    return [*rows, _tensors(found.tensors, "base_model.model.")]


def _tensors(tensors: dict[str, Stored], network: str = "") -> tuple[str, list[str]]:
    """A line for each kind of tensor, layer numbers folded."""
    kinds = Counter((_star(n.removeprefix(network)), t.shape, t.dtype) for n, t in tensors.items())
    total, dtypes = sum(t.bytes for t in tensors.values()), sorted({t.dtype for t in tensors.values()})
    lines = [
        f"{len(tensors)} of {' and '.join(dtypes)}, {sum(t.numel for t in tensors.values()):,} numbers, {size(total)}"
    ]
    for (name, shape, dtype), n in kinds.items():
        what = _shape(shape) + (f" {dtype}" if len(dtypes) > 1 else "")
        lines.append(_fitting(f"{n:>4} × {what:<10} ", name))
    return "tensors", lines


def _fields(config: dict[str, Any], without: Iterable[str]) -> str:
    given = {k: v for k, v in config.items() if k not in without and v is not None and v != {}}
    return ", ".join(f"{k}={v!r}" for k, v in given.items())


def _folded(names: Iterable[str]) -> list[str]:
    return [_fitting(f"{count:>4} × ", name) for name, count in Counter(_star(n) for n in names).items()]


def _fitting(start: str, name: str) -> str:
    """A line with the end of the name, which says more than its beginning, where there is no room for all of it."""
    room = _width() - _LABEL - len(start)
    return start + (name if len(name) <= room else "…" + name[1 - room :])


def _width() -> int:
    return max(60, shutil.get_terminal_size().columns - 1)


def _star(name: str) -> str:
    return ".".join("*" if i and part.isdigit() else part for i, part in enumerate(name.split(".")))


def _shape(shape: tuple[int, ...]) -> str:
    return f"({'×'.join(map(str, shape))})"


def _size_of(path: Path) -> str:
    return f" ({size(path.stat().st_size)})" if path.is_file() else ""


def _print(label: str, texts: Sequence[str]) -> None:
    """A label and its lines; what a file says may hold anything, in any length."""
    width = _width()
    for i, text in enumerate(printable(str(t)[:_LONGEST]) for t in texts if t):
        first = f"{label if i == 0 else '':<{_LABEL}}"
        options: dict[str, Any] = {"initial_indent": first, "subsequent_indent": " " * (_LABEL + 2)}
        print(textwrap.fill(text, width, drop_whitespace=True, break_on_hyphens=False, **options))
