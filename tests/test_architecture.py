"""The house rules a machine can check: imports go downward, the core stays light, defaults and configs agree."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_peft
from lightning_peft.method import registry

PACKAGE = Path(lightning_peft.__file__).parent
#: each file may import only from lines above its own
LAYERS = [
    ["errors"],
    ["requirements"],
    ["paths", "header", "bytecode", "format1", "untrusted", "pickles"],
    ["saving", "saving.section", "objects", "samples"],
    ["quantized", "replacing", "guards", "folders", "sharding", "fingerprint"],
    ["adapted"],
    ["readers"],
    ["match", "bottleneck.sites"],
    ["heads"],
    ["method"],
    ["rates"],
    ["model"],
    ["lowrank", "bottleneck.layers", "torch_encoder", "model.adapters", "files", "fields"],
    ["saving.saved_adapter"],
    ["bottleneck.placement"],
    ["bottleneck"],
    ["prompting.hooked", "prompting.insertion", "prompting.positions"],
    ["prompting.backbone", "prompting.call"],
    ["prompting.prefix"],
    ["prompting.multihead", "prompting.prompt"],
    ["prompting.attention", "prompting.virtual"],
    ["prompting.visual"],
    ["prompting"],
    ["methods"],
    ["model.injection"],
    ["model.hollow", "model.merging", "model.summary"],
    ["saving.checkpoint", "saving.combining"],
    ["formats.naming", "formats.folder", "formats.for_vllm"],
    ["formats.card", "formats.lowrank"],
    ["formats.prompts", "formats.vectors"],
    ["formats.peft"],
    ["formats"],
    ["saving.export"],
    ["lightning_packages"],
    ["trainer.best", "trainer.driving", "trainer.checkpoint_io", "trainer.kept_files", "trainer.objects"],
    ["trainer.strategies"],
    ["trainer.optimizer_states", "trainer.checks", "trainer.resuming", "trainer.idle_layers", "trainer.rate_check"],
    ["trainer.loading"],
    ["trainer.checkpoints"],
    ["trainer.session"],
    ["trainer.reload"],
    ["trainer"],
    ["callbacks.peft"],
    [
        "callbacks.merge",
        "callbacks.trainability",
        "callbacks.log_adapter",
        "callbacks.prediction_writer",
        "callbacks.adapter_drop",
    ],
    ["callbacks"],
    ["data.loaders", "data.labels", "data.splits", "data.sources", "data.prompts", "data.template", "data.tasks"],
    ["data.collate", "data.tokenise", "data.arrays", "data.base", "data.packing"],
    ["data"],
    ["task.kinds"],
    ["task.loading", "task.losses", "task.modes", "task.optimization", "task.speed", "task.divergence"],
    ["task.batches", "task.metrics", "task.hyperparameters", "task.labels"],
    ["task.predictions", "task.objectives"],
    ["task"],
    ["module"],
    ["compare", "compare.plan", "compare.results", "compare.cost", "compare.progress"],
    ["compare.task"],
    ["compare.training"],
    ["compare.comparison"],
    ["compare.table", "compare.plots"],
    ["cli.folder", "cli.terminal"],
    [
        "cli.help",
        "cli.configs",
        "cli.messages",
        "cli.quiet",
        "cli.methods",
        "cli.screen",
        "cli.arguments",
        "cli.peek",
        "cli.bar",
    ],
    ["cli.base", "cli.inspect", "cli.found"],
    ["cli.export", "cli.merge"],
    ["cli.run"],
    ["cli.compare"],
    ["cli"],
    ["__main__"],
]
HEAVY = {"lightning", "pytorch_lightning", "transformers", "wandb", "bitsandbytes", "datasets", "peft", "matplotlib"}


def level(module: str) -> int:
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        name = ".".join(parts[:depth])
        for i, layer in enumerate(LAYERS):
            if name in layer:
                return i
    raise AssertionError(f"{module} has no place in LAYERS")


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            names[name] = path
    return names


def imports(path: Path, everywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downward(name):
    if name == "methods":
        return  # the list of methods
    for target in imports(modules()[name], everywhere=True):
        if not target.startswith("lightning_peft."):
            continue
        other = target.removeprefix("lightning_peft.")
        same_package = name.split(".")[0] == other.split(".")[0]
        assert level(other) < level(name) or (same_package and level(other) <= level(name)), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_heavy_libraries_only_where_used(name):
    heavy = {i.split(".")[0] for i in imports(modules()[name], everywhere=False)} & HEAVY
    assert not heavy


@pytest.mark.parametrize("name", sorted(modules()))
def test_lightning_is_imported_in_one_place(name):
    """`lightning_packages` decides which of the two packages is meant; only annotations name one of them."""
    tree = ast.parse(modules()[name].read_text())
    for_annotations = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", None) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    ]
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        named = [n for n in imported if n.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")]
        assert not named or node in for_annotations, f"line {node.lineno} imports {named[0]}"


def test_core_loads_neither_lightning_nor_transformers():
    core = (
        "inject, unload, merge, unmerge, merge_and_unload, disabled, save_adapter, load_adapter, summarize,"
        " save_merged, export_peft, import_peft"
    )
    code = (
        "import sys, torch; from torch import nn\n"
        f"from lightning_peft import LoRA, {core}\n"
        "net = nn.Sequential(nn.Linear(4, 4)); inject(net, LoRA(r=1)); summarize(net); merge(net); unload(net)\n"
        f"bad = {HEAVY} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_and_configs_agree(root):
    """Every method has a test and a config; the config holds the class's own defaults and names the source."""
    import lightning_peft.methods  # noqa: F401

    kinds = {n: k for n, k in registry().items() if k.__module__.startswith("lightning_peft.")}
    configs = {yaml.safe_load(p.read_text())["peft"]["class_path"]: p for p in (root / "configs/method").glob("*.yaml")}
    assert set(configs) == set(kinds)
    for name, path in configs.items():
        kind, fields = kinds[name], yaml.safe_load(path.read_text())["peft"].get("init_args", {})
        for field, value in fields.items():
            found = kind.__dataclass_fields__[field]
            made = found.default_factory is not dataclasses.MISSING
            default = found.default_factory() if made else found.default
            assert default in (value, dataclasses.MISSING), f"{path.name}: {field}"
        assert path.read_text().startswith("#") and kind.paper and kind.lr_source, name
        assert 0 < kind.reference_lr < 1 and kind.lr_width_exponent in (0.0, 0.5, 1.0), name
        assert (root / "tests/methods" / f"test_{path.stem}.py").exists(), path.stem
        assert kind.mergeable != bool(kind.why_not_mergeable), name


def test_public_names_exist():
    star: dict = {}
    exec("from lightning_peft import *", star)
    assert {"PEFT", "LoRA", "TaskModule", "load_adapter"} <= set(star) and set(lightning_peft.__all__) <= set(star)
    for name in dir(lightning_peft):
        getattr(lightning_peft, name)
    with pytest.raises(AttributeError, match=r"no attribute 'LORA'\. Did you mean 'LoRA'"):
        lightning_peft.LORA  # noqa: B018
