"""Whole models out: a folder others can load without lightning_peft."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from lightning_peft.merging import merge_and_unload
from lightning_peft.trainable import MARK, require


def save_merged(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write the merged network: a ``from_pretrained`` folder for a transformers model, else ``model.safetensors``.

    The model itself stays as it is. Everything is written to a temporary folder first, then moved into place.

    Args:
        model: an adapted LightningModule or network.
        directory: folder, made if it does not exist; files of an earlier export are replaced.
        tokenizer: tokenizer or processor to write beside a transformers model.

    Raises:
        MergeError: the method does not merge.

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


def plain_copy(root: nn.Module) -> nn.Module:
    """A merged copy of the network without wrappers, on the CPU."""
    merged = copy.deepcopy(root).cpu()
    assert MARK in merged.__dict__
    merge_and_unload(merged)
    return merged
