"""Predictions to a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lightning_peft.errors import ConfigError, TrainingError
from lightning_peft.lightning_packages import BasePredictionWriter, rank_zero_info
from lightning_peft.replacing import replacing

if TYPE_CHECKING:
    import lightning.pytorch as L

_WRITERS = (".csv", ".jsonl")


class PredictionWriter(BasePredictionWriter):
    """Save the rows of ``predict`` as ``.csv`` or ``.jsonl``, in the order of the data, also from several processes.

    The file appears when all rows are there; an earlier file of that name stays until then. In ``.csv`` the fields of
    nested values become columns (``scores.sport``) and lists are JSON.

    Args:
        path: where to write; the suffix says how.

    Raises:
        ConfigError: another suffix.

    >>> from lightning_peft import PredictionWriter
    >>> PredictionWriter("out.txt")
    Traceback (most recent call last):
    lightning_peft.errors.ConfigError: PredictionWriter(path='out.txt'): the suffix must be .csv or .jsonl.
    """

    def __init__(self, path: str) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path).expanduser()
        if self.path.suffix not in _WRITERS:
            raise ConfigError(f"PredictionWriter(path={str(path)!r}): the suffix must be {' or '.join(_WRITERS)}.")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collect the rows of all processes and write them once."""
        rows = _gathered(trainer, _rows(predictions), _indices(batch_indices))
        if trainer.is_global_zero:
            write_rows(rows, self.path)
            rank_zero_info(f"{len(rows):,} predictions written to {self.path.resolve()}.")
        trainer.strategy.barrier("predictions")


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows to ``path``; under a temporary name first."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        (_write_csv if path.suffix == ".csv" else _write_jsonl)(rows, file)


def _write_jsonl(rows: Sequence[dict[str, Any]], file: TextIO) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_csv(rows: Sequence[dict[str, Any]], file: TextIO) -> None:
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(k for row in flat for k in row)))
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}.{k}": v for k, v in _flat(value).items()}
        else:
            out[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple)) else value
    return out


def _rows(predictions: Any) -> list[dict[str, Any]]:
    """All rows, through batches and several dataloaders."""
    if isinstance(predictions, dict):
        return [predictions]
    if not isinstance(predictions, (list, tuple)):
        raise TrainingError(
            f"PredictionWriter writes lists of dicts; predict_step returned a {type(predictions).__name__}."
            " Return [{'label': …}, …], one dict for each example, as TaskModule does."
        )
    return [row for part in predictions for row in _rows(part)]


def _indices(batch_indices: Sequence[Any]) -> list[tuple[int, int]]:
    """Number of the dataloader and of the example in it, for every row."""
    return [(loader, i) for loader, batches in enumerate(batch_indices) for batch in batches for i in batch or []]


def _gathered(trainer: L.Trainer, rows: list[dict[str, Any]], indices: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows of every process in the order of the data; the repeats that even out the processes are dropped."""
    if trainer.world_size == 1:
        return rows
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, (rows, indices))
    if any(len(r) != len(i) for r, i in parts):  # the loader's sampler does not tell them
        return [row for r, _ in parts for row in r]
    placed = {i: row for r, numbers in parts for i, row in zip(numbers, r, strict=True)}
    return [placed[i] for i in sorted(placed)]
