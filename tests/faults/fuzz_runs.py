"""Whole runs from a stranger, at every door they can come in by: ``python -m tests.faults.fuzz --cases 10000``.

Hyper-parameters, states of callbacks, configs beside checkpoints and adapters, folders of peft's and templates are
changed in one or a few places, by values that want to run, import, remove or overwrite something, or that are merely
wrong. Each case must be refused in one sentence, or do no harm.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_peft import (
    PEFT,
    ImageDataModule,
    LoRA,
    PEFTError,
    PrefixTuning,
    TaskModule,
    TextDataModule,
    export_peft,
    import_peft,
    inject,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from tests.contract.battery import shake
from tests.data.conftest import build
from tests.faults import hostile
from tests.faults.hostile_runs import EVIL, Run
from tests.faults.watch import Watch
from tests.faults.workload import Net, rows
from tests.models import llama, trainer

Dice = random.Random
#: options that want to be obeyed, and the names of real ones
KEYS = [
    *("trust_remote_code", "auto_map", "code_revision", "weights_only", "custom_generate", "use_kernels", "config"),
    *("class_path", "init_args", "dict_kwargs", "_instantiator", "_class_path", "model.class_path", "init_args.loss"),
    *("loss", "optimizer", "lr_scheduler", "tokenizer", "model", "model_kwargs", "generate", "label_names", "task"),
    *("cache_dir", "offload_folder", "path", "dirpath", "save_dir", "default_root_dir", "filename", "data", "template"),
    *("callbacks", "logger", "plugins", "profiler", "strategy", "predict_data", "load_kwargs", "callbacks.class_path"),
    *("model_type", "attn_implementation", "quantization_config", "subfolder", "revision", "gguf_file", "variant"),
    *("hparams_type", "num_labels", "peft", "trainer", "ckpt_path", "subfolder", "verbalizer", "adapter_kwargs"),
]
#: places in a config where a value goes a long way
AIMS = [
    *("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.profiler", "trainer.strategy", "peft", "data"),
    *("model.init_args.loss", "model.init_args.tokenizer", "model.init_args.generate", "model.init_args.model_kwargs"),
    *("model.init_args.model", "model.init_args.optimizer", "model.init_args.lr_scheduler", "model", "weights_only"),
    *("data.init_args.data", "data.init_args.template", "data.init_args.tokenizer", "data.init_args.load_kwargs"),
    *("data.init_args.cache_dir", "data.init_args.predict_data", "peft.init_args.target_modules", "ckpt_path"),
    *("model.init_args.model.auto_map", "model.init_args.model_kwargs.trust_remote_code", "trainer.default_root_dir"),
]
#: names as a stranger may choose them: leading upward, turning the direction of writing, of four bytes a letter
NAMES = ["..", "../..", "a/../b", "a\u202egpj.exe", "\u2066x\u2069", "😀𝄞", "\x1b[2J", "a\nb", "\0", " ", "é" * 300]
TEMPLATES = [
    *(
        "{text}",
        "{label}",
        "{text.__class__}",
        "{text[0]}",
        "{text!r}",
        "{text:>9999}",
        "{}",
        "{0}",
        "{",
        "}",
        "{{",
        "}}",
    ),
    *("{prompt:3}", "{prompt:99999999999}", "{mask}", "{text.__init__.__globals__}", "word", "\n", *NAMES),
]


class Runs:
    """Sound runs to spoil, a folder of the victim's, and the doors."""

    def __init__(self, top: Path) -> None:
        self.top, self.victim, self.work = top, top / "victim", top / "work"
        self.run = Run(top / "sender", words=61)
        self.words = Run(top / "words")  # its words are those of the tokenizer that its config names
        self.words.marker = self.run.marker
        self._keeper()
        self._peft_folders()
        self.tokenizer = build(
            ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"),
            ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
            unk_token="[UNK]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
        )
        self.sound = _logits(TaskModule.load_from_checkpoint(self.run.path))
        self.inner = self.run.place / "inner.yaml"  # a further config that names code
        self.inner.write_text(yaml.safe_dump({"class_path": f"{EVIL}.Loss"}))
        self.victim.mkdir()
        (self.victim / "x.ckpt").write_text("precious")
        self.doors: dict[str, tuple[float, Callable[[Dice], str]]] = {
            "TaskModule.load_from_checkpoint": (3, self.reload),
            "data modules' load_from_checkpoint": (2, self.reload_data),
            "lightning-peft merge, export": (3, self.merge),
            "lightning-peft inspect": (4, self.inspect),
            "lightning-peft test, predict": (2, self.test),
            "Trainer.fit: states of callbacks": (3, self.resume),
            "import_peft": (4, self.peft),
            "TextDataModule(template)": (2, self.template),
        }

    def fresh(self) -> Path:
        """An empty folder to work in."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self.work

    def is_safe(self) -> bool:
        """Whether the victim's folder is as it was, and nothing of the sender's has run."""
        kept = {p.name: p.read_text() for p in self.victim.iterdir()} if self.victim.is_dir() else {}
        return kept == {"x.ckpt": "precious"} and not self.run.marker.exists()

    def repair(self) -> None:
        """After a case that went wrong."""
        shutil.rmtree(self.victim, ignore_errors=True)
        self.victim.mkdir()
        (self.victim / "x.ckpt").write_text("precious")
        self.run.marker.unlink(missing_ok=True)

    # ---- what is written --------------------------------------------------------------------------------------------
    def codes(self) -> list[Any]:
        """Values that want to run, import or write something."""
        evil, code = f"{EVIL}.function", str(self.run.code)
        calls = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_test_start": evil}}
        writes = {"class_path": "lightning_peft.PredictionWriter", "init_args": {"path": str(self.victim / "p.csv")}}
        logs = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(self.victim)}}
        opens = {"class_path": "torch.package.PackageImporter", "init_args": {"file_or_buffer": code}}
        auto = dict.fromkeys(("AutoModelForSequenceClassification", "AutoConfig"), f"{code}--modeling_x.X")
        loss = {"class_path": f"{EVIL}.Loss"}
        optimizer = {"class_path": f"{EVIL}.Optimizer", "init_args": {"lr": 1}}
        system = {"class_path": "torch.serialization.os.system"}
        return [
            *(evil, f"{EVIL}.Loss", f"{EVIL}:function", code, str(self.victim), str(self.victim / "x.ckpt")),
            *(loss, optimizer, system, calls, writes, logs, opens, "../victim", "pandas", f"pkg://{EVIL}/x"),
            *({"trust_remote_code": True}, {"auto_map": auto}, {"auto_map": auto, "trust_remote_code": True}),
            *("torch.utils.data.dataloader.os.system", "torch.hub.load", "torch.load", "os.system", "builtins.eval"),
            *([{"class_path": f"{EVIL}.Calls"}], [f"{EVIL}.Calls"], "lightning.pytorch.cli.instantiate_module"),
            *(
                json.dumps(spec)
                for spec in (loss, calls, writes, logs, {"trust_remote_code": True}, {"auto_map": auto})
            ),
            *("trust_remote_code: true", str(self.inner), {"data_files": f"filecache::file://{code}/config.json"}),
            *("{text.__class__}", *NAMES),
        ]

    def spoil(self, dice: Dice, content: Any, keys: list[str] = KEYS) -> None:
        """Change one to three places, at any depth."""
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            place = content
            while True:
                inner = list(place) if isinstance(place, dict) else range(len(place))
                if not inner:
                    break
                key = dice.choice(list(inner))
                if not isinstance(place[key], (dict, list)) or not place[key] or dice.random() < 0.25:
                    break
                place = place[key]
            value = copy.deepcopy(dice.choice(self.codes() if dice.random() < 0.6 else hostile.VALUES))
            if isinstance(place, list):
                place[dice.randrange(len(place))] = value
            elif dice.random() < 0.5 or not place:
                place[dice.choice([*keys, *NAMES] if dice.random() < 0.9 else NAMES)] = value
            elif dice.random() < 0.15:
                del place[dice.choice(list(place))]
            else:
                place[dice.choice(list(place))] = value

    def aim(self, dice: Dice, config: dict[str, Any]) -> None:
        """Put one of the values that want something where it goes a long way."""
        *outer, last = dice.choice(AIMS).split(".")
        place = config
        for key in outer:
            place = place.setdefault(key, {})
        sound = [{"trust_remote_code": True}, {"max_new_tokens": 3}, True, False, None, str(self.work / "run"), []]
        sound += [[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}]]
        sound += [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}]
        sound += [[{"class_path": "PredictionWriter", "init_args": {"path": str(self.work / "run" / "p.csv")}}]]
        value = copy.deepcopy(dice.choice(self.codes() if dice.random() < 0.7 else sound))
        place[last] = [value] if last == "callbacks" and isinstance(value, dict) else value

    def checkpoint(self, dice: Dice, key: str = "hyper_parameters") -> Path:
        """A checkpoint with other hyper-parameters."""
        content = copy.deepcopy(self.run.checkpoint)
        parameters = content.setdefault(key, {})
        if dice.random() < 0.4:
            parameters["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        if dice.random() < 0.3:
            parameters["model_kwargs"] = {"trust_remote_code": True}
        names = ["loss", "optimizer", "lr_scheduler", "tokenizer", "generate", "model", "model_kwargs"]
        self.spoil(dice, parameters, names if dice.random() < 0.5 else KEYS)
        if dice.random() < 0.1:
            content[dice.choice(("hparams", "module_arguments", "hparams_name", "hparams_type"))] = dice.choice(
                [*self.codes(), *hostile.VALUES, {"loss": f"{EVIL}.function"}]
            )
        path = self.work / dice.choice(("a.ckpt", "a.ckpt", "ä\u202e.ckpt", "😀.ckpt", "..ckpt", f"{EVIL}.ckpt"))
        torch.save(content, path)
        return path

    # ---- the doors: each returns "refused" or "harmless", and raises for anything else --------------------------
    def reload(self, dice: Dice) -> str:
        """Hyper-parameters build a module."""
        self.fresh()
        path = self.checkpoint(dice)
        load = dice.choice((TaskModule.load_from_checkpoint, lambda p: load_from_checkpoint(TaskModule, p)))
        return refused(lambda: _logits(load(path)))

    def reload_data(self, dice: Dice) -> str:
        """Hyper-parameters build a data module, which then reads its rows."""
        self.fresh()
        content = copy.deepcopy(self.run.checkpoint)
        kind = dice.choice((TextDataModule, ImageDataModule))
        parameters: dict[str, Any] = {"data": str(self.run.place / "rows.csv")}
        if dice.random() < 0.5:
            parameters["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        self.spoil(dice, parameters)
        content["datamodule_hyper_parameters"] = parameters
        torch.save(content, self.work / "a.ckpt")

        def build_and_read() -> None:
            data = kind.load_from_checkpoint(self.work / "a.ckpt")
            if kind is TextDataModule:
                data.tokenizer = self.tokenizer
            data.setup("fit")

        return refused(build_and_read)

    def merge(self, dice: Dice) -> str:
        """A checkpoint, or an adapter with a config beside it."""
        self.fresh()
        if dice.random() < 0.5:
            path = self.checkpoint(dice)
        else:
            path = self.work / "adapter"
            shutil.copytree(self.run.folder / "adapter", path)
            config = self.run.config()
            self.spoil(dice, config["model"] if dice.random() < 0.7 else config)
            write_yaml(path / "config.yaml", config, dice)
        return command(dice.choice(("merge", "export")), path, self.work / "out")

    def inspect(self, dice: Dice) -> str:
        """A file or folder of any kind is looked at."""
        self.fresh()
        kind = dice.choice(("parameters", "content", "bytes", "peft"))
        if kind == "peft":
            path = self.spoiled_folder(dice)
        elif kind == "parameters":
            path = self.checkpoint(dice)
        else:
            path = self.work / dice.choice(("a.ckpt", "a.safetensors", "a\u202e.ckpt"))
            content = copy.deepcopy(self.run.checkpoint)
            if kind == "bytes":
                source = self.run.path if dice.random() < 0.5 else self.run.folder / "adapter" / "adapter.safetensors"
                path.write_bytes(dice.choice(hostile.BYTES)(dice, bytearray(source.read_bytes())))
            else:
                dice.choice(hostile.CONTENT)(dice, content["state_dict"], content[hostile.SECTION])
                torch.save(content, path)
        return command("inspect", path)

    def test(self, dice: Dice) -> str:
        """The config beside a checkpoint is found."""
        self.fresh()
        run = self.words
        folder = self.work / "run"
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(run.path, folder / "checkpoints" / "best.ckpt")
        config = run.config()
        config["trainer"]["default_root_dir"] = dice.choice((str(folder), "run", str(self.victim), "../victim", "."))
        if dice.random() < 0.6:
            self.aim(dice, config)
        else:
            part = dice.choice(("model", "data", "trainer", "trainer", "peft", None))
            self.spoil(dice, config[part] if part else config)
        write_yaml(folder / "config.yaml", config, dice)
        return command(dice.choice(("test", "predict")), "--ckpt_path", folder / "checkpoints" / "best.ckpt")

    def resume(self, dice: Dice) -> str:
        """States of callbacks name files that are then deleted."""
        folder = self.fresh() / "run"
        shutil.copytree(self.kept, folder, symlinks=True)
        (folder / "link").symlink_to(self.victim)
        content = torch.load(folder / "last.ckpt", weights_only=True)
        old = str(self.kept)
        text = {k: _moved(v, old, str(folder)) for k, v in content["callbacks"].items()}
        content["callbacks"] = text
        state = text[next(k for k in text if k.startswith("ModelCheckpoint"))]
        paths = [
            *(
                f"{folder}/../../victim",
                f"{folder}/sub/../../../victim/x.ckpt",
                f"{folder}/link/x.ckpt",
                f"{folder}/link",
            ),
            *(str(self.victim), f"local://{self.victim}/x.ckpt", f"file://{self.victim}/x.ckpt", "s3://bucket/x.ckpt"),
            *("../victim/x.ckpt", "", str(folder), f"{folder}/epoch=0.ckpt", f"{self.kept}/epoch=0.ckpt", *NAMES),
        ]
        fields = ("best_model_path", "last_model_path", "kth_best_model_path", "best_k_models", "dirpath")
        for _ in range(dice.choice((1, 1, 2, 3))):
            name = dice.choice(fields)
            value: Any = dice.choice(paths) if dice.random() < 0.8 else copy.deepcopy(dice.choice(hostile.VALUES))
            if name == "best_k_models" and isinstance(value, str):
                state["kth_best_model_path"] = value
                value = {value: torch.tensor(dice.choice((10.0, 0.0, float("nan"))))}
            state[name] = value
        if dice.random() < 0.2:
            self.spoil(dice, text, ["best_model_score", "kth_value", "wait_count", "patience", "stopped_epoch"])
        if dice.random() < 0.1:
            content["pytorch-lightning_version"] = dice.choice(("0.9.0", "1.5.0", "9.0", "", 3, None))
            content["checkpoint_callback_best_model_path"] = str(self.victim)
        torch.save(content, folder / "bad.ckpt")
        keeper = _saver(folder)
        run = trainer(self.work, PEFT(LoRA(r=2)), keeper, EarlyStopping("score", patience=9), max_epochs=3)
        return refused(lambda: run.fit(Falling(12), rows(), ckpt_path=folder / "bad.ckpt"))

    def peft(self, dice: Dice) -> str:
        """A folder of peft's."""
        self.fresh()
        path = self.spoiled_folder(dice)
        net, inputs = (llama(), {"input_ids": torch.arange(5, 14)[None]}) if self.kind == "prefix" else (_plain(), None)

        def load() -> None:
            import_peft(net, path)
            result = net(**inputs).logits if inputs else net(torch.ones(1, 8))
            # Fields may say alpha=1e308, which is a useless adapter and no broken file. So may the bytes of the
            # weights: peft's format has no checksum.
            assert self.fields or _is_huge(path) or torch.isfinite(result).all(), "an adapter of no use"

        before = {n: t.clone() for n, t in net.state_dict().items()}
        outcome = refused(load)
        if outcome == "refused":
            after = net.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items()), "changed"
        return outcome

    def template(self, dice: Dice) -> str:
        """A template reads columns, and nothing else of a row."""
        text = "".join(dice.choice(TEMPLATES) for _ in range(dice.choice((1, 2, 3))))
        task = dice.choice(("sequence-classification", "masked-cloze"))
        words = dict.fromkeys(("red", "green", "blue"), "w1") if task == "masked-cloze" else None

        def read() -> None:
            data = TextDataModule(
                str(self.run.place / "rows.csv"), task=task, template=text, tokenizer=self.tokenizer, verbalizer=words
            )
            data.setup("fit")
            ids = [token for row in data._ready["train"]["input_ids"][:3] for token in row]
            shown = self.tokenizer.decode([i for i in ids if i >= 0])
            assert "class" not in shown and "object" not in shown, shown

        return refused(read)

    # ---- sound folders ----------------------------------------------------------------------------------------------
    def _keeper(self) -> None:
        self.kept = self.top / "kept"
        trainer(self.top, PEFT(LoRA(r=2)), _saver(self.kept), EarlyStopping("score", patience=9), max_epochs=1).fit(
            Falling(12), rows()
        )

    def _peft_folders(self) -> None:
        self.folders = {"lora": self.top / "peft_lora", "prefix": self.top / "peft_prefix"}
        net, model = _plain(), llama()
        inject(net, LoRA(r=2, rank_pattern={"0": 3}, modules_to_save="2"))
        inject(model, PrefixTuning(num_virtual_tokens=3, positions="shift"))
        for kind, module in (("lora", net), ("prefix", model)):
            shake(module)
            export_peft(module, self.folders[kind])

    def spoiled_folder(self, dice: Dice) -> Path:
        """A folder of peft's with another configuration, or with broken bytes."""
        self.kind = dice.choice(("lora", "lora", "prefix"))
        path = self.work / dice.choice(("adapter", "a\u202e", "😀"))
        shutil.copytree(self.folders[self.kind], path)
        config = path / "adapter_config.json"
        self.fields = True
        if dice.random() < 0.25:
            file = dice.choice((config, path / "adapter_model.safetensors"))
            self.fields = file == config
            file.write_bytes(dice.choice(hostile.BYTES)(dice, bytearray(file.read_bytes())))
            return path
        fields = json.loads(config.read_text())
        names = ["auto_mapping", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_type", "r"]
        names += ["layers_pattern", "init_lora_weights", "base_model_name_or_path", "bias", "use_dora", "task_type"]
        self.spoil(dice, fields, names)
        if dice.random() < 0.3:
            patterns = ["(a+)+$", r"(\w+\.?)+X", "(", ".*" * 30 + "X", "(?:" * 200, r"((((\w*)*)*)*)*X"]
            fields[dice.choice(names)] = dice.choice([{dice.choice(patterns): 3}, dice.choice(patterns)])
        with contextlib.suppress(TypeError):  # bytes are not in this format
            text = json.dumps(fields)
            config.write_text("[" * 100_000 if dice.random() < 0.02 else text)
        return path


class Falling(Net):
    """Its loss gets better with every epoch, so that checkpoints are replaced."""

    def training_step(self, batch, index):
        self.log("score", 10.0 - self.current_epoch, on_epoch=True, on_step=False)
        return super().training_step(batch, index)


def _saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="score", filename="{epoch}", save_top_k=1, save_last=True)


def _is_huge(folder: Path) -> bool:
    """Whether a folder of peft's has weights whose products overflow."""
    tensors = load_file(folder / "adapter_model.safetensors").values()
    return any(t.is_floating_point() and t.numel() and t.abs().max() > 1e6 for t in tensors)


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3))


def _logits(module: TaskModule) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().model(input_ids=torch.arange(5, 14)[None]).logits


def _moved(value: Any, old: str, new: str) -> Any:
    """Plain values with other paths."""
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    return value.replace(old, new) if isinstance(value, str) else value


def write_yaml(path: Path, config: Any, dice: Dice) -> None:
    """A config as text, now and then broken or deep."""
    try:
        text = yaml.safe_dump(config, allow_unicode=True)
    except yaml.YAMLError:
        text = "a: ["
    form = dice.random()
    if form < 0.02:
        text = "[" * 5000
    elif form < 0.04:
        text = "a: &a [x, x]\nb: &b [*a, *a]\n" + text
    elif form < 0.06:
        text = text.replace("class_path", "? class_path\n", 1)
    elif form < 0.08:
        text += f"\nx: !!python/object/apply:os.system ['touch {path}.marker']\n"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def refused(call: Callable[[], Any]) -> str:
    """Call, and look at the error; one of another kind is not ours."""
    try:
        call()
    except PEFTError as error:
        text = str(error)
        assert len(text) < 2500 and "\n" not in text and text.isprintable(), f"{len(text)} characters: {text[:3000]!r}"
        return "refused"
    return "harmless"


def command(*words: Any) -> str:
    """A command in this process: status 0, or 2 and one line of error."""
    said, shown, before = io.StringIO(), io.StringIO(), os.getcwd()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    assert os.getcwd() == before
    lines = [line for line in said.getvalue().splitlines() if line.startswith("lightning-peft: error: ")]
    assert "Traceback" not in said.getvalue(), said.getvalue()[-2000:]
    assert status in (0, 2) and len(lines) == (status == 2), f"status {status}: {said.getvalue()[-1000:]}"
    for line in lines:
        assert len(line) < 2500 and line.isprintable(), line[:3000]
    if words[0] == "inspect":
        text = shown.getvalue()
        assert all(letter.isprintable() or letter == "\n" for letter in text), text[:2000]
    return "refused" if status else "harmless"


def temporary(top: Path) -> None:
    """Let temporary files lie below the folder that is watched."""
    place = top / "tmp"
    place.mkdir()
    tempfile.tempdir = str(place)


SECONDS = 60


def fuzz_runs(cases: int, seed: int, first: int = 0) -> tuple[collections.Counter, list[str]]:
    """So many cases; counts by door and outcome, and what went wrong, with what each case did beside its result."""
    found: collections.Counter = collections.Counter()
    wrong: list[str] = []
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    before, path, place = os.getcwd(), list(sys.path), tempfile.tempdir
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        temporary(top)
        runs = Runs(top)
        sys.path.insert(0, str(runs.run.place))
        watch = Watch([runs.work, top / "tmp"], (EVIL, "transformers_modules", "modeling_x", "nowhere"))
        (top / "elsewhere").mkdir()
        os.chdir(top / "elsewhere")
        try:
            for number in range(first, first + cases):
                _one(runs, watch, number, seed, found, wrong)
        finally:
            os.chdir(before)
            sys.path[:], tempfile.tempdir = path, place
    return found, wrong


def _one(runs: Runs, watch: Watch, number: int, seed: int, found: collections.Counter, wrong: list[str]) -> None:
    """One case, judged by its outcome and by what it did."""
    dice = random.Random(f"{seed}:{number}")
    doors = list(runs.doors)
    door = dice.choices(doors, [weight for weight, _ in runs.doors.values()])[0]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = []
    outcome = "WRONG"
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the process's own time: the machine may be busy
    signal.alarm(20 * SECONDS)
    with watch.on() as seen:
        try:
            outcome = runs.doors[door][1](dice)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
            problems.append(f"{type(error).__name__}: {str(error)[:1500]} ({' '.join(frames)})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
    for kind, what in seen.items():
        found["did", kind] += len(what)
        problems += [f"{kind}: {one}" for one in what[:3]]
    if not runs.is_safe():
        problems.append("the victim's folder was changed, or the sender's code ran")
        runs.repair()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if grown > 700:
        problems.append(f"{grown:.0f} MB taken")
    for module in [m for m in sys.modules if m.split(".")[0] in watch.foreign]:
        del sys.modules[module]
    found[door, "WRONG" if problems else outcome] += 1
    wrong += [f"{number}: {door}: {problem}" for problem in problems]


def too_long(*_: Any) -> None:
    """The alarm."""
    raise TimeoutError(f"more than {SECONDS} seconds")
