"""fit, validate, test and predict: LightningCLI with ``--peft``, and a last screen that says what to do next."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_peft.methods  # noqa: F401  (short names resolve once the classes exist)
from lightning_peft.callbacks import PEFT, PredictionWriter
from lightning_peft.cli.bar import Bar
from lightning_peft.cli.configs import check_config
from lightning_peft.cli.found import read_found
from lightning_peft.cli.messages import chain, explain
from lightning_peft.cli.quiet import silence_wandb
from lightning_peft.cli.screen import finish
from lightning_peft.data import AudioDataModule, ImageDataModule, TextDataModule
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.files import locate, read
from lightning_peft.method import Method, registry
from lightning_peft.module import TaskModule
from lightning_peft.replacing import replacing
from lightning_peft.untrusted import only_known_imports, short

SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
_PREDICTIONS = "predictions.jsonl"
_DATA = (TextDataModule, ImageDataModule, AudioDataModule)


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print one sentence and stop with status 2, in place of the usage and twenty lines."""
        if not self.exit_on_error:  # one attempt among several types: the next may fit
            super().error(message, ex)
        text = short(explain(message, _classes(), _options()), 1500)
        print(f"lightning-peft: error: {text}", file=sys.stderr)
        raise SystemExit(2)  # no ordinary exception: jsonargparse would catch it and try something else


def _classes() -> dict[str, list[str]]:
    hidden = ("_", "SaveConfig", "Bar")
    callbacks = sorted(k.__name__ for k in _subclasses(L.Callback) if not k.__name__.startswith(hidden))
    data = [d.__name__ for d in _DATA]
    return {"peft": list(registry()), "model": ["TaskModule"], "data": data, "callbacks": callbacks}


def _options() -> dict[str, list[str]]:
    kinds = {**registry(), "TaskModule": TaskModule, **{d.__name__: d for d in _DATA}, "": L.Trainer}
    kinds |= {k.__name__: k for k in _subclasses(L.Callback)}
    return {n: [p for p in inspect.signature(k.__init__).parameters if p != "self"] for n, k in kinds.items()}


class SaveConfig(SaveConfigCallback):
    """Writes the config into the run's folder and into the loggers, of a fit that really starts.

    A run that fails before must not take the place of the one whose checkpoints lie there.
    """

    def __init__(self, parser: Any, config: Any, **options: Any) -> None:
        super().__init__(parser, config, **{**options, "save_to_log_dir": False})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Too early."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything is built and checked."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Into both places."""
        with replacing(Path(trainer.default_root_dir) / "config.yaml") as temporary:
            self.parser.save(self.config, temporary, skip_none=False, overwrite=True)
        for logger in trainer.loggers:
            if isinstance(logger, Logger):
                logger.log_hyperparams({"cli": _plain(self.config)})


class PEFTCLI(LightningCLI):
    """LightningCLI with the top-level option ``--peft``; explicit flags win over a checkpoint's hyper-parameters."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of ours, the same for every command so that one config serves them all."""
        parser.add_argument(
            "--peft", type=Method | list[Method] | None, default=None, help="Method(s), for example LoRA."
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Measure the best weights after fit.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What the parser does not report itself is the user's input all the same."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            raise ConfigError(explain(str(error), _classes(), _options())) from error

    def instantiate_classes(self) -> None:
        """Constructors of Lightning and torch complain in many ways; they had nothing but the config to complain of."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ImportError, OSError) as error:
            if any(isinstance(e, (PEFTError, MisconfigurationException)) for e in chain(error)):
                raise
            raise ConfigError(short(error, 1000)) from error

    def before_instantiate_classes(self) -> None:
        """Look at a checkpoint before data and model are loaded; keep W&B quiet."""
        trainer = self._get(self.config, "trainer")
        if not hasattr(trainer, "get"):
            raise ConfigError(f"trainer: expected a mapping of options, got {trainer!r}.")
        path = self._get(self.config, "ckpt_path")
        if path == "best":
            raise PEFTError("--ckpt_path best: nothing was trained in this command; give the checkpoint's file.")
        if path and path not in ("last", "hpc", "registry"):
            if locate(path).is_dir():
                raise PEFTError(
                    f"--ckpt_path {path} is a folder; give a .ckpt in it. PEFT(init_from=…) starts a new fit from an"
                    " adapter folder."
                )
            read(path)
            if Path(path).suffix == ".safetensors":
                raise PEFTError(
                    f"--ckpt_path {path} is an adapter by itself; the commands take a .ckpt. To start a fit from it:"
                    f" --peft null --trainer.callbacks+=PEFT --trainer.callbacks.init_from {path}"
                )
        if "WandbLogger" in str(trainer.get("logger")):
            silence_wandb()

    def _parse_ckpt_path(self) -> None:
        """Leave the parsed config as it is: it is complete, and it is what the user asked for."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Put the method first among the callbacks: those that copy the module must come after it."""
        method = self._get(self.config_init, "peft")
        config = self._get(self.config_init, "trainer")
        if config.get("accumulate_grad_batches", 1) < 1:
            raise ConfigError(f"trainer.accumulate_grad_batches={config.accumulate_grad_batches}: give at least 1.")
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        own = next((c for c in callbacks if isinstance(c, PEFT)), None)
        if method is not None and own is not None:
            raise PEFTError("Both --peft and a PEFT callback in trainer.callbacks are given; keep one.")
        if own is None:
            callbacks = [PEFT(method), *callbacks]
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            callbacks = [*callbacks, PredictionWriter(str(Path(config.get("default_root_dir") or ".", _PREDICTIONS)))]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [Bar(), *callbacks]
        try:
            return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks})
        except (TypeError, ValueError) as error:  # options that exclude each other, or do not fit this machine
            raise PEFTError(f"trainer: {error}") from error

    def before_fit(self) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def after_fit(self) -> None:
        """Measure, write the adapter file, and say where everything is."""
        if self.trainer.fast_dev_run or self.trainer.interrupted:
            return
        self.show_result(time.monotonic() - self.started)

    def show_result(self, seconds: float) -> None:
        """The end of a fit."""
        metrics: dict[str, float] = {}
        speed = self.trainer.callback_metrics.get("train_tokens_per_second")
        if self._get(self.config_init, "test_after_fit"):
            results = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            metrics = {k: v for row in results for k, v in row.items()}
        finish(self.trainer, self.model, metrics, seconds, None if speed is None else float(speed))


def run(words: list[str]) -> PEFTCLI:
    """Parse and run one of Lightning's commands."""
    sys.argv = ["lightning-peft", *words]  # Lightning and the loggers show the command from here
    full, guard = expand(words), nullcontext()
    if words[0] in ("validate", "test", "predict") and not any(w.split("=")[0] in ("-c", "--config") for w in words):
        file = _beside(words)
        if file is not None:
            full[1:1] = ["--config", read_found(file)]
            guard = only_known_imports(_packages_named(words))
    with guard:
        return PEFTCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            args=full,
        )


def _packages_named(words: list[str]) -> list[str]:
    """The packages whose classes the user names in the command itself: ``--trainer.callbacks+=my_package.Mine``."""
    found = []
    for before, word in pairwise(words):
        option, equals, value = word.partition("=")
        option, value = (option, value) if equals else (before, word)
        is_path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) is not None
        # the name of a file reads like an import path, and the sender has chosen it
        if is_path and not option.startswith("--ckpt_path") and not os.path.exists(value):
            found.append(value.split(".")[0])
    return [name for name in found if name != "jsonargparse"]


def expand(words: list[str]) -> list[str]:
    """Find shipped configs from any folder."""
    found = list(words)
    for i, word in enumerate(found):
        name, separator, value = word.partition("=")
        if name in ("-c", "--config") and (separator or i + 1 < len(found)):
            place = _config(value if separator else found[i + 1])
            check_config(place)
            found[i if separator else i + 1] = f"{name}={place}" if separator else place
    return found


def _config(value: str) -> str:
    if os.path.exists(value):
        return value
    short = value.removeprefix("configs/")
    place = next((str(folder / short) for folder in SHIPPED if (folder / short).is_file()), None)
    if place is None:
        names = [
            str(p.relative_to(folder))
            for folder in SHIPPED
            for p in sorted(folder.rglob("*.yaml"))
            if p.stem != "sweep"
        ]
        near = difflib.get_close_matches(short, names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Shipped are quickstart.yaml, task/, method/ and trainer/."
        raise PEFTError(f"--config {value}: there is no such file. {hint}")
    return place


def _beside(words: list[str]) -> Path | None:
    """The config that fit wrote into the folder of the checkpoint or the one above; None without a checkpoint."""
    joined = [w.split("=", 1)[1] for w in words if w.startswith("--ckpt_path=")]
    apart = [b for a, b in pairwise(words) if a == "--ckpt_path"]
    for path in (locate(p) for p in joined + apart):
        if not path.exists():
            read(path)  # says what is there
        for folder in (path.parent, path.parent.parent):
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml"
        raise PEFTError(f"No config.yaml lies beside {path}, where fit writes it; give --config FILE.")
    return None


def _subclasses(kind: type) -> set[type]:
    direct = set(kind.__subclasses__())
    return direct | {s for k in direct for s in _subclasses(k)}


def _plain(config: Any) -> dict[str, Any]:
    return config.as_dict() if hasattr(config, "as_dict") else dict(config)
