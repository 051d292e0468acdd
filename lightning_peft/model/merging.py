"""Fold adapters into the base weights, reversibly, or for good."""

from __future__ import annotations

from torch import nn

from lightning_peft.errors import MergeError
from lightning_peft.model.adapters import Adapters, adapted_modules, adapter_tensors
from lightning_peft.model.injection import end_session
from lightning_peft.quantized import packed


def merge(model: nn.Module) -> None:
    """Fold every adapter into its base weights: summed in float32 (or wider), cast once. In place, reversible.

    The originals are kept, so `unmerge` restores them bit for bit. A parameter that is tied to another module is
    untied while merged: the other module keeps its value.

    Raises:
        MergeError: the model is merged already, or the method does not merge.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, merge, unmerge
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> before = net[0].weight
    >>> inject(net, LoRA()); merge(net); unmerge(net)
    >>> net[0].weight is before
    True
    """
    adapters = Adapters.of(model)
    adapters.refuse_disabled("merge")
    if adapters.record.merged:
        raise MergeError("The model is merged already; unmerge(model) takes the adapters out of the weights again.")
    refuse(adapters)
    adapters.switch(merged=True)


def unmerge(model: nn.Module) -> None:
    """Take the adapters out of the weights again; the very same parameters return.

    Raises:
        MergeError: the model is not merged.
    """
    adapters = Adapters.of(model)
    if not adapters.record.merged:
        raise MergeError("The model is not merged, so there is nothing to unmerge.")
    adapters.switch(merged=False)


def merge_and_unload(model: nn.Module) -> None:
    """Merge for good: the modules stay with merged weights, adapters and record go. In place.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, merge_and_unload
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA()); merge_and_unload(net); type(net[0]).__name__
    'Linear'
    """
    adapters = Adapters.of(model)
    adapters.refuse_disabled("merge_and_unload")
    refuse(adapters)
    adapters.check_removable()
    root = adapters.network
    tied = tied_parameters(root)
    adapters.switch(merged=True)
    adapters.remove()
    end_session(model)
    config = getattr(root, "config", None)
    left = tied_parameters(root)
    if tied != left and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # one side took an adapter, the other did not: they are two tensors now
        for first, *others in (g for g in left if any(set(g) < set(group) for group in tied)):
            for name in others:  # a file written from here must hold each of them
                _separate(root, name, root.get_parameter(first))


def refuse(adapters: Adapters) -> None:
    """Raise a `MergeError` with the reason if a method in the model does not merge."""
    adapters.refuse_flat("merge")
    for method in adapters.methods:
        if not method.mergeable:
            raise MergeError(
                f"{type(method).__name__} cannot be merged: {method.why_not_mergeable} Keep the adapter beside the"
                " base: save_adapter(model, path)."
            )
    if reason := packed_obstacle(adapters.model):
        raise MergeError(
            f"Cannot merge in place: {reason} save_merged(model, folder) writes a merged float model where the original"
            " base can be loaded again."
        )
    if reason := obstacle(adapters.model):
        raise MergeError(f"Cannot merge {reason}")


def obstacle(model: nn.Module) -> str | None:
    """Why base weights of this model cannot take merged values, or None: they are packed to few bits, or computed."""
    for name, layer in adapted_modules(model):
        reason = layer._obstacle()
        if reason is not None:
            return f"{name}: {reason}"
    return None


def packed_obstacle(model: nn.Module) -> str | None:
    """As `obstacle`, but only for a base in few bits, which can be loaded once more in floats."""
    layers = [layer for _, layer in adapted_modules(model) if packed(layer) is not None]
    return layers[0]._obstacle() if layers else None


def tied_parameters(root: nn.Module) -> set[tuple[str, ...]]:
    """Groups of names that stand for one parameter of the base."""
    names: dict[int, list[str]] = {}
    added = adapter_tensors(root)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) not in added:
            names.setdefault(id(parameter), []).append(name)
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def _separate(root: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    copy = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    root.get_submodule(owner)._parameters[leaf] = copy
