"""The task that all methods share: data read once, one base for all, a Trainer and loggers for each run."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft import __version__
from lightning_peft.compare.results import digest
from lightning_peft.data.base import SplitDataModule
from lightning_peft.errors import ConfigError
from lightning_peft.fingerprint import fingerprint
from lightning_peft.heads import new_modules
from lightning_peft.lightning_packages import L
from lightning_peft.method import Method
from lightning_peft.task.kinds import find_task

#: what a Trainer is told in every run, whatever the config says
QUIET: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
#: settings of the Trainer that change no result
_FREE = {*QUIET, "max_steps", "val_check_interval", "logger", "callbacks", "default_root_dir", "log_every_n_steps"}
_METRIC = {"class": "accuracy", "token": "accuracy", "number": "mae", "text": "loss", "custom": "loss"}


class ComparedTask:
    """Builds what a run needs from a parsed config of ``lightning-peft fit``.

    Args:
        parser: of LightningCLI: it builds model, data and Trainer options from a config.
        config: parsed; its callbacks, checkpoints and learning rate are left aside.
        out: folder for what the loggers write.
        group: name that the runs share in W&B.

    Raises:
        ConfigError: a model whose rate cannot be set, or several devices.
    """

    def __init__(self, parser: Any, config: Any, out: Path, group: str) -> None:
        self.parser, self.config, self.out, self.group = parser, config.clone(), out, group
        self.model_options = _options(self.config.model)
        self._check()
        self._loggers = _as_list(self.config.trainer.get("logger"))
        self.config.trainer.logger, self.config.trainer.callbacks = False, None
        self._base: nn.Module | None = None
        self.kind = find_task(self.model_options["task"])
        self.metric = _METRIC[self.kind.target]
        self.data = self._read()
        self.metric_names: list[str] = []
        self.base_values = self._look_at_base()

    def _check(self) -> None:
        if not {"lr", "task"} <= set(self.model_options):
            raise ConfigError(f"compare needs a TaskModule as model, not {self.config.model.get('class_path')}.")
        if self.model_options.get("optimizer") is not None:
            raise ConfigError("compare sets each method's learning rate: leave model.optimizer out of the config.")
        devices = self.config.trainer.get("devices", "auto")
        if devices not in ("auto", 1, "1", [0], "0") or self.config.trainer.get("num_nodes", 1) != 1:
            raise ConfigError(f"trainer.devices={devices!r}: compare runs on one device; leave it out.")

    def check_metric(self, name: str) -> str:
        """The name, if the task has such a metric; a custom loss may log any."""
        if name not in self.metric_names and self.kind.target != "custom":
            raise ConfigError(f"--metric {name}: {self.kind.name} has {', '.join(self.metric_names)}.")
        return name

    # ---- data ------------------------------------------------------------------------------------------------------
    def _read(self) -> L.LightningDataModule:
        """Read, split and encode everything, once for all runs."""
        options = _options(self.config.data)
        source = self.model_options.get("tokenizer") or self.model_options.get("model")
        if "tokenizer" in options and options["tokenizer"] is None and isinstance(source, str):
            self.config.data.init_args.tokenizer = source  # no Trainer is there that could be asked for the model
        data = self.parser.instantiate_classes(self.config).data
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        names = getattr(data, "label_names", None)
        classes = self.kind.target in ("class", "token")
        if classes and names and not (self.model_options.get("label_names") or self.model_options.get("num_labels")):
            self.config.model.init_args.label_names = [str(n) for n in names]
        if not data.val_dataloader():
            raise ConfigError(
                "compare chooses learning rates on validation data, and there are none: set data.val_size."
            )
        return data

    def batches(self) -> int:
        """Training batches in an epoch."""
        count = len(self.data.train_dataloader())
        limit = self.config.trainer.get("limit_train_batches")
        if limit is None:
            return count
        return max(1, min(count, limit) if isinstance(limit, int) else int(count * limit))

    def steps(self, budget: tuple[int, str] | None) -> int:
        """Optimizer steps of a run: the budget, or what the config asks for (3 epochs where it says nothing)."""
        trainer = self.config.trainer
        if budget is None:
            most = trainer.get("max_steps", -1)
            budget = (most, "steps") if most and most > 0 else (trainer.get("max_epochs") or 3, "epochs")
        count, unit = budget
        if count < 1:
            raise ConfigError("The config names no end (max_epochs, max_steps): give --budget.")
        return count if unit == "steps" else count * math.ceil(self.batches() / self._accumulated)

    @property
    def _accumulated(self) -> int:
        return int(self.config.trainer.get("accumulate_grad_batches") or 1)

    # ---- model -----------------------------------------------------------------------------------------------------
    def _look_at_base(self) -> str:
        """A hash of the base's weights; keep the base if no part of it is drawn anew for each seed."""
        module = self._bare(self.config, 0)
        new = new_modules(module.model)
        if not new:
            self._base = module.model
        self.metric_names = ["loss", *(name.removeprefix("val_") for name in module.metrics["val_"])]
        drawn = {id(p) for name in new for p in module.model.get_submodule(name).parameters()}
        found = fingerprint(module.model, drawn)
        return found.structure + found.values

    def _bare(self, config: Any, seed: int, base: nn.Module | None = None) -> Any:
        L.seed_everything(seed, verbose=False)
        module = self.parser.instantiate_classes(config).model
        if module.tokenizer is None:
            module.tokenizer = getattr(self.data, "tokenizer", None)
        if base is not None:
            module.model = copy.deepcopy(base)
            for ours, theirs in zip(module.model.parameters(), base.parameters(), strict=True):
                ours.__dict__.update(theirs.__dict__)  # which weights were loaded: a copy loses that
        module.configure_model()
        return module

    def module(self, method: Method, rate: float | None, seed: int) -> Any:
        """A `TaskModule` with its network, before injection; the batches take the seed's order."""
        config = self.config.clone()
        config.model.init_args.lr = rate
        options = method.load_options()
        if options:  # another base: it is loaded anew
            config.model.init_args.model_kwargs = {**options, **(self.model_options.get("model_kwargs") or {})}
        if isinstance(self.data, SplitDataModule):
            self.data.seed = seed  # the rows are split: from here on it orders batches only
        module = self._bare(config, seed, None if options else self._base)
        module.hparams["lr"] = rate  # LightningCLI hands every module it builds the hyper-parameters it parsed itself
        return module

    def batch(self) -> Any:
        """The first training batch of the first order: with `TextDataModule`, the one with the longest row."""
        if isinstance(self.data, SplitDataModule):
            self.data.seed = 0
        return L.utilities.move_data_to_device(next(iter(self.data.train_dataloader())), self.device)

    # ---- runs ------------------------------------------------------------------------------------------------------
    def trainer(self, steps: int, validations: int, callbacks: list[L.Callback], loggers: list[Any]) -> L.Trainer:
        """A quiet Trainer with the config's own precision, clipping, accumulation and the like."""
        options = dict(vars(self.parser.instantiate_classes(self.config).trainer))
        options |= QUIET | {
            "max_steps": steps,
            "val_check_interval": max(1, math.ceil(steps * self._accumulated / validations)),
            "log_every_n_steps": max(1, steps // 50),
            "callbacks": callbacks,
            "logger": loggers or False,
            "default_root_dir": str(self.out),
        }
        return L.Trainer(**options)

    @property
    def device(self) -> torch.device:
        """Where the runs train."""
        if not hasattr(self, "_device"):
            self._device = self.trainer(1, 1, [], []).strategy.root_device
        return self._device

    @contextmanager
    def loggers(self, name: str, job: str, settings: Mapping[str, Any]):
        """The config's loggers for one run; W&B runs share a group. Closed at the end."""
        made = [self._logger(spec, name, job) for spec in self._loggers]
        try:
            for logger in made:
                logger.log_hyperparams({"compare": dict(settings)})
            yield made
        finally:
            for logger in made:
                logger.finalize("success")
                finish = getattr(logger.experiment, "finish", None)
                if callable(finish):
                    finish()

    def _logger(self, spec: Any, name: str, job: str) -> Any:
        module, _, kind_name = spec["class_path"].rpartition(".")
        kind = getattr(import_module(module), kind_name)
        options = {**_options(spec), **(spec.get("dict_kwargs") or {})}
        ours: dict[str, Any] = {"name": name, "save_dir": str(self.out)}
        if kind_name == "WandbLogger":
            ours |= {"group": options.get("group") or self.group, "job_type": job, "id": None, "version": None}
        known = inspect.signature(kind.__init__).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in known.values())
        return kind(**{**options, **{k: v for k, v in ours.items() if free or k in known}})

    def key(self) -> dict[str, Any]:
        """What every outcome depends on beside method, rate, seed and budget."""
        trainer = {k: v for k, v in self.config.trainer.as_dict().items() if k not in _FREE}
        model = {k: v for k, v in self.config.model.as_dict()["init_args"].items() if k != "lr"}
        parts = {"model": model, "data": self.config.data.as_dict(), "trainer": trainer}
        return {"task": digest(parts), "rows": _rows(self.data), "base": self.base_values, "version": __version__}


def _options(spec: Any) -> dict[str, Any]:
    """The arguments of a class in a parsed config."""
    return dict(vars(spec["init_args"])) if spec.get("init_args") else {}


def _rows(data: Any) -> str:
    """A hash of what is trained and tested on."""
    found = hashlib.sha256()
    for split, rows in getattr(data, "_ready", {}).items():
        columns = [c for c in ("input_ids", "labels", "length") if c in rows.column_names]
        found.update(repr([split, len(rows), *(rows[c][:] for c in columns)]).encode())
    return found.hexdigest()[:12]


def _as_list(logger: Any) -> Sequence[Any]:
    if not logger or logger is True:
        return []
    return logger if isinstance(logger, list) else [logger]
