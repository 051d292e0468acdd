"""Checkpoints, adapters and configs that want to run code, at every entry point; see `tests.faults.hostile_runs`."""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning.pytorch as L
import peft
import pytest
import torch
import transformers
import yaml

from lightning_peft import (
    CheckpointError,
    ConfigError,
    ImageDataModule,
    LoRA,
    PEFTError,
    TaskModule,
    TextDataModule,
    adapter_state_dict,
    export_peft,
    import_peft,
    inject,
    load_adapter,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from lightning_peft.cli.base import open_adapter
from lightning_peft.cli.peek import peek
from lightning_peft.data.sources import read
from lightning_peft.folders import _Unpickler
from lightning_peft.formats.folder import read_folder
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.trainer.kept_files import is_inside
from lightning_peft.untrusted import check_extent, known_class, settle_parameters, with_known_classes
from tests.faults.hostile_runs import CASE, CONFIGS, EVIL, MODEL, PARAMETERS, Run, with_config, with_parameters
from tests.task_cases import NAMES

INSTANTIATOR = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run, made once."""
    return Run(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def evil_can_be_imported(run, monkeypatch):
    """The worst case: the sender's module lies where Python finds it."""
    monkeypatch.syspath_prepend(str(run.place))
    monkeypatch.chdir(run.place)
    yield
    run.marker.unlink(missing_ok=True)
    for name in [n for n in sys.modules if n.split(".")[0] in (EVIL, "transformers_modules")]:
        del sys.modules[name]


def nothing_ran(run: Run) -> bool:
    return not run.marker.exists() and EVIL not in sys.modules and "transformers_modules" not in sys.modules


# ---- in this process ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_hyper_parameters_choose_no_code_of_a_command(run, tmp_path, capsys, verb, name):
    path = with_parameters(run, PARAMETERS[name], tmp_path / "a.ckpt")
    status = main([verb, str(path), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status in (0, 2) and (status == 0 or said.count("lightning-peft: error: ") == 1), said
    assert nothing_ran(run)


@pytest.mark.parametrize("name", PARAMETERS)
def test_hyper_parameters_choose_no_code_of_a_reload(run, tmp_path, name):
    path = with_parameters(run, PARAMETERS[name], tmp_path / "a.ckpt")
    for load in (TaskModule.load_from_checkpoint, lambda p: load_from_checkpoint(TaskModule, p)):
        try:
            load(path)
        except PEFTError as error:
            assert "\n" not in str(error)
        assert nothing_ran(run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("import_path_of_the_loss", "loss names 'evil_module.function'. Of what a file names, only classes of torch, "),
        ("class_path_of_the_optimizer", "optimizer names 'evil_module.Optimizer'."),
        ("class_path_of_anything", "tokenizer names 'evil_module.Loss'."),
        ("class_path_of_the_module", "the class names 'evil_module.Module'."),
        ("callable_behind_a_torch_path", "a.ckpt: optimizer names 'torch.serialization.os.system'. Of what a file"),
        ("options_in_a_text", "is a text with auto_map in it, which would be read as an option. Give it in the call"),
        ("instantiator", "names the function 'evil_module.function' to build the module with, which is not called"),
    ],
)
def test_a_refusal_names_the_path_and_the_way_out(run, tmp_path, name, said):
    path = with_parameters(run, PARAMETERS[name], tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as refused:
        TaskModule.load_from_checkpoint(path)
    assert said in str(refused.value)
    assert any(way in str(refused.value) for way in ("Give it in the call: ", "If you trust it, ", "Build the module"))


def test_what_the_user_gives_replaces_what_the_file_names(run, tmp_path):
    """An argument of this call is the user's own, even where the file names something else."""
    path = with_parameters(run, PARAMETERS["import_path_of_the_loss"], tmp_path / "a.ckpt")
    given = {"task": CASE.task, "label_names": NAMES}
    module = TaskModule.load_from_checkpoint(path, loss=None, **given)
    assert module.custom_loss is None and nothing_ran(run)
    path = with_parameters(run, PARAMETERS["class_path_of_the_optimizer"], tmp_path / "a.ckpt")
    module = TaskModule.load_from_checkpoint(path, optimizer=torch.optim.SGD, _instantiator=None)
    assert module.optimizer_factory is torch.optim.SGD and nothing_ran(run)
    path = with_parameters(run, PARAMETERS["remote_model"], tmp_path / "a.ckpt")
    module = TaskModule.load_from_checkpoint(path, model_kwargs={"trust_remote_code": True}, model=MODEL)
    assert module.load_options["trust_remote_code"] is True


def test_any_module_is_built_without_the_permission(run, tmp_path):
    """A user's own module takes the hyper-parameters of the file, but for those that let code run."""
    parameters = {"width": 7, "trust_remote_code": True, "options": {"code_revision": "x", "kept": [{"auto_map": 1}]}}
    net = Hungry(width=7)
    inject(net, LoRA(r=2))
    info = SavedAdapter.of(net).section.as_dict() | {"save": "trainable"}
    content = {"state_dict": adapter_state_dict(net), "lightning_peft": info, "hyper_parameters": parameters}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    module = load_from_checkpoint(Hungry, tmp_path / "a.ckpt")
    assert module.given == {"width": 7, "trust_remote_code": None, "options": {"kept": [{}]}}
    module = load_from_checkpoint(Hungry, tmp_path / "a.ckpt", trust_remote_code=True)
    assert module.given["trust_remote_code"] is True


class Hungry(L.LightningModule):
    """Takes a permission as an argument, as a user's module may."""

    def __init__(self, width, trust_remote_code=None, options=None):
        super().__init__()
        self.given = {"width": width, "trust_remote_code": trust_remote_code, "options": options}
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))


def test_the_configuration_of_peft_brings_no_code(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject(net, LoRA(r=2))
    export_peft(net, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoModel": "x.X"}, "trust_remote_code": True}
    file.write_text(json.dumps(config))
    assert not {"auto_map", "trust_remote_code"} & set(read_folder(tmp_path).config)
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fresh.load_state_dict({k.replace("base.", ""): v for k, v in net.state_dict().items() if "delta" not in k})
    import_peft(fresh, tmp_path)


def test_a_base_with_an_adapter_in_its_folder_is_refused(run, tmp_path):
    """transformers would load both with peft, which imports a module that the adapter's configuration names."""
    fields = {k: v for k, v in run.model.items() if k != "model_type"}
    transformers.BertForSequenceClassification(transformers.BertConfig(**fields)).save_pretrained(tmp_path)
    net = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(tmp_path), "megatron_core": "megatron_evil", "megatron_config": {"a": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path)
    shutil.copy(run.place / f"{EVIL}.py", run.place / "megatron_evil.py")
    module = TaskModule(str(tmp_path), CASE.task, label_names=NAMES)
    with pytest.raises(ConfigError, match=r"holds an adapter of peft .* Give the folder or hub id of the base"):
        module.configure_model()
    assert nothing_ran(run) and "megatron_evil" not in sys.modules


@pytest.mark.parametrize("name", ["é" * 300, "a\0b", "\ud800", "x/" * 3000])
def test_names_that_no_file_can_have(name):
    for load in (TaskModule.load_from_checkpoint, lambda p: load_adapter(torch.nn.Linear(2, 2), p), read):
        with pytest.raises(PEFTError, match=r"is no path: it has letters|does not exist"):
            load(name)


@pytest.mark.parametrize("name", ["é" * 300, "x" * 5000], ids=["300", "5000"])
def test_sources_too_long_for_any_file(run, name):
    """Python refuses even to look whether there is such a file."""
    sources = {
        "model": lambda: TaskModule(name, CASE.task, label_names=NAMES).configure_model(),
        "tokenizer": lambda: TextDataModule(str(run.place / "rows.csv"), tokenizer=name).setup("fit"),
        "images": lambda: ImageDataModule(name).setup("fit"),
    }
    for what, look in sources.items():
        with pytest.raises(PEFTError) as refused:
            look()
        assert len(str(refused.value)) < 2100, what


ODD = "a\u202egnp.exe\x1b[2J\x07"


def test_names_in_a_file_do_not_move_the_cursor(run, tmp_path, capsys):
    """Neither in what inspect prints nor in an error; letters of four bytes are letters."""
    content = copy.deepcopy(run.checkpoint)
    info = content["lightning_peft"]
    info["base"] |= {"source": ODD, "class": "Bert😀𝄞"}
    info["methods"][0]["targets"][0] = ODD
    content["state_dict"][ODD] = content["state_dict"].pop(info["keys"][0])
    info["keys"][0] = ODD
    torch.save(content, tmp_path / "odd\u202e.ckpt")
    assert main(["inspect", str(tmp_path / "odd\u202e.ckpt")]) == 0
    said = capsys.readouterr().out
    assert "Bert😀𝄞" in said and "a\\u202egnp.exe" in said.replace("\n", "").replace(" ", "")
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert main(["merge", str(tmp_path / "odd\u202e.ckpt"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "\\u202e" in said and all(letter.isprintable() or letter == "\n" for letter in said)
    with pytest.raises(PEFTError) as refused:
        load_adapter(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "odd\u202e.ckpt")
    assert str(refused.value).isprintable()


def test_an_adapter_in_a_folder_below_the_base_is_refused_too(run, tmp_path):
    """The file itself may say in which folder transformers looks."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    module = TaskModule(str(tmp_path), CASE.task, label_names=NAMES, model_kwargs={"subfolder": "inner"})
    with pytest.raises(ConfigError, match="holds an adapter of peft"):
        module.configure_model()


def test_a_packed_checkpoint_is_not_unpacked(run, tmp_path):
    """torch packs nothing. A packed record of a few kilobytes can be a gigabyte."""
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"x": "0" * 1_000_000}))
    with pytest.raises(CheckpointError, match="its records declare more bytes than it has"):
        peek(tmp_path / "a.ckpt")


def test_a_description_without_end_is_refused(run, tmp_path):
    """A few lists inside each other, each named twice, print as more letters than a machine can hold."""
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    content = copy.deepcopy(run.checkpoint)
    content["lightning_peft"]["methods"][0]["config"]["r"] = bomb
    torch.save(content, tmp_path / "a.ckpt")
    for look in (lambda p: load_adapter(torch.nn.Linear(2, 2), p), peek):
        with pytest.raises(CheckpointError, match="more than 2000000 values"):
            look(tmp_path / "a.ckpt")


def test_a_config_without_end_beside_an_adapter_is_refused(run, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(run.folder / "adapter", folder)
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (folder / "config.yaml").write_text("\n".join([*lines, "model: {init_args: {model: {x: *a59}}}"]))
    with pytest.raises(CheckpointError, match="more than 200000 values"):
        open_adapter(str(folder), None)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ImageDataModule, {"data": f"{EVIL}.function"}),
        (ImageDataModule, {"data": "images", "predict_data": f"{EVIL}.function"}),
        (TextDataModule, {"data": "rows.csv", "tokenizer": {"class_path": f"{EVIL}.Loss"}, **INSTANTIATOR}),
        (TextDataModule, {"data": "rows.csv", "tokenizer.class_path": f"{EVIL}.Loss", **INSTANTIATOR}),
        (TextDataModule, {"data": "rows.csv", "load_kwargs": {"deep": [{"class_path": f"{EVIL}.X"}]}, **INSTANTIATOR}),
    ],
)
def test_data_modules_take_no_code_from_a_checkpoint(run, tmp_path, kind, arguments):
    torch.save(run.checkpoint | {"datamodule_hyper_parameters": arguments}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"load_from_checkpoint\(…, .*=…\)"):
        kind.load_from_checkpoint(tmp_path / "a.ckpt")
    assert nothing_ran(run)


def test_no_pickles_as_data():
    with pytest.raises(ConfigError, match="reads pickles, which can run code"):
        read("pandas", {"data_files": "x.pkl"})


@pytest.mark.parametrize(
    "path",
    [
        *("torch.hub.load", "torch.load", "torch.utils.data.dataloader.os.system", "torch.nn.functional.torch.load"),
        *("lightning_peft.files.json", "torch.optim.optimizer.defaultdict", "torch.nn.Linear.__init__", "torch"),
        *("lightning.pytorch.callbacks.LambdaCallback", "pytorch_lightninG.x.Y", "torch.nn.Linear\0", "", None, 3),
        *("torch.package.PackageImporter", "torch.distributed.FileStore", "transformers.pipeline", "os.path.Foo"),
        *("torch..nn", "torch.nn.", " torch.nn.Linear", "torch.nn.Linear:x", ["torch.nn.Linear"]),
    ],
)
def test_paths_that_lead_elsewhere(path):
    """Only a class that a known package defines, and of a kind that belongs into a config, is taken."""
    with pytest.raises(CheckpointError, match="Of what a file names, only classes of"):
        known_class(path, "a file", "Give another.")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_config_that_was_found_chooses_no_code(run, capsys, verb, name):
    path = with_config(run, CONFIGS[name])
    status = main([verb, "--ckpt_path", str(path)])
    said = capsys.readouterr().err
    assert status in (0, 2) and (status == 0 or said.count("lightning-peft: error: ") == 1), said
    assert status == 0 or "Traceback" not in said
    assert nothing_ran(run) and not (run.place / "elsewhere.csv").exists() and not (run.place / "planted").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model_class", "config.yaml: model names 'evil_module.Module'. Of what a file names, only classes of torch, "),
        ("method_class", "config.yaml: peft names 'evil_module.Module'."),
        ("callback_class", "config.yaml: trainer.callbacks.0 names 'evil_module.Calls'."),
        ("callback_that_calls", "trainer.callbacks.0 names 'lightning.pytorch.callbacks.LambdaCallback'."),
        ("callback_by_name", "the config beside the checkpoint names 'evil_module.Calls'."),
        ("loss_of_a_config", "config.yaml: model: loss names 'evil_module.function'."),
        ("function_for_data", "config.yaml: data: data names 'evil_module.function'."),
        ("config_in_a_config", "config.yaml: model should be a mapping of options."),
        ("writing_elsewhere", "path='../elsewhere.csv' lies outside the run's folder"),
        ("writing_above", "filename='../../x' lies outside the run's folder"),
        ("options_in_a_text_of_a_config", "is a text with auto_map in it, which would be read as an option"),
        ("class_in_a_text", "is a text with class_path in it, which would be read as an option"),
        ("model_in_a_further_file", "inner.yaml' names a further file"),
        ("data_from_elsewhere", "has other options than those that say how a table is written"),
        ("place_behind_a_dot", "profiler.dirpath='"),
    ],
)
def test_a_refusal_of_a_found_config_names_the_way_out(run, capsys, name, said):
    path = with_config(run, CONFIGS[name])
    assert main(["test", "--ckpt_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "--config" in error, error
    assert "If you trust" in error


def test_a_config_that_is_given_is_obeyed(run, capsys):
    """The same file with ``--config`` is the user's own."""
    path = with_config(run, CONFIGS["callback_class"])
    main(["test", "--ckpt_path", str(path), "--config", str(run.folder / "config.yaml")])
    assert run.marker.exists()


def test_a_class_that_the_user_names_is_imported_beside_a_found_config(run, capsys):
    path = with_config(run)
    main(["test", "--ckpt_path", str(path), f"--trainer.callbacks+={EVIL}.Calls"])
    assert run.marker.exists()
    capsys.readouterr()


def test_a_sound_config_is_found(run, capsys):
    """It works as before; what is written lies in the run's folder, also after it was moved."""
    moved = run.place / "moved"
    shutil.rmtree(moved, ignore_errors=True)
    (run.folder / "predictions.jsonl").unlink(missing_ok=True)
    with_config(run)
    shutil.copytree(run.folder, moved)
    assert main(["predict", "--ckpt_path", str(moved / "checkpoints/best.ckpt")]) == 0, capsys.readouterr().err
    assert (moved / "predictions.jsonl").exists() and not (run.folder / "predictions.jsonl").exists()


def test_a_model_without_its_hostile_fields_is_the_model(run, tmp_path):
    """The permission and the class are left out; what remains is loaded."""
    path = with_parameters(run, PARAMETERS["remote_model"], tmp_path / "a.ckpt")
    sound = TaskModule.load_from_checkpoint(run.path).eval()
    module = TaskModule.load_from_checkpoint(path).eval()
    batch = next(iter(torch.utils.data.DataLoader([{"input_ids": torch.arange(5, 14)}])))
    torch.testing.assert_close(module.model(**batch).logits, sound.model(**batch).logits)
    assert "auto_map" not in module.hparams["model"] and not module.hparams["model_kwargs"]


# ---- each in a process of its own ----------------------------------------------------------------------------------
RELOAD = """\
import sys
from lightning_peft import PEFTError, TaskModule, load_from_checkpoint
for load in (TaskModule.load_from_checkpoint, lambda path: load_from_checkpoint(TaskModule, path)):
    try:
        load(sys.argv[1])
    except PEFTError as error:
        print("lightning-peft: error:", error, file=sys.stderr)
"""


def alone(run: Run, *words: object) -> str:
    """Run a command in a process of its own, in the folder of the sender's code; returns what it says."""
    command = [sys.executable, "-c", RELOAD] if words[0] == "reload" else [sys.executable, "-m", "lightning_peft"]
    words = words[1:] if words[0] == "reload" else words
    paths = os.pathsep.join([str(run.place), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command += [str(word) for word in words]
    done = subprocess.run(command, cwd=run.place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 0 or done.stderr.count("lightning-peft: error: ") == 1
    assert not run.marker.exists(), f"{words} ran the sender's code"
    return done.stderr


def test_the_marker_shows_code_that_runs(run):
    """The check itself: where the user asks for the code, it runs."""
    with_config(run, CONFIGS["callback_class"])
    with pytest.raises(AssertionError, match="ran the sender's code"):
        alone(run, "test", "--ckpt_path", run.path, "--config", run.folder / "config.yaml")


SOME = ["remote_model", "pickled_base", "class_path_of_the_optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "name"), [(v, n) for v in ("merge", "reload") for n in PARAMETERS] + [("export", n) for n in SOME]
)
def test_hyper_parameters_in_a_fresh_process(run, tmp_path, verb, name):
    path = with_parameters(run, PARAMETERS[name], tmp_path / "a.ckpt")
    alone(run, verb, path, *([] if verb == "reload" else [tmp_path / "out"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "name"), [("test", n) for n in CONFIGS] + [("predict", n) for n in ("model_class", "unpickling")]
)
def test_a_found_config_in_a_fresh_process(run, verb, name):
    alone(run, verb, "--ckpt_path", with_config(run, CONFIGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_test_of_hostile_hyper_parameters_in_a_fresh_process(run, name):
    with_config(run)
    with_parameters(run, PARAMETERS[name], run.path)
    alone(run, "test", "--ckpt_path", run.path)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_folder_with_an_adapter_and_a_config_in_a_fresh_process(run, tmp_path, verb):
    """The config that lies beside the adapter describes the base, and names the sender's code."""
    folder = tmp_path / "adapter"
    shutil.copytree(run.folder / "adapter", folder)
    config = run.config()
    CONFIGS["remote_code_in_a_config"](run, config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for place in (folder, folder / "adapter.safetensors"):
        assert "error" not in alone(run, verb, place, tmp_path / f"out{place.suffix}")


OWN_COMMAND = """
model:
  loss:
    class_path: torchmetrics.metric.CompositionalMetric
    init_args:
      operator: transformers.testing_utils.run_command
      metric_a: 1.0
      metric_b: 1.0
"""


def test_a_file_names_no_function(tmp_path):
    """Wherever a class takes a function, an import path in a file is refused; types of numbers are none."""
    found = yaml.safe_load(OWN_COMMAND)
    with pytest.raises(CheckpointError, match=r"run_command is an import path"):
        with_known_classes(found, "config.yaml", "Give it yourself.")
    kept = {"model": {"dtype": "torch.bfloat16", "loss": "torch.nn.functional.cross_entropy"}}
    assert with_known_classes(kept, "config.yaml", "Give it yourself.") == kept


@pytest.mark.parametrize(
    "text",
    [
        *("{text}", "{path}", "Review: {text}\nIt was {mask}.", "{title}, {body}", "a: b", "[CLS] {text}", "- one"),
        *("torch", "a.b.c", "2020-99-99", "C:\\data", "'", "*", "&", "!x", "'quoted'", "12", "no", "", "my torch.nn"),
    ],
)
def test_a_text_that_is_none_of_these_is_kept(text):
    """Templates, names and words may look like YAML."""
    value = {"data": [{"template": text}]}
    assert with_known_classes(value, "config.yaml", "Give it yourself.") == value


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [{"class_path": "torch.nn.ReLU"}]}',
        "trust_remote_code: true",
        "{deep: '{\"trust_remote_code\": true}'}",
        "[torch.save]",
        "a: &a [*a]",
        "x: {save_dir: /home}",
        "attn_implementation: someone/kernel",
        "torch.hub.load",
        "torch._dynamo.config.x",
    ],
)
def test_a_text_that_would_be_obeyed_is_refused(text):
    with pytest.raises(CheckpointError, match="Give it yourself"):
        with_known_classes({"model": {"anything": text}}, "config.yaml", "Give it yourself.")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]",
    ],
)
def test_values_without_end_are_refused(text):
    with pytest.raises(ValueError, match=r"more than 200000 values|more than 200 deep"):
        check_extent(yaml.safe_load(text))


def test_an_index_changes_no_class(tmp_path):
    """A pickle may give a state to an object, but not to a class, where it would hold for the whole process."""
    before = pathlib.PosixPath.resolve
    data = b"\x80\x02cpathlib\nPosixPath\n(N}U\x07resolvecpathlib\nPosixPath\nstb."
    with pytest.raises(pickle.UnpicklingError, match="changes a class"):
        _Unpickler(io.BytesIO(data)).load()
    assert pathlib.PosixPath.resolve is before


def test_paths_that_mean_the_home_folder_are_outside():
    assert not is_inside("~/thesis.ckpt", ".") and not is_inside("file:/etc/passwd", ".")
    assert is_inside("run/a.ckpt", "run") and is_inside("s3://bucket/run/a.ckpt", "s3://bucket/run")


def test_a_class_of_the_users_own_keeps_its_arguments():
    content = {"hyper_parameters": {"kernel_config": {"scale": 10}, "use_kernels": True, "auto_map": {"A": "b--c.D"}}}
    settle_parameters(content)
    assert content["hyper_parameters"] == {"kernel_config": {"scale": 10}, "use_kernels": True}
    content = {"hyper_parameters": {"model_kwargs": {"use_kernels": True, "dtype": "float16"}}}
    settle_parameters(content)
    assert content["hyper_parameters"] == {"model_kwargs": {"dtype": "float16"}}
