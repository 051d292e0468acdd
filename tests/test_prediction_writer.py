"""`PredictionWriter`: complete files, in order, or none."""

from __future__ import annotations

import csv
import json

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LoRA, PredictionWriter, TaskModule
from lightning_peft.errors import ConfigError, TrainingError
from tests.models import trainer
from tests.task_cases import BERT, CASES, NAMES, Data

SENTENCE = CASES["sequence-classification"]


class Echo(L.LightningModule):
    def predict_step(self, batch, index):
        return [{"id": int(i), "odd": bool(i % 2), "list": [int(i)], "deep": {"a": {"b": float(i)}}} for i in batch]


def test_rows_of_a_task(tmp_path):
    module = TaskModule(BERT, "sequence-classification", label_names=NAMES)
    for name in ("rows.csv", "deep/rows.jsonl"):
        writer = PredictionWriter(str(tmp_path / name))
        kept = trainer(tmp_path, PEFT(LoRA(r=2)), writer).predict(module, Data(SENTENCE))
        rows = [row for batch in kept for row in batch]
        assert len(rows) == 16
        with (tmp_path / name).open() as file:
            if name.endswith("jsonl"):
                assert [json.loads(line) for line in file] == rows
                continue
            table = list(csv.DictReader(file))
        assert list(table[0]) == ["text", "label", "score", *(f"scores.{n}" for n in NAMES)]
        assert [t["label"] for t in table] == [r["label"] for r in rows]
        assert float(table[3]["scores.green"]) == rows[3]["scores"]["green"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "rows.csv"]


def test_csv_of_nested_values_and_several_loaders(tmp_path):
    loaders = [DataLoader(torch.arange(5), batch_size=2), DataLoader(torch.arange(3), batch_size=2)]

    class Two(Echo):
        def predict_step(self, batch, index, dataloader_idx=0):
            return super().predict_step(batch, index)

    trainer(tmp_path, PredictionWriter(str(tmp_path / "a.csv"))).predict(Two(), loaders, return_predictions=False)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[:2] == ["id,odd,list,deep.a.b", "0,False,[0],0.0"]
    assert [line.split(",")[0] for line in lines[1:]] == list("01234012")


def test_errors_leave_the_old_file(tmp_path):
    with pytest.raises(ConfigError, match=r"suffix must be \.csv or \.jsonl"):
        PredictionWriter("rows.parquet")
    (tmp_path / "a.jsonl").write_text("old")

    class Tensors(Echo):
        def predict_step(self, batch, index):
            return batch

    class Broken(Echo):
        def predict_step(self, batch, index):
            return [{"x": object()}]

    for module, error in ((Tensors(), TrainingError), (Broken(), TypeError)):
        with pytest.raises(error):
            trainer(tmp_path, PredictionWriter(str(tmp_path / "a.jsonl"))).predict(module, DataLoader(torch.arange(2)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"] and (tmp_path / "a.jsonl").read_text() == "old"


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Rows of both, in the order of the data, without the repeat that evens the shares out."""
    run = trainer(tmp_path, PredictionWriter(str(tmp_path / "a.jsonl")), devices=2, strategy="ddp_spawn")
    run.predict(Echo(), DataLoader(torch.arange(7), batch_size=2), return_predictions=False)
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").open()] == list(range(7))
