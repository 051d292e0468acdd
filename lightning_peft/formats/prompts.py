"""Prefixes and prompts as peft stores them: one table of vectors."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import PEFTError
from lightning_peft.formats.folder import COMMON, PROMPT, Folder, Incoming, Outgoing
from lightning_peft.formats.naming import TASK_MODULES, task_of
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.ptuning import PTuning
from lightning_peft.prompting.prefix import PrefixedAttention, heads_of
from lightning_peft.prompting.virtual import VirtualTokens

_KEY = "prompt_embeddings"
#: tasks whose outputs stand at the tokens themselves; others pool or read places that peft's virtual tokens move
_PROMPT_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_KNOWN = COMMON | {
    *("num_virtual_tokens", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"),
    *("encoder_hidden_size", "encoder_dropout", "encoder_num_layers", "encoder_reparameterization_type"),
    *("prefix_projection", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    *("tokenizer_name_or_path",),
}


# ---- prefixes ------------------------------------------------------------------------------------------------------
def write_prefix(root: nn.Module, method: PrefixTuning, names: list[str]) -> Outgoing:
    """Keys and values of all layers, side by side in a row for each virtual token; a projection is folded.

    Raises:
        PEFTError: positions stay, layers or parts of the model take part that peft knows no prefix for.
    """
    attentions = {n: m for n in names if isinstance(m := root.get_submodule(n), PrefixedAttention)}
    _check_prefix(root, method, list(attentions))
    pairs = [_pair(module) for module in attentions.values()]
    shapes = {tuple(t.shape) for pair in pairs for t in pair}
    if len(shapes) > 1:
        raise _no(method, f"keys and values have several shapes, {sorted(shapes)}, and peft has one")
    n, heads, width = shapes.pop()
    fields = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": n,
        "num_layers": len(pairs),
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": None,
        "prefix_projection": False,
    }
    table = torch.cat([t.flatten(1) for pair in pairs for t in pair], 1)
    return Outgoing(fields | _prefix_task(root), {_KEY: table}, PROMPT)


def _prefix_task(root: nn.Module) -> dict[str, Any]:
    """The task under which peft hands a prefix over to a model without a language model head.

    peft's classes for classification look for an argument ``past_key_values``, which newer transformers call ``cache``,
    and give up; without a task it leaves the prefix out. Its class for feature extraction passes the prefix to any
    model and returns what that gives, but drops token type ids.
    """
    task = task_of(root)
    if task in _PROMPT_TASKS or (task in TASK_MODULES and "past_key_values" in _arguments(root)):
        return {}
    types = getattr(root.config, "type_vocab_size", 0)
    if isinstance(types, int) and types > 1 and "token_type_ids" in inspect.signature(type(root).forward).parameters:
        warnings.warn(
            f"peft runs the prefix of {type(root).__name__} in its class for feature extraction, which ignores"
            " token_type_ids: what is given as a pair of texts gets other results there.",
            stacklevel=4,
        )
    return {"task_type": "FEATURE_EXTRACTION"}


def _pair(module: PrefixedAttention) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        key, value = module.delta.pair()
    return key.detach(), value.detach()


def _check_prefix(root: nn.Module, method: PrefixTuning, names: list[str]) -> None:
    reason = None
    if method.positions != "shift":
        reason = (
            "positions='keep' leaves the positions of tokens alone, peft's cache moves them on. Train with"
            " PrefixTuning(positions='shift')"
        )
    elif not hasattr(root, "config") or not _takes_cache(root):
        reason = f"peft hands prefixes over as a cache, which {type(root).__name__} does not take"
    elif type(root).__name__.endswith("ForMultipleChoice"):
        reason = f"peft makes one prefix for each row, and {type(root).__name__} takes several texts in a row"
    elif _encoder_decoder(root):
        reason = (
            "in an encoder-decoder peft gives layer i the keys and values of layer 2i, so that layers share them."
            " PromptTuning and LoRA export from such models"
        )
    elif len(names) != _layers(root):
        reason = f"peft needs a prefix in each of the {_layers(root)} layers, here {len(names)} have one"
    if reason:
        raise _no(method, reason)


def _takes_cache(root: nn.Module) -> bool:
    return not _arguments(root).isdisjoint({"past_key_values", "cache"})  # the second is its name in newer transformers


def _arguments(root: nn.Module) -> set[str]:
    """Names of what a model and the model without its head take."""
    models = [root, getattr(root, "base_model", root)]
    return {name for model in models for name in inspect.signature(type(model).forward).parameters}


def _layers(root: nn.Module) -> int:
    config: Any = root.config
    names = ("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else ()
    return next(
        (getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), config.num_hidden_layers
    )


def _encoder_decoder(root: nn.Module) -> bool:
    return bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))


def _no(method: Any, reason: str) -> PEFTError:
    name = type(method).__name__
    return PEFTError(f"{name} cannot be exported to peft: {reason}. save_adapter(model, path) writes our own file.")


def read_prefix(folder: Folder, root: nn.Module) -> Incoming:
    """Row i, as (2·layers, heads, width): keys at even places, values at odd ones."""
    table = _table(folder)
    crossed = _encoder_decoder(root)
    parts = {"encoder": False, "cross": False} if crossed else {}
    method = PrefixTuning(num_virtual_tokens=len(table), positions="shift", **parts)
    targets = method.targets(root)
    attentions = [(n, m) for n, m in targets.items() if method.adapts(m)]
    heads = [heads_of(m, n) for n, m in attentions]
    if len(set(heads)) != 1 or heads[0].key != heads[0].value or table.shape[1] != sum(h.width for h in heads):
        raise folder.refuse(
            f"its prefixes are {table.shape[1]} numbers wide, the {len(attentions)} attentions of"
            f" {type(root).__name__} take {sum(h.width for h in heads)}. It was made for"
            f" {folder.config.get('base_model_name_or_path') or 'another base'}."
        )
    rows = table.unflatten(1, (len(attentions), 2, heads[0].count, heads[0].key))
    tensors = {}
    for i, (name, _) in enumerate(attentions):
        layer = 2 * i % len(attentions) if crossed else i  # what peft's cache gives to this layer
        for j, leaf in enumerate(("prefix_key", "prefix_value")):
            tensors[f"{name}.delta.{leaf}"] = rows[:, layer, j]
    return Incoming(method, targets, tensors, {_KEY})


# ---- prompts -------------------------------------------------------------------------------------------------------
def write_prompt(root: nn.Module, method: PromptTuning, names: list[str]) -> Outgoing:
    """The vectors.

    Raises:
        PEFTError: a prompt that is appended, or that peft would let a head read.
    """
    if method.position != "prepend":
        raise _no(method, f"position={method.position!r}, but peft puts prompts before the text only")
    fields = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    return _write_vectors(root, method, names, fields)


def write_ptuning(root: nn.Module, method: PTuning, names: list[str]) -> Outgoing:
    """The vectors that the prompt encoder gives: peft keeps no encoder either.

    Raises:
        PEFTError: the vectors stand at placeholders inside the text.
    """
    modules = [root.get_submodule(n) for n in names]
    if method.placeholder_id is not None or any(m._adapter.used for m in modules):
        raise _no(method, "its vectors stand at placeholders inside the text, and peft puts vectors before it only")
    # which encoder it was is of no use without its weights
    return _write_vectors(root, method, names, {"peft_type": "P_TUNING", "encoder_reparameterization_type": "MLP"})


def _write_vectors(root: nn.Module, method: Any, names: list[str], fields: dict[str, Any]) -> Outgoing:
    module = root.get_submodule(names[0])
    task = task_of(root)
    tokens = module._adapter
    if not isinstance(tokens, VirtualTokens) or not tokens.argument_names or len(names) != 1:
        raise _no(method, "peft puts prompts before the token ids of a transformers model, here they stand elsewhere")
    if task not in _PROMPT_TASKS:
        raise _no(
            method,
            f"peft does not take its virtual tokens out again, so {type(root).__name__} would pool or label them. Only"
            " causal and sequence-to-sequence language models give the same results there; PrefixTuning("
            "positions='shift') and LoRA export from others",
        )
    with torch.no_grad():
        table = module.delta.vectors().detach()
    n, width = table.shape
    halves = 2 if task == "SEQ_2_SEQ_LM" else 1
    shape = {"num_virtual_tokens": n, "num_transformer_submodules": halves, "token_dim": width}
    shape |= {"num_layers": _layers(root), "num_attention_heads": root.config.num_attention_heads}
    if halves == 2:  # peft stores rows for a decoder as well and never reads them
        table = torch.cat([table, torch.zeros_like(table)])
    return Outgoing(fields | shape, {_KEY: table}, PROMPT)


def read_prompt(folder: Folder, root: nn.Module) -> Incoming:
    """Prompt tuning, or P-tuning without its encoder."""
    table = _table(folder)
    n = int(folder.config.get("num_virtual_tokens") or len(table))
    if task_of(root) not in _PROMPT_TASKS:
        raise folder.refuse(
            f"{folder.kind} on a {type(root).__name__}: there peft lets the head read virtual tokens, which here never"
            " leave the backbone. The results would differ; train PromptTuning anew."
        )
    prompts = folder.kind == "PROMPT_TUNING"
    method = PromptTuning(num_virtual_tokens=n) if prompts else PTuning(num_virtual_tokens=n, encoder="none")
    targets = method.targets(root)
    name, module = next(iter(targets.items()))
    if table.shape[1] != module.embedding_dim:
        raise folder.refuse(
            f"its vectors have {table.shape[1]} numbers, the embeddings of {type(root).__name__} have"
            f" {module.embedding_dim}."
        )
    return Incoming(method, targets, {f"{name}.delta.prompt": table[:n]}, {_KEY})


def _table(folder: Folder) -> Tensor:
    folder.neutral(_KNOWN, {})
    table = folder.tensors.get(_KEY)
    if table is None or table.ndim != 2:
        raise folder.refuse(f"it holds no {_KEY!r}, which {folder.kind} is made of.")
    return table
