"""``lightning-peft compare``: many methods on one task, as a table and two pictures."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_peft.cli.quiet import LIGHTNING_LOGGERS
from lightning_peft.cli.run import PEFTCLI, Parser, expand
from lightning_peft.compare import plots, table
from lightning_peft.compare.comparison import Comparison
from lightning_peft.compare.plan import choose, read_budget, read_rates
from lightning_peft.compare.progress import Progress
from lightning_peft.compare.results import Results
from lightning_peft.compare.task import ComparedTask
from lightning_peft.errors import ConfigError
from lightning_peft.files import near
from lightning_peft.lightning_packages import L
from lightning_peft.method import Method

_ABOUT = """Train methods on one task under one budget and set them side by side.

Each method is measured (parameters, file, memory, step time), then trained with the first seed and --rates learning
rates around its default, and further ones while the best is the lowest or highest. The rate with the best validation
metric is trained with the other seeds, and only its runs are tested, each once. Finished runs are kept in OUT/results:
the same command goes on after an interruption."""
_MORE = """
Everything else is as in fit: --config FILE (several), --data.max_train_samples 600, --data.max_length 64,
--model.base_mode eval, --trainer.accumulate_grad_batches 2, --seed_everything 1 (the first seed). The config's
callbacks and learning rate are left out; its loggers get a run for each training, W&B with one group
(--trainer.logger false: none).

  lightning-peft compare --config task/bbc_topics.yaml --methods LoRA "LoRA(r=32)" Houlsby --budget 100 --seeds 3

writes table, comparison.csv, comparison.md, metric_and_parameters.png and learning_curves.png."""


class _Arguments(argparse.ArgumentParser):
    """One sentence for a mistake."""

    def error(self, message: str) -> Any:
        """Stop with status 2."""
        raise ConfigError(f"compare: {message[0].upper()}{message[1:]}. See lightning-peft compare --help.")


def _arguments() -> _Arguments:
    parser = _Arguments(
        "lightning-peft compare",
        usage="lightning-peft compare --config TASK [options] [options of fit]",
        description=_ABOUT,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="METHOD", help="NAME or 'NAME(field=value)'; by default all that fit the task")
    add("--seeds", type=_positive, default=3, metavar="N", help="seeds of the chosen rate (3)")
    add("--budget", metavar="N", help="optimizer steps of each run (200), or epochs (3epochs); by default the config's")
    add("--rates", nargs="+", default=["3"], metavar="K", help="learning rates: how many (3), or which (1e-3 3e-3)")
    add("--validations", type=_positive, default=4, metavar="N", help="validations during a run, the end included (4)")
    add("--metric", help="what decides (accuracy for classes, mae for numbers, loss for text)")
    add(
        *("--output_dir", "--out"),
        type=Path,
        metavar="DIR",
        help="folder for everything (the config's output_dir + /compare)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


class _Config(PEFTCLI):
    """Parses a config of ``fit`` and builds nothing."""

    def instantiate_classes(self) -> None:
        """Not here: every run builds its own."""


def compare(words: Sequence[str]) -> int:
    """Run the command; the status is 1 if no method could be tested.

    Raises:
        ConfigError: an unknown method or metric, a bad budget, a task that cannot be compared.
    """
    options, rest = _arguments().parse_known_args(list(words))
    if options.budget is not None:
        read_budget(options.budget)
    rates = read_rates(options.rates)
    choose(options.methods)  # a wrong name is said before anything is loaded
    config = _parse(rest)
    given = [m for m in _given(config) if isinstance(m, Method)]
    candidates, left_out = choose(options.methods, given)
    console = Console(highlight=False)
    folder = config.config.output_dir or config.config.trainer.get("default_root_dir") or "runs"
    out = options.output_dir or Path(folder, "compare")
    with _quiet(bars=console.is_terminal):
        task = ComparedTask(config.parser, config.config, out, f"compare-{out.parent.name or out.name}")
        steps = task.steps(read_budget(options.budget) if options.budget is not None else None)
        first = config.config.get("seed_everything")
        first = first if isinstance(first, int) and not isinstance(first, bool) else 42
        seeds, metric = list(range(first, first + options.seeds)), task.check_metric(options.metric or task.metric)
        task.group += f"-{steps}steps"
        progress, results = Progress(console), Results(out / "results")
        settings = (steps, rates, options.validations, metric)
        comparison = Comparison(task, candidates, seeds, *settings, results, progress)
        comparison.left_out.update(left_out)
        for name, reason in left_out.items():
            progress.say(f"{name} is left out: {reason}")
        try:
            comparison.run()
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one into the other
            console.print("Stopped. The same command goes on from here; until now:")
            raise SystemExit(130) from None
        finally:
            _write(console, comparison, out)
    return 0 if any(outcome.tested for outcome in comparison.outcomes) else 1


def _parse(words: list[str]) -> _Config:
    if not any(w.split("=")[0] in ("-c", "--config") for w in words):
        raise ConfigError("compare needs a task: --config task/bbc_topics.yaml, or a config of your own for fit.")
    sys.argv = [sys.argv[0], "compare", *words]
    found = expand(["compare", *words])[1:]
    options: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True}
    options |= {"auto_configure_optimizers": False, "seed_everything_default": 42, "parser_class": Parser}
    return _Config(
        L.LightningModule, L.LightningDataModule, run=False, save_config_callback=None, args=found, **options
    )


def _given(config: _Config) -> list[Any]:
    """The methods that the config itself sets up: their settings stand in for the defaults."""
    spec = config.config.get("peft")
    made = config.parser.instantiate_classes(config.config).peft if spec else None
    return made if isinstance(made, list) else [made]


def _write(console: Console, comparison: Comparison, out: Path) -> None:
    """Table and files, of as much as is done."""
    outcomes, metric = comparison.outcomes, comparison.metric
    made = table.rows(outcomes, metric)
    if not made:
        return
    c = comparison
    about = (
        f"{c.steps} optimizer steps a run; the learning rate is the best of {c.tried} on validation {metric};"
        f" test {metric}: mean ± standard deviation over {len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}."
    )
    said = table.notes(outcomes, comparison.left_out, about)
    table.write_csv(out / "comparison.csv", made)
    drawn = plots.draw(out, outcomes, made, metric) if plots.available() else []
    table.write_markdown(out / "comparison.md", made, said, metric, drawn)
    table.show(console, made, said, metric)
    if not plots.available():
        console.print("No pictures: matplotlib is missing. pip install lightning-peft[examples]", markup=False)
    known = comparison.progress.known
    again = f" {known} runs were there already." if known else ""
    console.print(f"{comparison.progress.fresh} runs done.{again}")
    for name in ("comparison.csv", "comparison.md", *drawn):
        console.print(f"  {near(out / name)}", soft_wrap=True)


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep what Lightning says of every Trainer off the screen, and bars of tokenising out of a file."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    enable_progress_bar() if bars else disable_progress_bar()
    loggers = [logging.getLogger(name) for name in LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning\.(pytorch|fabric)|pytorch_lightning|lightning_fabric).*")
        try:
            yield
        finally:
            enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
