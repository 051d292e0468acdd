"""fit, validate, test and predict: LightningCLI with ``--peft``, and a last screen that says what to do next."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import shlex
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_peft.methods  # noqa: F401  (short names resolve once the classes exist)
from lightning_peft.callbacks import PEFT, PredictionWriter
from lightning_peft.cli.bar import Bar
from lightning_peft.cli.configs import check_config
from lightning_peft.cli.folder import CONFIG, OldRun, free_neighbour, holds_run, newest_checkpoint, put_below
from lightning_peft.cli.found import read_found
from lightning_peft.cli.help import show_choices
from lightning_peft.cli.messages import chain, explain
from lightning_peft.cli.quiet import silence_wandb
from lightning_peft.cli.screen import finish
from lightning_peft.cli.terminal import command, filled, say_error, width_of
from lightning_peft.data import AudioDataModule, ImageDataModule, TextDataModule
from lightning_peft.data.tasks import TextTask
from lightning_peft.errors import ConfigError, PEFTError, TrainingError
from lightning_peft.files import locate, near
from lightning_peft.lightning_packages import L, every, rank_zero_only
from lightning_peft.method import Method, registry
from lightning_peft.module import TaskModule
from lightning_peft.replacing import replacing
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.task.labels import ask_checkpoint
from lightning_peft.untrusted import only_known_imports, short

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
else:
    _cli = import_module(f"{L.__name__}.cli")
    LightningArgumentParser, LightningCLI = _cli.LightningArgumentParser, _cli.LightningCLI
    SaveConfigCallback = _cli.SaveConfigCallback

SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
_PREDICTIONS = "predictions.jsonl"
_PARTS = ("model", "data")
_DATA = (TextDataModule, ImageDataModule, AudioDataModule)
#: what accelerators are called by people
_DEVICES = {"gpu": "GPU", "cuda": "CUDA GPU", "mps": "Apple GPU", "tpu": "TPU"}


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print one sentence and stop with status 2, in place of the usage and twenty lines."""
        if not self.exit_on_error:  # one attempt among several types: the next may fit
            super().error(message, ex)
        say_error(short(explain(message, _classes(), _options()), 1500))
        raise SystemExit(2)  # no ordinary exception: jsonargparse would catch it and try something else


def _classes() -> dict[str, list[str]]:
    hidden = ("_", "SaveConfig", "Bar")
    found = [k for k in _subclasses(L.Callback) if not k.__module__.startswith("lightning_peft.compare")]
    callbacks = sorted(k.__name__ for k in found if not k.__name__.startswith(hidden))
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

    def __init__(
        self, parser: Any, config: Any, as_given: Any = None, replaced: OldRun | None = None, **options: Any
    ) -> None:
        super().__init__(parser, as_given or config, **{**options, "save_to_log_dir": False})
        self.replaced = replaced

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Too early."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything is built and checked."""
        if not trainer.is_global_zero:
            return
        if self.replaced is not None:
            self.replaced.remove()
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Into both places."""
        with replacing(Path(trainer.default_root_dir) / CONFIG) as temporary:
            # as one file: in the other form jsonargparse writes the fields of a model as a torch.nn.Module of them
            self.parser.save(self.config, temporary, skip_none=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            if isinstance(logger, L.loggers.Logger):
                logger.log_hyperparams({"cli": _plain(self.config)})


class PEFTCLI(LightningCLI):
    """LightningCLI with the top-level option ``--peft``; explicit flags win over a checkpoint's hyper-parameters."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of ours, the same for every command so that one config serves them all."""
        parser.add_argument(
            "--peft", type=Method | list[Method] | None, default=None, help="Method(s), for example LoRA."
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Measure the best weights after fit.")
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="Folder of the run. Relative dirpath, save_dir and path stand below it. If it holds a run, fit takes"
            " the next free neighbour: DIR-2, DIR-3.",
        )
        parser.add_argument(
            "--resume", action="store_true", help="fit: go on from the newest checkpoint in the folder."
        )
        parser.add_argument("--overwrite", action="store_true", help="fit: replace the run in the folder.")

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
            if any(isinstance(e, (PEFTError, L.utilities.exceptions.MisconfigurationException)) for e in chain(error)):
                raise
            raise ConfigError(short(error, 1000)) from error

    def before_instantiate_classes(self) -> None:
        """Look at a checkpoint before data and model are loaded; keep W&B quiet."""
        trainer = self._get(self.config, "trainer")
        if not hasattr(trainer, "get"):
            raise ConfigError(f"trainer: expected a mapping of options, got {trainer!r}.")
        self._share_task()
        self._settle_folder(trainer)
        path = self._get(self.config, "ckpt_path")
        if path == "best":
            raise PEFTError("--ckpt_path best: nothing was trained in this command; give the checkpoint's file.")
        if path and path not in ("last", "hpc", "registry"):
            if locate(path).is_dir():
                raise PEFTError(
                    f"--ckpt_path {path} is a folder; give a .ckpt in it. PEFT(init_from=…) starts a new fit from an"
                    " adapter folder."
                )
            SavedAdapter.read(path)
            if Path(path).suffix == ".safetensors":
                raise PEFTError(
                    f"--ckpt_path {path} is an adapter by itself; the commands take a .ckpt. To start a fit from it:"
                    f" --peft null --trainer.callbacks+=PEFT --trainer.callbacks.init_from {path}"
                )
            self._take_classes(path)
        if "WandbLogger" in str(trainer.get("logger")):
            silence_wandb()

    def _share_task(self) -> None:
        """The data take the task of the model where the command names only that: they must be equal anyway."""
        words = sys.argv[1:]
        named = {part: _values(words, f"--{part}.task") + _values(words, f"--{part}.init_args.task") for part in _PARTS}
        data = self._get(self.config, "data")
        arguments = data.get("init_args") if data else None
        if not named["model"] or named["data"] or not arguments or "task" not in arguments:
            return
        if named["model"][-1] in TextTask.__args__:
            arguments.task = named["model"][-1]

    def _settle_folder(self, trainer: Any) -> None:
        """Choose the run's folder, put everything that is written below it, and find the checkpoint to go on from."""
        config = self.config.get(self.subcommand) if self.subcommand else self.config
        root = trainer.get("default_root_dir")
        if config.output_dir is not None and root is not None and Path(root).resolve() != _resolved(config.output_dir):
            raise ConfigError(
                f"output_dir={config.output_dir} and trainer.default_root_dir={root} both name the run's folder: give"
                " --output_dir, and leave default_root_dir out."
            )
        if self.subcommand != "fit" and (config.resume or config.overwrite):
            raise ConfigError("--resume and --overwrite belong to fit.")
        folder = config.output_dir or root
        if self.subcommand == "fit" and folder is not None:
            config.output_dir = self._choose(Path(folder).expanduser(), config)
        if config.output_dir is None or not self.subcommand:
            return
        config.resume = config.overwrite = False  # of this call, not of the run
        trainer.default_root_dir = None
        self.save_config_kwargs = {**self.save_config_kwargs, "as_given": config.clone()}
        put_below(trainer, Path(config.output_dir).expanduser())
        trainer.default_root_dir = config.output_dir

    def _choose(self, folder: Path, config: Any) -> str | None:
        """The folder of this fit; None if the config does not use ``output_dir``."""
        if config.resume and config.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite replaces it: give one of them.")
        if config.resume:
            self._resume(folder, config)
        if config.output_dir is None:
            if config.overwrite:
                raise ConfigError("--overwrite replaces the run in --output_dir: give it.")
            return None
        inside = config.ckpt_path and _resolved(config.ckpt_path).is_relative_to(folder.resolve())
        if config.overwrite and inside:
            raise ConfigError(f"--overwrite would remove --ckpt_path {config.ckpt_path}. Leave one of them out.")
        if config.overwrite and holds_run(folder):
            self.save_config_kwargs = {**self.save_config_kwargs, "replaced": OldRun(folder)}
        elif holds_run(folder) and not inside:
            neighbour = free_neighbour(folder)
            _say(
                f"{near(folder)} holds a run already, so this one is written to {near(neighbour)}."
                " (--overwrite replaces a run, --resume goes on with it.)"
            )
            folder = neighbour
        return str(folder)

    def _resume(self, folder: Path, config: Any) -> None:
        """Take the newest checkpoint of the run's folder."""
        if config.ckpt_path:
            raise ConfigError("--resume finds the checkpoint by itself: leave --ckpt_path out, or --resume.")
        newest = newest_checkpoint(folder)
        if newest is None:
            raise ConfigError(f"--resume: there is no checkpoint below {folder}. Leave --resume out to start anew.")
        config.ckpt_path = str(newest)
        _say(f"Going on from {near(newest)}.")

    def _take_classes(self, path: str) -> None:
        """Let the model have the classes of the checkpoint, unless the user names some."""
        given = self._get(self.config, "model").get("init_args")
        if given and "label_names" in given and given.label_names is None and given.get("num_labels") is None:
            for name, value in ask_checkpoint(path).items():
                given[name] = value

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
        if self.subcommand == "predict" and not any(isinstance(c, L.callbacks.BasePredictionWriter) for c in callbacks):
            callbacks = [*callbacks, PredictionWriter(str(Path(config.get("default_root_dir") or ".", _PREDICTIONS)))]
        own_bar = any(isinstance(c, L.callbacks.ProgressBar) for c in callbacks)
        if config.get("enable_progress_bar") is not False and not own_bar:
            callbacks = [Bar(), *callbacks]
        try:
            return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks})
        except Exception as error:
            no_device = ("No supported gpu backend found", "can not run on your system")
            if any(part in str(error) for part in no_device):
                name = config.get("accelerator")
                raise PEFTError(
                    f"trainer.accelerator={name}: torch finds no {_DEVICES.get(name, name)} on this machine. Train on"
                    " what there is with --trainer.accelerator auto, or install a torch that supports it."
                ) from error
            if not isinstance(error, (TypeError, ValueError)):
                raise
            # options that exclude each other, or do not fit this machine
            raise PEFTError(f"trainer: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; of a fit that is cut short, say what was saved and how to go on."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            # after a TrainingError there is nothing to go on with
            if subcommand == "fit" and not self.trainer.fast_dev_run and not isinstance(error, TrainingError):
                self.show_interruption()
            if isinstance(error, every("utilities.exceptions.SIGTERMException")):
                raise SystemExit(143) from error  # as a shell counts: 128 + the number of the signal
            if isinstance(error, SystemExit) and self.trainer.interrupted:
                raise SystemExit(130) from error
            raise

    def show_interruption(self) -> None:
        """What is left of a fit that did not reach its end."""
        stopped = self.trainer.interrupted and self.trainer.state.fn == "fit"
        if not stopped or not self.trainer.global_step:
            return
        folder = Path(self.trainer.default_root_dir)
        saved = newest_checkpoint(folder, since=self.began)
        if saved is None:
            _say(f"\nStopped at step {self.trainer.global_step:,}; nothing was saved.")
            return
        _say(f"\nStopped at step {self.trainer.global_step:,}. Saved: {near(saved)}. To go on:")
        again = f"lightning-peft fit --resume --output_dir {shlex.quote(near(folder))}"
        print(command(again, width_of(sys.stderr), "  "), file=sys.stderr)

    def before_fit(self) -> None:
        """Start the clocks."""
        self.started, self.began = time.monotonic(), time.time()

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


@rank_zero_only
def _say(line: str) -> None:
    print(filled(line, width_of(sys.stderr)), file=sys.stderr)


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()


def run(words: list[str]) -> PEFTCLI:
    """Parse and run one of Lightning's commands."""
    # Lightning starts further processes with these words, and loggers show them. The program's own path stays.
    sys.argv = [sys.argv[0], *words]
    choices = {"model": [TaskModule], "data": list(_DATA), "peft": list(registry().values())}
    if show_choices(words, choices):
        raise SystemExit(0)
    full, guard = expand(words), nullcontext()
    if not any(w.split("=")[0] in ("-c", "--config") for w in words):
        file = None
        if words[0] in ("validate", "test", "predict"):
            file = _beside(words)
        elif words[0] == "fit" and "--resume" in words:
            file = _of_run(words)
        if file is not None:
            full[1:1] = ["--config", read_found(file, loggers=words[0] == "fit")]
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
            parser_kwargs={"prog": "lightning-peft"},
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
    """Find shipped configs from any folder, and let options come after the class that they belong to."""
    found = in_order(words)
    for i, word in enumerate(found):
        name, separator, value = word.partition("=")
        if name in ("-c", "--config") and (separator or i + 1 < len(found)):
            place = _config(value if separator else found[i + 1])
            check_config(place)
            found[i if separator else i + 1] = f"{name}={place}" if separator else place
    return found


def in_order(words: list[str]) -> list[str]:
    """Configs first, then the classes of method, model and data, then their options; else as given.

    The parser reads from left to right, and an option of a class that is named later would belong to none.

    >>> in_order(["fit", "--peft.r", "4", "--peft", "LoRA", "--config", "task.yaml"])
    ['fit', '--config', 'task.yaml', '--peft', 'LoRA', '--peft.r', '4']
    """
    command, options = words[:1], []
    for word in words[1:]:
        if word.startswith("--") or word == "-c" or not options:
            options.append([word])
        else:
            options[-1].append(word)  # a value of the option before it
    return command + [word for option in sorted(options, key=_turn) for word in option]


def _turn(option: list[str]) -> int:
    name = option[0].split("=")[0]
    if name in ("-c", "--config"):
        return 0
    return 1 if name in ("--peft", "--model", "--data") else 2


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
    for path in (locate(p) for p in _values(words, "--ckpt_path")):
        if not os.path.exists(path):
            SavedAdapter.read(path)  # says what is there
        for folder in (path.parent, path.parent.parent):
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml"
        raise PEFTError(f"No config.yaml lies beside {path}, where fit writes it; give --config FILE.")
    return None


def _of_run(words: list[str]) -> Path | None:
    """The config that fit wrote into ``--output_dir``; None without that option."""
    for folder in (Path(value).expanduser() for value in _values(words, "--output_dir")):
        if not (folder / CONFIG).is_file():
            raise PEFTError(f"--resume: {folder} holds no {CONFIG}, where fit writes it; give --config FILE.")
        return folder / CONFIG
    return None


def _values(words: list[str], option: str) -> list[str]:
    """What is given for an option."""
    joined = [word.split("=", 1)[1] for word in words if word.startswith(f"{option}=")]
    return joined + [after for before, after in pairwise(words) if before == option]


def _subclasses(kind: type) -> set[type]:
    direct = set(kind.__subclasses__())
    return direct | {s for k in direct for s in _subclasses(k)}


def _plain(config: Any) -> dict[str, Any]:
    return config.as_dict() if hasattr(config, "as_dict") else dict(config)
