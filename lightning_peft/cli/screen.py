"""The last screen of a fit: the result, where everything is, what to do next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from lightning_peft.callbacks import MergeOnFitEnd
from lightning_peft.cli.folder import newest_checkpoint
from lightning_peft.cli.terminal import command, filled, width_of
from lightning_peft.files import near
from lightning_peft.lightning_packages import L
from lightning_peft.model.summary import size, summarize
from lightning_peft.trainer.best import best_adapter, best_path


def finish(
    trainer: L.Trainer, model: L.LightningModule, metrics: dict[str, float], seconds: float, speed: float | None
) -> None:
    """Write the adapter file beside the checkpoints and print the screen (rank zero)."""
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.default_root_dir)
    saved, _ = best_adapter(trainer, model)
    adapter = folder / "adapter.safetensors"
    saved.write(adapter)
    summary = summarize(model)
    names = " + ".join(m["name"] for m in summary["methods"])
    minutes, rest = divmod(int(seconds), 60)
    steps = f"{trainer.global_step:,} step{'s' if trainer.global_step != 1 else ''}"
    console = Console(highlight=False, soft_wrap=True)
    width = width_of(sys.stdout)
    trained = f": {summary['trainable']:,} of {summary['total']:,} parameters trained ({summary['percent']:.2f} %)"
    pace = f", {speed:,.0f} tokens/s" if speed else ""
    headline = filled(f"{names}{trained}, {steps} in {minutes} min {rest:02d} s{pace}", width)
    console.print(f"\n[bold]{names}[/]{headline.removeprefix(names)}")
    for name, value in sorted(metrics.items()):
        console.print(f"  {name:<14} [bold]{value:.4f}[/]")
    places = _places(trainer, adapter, folder)
    for label, text in places:
        console.print(row(label, text, width), markup=False)
    console.print("[bold]Next[/]")
    for label, text in _next(trainer, places, adapter):
        console.print(row(label, text, width), markup=False)


def row(label: str, text: str, width: int | None) -> str:
    """A label and what belongs to it; below it, where both have no room in a line.

    >>> print(row("measure", "lightning-peft test", 40))
      measure        lightning-peft test
    >>> print(row("measure", "lightning-peft test", 30))
      measure
        lightning-peft test
    """
    line = f"  {label:<14} {text}"
    return line if width is None or len(line) <= width else f"  {label}\n{command(text, width, '    ')}"


def _places(trainer: L.Trainer, adapter: Path, folder: Path) -> list[tuple[str, str]]:
    rows = [("adapter", _file(adapter))]
    checkpoint = _checkpoint(trainer, folder)
    if checkpoint:
        rows.append(("checkpoint", _file(checkpoint)))
    merged = next((c.dirpath for c in trainer.callbacks if isinstance(c, MergeOnFitEnd) and c.dirpath), None)
    if merged and Path(merged).is_dir():
        total = sum(f.stat().st_size for f in Path(merged).iterdir() if f.is_file())
        rows.append(("merged model", f"{near(Path(merged))} ({size(total)})"))
    if (folder / "config.yaml").exists():
        rows.append(("config", near(folder / "config.yaml")))
    for logger in trainer.loggers:
        if isinstance(logger, L.loggers.WandbLogger):
            run = logger.experiment
            offline = run.settings.mode == "offline" or run.offline
            rows.append(("W&B, offline", near(Path(run.dir).parent)) if offline else ("W&B", str(run.url)))
    return rows


def _next(trainer: L.Trainer, places: list[tuple[str, str]], adapter: Path) -> list[tuple[str, str]]:
    folder = Path(trainer.default_root_dir)
    checkpoint = _checkpoint(trainer, folder)
    rows = []
    if checkpoint:
        path = shlex.quote(str(near(checkpoint)))
        rows.append(("measure", f"lightning-peft test --ckpt_path {path}"))
        rows.append(("predict", f"lightning-peft predict --ckpt_path {path}"))
    if newest_checkpoint(folder):
        longer = f"--trainer.max_epochs {2 * (trainer.max_epochs or 1)}"
        if trainer.max_steps > 0:
            longer = f"--trainer.max_steps {2 * trainer.max_steps}"
        rows.append(("train on", f"lightning-peft fit --resume --output_dir {shlex.quote(str(near(folder)))} {longer}"))
    rows.append(("swap in", f'lightning_peft.load_adapter(model, "{near(adapter)}")'))
    merged = next((text.split(" (")[0] for label, text in places if label == "merged model"), None)
    offline = next((text for label, text in places if label == "W&B, offline"), None)
    if offline:
        rows.append(("upload", f"wandb sync {shlex.quote(offline)}"))
    if merged:
        rows.append(("plain", f'transformers.AutoModel….from_pretrained("{merged}")'))
    return rows


def _checkpoint(trainer: L.Trainer, folder: Path) -> Path | None:
    """The best checkpoint; where none was chosen by a metric, the newest."""
    best = best_path(trainer)
    return Path(best) if best else newest_checkpoint(folder)


def _file(path: Path) -> str:
    return f"{near(path)} ({size(path.stat().st_size)})"
