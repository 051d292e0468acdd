"""Method and counts in every logger; the adapter with its card as a folder."""

from __future__ import annotations

import pytest
import torch
import yaml
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import IA3, PEFT, LogAdapter, LoRA, load_adapter, summarize
from lightning_peft.callbacks.log_adapter import record, write_folder
from lightning_peft.trainer.best import best_adapter
from tests.models import Foreign, bert, loader, logits, trainer


def test_csv_logger_gets_config_and_counts(tmp_path):
    module, logger = Foreign("bert"), CSVLogger(tmp_path)
    fitted = trainer(
        tmp_path, PEFT([LoRA(r=2, target_modules="query"), IA3()]), LogAdapter(), logger=logger, max_epochs=1
    )
    fitted.fit(module, loader("bert"))
    saved = yaml.safe_load((tmp_path / "lightning_logs/version_0/hparams.yaml").read_text())["peft"]
    summary = summarize(module)
    assert saved["method"] == ["LoRA", "IA3"] and saved["config"][0]["r"] == 2
    for key in ("trainable", "total", "adapter_bytes", "fingerprint"):
        assert saved[key] == summary[key], key


def test_tensorboard_gets_config_and_counts(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, logger = Foreign("bert"), TensorBoardLogger(tmp_path)
    trainer(tmp_path, PEFT(LoRA(r=2)), LogAdapter(), logger=logger, max_epochs=1).fit(module, loader("bert"))
    assert yaml.safe_load((tmp_path / "lightning_logs/version_0/hparams.yaml").read_text())["peft"]["method"] == "LoRA"
    assert "_hparams_/session_start_info" in EventAccumulator(logger.log_dir).Reload().summary_metadata


def test_loggers_that_flatten_get_plain_values():
    """MLflow takes the fields one by one, as text."""
    module = Foreign("bert")
    PEFT(LoRA(r=2)).ensure(module, "fit")
    flat = _flatten_dict(_convert_params({"peft": record(module)}))
    assert flat["peft/method"] == "LoRA" and flat["peft/config/r"] == 2
    assert flat["peft/trainable"] == summarize(module)["trainable"]
    assert all(isinstance(v, (str, int, float, bool, list, type(None))) for v in flat.values())


def test_folder_with_card(tmp_path):
    """Holds the best adapter of the run, and says how good it was."""
    module = Foreign("bert")
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    fitted = trainer(tmp_path, PEFT(LoRA(r=2)), best, max_epochs=2)
    fitted.fit(module, loader("bert"), loader("bert"))
    saved, monitored = best_adapter(fitted, module)
    assert monitored
    write_folder(tmp_path / "adapter", fitted, module, saved)
    model, again = bert(), bert()
    load_adapter(model, tmp_path / "adapter")
    load_adapter(again, best.best_model_path)
    assert torch.equal(logits(model, "bert"), logits(again, "bert"))
    card = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: lightning_peft" in card and "load_adapter" in card
    assert f"| val_loss | {float(best.best_model_score):.4f} |" in card
