"""Libraries that train with `pytorch_lightning` through entry points of their own; skipped where one is missing.

They are no requirement of the tests: pip install darts neuralforecast pytorch-tabular
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytestmark = pytest.mark.slow


class Run:
    """What all libraries are asked: the options for their Trainer, and what holds after their ``fit``."""

    def __init__(self, folder) -> None:
        from pytorch_lightning.callbacks import ModelCheckpoint

        from lightning_peft import PEFT, LoRA, MergeOnFitEnd, TrainabilityCheck

        self.folder = folder
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
        self.callbacks = [PEFT(LoRA(r=2)), TrainabilityCheck(), MergeOnFitEnd("last"), saver]
        self.options = {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }

    def check(self, module) -> None:
        """A file holds the weights of the adapter alone, and brings them back."""
        from lightning_peft import adapter_state_dict, load_adapter, trainable_names, unmerge

        trained = adapter_state_dict(module)
        assert set(trained) == set(trainable_names(module)) and len(trained) >= 4
        newest = max(self.folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
        # darts and pytorch-tabular add objects of their own to a checkpoint.
        content = torch.load(newest, weights_only=False)
        assert set(content["state_dict"]) == set(trained)
        assert type(module).__module__.split(".")[0] not in ("lightning", "lightning_peft")

        again = copy.deepcopy(module)
        unmerge(again)
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                if name in trained:
                    parameter.zero_()
        load_adapter(again, {key: content[key] for key in ("state_dict", "lightning_peft")})
        for name, value in adapter_state_dict(again).items():
            assert torch.equal(value, content["state_dict"][name]), name


def wave(count: int) -> list[float]:
    return [math.sin(i / 5) for i in range(count)]


def test_darts(tmp_path):
    darts = pytest.importorskip("darts")
    import numpy as np
    from darts.models import TransformerModel

    run = Run(tmp_path)
    options = {**run.options, "callbacks": run.callbacks, "enable_checkpointing": True, "logger": False}
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
    model = TransformerModel(
        input_chunk_length=12, output_chunk_length=4, n_epochs=2, batch_size=16, pl_trainer_kwargs=options, **sizes
    )
    model.fit(darts.TimeSeries.from_values(np.array(wave(120), dtype=np.float32)))
    assert len(model.predict(4)) == 4
    run.check(model.model)


def test_neuralforecast(tmp_path):
    library = pytest.importorskip("neuralforecast")
    import pandas as pd
    from neuralforecast.models import NHITS

    run = Run(tmp_path)
    options = {**run.options, "callbacks": run.callbacks, "enable_checkpointing": True, "logger": False}
    days = pd.date_range("2020-01-01", periods=150, freq="D")
    model = NHITS(h=4, input_size=12, max_steps=8, val_check_steps=4, mlp_units=[[16, 16]] * 3, **options)
    forecast = library.NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.DataFrame({"unique_id": 1, "ds": days, "y": wave(150)}))
    assert len(forecast.predict()) == 4
    run.check(forecast.models[0])


def test_pytorch_tabular(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the library writes into the working directory
    library = pytest.importorskip("pytorch_tabular")
    import pandas as pd
    from pytorch_tabular import config
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    run = Run(tmp_path)
    rows = pd.DataFrame({"a": wave(200), "b": wave(400)[200:]})
    rows["y"] = (rows.a > rows.b).astype(int)
    settings = {"early_stopping": None, "checkpoints": "valid_loss", "load_best": False, "progress_bar": "none"}
    model = library.TabularModel(
        data_config=config.DataConfig(target=["y"], continuous_cols=["a", "b"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8"),
        optimizer_config=config.OptimizerConfig(),
        trainer_config=config.TrainerConfig(
            max_epochs=2,
            batch_size=32,
            accelerator="cpu",
            checkpoints_path=str(tmp_path / "own"),
            trainer_kwargs={"enable_model_summary": False, "default_root_dir": str(tmp_path)},
            **settings,
        ),
    )
    model.fit(train=rows, callbacks=run.callbacks)
    assert len(model.predict(rows)) == 200
    run.check(model.model)
