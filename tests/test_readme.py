"""README's snippets run, its commands parse, its pictures exist; the examples do what they say."""

from __future__ import annotations

import importlib.util
import re
import shlex

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.cli import main
from tests.models import Plain, plain_loader


def blocks(root, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


class Data(L.LightningDataModule):
    """What README calls ``data``."""

    train_dataloader = val_dataloader = staticmethod(plain_loader)


def test_python_snippets_run_in_order(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(root, "python")).replace("L.Trainer(", "L.Trainer(max_epochs=1, logger=False, ")
    names = {"L": L, "ModelCheckpoint": ModelCheckpoint, "MyModule": Plain, "module": Plain(), "network": Plain().net}
    exec(compile(code, "README.md", "exec"), names | {"data": Data()})
    assert (tmp_path / "merged/model.safetensors").exists() and (tmp_path / "adapter.safetensors").exists()


def test_commands_parse(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(root, "bash") for line in block.splitlines()]
    ours = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lightning-peft")]
    assert len(ours) == 11
    for words in ours:
        if words[0] == "methods":
            assert main(words) == 0
        elif "--resume" in words:  # the run is not there
            assert main(words) == 2 and "runs/reviews holds no config.yaml" in capsys.readouterr().err
        elif words[0] == "fit":
            assert main([*words, "--print_config"]) == 0, capsys.readouterr().err
        elif words[0] == "compare":  # understood up to the last word
            assert main([*words, "--budget", "none"]) == 2 and "--budget none: " in capsys.readouterr().err
        else:  # the checkpoint is not there: the command is understood, and says so
            config = ["--config", "quickstart.yaml"] if words[0] in ("test", "predict") else []
            assert main([words[0], *config, *words[1:]]) == 2
            assert "best.ckpt does not exist" in capsys.readouterr().err


def test_links_lead_somewhere(root):
    text = (root / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), target
    for path in re.findall(r"`((?:examples|tests|configs|\.ci|lightning_peft)/[\w./]*)`", text):
        assert (root / path).exists(), path


def test_every_method_is_listed(root):
    from lightning_peft.method import registry

    text = (root / "README.md").read_text()
    ours = [n for n, k in registry().items() if k.__module__.startswith("lightning_peft.")]
    assert [n for n in ours if f"`{n}`" not in text] == []


def example(root, name: str):
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop(root, tmp_path):
    before, after = example(root, "plain_loop").main(str(tmp_path / "a.safetensors"))
    assert after < 0.1 < before


def test_fabric_loop(root, tmp_path):
    """The file holds the adapter and its optimizer's two moments, and the run goes on from it exactly."""
    loss, equal, share = example(root, "fabric_loop").main(str(tmp_path))
    assert loss < 0.6 and equal and share < 0.15
    content = torch.load(tmp_path / "step30.ckpt", weights_only=True)
    assert len(content["model"]) == 6 and all(".delta." in name for name in content["model"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", "tones"])
def test_prefix_media(root, kind):
    """On an image model and on a speech model a prefix adds to what a new head alone learns."""
    found = example(root, "prefix_media").compare(kind, rates=[1e-2])
    assert found["first task, full"] > 0.8
    assert found["second, prefix and head"] > found["second, head alone"] + 0.04


@pytest.mark.slow
def test_own_module(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live, reloaded = example(root, "own_module").main(str(tmp_path), epochs=1)
    assert live["val_accuracy"] > 0.5 and reloaded["val_loss"] == pytest.approx(live["val_loss"], abs=1e-4)
