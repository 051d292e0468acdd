"""What is printed fits the terminal and is broken between words; help for the parts of a config fits a screen."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from lightning_peft.cli import main
from lightning_peft.cli.bar import Bar
from lightning_peft.cli.screen import row
from lightning_peft.cli.terminal import say_error
from lightning_peft.method import registry
from tests.models import Plain, plain_loader, trainer


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_bar_takes_one_line(width, tmp_path):
    """With two losses, a diverging one among them, thousands of steps, and epochs counted from one."""
    bar = Bar()
    run = trainer(tmp_path, bar, enable_progress_bar=True, max_epochs=1)
    bar._console = Console(width=width, force_terminal=True, file=io.StringIO())
    run.fit(Plain(), plain_loader())
    assert bar._get_train_description(0).strip() == "Epoch 1/1"
    bar._metric_component.update({"train_loss": 123456.789, "val_loss": 0.123456})
    run.state.fn, run.sanity_checking = "fit", False
    bar.train_progress_bar_id = 0
    bar._console = Console(width=width, force_terminal=True, file=io.StringIO())
    progress = Progress(*bar.configure_columns(run), bar._metric_component, console=bar._console)
    progress.add_task(bar._get_train_description(0), total=9999, completed=1234)
    shown = Console(width=width, file=io.StringIO())
    shown.print(progress.get_renderable())
    lines = shown.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1 and "train_loss: 1.235e+05 val_loss: 0.1235" in lines[0], lines


@pytest.mark.parametrize("width", [80, 140])
def test_lines_are_broken_between_words(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stderr", Terminal())
    text = "--peft.r: " + "expected int, got something else. " * 8
    say_error(text)
    lines = sys.stderr.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert " ".join(lines) == f"lightning-peft: error: {text}".rstrip()
    long = "lightning-peft fit --resume --output_dir runs/a_folder_with_a_long_name/of_mine --trainer.max_epochs 6"
    shown = row("train on", long, 80)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert shown.splitlines()[1].endswith(" \\")
    assert " ".join(shown.replace("\\\n", " ").split()) == f"train on {long}"
    assert row("train on", long, None) == f"  train on       {long}"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            "data",
            ["TextDataModule", "ImageDataModule", "AudioDataModule", "lightning-peft fit --data.help TextDataModule"],
        ),
        ("model", ["--model.task", "--model.lr ", "lightning-peft fit --model.help TaskModule"]),
        ("peft", ["LoRA", "AdapterFusion", "lightning-peft methods"]),
    ],
)
def test_help_for_a_part_fits_a_screen(part, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["fit", f"--{part}.help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    # other tests define methods of their own, which are listed as well
    strangers = [kind for kind in registry().values() if not kind.__module__.startswith("lightning_peft.")]
    assert len(out.splitlines()) <= 24 + len(strangers) and max(map(len, out.splitlines())) <= 80


def test_commands_can_be_copied_from_a_folder_with_a_space(tmp_path, monkeypatch, capsys):
    from tests.cli.test_first_hour import CONFIG, ROWS

    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    Path("rows.csv").write_text(ROWS)
    words = ["--output_dir", "my runs", "--trainer.limit_train_batches", "1"]
    assert main(["fit", "--config", "config.yaml", *words]) == 0
    assert "lightning-peft test --ckpt_path 'my runs/checkpoints/best.ckpt'" in capsys.readouterr().out
