"""What a `TaskModule` remembers of its arguments: plain values that rebuild it from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.errors import ConfigError
from lightning_peft.lightning_packages import PACKAGES
from lightning_peft.task.kinds import Task
from lightning_peft.task.optimization import check_warmup
from lightning_peft.untrusted import without_code

if TYPE_CHECKING:
    import lightning.pytorch as L


def unstorable(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that are objects; none under LightningCLI, which stores their configuration instead."""
    if _given_by_cli(package_of_cli()):
        return []
    return [k for k, v in arguments.items() if not is_plain(v)]


def package_of_cli() -> Any:
    """The package whose LightningCLI is building a module at this moment; the first one if none is."""
    return next((package for package in PACKAGES if _given_by_cli(package)), PACKAGES[0])


def _given_by_cli(package: Any) -> Any:
    """The configuration from which a package's LightningCLI builds a module, while it does."""
    return package.core.mixins.hparams_mixin._given_hyperparameters.get()


def tidy(module: L.LightningModule, model: Any, model_kwargs: Mapping[str, Any] | None) -> None:
    """Make the stored arguments valid everywhere: absolute paths, plain options, no objects."""
    stored = module.hparams
    for name in [k for k, v in stored.items() if not is_plain(v)]:  # objects among a subclass's own arguments
        del stored[name]
    stored.setdefault("model", None)
    if isinstance(model, str) and "://" not in model and os.path.exists(os.path.expanduser(model)):
        stored["model"] = str(Path(model).expanduser().absolute())
    stored["model_kwargs"] = plain_options(model_kwargs or {})


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a checkpoint; code from a hub is allowed by the caller, never by a file.

    >>> import torch
    >>> plain_options({"dtype": torch.bfloat16, "trust_remote_code": True})
    {'dtype': 'bfloat16'}
    """
    out = {}
    for name, value in options.items():
        value = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        value = value.to_dict() if hasattr(value, "to_dict") else value  # a quantisation config
        if is_plain(value):
            out[name] = value
    return without_code(out)


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold a value and be loaded with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return all(isinstance(k, (str, int)) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def check(task: Task, names: Sequence[str] | None, arguments: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` for arguments of a `TaskModule` that are wrong or exclude each other."""
    a = arguments
    check_warmup(a["warmup"])
    if a["lr"] is not None and not 0 < a["lr"] < float("inf"):
        raise ConfigError(f"lr={a['lr']}: give a learning rate above 0, for example 2e-4.")
    if not 0 <= a["weight_decay"] < float("inf"):
        raise ConfigError(f"weight_decay={a['weight_decay']}: give at least 0.")
    for option, allowed in (("base_mode", ("train", "eval")), ("lr_interval", ("epoch", "step"))):
        if a[option] not in allowed:
            raise ConfigError(f"{option}={a[option]!r}: choose {' or '.join(map(repr, allowed))}.")
    if a["gradient_checkpointing"] and a["base_mode"] == "eval":
        raise ConfigError(
            "gradient_checkpointing needs base_mode='train': transformers recomputes in train mode only. To train"
            " without dropout in the base, set its dropout to 0 in model_kwargs."
        )
    if a["optimizer"] is not None and (a["lr"] is not None or a["weight_decay"]):
        raise ConfigError("lr and weight_decay belong to the default optimizer; set them in `optimizer` instead.")
    if a["lr_scheduler"] is not None and a["warmup"] is not None:
        raise ConfigError("warmup belongs to the default schedule; give it or `lr_scheduler`, not both.")
    if a["lr_scheduler"] is None and a["lr_interval"] != "epoch":
        raise ConfigError("lr_interval belongs to `lr_scheduler`; the default schedule counts steps.")
    if a["loss"] is not None and task.target != "custom":
        raise ConfigError(f"loss is for task='custom'; {task.name} has its own.")
    if task.target == "number" and names and len(names) != 1:
        raise ConfigError(f"regression predicts one number; {len(names)} labels do not fit.")


def numbered(names: Sequence[Any] | None, count: int | None) -> list[str] | None:
    """Names of the labels, numbered where they have none.

    >>> numbered(None, 2)
    ['LABEL_0', 'LABEL_1']
    """
    if names is None:
        return None if count is None else [f"LABEL_{i}" for i in range(count)]
    names = [str(n) for n in names]
    if count is not None and count != len(names):
        raise ConfigError(f"num_labels={count}, but label_names holds {len(names)}: {', '.join(names)}. Give one.")
    if len(set(names)) != len(names) or not names:
        raise ConfigError(f"label_names={names!r}: there must be some, each once.")
    return names
