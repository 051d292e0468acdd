"""Whole models out: a folder others can load without lightning_peft."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from lightning_peft.checkpoint import adapter_state_dict, load_adapter, section
from lightning_peft.errors import MergeError
from lightning_peft.files import SECTION
from lightning_peft.merging import merge_and_unload, obstacle, tied_parameters
from lightning_peft.trainable import MARK, require


def save_merged(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write the merged network: a ``from_pretrained`` folder for a transformers model, else ``model.safetensors``.

    The model itself stays as it is. A base in few bits is loaded once more, in floats, from where it came: nothing is
    rounded to few bits again. Everything is written to a temporary folder first, then moved into place.

    Args:
        model: an adapted LightningModule or network.
        directory: folder, made if it does not exist; files of an earlier export are replaced.
        tokenizer: tokenizer or processor to write beside a transformers model.

    Raises:
        MergeError: the method does not merge, or the float base of a quantised model cannot be found.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, save_merged
    >>> net, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> inject(net, LoRA()); save_merged(net, folder); os.listdir(folder)
    ['model.safetensors']
    """
    _, _, root = require(model)
    merged = plain_copy(root)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        if hasattr(merged, "save_pretrained"):
            with _no_bar():
                merged.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        else:
            save_model(merged, str(temporary / "model.safetensors"))
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers draws a bar for shards, which breaks that of a Trainer."""
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()


def plain_copy(root: nn.Module) -> nn.Module:
    """A merged copy of the network without wrappers, on the CPU."""
    assert MARK in root.__dict__
    if reason := obstacle(root):
        merged = float_base(root, reason)
        load_adapter(merged, {"state_dict": adapter_state_dict(root), SECTION: section(root)})
    else:
        merged = copy.deepcopy(root).cpu()
    tied = tied_parameters(merged)
    merge_and_unload(merged)
    if tied - tied_parameters(merged) and hasattr(merged, "save_pretrained"):
        _refuse_retied(merged)
    return merged


def _refuse_retied(merged: Any) -> None:
    """Some architectures (T5) tie their embeddings at each load, whatever the configuration says."""
    with torch.device("meta"):
        again = type(merged)(type(merged.config).from_dict(merged.config.to_dict()))
        again.tie_weights()
    for group in tied_parameters(again):
        if len({id(merged.get_parameter(n)) for n in group}) > 1:
            raise MergeError(
                f"{type(merged).__name__} ties {' and '.join(group)} whenever it is loaded, and the adapters on some of"
                " them make them differ: a merged folder would load as another model. Leave embeddings and output head"
                " out of target_modules, or keep the adapter beside the base: save_adapter(model, path)."
            )


def float_base(root: nn.Module, reason: str = "") -> nn.Module:
    """The base of a quantised transformers model once more, in floats, from where it was loaded.

    Raises:
        MergeError: it cannot be found there.
    """
    config = copy.deepcopy(getattr(root, "config", None))
    source = getattr(config, "_name_or_path", "")
    if config is None or not source:
        raise MergeError(
            f"Cannot merge: {reason} The model does not say where its base came from, so no float base can be loaded:"
            " build it in floats, load_adapter(base, file), then save_merged(base, folder)."
        )
    config.__dict__.pop("quantization_config", None)
    try:
        if getattr(type(config).from_pretrained(source), "quantization_config", None) is not None:
            raise ValueError(
                "its files are quantised themselves. Build the model in floats from other ones, load_adapter(base,"
                " file), then save_merged(base, folder)."
            )
        return type(root).from_pretrained(source, config=config, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise MergeError(f"Cannot merge: {reason} Its float base could not be loaded from {source}: {error}") from error
