"""Whole models out: a folder others can load without lightning_peft."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from lightning_peft.checkpoint import adapter_state_dict, load_adapter, section
from lightning_peft.errors import MergeError
from lightning_peft.files import SECTION
from lightning_peft.merging import merge_and_unload, obstacle
from lightning_peft.replacing import replacing_folder
from lightning_peft.trainable import MARK, require


def save_merged(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write the merged network: a ``from_pretrained`` folder for a transformers model, else ``model.safetensors``.

    The model itself stays as it is. A base in few bits is loaded once more, in floats, from where it came: nothing is
    rounded to few bits again. All is written to a temporary folder, then moved into place: half an export never shows.

    Args:
        model: an adapted LightningModule or network.
        directory: folder, made if it does not exist; files of an earlier export are replaced.
        tokenizer: tokenizer or processor to write beside a transformers model.

    Raises:
        MergeError: the method does not merge, or the float base of a quantised model cannot be found.
        WriteError: the disk is full or the folder cannot be written.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, save_merged
    >>> net, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> inject(net, LoRA()); save_merged(net, folder); os.listdir(folder)
    ['model.safetensors']
    """
    _, _, root = require(model)
    merged = plain_copy(root)
    with replacing_folder(Path(directory)) as temporary:
        if hasattr(merged, "save_pretrained"):
            with _no_bar():
                merged.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        else:
            save_model(merged, str(temporary / "model.safetensors"))


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
    merge_and_unload(merged)
    return merged


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
        return type(root).from_pretrained(source, config=config, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise MergeError(f"Cannot merge: {reason} Its float base could not be loaded from {source}: {error}") from error
