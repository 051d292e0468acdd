"""Whole models out: a folder others can load without lightning_peft."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from lightning_peft.errors import MergeError, PEFTError
from lightning_peft.model.adapters import Adapters
from lightning_peft.model.merging import merge_and_unload, packed_obstacle, tied_parameters
from lightning_peft.quantized import bits
from lightning_peft.replacing import replacing_folder
from lightning_peft.saving.checkpoint import load_saved
from lightning_peft.saving.saved_adapter import SavedAdapter

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("sentencepiece*.model", "chat_template.*", "preprocessor_config.json", "processor_config.json"),
)


def save_merged(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write the merged network: a ``from_pretrained`` folder for a transformers model, else ``model.safetensors``.

    The model itself stays as it is. A base in few bits is loaded once more, in floats, from where it came: nothing is
    rounded to few bits again. Everything is first written to a temporary folder. A new folder then appears at once; in
    one that exists the files are exchanged, and until the last of them is there it has no weights.

    Args:
        model: an adapted LightningModule or network.
        directory: folder, made if it does not exist; files of an earlier export are replaced.
        tokenizer: tokenizer or processor to write beside a transformers model; without one, that of the folder or the
            local cache the base was loaded from.

    Raises:
        MergeError: the method does not merge, or the float base of a quantised model cannot be found.
        PEFTError: ``directory`` is a file, or holds an adapter for peft.
        WriteError: the disk is full or the folder cannot be written; an earlier export in it is as it was.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, save_merged
    >>> net, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> inject(net, LoRA()); save_merged(net, folder); os.listdir(folder)
    ['model.safetensors']
    """
    root = Adapters.of(model).network
    target = Path(directory).expanduser()
    check_target(target, root)
    merged = plain_copy(root)
    with replacing_folder(target) as temporary:
        if hasattr(merged, "save_pretrained"):
            _forget_packing(merged)
            with _no_bar():
                merged.save_pretrained(temporary)
            _add_tokenizer(temporary, tokenizer, str(getattr(merged.config, "_name_or_path", "") or ""))
        else:
            save_model(merged, str(temporary / "model.safetensors"))


def check_target(target: Path, root: nn.Module) -> None:
    """Raise PEFTError if the merged network cannot be written to a path, or could not be loaded from there."""
    if target.is_file():
        raise PEFTError(f"{target} is a file; give a folder.")
    # transformers looks for an adapter first, and takes the base from where that came
    if hasattr(root, "save_pretrained") and os.path.exists(target / "adapter_config.json"):
        raise PEFTError(
            f"{target} holds an adapter for peft (adapter_config.json), and from_pretrained would load that onto the"
            " merged model. Give another folder."
        )


def _forget_packing(merged: Any) -> None:
    """A model of floats that came out of a packed file (GGUF) still calls itself quantised, and would not be saved."""
    if any(bits(p) is not None for p in merged.parameters()):
        return
    for owner in (merged, merged.config):
        for name in ("hf_quantizer", "quantization_method", "quantization_config"):
            owner.__dict__.pop(name, None)


def _add_tokenizer(folder: Path, tokenizer: Any, source: str) -> None:
    """Write the tokenizer, or copy what lies beside the base; nothing is downloaded."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    place = Path(source)
    if place.is_dir():
        files = [p for p in place.iterdir() if any(p.match(pattern) for pattern in _TOKENIZER_FILES)]
        files = [p for p in files if p.is_file()]  # a link to a device would be copied without end
        for file in files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    elif source:
        from transformers import AutoTokenizer

        with suppress(OSError, ValueError, KeyError, ImportError):
            found = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            found.save_pretrained(folder)


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
    if reason := packed_obstacle(root):
        merged = float_base(root, reason)
        load_saved(merged, SavedAdapter.of(root))
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
