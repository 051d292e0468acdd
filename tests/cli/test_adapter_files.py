"""inspect, export and merge from the shell: every kind of saved adapter, and clear errors for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_peft import (
    PEFT,
    AdapterFusion,
    CheckpointError,
    Houlsby,
    LoRA,
    PrefixTuning,
    TaskModule,
    export_peft,
    inject,
    load_adapter,
    save_adapter,
    trainable_names,
)
from lightning_peft.cli import main
from tests.models import bert, llama, loader, logits, trainer

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base folder (no head in it), a checkpoint and an adapter file of a short run, and the outputs it must give."""
    folder = tmp_path_factory.mktemp("run")
    base = folder / "base"
    bert().bert.save_pretrained(base)
    (base / "tokenizer_config.json").write_text("{}")
    module = TaskModule(str(base), "sequence-classification", label_names=NAMES)
    best = ModelCheckpoint(dirpath=folder, filename="best", monitor="train_loss_epoch")
    fitted = trainer(folder, PEFT(LoRA(r=2)), best, max_epochs=1, limit_train_batches=2)
    fitted.fit(module, loader("bert"))
    module.eval()
    save_adapter(module, folder / "adapter/adapter.safetensors")
    return folder, logits(module.model, "bert")


SOURCES = ["best.ckpt", "adapter/adapter.safetensors", "adapter"]


def call(*words) -> int:
    return main([str(w) for w in words])


@pytest.mark.parametrize("source", SOURCES)
def test_export(source, run, tmp_path, capsys):
    folder, expected = run
    assert call("export", folder / source, tmp_path / "out") == 0
    printed = capsys.readouterr().out.split("Use it:  ")[1].splitlines()[0]
    assert printed.startswith("peft.AutoPeftModelForSequenceClassification.from_pretrained(")
    model = eval(printed, {"peft": peft}).eval()
    torch.testing.assert_close(logits(model, "bert"), expected, atol=1e-5, rtol=1e-5)
    text = (tmp_path / "out/README.md").read_text()
    assert ("train_loss_epoch" in text) == (source == "best.ckpt")


@pytest.mark.parametrize("source", SOURCES)
def test_merge(source, run, tmp_path, capsys):
    folder, expected = run
    assert call("merge", folder / source, tmp_path / "out") == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, "bert"), expected, atol=1e-5, rtol=1e-5)
    assert list(model.config.id2label.values()) == NAMES
    assert (tmp_path / "out/tokenizer_config.json").exists()
    assert "BertForSequenceClassification.from_pretrained" in capsys.readouterr().out


def test_another_place_of_the_base(run, tmp_path, capsys):
    folder, _ = run
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (folder / "base").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert call("merge", folder / "best.ckpt", tmp_path / "out", "--base", moved) == 0
    model = bert()
    del model.config.__dict__["_name_or_path"]
    inject(model, LoRA(r=2))
    save_adapter(model, tmp_path / "adapter.safetensors")
    assert call("export", tmp_path / "adapter.safetensors", tmp_path / "e") == 2
    assert "does not say where its base came from: give --base PATH" in capsys.readouterr().err
    other = tmp_path / "other"
    bert(seed=5).save_pretrained(other)
    assert call("merge", folder / "best.ckpt", tmp_path / "m", "--base", other) == 2
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not (tmp_path / "e").exists()


def _shown(capsys, *words) -> str:
    assert call("inspect", *words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("source", SOURCES)
def test_inspect(source, width, run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    folder, _ = run
    out = _shown(capsys, folder / source)
    assert max(len(line) for line in out.splitlines()[1:]) <= width
    count = sum(p.numel() for p in _trained(bert()))
    for part in ("LoRA", "r=2", "13 modules", "classifier (new)", f"{count:,} parameters", "BertForSequence", "torch"):
        assert part in out, part
    assert ("step 2, epoch 0; can be resumed" in out) == (source == "best.ckpt")
    name = "bert.encoder.layer.*.attention.self.query.delta.lora_A"
    line = next(line for line in out.splitlines() if line.endswith("self.query.delta.lora_A"))
    assert "2 × (2×32)" in line and (line.endswith(" " + name) if width == 140 else "…" in line)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    inject(model, LoRA(r=2, modules_to_save="classifier"))
    names = set(trainable_names(model))
    return [p for n, p in model.named_parameters() if n in names]


def test_inspect_is_fast_and_runs_nothing(run, tmp_path):
    """No torch is needed, and a pickle that wants to run code does not."""
    folder, _ = run
    code = "import sys; from lightning_peft.cli import main; code = main(sys.argv[1:]);"
    code += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules); sys.exit(code)"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code, "inspect", str(folder / "best.ckpt")], check=True, capture_output=True)
    assert time.monotonic() - begin < 2.5
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    content = torch.load(folder / "best.ckpt", weights_only=True) | {"evil": Evil()}
    torch.save(content, tmp_path / "evil.ckpt")
    assert call("inspect", tmp_path / "evil.ckpt") == 0
    assert not mark.exists()


def test_inspect_folders_of_peft(tmp_path, capsys):
    model = bert()
    inject(model, LoRA(r=3, target_modules="query", modules_to_save="classifier"))
    export_peft(model, tmp_path / "p")
    out = _shown(capsys, tmp_path / "p")
    for part in ("LORA of peft (import_peft reads it)", "r=3", "query", "classifier", "SEQ_CLS"):
        assert part in out


def _plain(folder: Path) -> Path:
    save_file({"a": torch.ones(1)}, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def _cut(folder: Path) -> Path:
    model = bert()
    inject(model, LoRA(r=2))
    save_adapter(model, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-7])
    return folder / "cut.safetensors"


def _plain_ckpt(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(1)}}, folder / "plain.ckpt")
    return folder / "plain.ckpt"


def _custom(folder: Path) -> Path:
    net = nn.Sequential(nn.Linear(2, 2))
    inject(net, LoRA(r=1))
    save_adapter(net, folder / "net.safetensors")
    return folder / "net.safetensors"


def _peft_folder(folder: Path) -> Path:
    model = bert()
    inject(model, LoRA(r=2))
    export_peft(model, folder / "p")
    return folder / "p"


WRONG = [
    ("inspect", lambda f: f / "none.ckpt", "none.ckpt does not exist"),
    ("inspect", lambda f: f, "is a folder without an adapter.safetensors"),
    ("inspect", _plain, "no 'lightning_peft' section: a plain model or checkpoint"),
    ("inspect", _plain_ckpt, "no 'lightning_peft' section: a plain model or checkpoint"),
    ("inspect", _cut, "is broken or no adapter"),
    ("export", lambda f: f / "none.ckpt", "none.ckpt does not exist"),
    ("export", _plain, "is a plain safetensors file without a 'lightning_peft' section"),
    ("export", _plain_ckpt, "is a plain checkpoint without"),
    ("merge", lambda f: f, "is a folder without adapter.safetensors"),
    ("merge", _peft_folder, "was written by peft: import_peft(model, folder) reads it"),
    ("merge", _custom, "does not say where its base came from"),
]


@pytest.mark.parametrize(("command", "make", "message"), WRONG)
def test_one_line_for_each_error(command, make, message, tmp_path, capsys):
    words = [command, make(tmp_path), *([] if command == "inspect" else [tmp_path / "out"])]
    assert call(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lightning-peft: error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_words_and_foreign_bases(run, tmp_path, capsys):
    folder, _ = run
    assert call("export", folder / "best.ckpt") == 2
    assert "the following arguments are required: DIR. See lightning-peft export --help" in capsys.readouterr().err
    assert call("merge", "--help") == 0 and "--base" in capsys.readouterr().out
    file = tmp_path / "file"
    file.write_text("")
    assert call("merge", folder / "best.ckpt", file) == 2 and "is a file; give a folder" in capsys.readouterr().err
    assert call("export", folder / "best.ckpt", file) == 2 and "is a file; give a folder" in capsys.readouterr().err
    assert call("export", _custom(tmp_path), tmp_path / "o", "--base", folder / "base") == 2
    assert "Sequential, which is no class of transformers" in capsys.readouterr().err
    model = llama()
    model.config._name_or_path = str(tmp_path / "llama")
    model.save_pretrained(tmp_path / "llama")
    inject(model, PrefixTuning(2))
    save_adapter(model, tmp_path / "prefix.safetensors")
    assert call("merge", tmp_path / "prefix.safetensors", tmp_path / "o") == 2
    assert "PrefixTuning cannot be merged" in capsys.readouterr().err
    assert call("export", tmp_path / "prefix.safetensors", tmp_path / "o") == 2
    assert "positions='keep'" in capsys.readouterr().err
    words = ["fit", "--config", "quickstart.yaml", "--trainer.logger", "false", "--ckpt_path", folder / "adapter"]
    assert call(*words) == 2 and "is a folder; give a .ckpt in it" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# ---- folders of ours wherever a file is taken ----------------------------------------------------------------------
def test_folders_stand_for_files(tmp_path):
    for name in ("a", "b"):
        net = bert()
        inject(net, Houlsby())
        save_adapter(net, tmp_path / name / "adapter.safetensors")
    model = bert()
    load_adapter(model, tmp_path / "a")
    fused = bert()
    inject(fused, AdapterFusion({n: str(tmp_path / n) for n in ("a", "b")}))
    module = TaskModule(bert(), "sequence-classification", label_names=NAMES)
    fitted = trainer(tmp_path, PEFT(init_from=str(tmp_path / "a")), max_epochs=1, limit_train_batches=1)
    fitted.fit(module, loader("bert"))
    export_peft_folder = tmp_path / "p"
    net = bert()
    inject(net, LoRA(r=2))
    export_peft(net, export_peft_folder)
    with pytest.raises(CheckpointError, match=r"written by peft: import_peft\(model, folder\) reads it"):
        load_adapter(bert(), export_peft_folder)
    with pytest.raises(CheckpointError, match=r"a folder without adapter.safetensors"):
        load_adapter(bert(), tmp_path)
    assert json.loads((export_peft_folder / "adapter_config.json").read_text())["r"] == 2
