"""Networks from a hub id, a folder, a GGUF file, or a configuration; transformers is imported here only."""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.files import locate
from lightning_peft.heads import NEW, head_names, new_modules
from lightning_peft.requirements import require_package
from lightning_peft.task.kinds import TASKS, Task

_SEED = 0  # random models are the same in every process, so that an adapter finds the base it was trained beside


def load(
    source: str | Mapping[str, Any], task: Task, labels: Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Build the network for a task, in eval mode.

    Args:
        source: hub id, folder, GGUF file (both also as ``pkg://PACKAGE/PATH``), or the fields of a configuration with
            its ``model_type`` for a model with random weights (always the same ones).
        task: decides the head.
        labels: names of the classes; None takes them from the checkpoint.
        options: further arguments of ``from_pretrained``. Weights are float32 (or as the Trainer's precision says)
            unless ``dtype`` is given.

    Returns:
        The network and what to tell the user: which parts are new.

    Raises:
        ConfigError: nothing there, a broken or foreign checkpoint, unknown options, or a head without known labels.
    """
    transformers = require_package("transformers", f"TaskModule(model={source!r})")
    auto = getattr(transformers, task.auto)
    options = {"dtype": torch.get_default_dtype(), "trust_remote_code": False, **options}
    if isinstance(source, Mapping):
        return _random(auto, source, task, labels, options), []
    place, extra = resolve(source)
    options = {**extra, **options, **label_options(task, labels)}
    with quiet(local=os.path.exists(place)), explained(source, options):
        refuse_adapter(source, place, options)
        network, report = auto.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    return network.eval(), _describe(network, report, source, task, labels, options["trust_remote_code"])


def resolve(source: str) -> tuple[str, dict[str, str]]:
    """What to hand to ``from_pretrained``: a hub id or a folder, and the name of a GGUF file in it.

    Raises:
        ConfigError: a path to nothing.

    >>> resolve("bert-base-uncased")
    ('bert-base-uncased', {})
    """
    place = locate(source)
    is_path = source.startswith(("pkg://", ".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf")
    if not os.path.exists(place):  # False too for a name that is too long for any file
        if is_path:
            raise ConfigError(f"model={source!r}: {place.absolute()} does not exist. Give a hub id, folder or .gguf.")
        return source, {}
    if place.is_file():
        if place.suffix != ".gguf":
            raise ConfigError(f"model={source!r} is a file; give the folder it lies in, or a .gguf file.")
        return str(place.parent.absolute()), {"gguf_file": place.name}
    return str(place.absolute()), {}


def refuse_adapter(source: Any, place: str, options: Mapping[str, Any]) -> None:
    """Raise unless a folder or a repository of the hub holds a model without an adapter of peft.

    transformers would load both, with peft, which imports modules that the adapter's configuration names.

    Args:
        source: what the user has given, for the message.
        place: what `resolve` makes of it.
        options: arguments of ``from_pretrained``.

    Raises:
        ConfigError: there is such an adapter.
    """
    from transformers.utils import find_adapter_config_file

    names = ("cache_dir", "token", "revision", "local_files_only", "subfolder")
    given = {name: options[name] for name in names if options.get(name) is not None}
    if find_adapter_config_file(place, **given) is not None:
        raise ConfigError(
            f"model={source!r} holds an adapter of peft (adapter_config.json). Give the folder or hub id of the base it"
            " was trained on; import_peft(model, folder) loads the adapter."
        )


def label_options(task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
    """Fields of the configuration that say what the head puts out."""
    if task.target == "number":
        return {"num_labels": 1, "problem_type": "regression"}
    if labels is None or not task.has_new_head:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def label_names(network: nn.Module) -> list[str] | None:
    """Names of the classes in the network's configuration, in order."""
    names = getattr(getattr(network, "config", None), "id2label", None)
    return [str(names[i]) for i in sorted(names)] if names else None


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a source, or None if there is none."""
    transformers = require_package("transformers", f"The tokenizer of {source!r}")
    try:
        place, extra = resolve(source)
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **extra)
    except Exception:  # a broken tokenizer fails in many ways, the library in Rust with plain exceptions
        return None


def _random(auto: Any, fields: Mapping[str, Any], task: Task, labels: Any, options: dict[str, Any]) -> nn.Module:
    import transformers

    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise ConfigError(f"model={fields!r} describes a configuration without model_type; add for example 'vit'.")
    if kind not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), transformers.CONFIG_MAPPING, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " Give one that it has, such as bert or vit."
        raise ConfigError(f"model_type={kind!r} is unknown to transformers {transformers.__version__}.{hint}")
    with quiet(local=True), explained(kind, options), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        config = transformers.AutoConfig.for_model(kind, **fields, **label_options(task, labels))
        network = auto.from_config(config, **options)
    heads = head_names(network) if task.has_new_head else set()
    for name in heads:
        head = network.get_submodule(name)
        if name.rpartition(".")[0] not in heads and any(True for _ in head.parameters()):
            head.__dict__[NEW] = True
    return network.eval()


def _describe(
    network: nn.Module, report: Mapping[str, Any], source: str, task: Task, labels: Any, trust_remote_code: bool
) -> list[str]:
    """Refuse what would train on noise; say what is new."""
    new, heads = new_modules(network), head_names(network)
    inside = [n for n, _ in network.named_parameters() if not _under(n, heads)]
    missing = set(report["missing_keys"]) & set(inside)
    wrong = sorted(n for n, *_ in report["mismatched_keys"] if not _under(n, heads))
    if wrong or len(missing) > len(inside) / 2:
        what = (
            f"other shapes in {', '.join(wrong[:3])}" if wrong else f"{len(missing)} of {len(inside)} tensors missing"
        )
        raise ConfigError(
            f"model={source!r}: its weights do not fit {type(network).__name__}: {what}."
            " Take the folder's own model_type and sizes, or another model."
        )
    if new and labels is None and task.target in ("class", "token"):
        raise ConfigError(
            f"{task.name} with {source!r}: the head ({', '.join(new)}) is new, so its labels must be known. Give"
            " label_names=[...] or num_labels=N, or train with a data module that has label_names."
        )
    said = [f"New in {type(network).__name__}, not in {source}: {', '.join(new)}."] if new else []
    return said + _other_labels(network, source, labels, heads & set(new), trust_remote_code)


def _other_labels(
    network: nn.Module, source: str, labels: Any, new_heads: set[str], trust_remote_code: bool
) -> list[str]:
    """A trained head keeps its weights: names in another order would silently mean other classes."""
    if labels is None or new_heads:
        return []
    import transformers

    place, extra = resolve(source)
    config: Any = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **extra)
    named = config.id2label or {}
    theirs = [named[i] for i in sorted(named)]
    if theirs == list(labels) or all(n.startswith("LABEL_") for n in theirs):
        return []
    return [f"The trained head of {source} stands for {theirs}; it is kept and now stands for {list(labels)}."]


def _without_task(error: Exception) -> str:
    """Of a model that a task does not go with: what it goes with. transformers lists all models that it does."""
    import transformers

    told = re.match(
        r"Unrecognized configuration class <class '([\w.]+)'> for this kind of AutoModel: (\w+)", str(error)
    )
    if not told:
        return ""
    config, auto = told[1].rpartition(".")[2], told[2]
    kind = getattr(transformers, config, None)
    fitting = [name for name, task in TASKS.items() if kind in getattr(transformers, task.auto)._model_mapping]
    return f"transformers has no {auto} for a {config}. Tasks for such a model: {', '.join(fitting)}."


def _under(name: str, modules: set[str]) -> bool:
    return any(name.startswith(m + ".") for m in modules)


@contextmanager
def quiet(*, local: bool) -> Iterator[None]:
    """Silence the load report (we say the same in a line) and the bar, but not that of a download."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def explained(source: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what goes wrong in ``from_pretrained`` into one error that says what was asked for."""
    try:
        yield
    except PEFTError:
        raise
    except Exception as error:  # a configuration of any content fails anywhere in the library
        untold = ["id2label", "label2id"]
        if not options.get("trust_remote_code"):  # what is meant when nobody speaks of it
            untold.append("trust_remote_code")
        given = ", ".join(f"{k}={v!r}" for k, v in options.items() if k not in untold)
        if refusal := _without_task(error):
            raise ConfigError(f"model={source!r}: {refusal}") from error
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise ConfigError(
            f"model={source!r} cannot be loaded with {given}: {reason} Give a hub id (with network, or cached),"
            " a from_pretrained folder, or a .gguf file, and check model_kwargs."
        ) from error
