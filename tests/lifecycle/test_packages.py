"""`lightning.pytorch` and `pytorch_lightning` are served by one code base, whichever is imported, and in any order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import packages

pytestmark = pytest.mark.slow

LIFE_CYCLE = [
    "tests/lifecycle",
    "tests/contract/test_trainer.py",
    "tests/test_adapter_drop.py",
    "tests/test_module.py",
    "tests/test_module_loading.py",
    "tests/test_prediction_writer.py",
    "tests/data/test_resume.py",
    "tests/data/test_text.py",
]


@pytest.mark.parametrize("mode", packages.MODES)
@pytest.mark.timeout(1500)
def test_the_life_cycle_under_pytorch_lightning(mode, tmp_path):
    """All tests of the life cycle, of a user of `pytorch_lightning`, without and with the other package imported."""
    done = packages.run(mode, tmp_path, *LIFE_CYCLE, "-m", "not slow")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 250, done.stdout[-2000:]


def python(code: str, *arguments: object) -> str:
    """Run code in a new process, in which no package of Lightning is imported yet."""
    environment = {**os.environ, "PYTHONPATH": str(packages.ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


BASES = """
import sys
for name in sys.argv[1:]:
    __import__(name)
import lightning_peft

PAIRS = {
    "Callback": ["PEFT", "MergeOnFitEnd", "TrainabilityCheck", "LogAdapter", "PredictionWriter", "AdapterDrop"],
    "LightningModule": ["TaskModule"],
    "LightningDataModule": ["TextDataModule", "ImageDataModule", "AudioDataModule"],
}
classes = {base: [getattr(lightning_peft, name) for name in names] for base, names in PAIRS.items()}
served = []
for name in ("lightning.pytorch", "pytorch_lightning"):
    package = sys.modules.get(name)
    if package is None:
        continue
    results = {issubclass(kind, getattr(package, base)) for base, kinds in classes.items() for kind in kinds}
    assert len(results) == 1, (name, results)
    if results == {True}:
        served.append(name)
print(*served)
"""


@pytest.mark.parametrize(
    ("imported", "served"),
    [
        (["lightning.pytorch"], "lightning.pytorch"),
        (["pytorch_lightning"], "pytorch_lightning"),
        (["pytorch_lightning", "lightning.pytorch"], "lightning.pytorch pytorch_lightning"),
        ([], "lightning.pytorch pytorch_lightning"),
    ],
)
def test_our_classes_derive_from_those_of_the_imported_packages(imported, served):
    """Where none is imported yet, from those of all installed ones: an import that follows changes nothing."""
    assert python(BASES, *imported).strip() == served


TOO_LATE = """
import lightning.pytorch
from lightning_peft import PEFT, LoRA, PEFTError, load_from_checkpoint, save_adapter
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

module = BoringModel()
trainer = pl.Trainer(callbacks=[PEFT(LoRA())], logger=False, enable_checkpointing=False, accelerator="cpu")
try:
    trainer.fit(module)
except PEFTError as error:
    print(error)
assert all(parameter.requires_grad for parameter in module.parameters())

from lightning_peft import inject
adapted = BoringModel()
inject(adapted, LoRA())
save_adapter(adapted, f"{__import__('sys').argv[1]}/a.safetensors")
for target in (module, BoringModel):
    try:
        load_from_checkpoint(target, f"{__import__('sys').argv[1]}/a.safetensors")
    except PEFTError as error:
        print(error)
"""


def test_a_package_that_is_imported_too_late_is_one_clear_error(tmp_path):
    said = python(TOO_LATE, tmp_path).splitlines()
    way_out = "made for lightning.pytorch because pytorch_lightning was not imported yet. Import pytorch_lightning"
    assert len(said) == 3 and all(way_out in line for line in said), said
    assert said[0].startswith("Trainer is a Trainer of pytorch_lightning")
    assert said[1].startswith("BoringModel is a LightningModule of pytorch_lightning")


MIXED = """
import lightning.pytorch as L, pytorch_lightning as pl
from lightning_peft import PEFT, LoRA
for trainer_of, module_of in ((L, pl), (pl, L)):
    demos = __import__(f"{module_of.__name__}.demos.boring_classes", fromlist=["BoringModel"])
    trainer = trainer_of.Trainer(callbacks=[PEFT(LoRA())], logger=False, enable_checkpointing=False, accelerator="cpu")
    try:
        trainer.fit(demos.BoringModel())
    except TypeError as error:
        print(error)
"""


def test_a_module_of_one_package_in_a_trainer_of_the_other_is_one_sentence():
    """Lightning's own: its Trainer looks at the module before it calls any callback."""
    said = python(MIXED).splitlines()
    assert len(said) == 2 and all("Please switch to a single import style" in line for line in said), said


HOOKS = """
import re, sys
from pathlib import Path
import lightning.pytorch as L, pytorch_lightning as pl
from lightning_peft.lightning_packages import LightningModule, LightningDataModule

asked = set()
for file in Path(L.__file__).parent.rglob("*.py"):
    asked |= set(re.findall(r'is_overridden\\("(\\w+)"', file.read_text()))
asked |= {f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")}
asked |= {f"on_{stage}_model_{mode}" for stage in ("validation", "test") for mode in ("train", "eval")}
asked |= {"on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "validation_step"}

class Module(LightningModule):
    pass

module = Module()
for package in (L, pl):
    is_overridden = package.utilities.model_helpers.is_overridden
    for hook in sorted(asked):
        if hasattr(package.LightningModule, hook) and is_overridden(hook, module, package.LightningModule):
            print(hook)
"""


def test_an_inherited_hook_is_not_taken_for_an_overridden_one():
    """But for those that Lightning asks about only before it warns, and those that every `TaskModule` overrides."""
    found = set(python(HOOKS).split())
    harmless = {"optimizer_step", "lr_scheduler_step", "on_validation_model_eval", "on_test_model_eval"}
    assert found <= harmless | {"configure_model", "configure_optimizers", "predict_step"}, found


COMMAND = """
import sys
import lightning.pytorch, pytorch_lightning
from importlib import import_module
name, folder = sys.argv[1:]
boring = import_module(f"{name}.demos.boring_classes").BoringModel
arguments = [
    "fit",
    "--trainer.callbacks+=lightning_peft.PEFT",
    "--trainer.callbacks.method=lightning_peft.LoRA",
    "--trainer.callbacks.method.r=2",
    "--trainer.callbacks+=lightning_peft.MergeOnFitEnd",
    "--trainer.callbacks.which=last",
    f"--trainer.default_root_dir={folder}",
    "--trainer.fast_dev_run=true",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
]
cli = import_module(f"{name}.cli")
run = cli.LightningCLI(boring, args=arguments, save_config_callback=None)
print([type(callback).__name__ for callback in run.trainer.callbacks][:2], run.model.layer.delta.lora_A.shape[0])
"""


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_the_command_line_of_either_package_takes_our_callbacks(name, tmp_path):
    assert python(COMMAND, name, tmp_path).splitlines()[-1] == "['PEFT', 'MergeOnFitEnd'] 2"


WRITE = """
import sys
from importlib import import_module
name, folder = sys.argv[1:]
L = import_module(name)
cli = import_module(f"{name}.cli")
import torch
from lightning_peft import PEFT, LoRA, TaskModule

saver = L.callbacks.ModelCheckpoint(folder, filename="a")
quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 1}
model = '{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}'
arguments = [f"--model.model={model}", "--model.task=sequence-classification", "--model.num_labels=2"]
arguments += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5"]
arguments += [f"--model.lr_scheduler={name}.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=train_loss_epoch"]
run = cli.LightningCLI(
    TaskModule,
    run=False,
    save_config_callback=None,
    auto_configure_optimizers=False,
    trainer_defaults={**quiet, "callbacks": [PEFT(LoRA(r=2)), saver]},
    args=arguments,
)
batch = {"input_ids": torch.arange(32).view(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
run.trainer.fit(run.model, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
"""
READ = """
import sys
name, folder = sys.argv[1:]
__import__(name)
from lightning_peft import TaskModule, adapter_state_dict
module = TaskModule.load_from_checkpoint(f"{folder}/a.ckpt")
factory = module.scheduler_factory
optimizer = module.optimizer_factory([p for p in module.parameters() if p.requires_grad])
print(len(adapter_state_dict(module)), type(optimizer).__name__, type(factory(optimizer)).__module__)
"""


@pytest.mark.parametrize("writer", ["lightning.pytorch", "pytorch_lightning"])
def test_a_file_of_one_package_is_read_with_the_other(writer, tmp_path):
    """Its hyper-parameters name the function that builds the module, and classes, by the names of its own package."""
    reader = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}[writer]
    python(WRITE, writer, tmp_path)
    count, optimizer, scheduler = python(READ, reader, tmp_path).split()
    assert int(count) > 4 and optimizer == "SGD" and scheduler == f"{reader}.cli"
