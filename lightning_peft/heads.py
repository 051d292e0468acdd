"""Heads: which modules are the output head, which are new, which train in full."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.adapted import Delta, base_class
from lightning_peft.errors import NoMatchError
from lightning_peft.match import aliases, candidates, matcher
from lightning_peft.untrusted import short

#: set on modules that our own code added to a loaded model: their values come from no checkpoint
NEW = "_lightning_peft_new"
#: numbers of classes of torchvision's own weights: ImageNet, Kinetics, and what is segmented in COCO
_TORCHVISION_CLASSES = (1000, 400, 21)


def head_names(model: nn.Module) -> set[str]:
    """Names of the modules that count as output head: what transformers puts around its base model.

    A bare base model ends in a pooler that many users never call (they read the hidden states): a head as well.
    Other models have no head that one could know.
    """
    transformers = sys.modules.get("transformers")
    known = getattr(transformers, "PreTrainedModel", None) if transformers else None
    heads: set[str] = set()
    outer: list[str] = []
    for name, module in model.named_modules():
        if known is None or not isinstance(module, known):
            continue
        try:
            output = module.get_output_embeddings()
        except NotImplementedError:  # vision and speech models without a table of outputs
            output = None
        base = module.base_model
        bare = base is module and not any(name.startswith(o) for o in outer)
        outer.append(name + "." if name else "")
        pooler = getattr(module, "pooler", None) if bare else None
        unused = {id(m) for m in pooler.modules()} if isinstance(pooler, nn.Module) else set()
        inside = {id(m) for m in base.modules()}
        for child, part in module.named_modules(prefix=name):
            if part is output or id(part) in unused or (base is not module and id(part) not in inside):
                heads.add(child)
    return heads - {""}


def resolve_modules(root: nn.Module, patterns: list[str], prefix: str = "") -> list[str]:
    """Names of modules meant by ``modules_to_save``; every pattern must match."""
    modules, other_names = candidates(root), aliases(root)
    names: list[str] = []
    for pattern in patterns:
        test = matcher(pattern)
        matched = []
        for name in modules:
            known_as = [name, *other_names.get(name, ())]
            if any(test(n) or (prefix and test(prefix + n)) for n in known_as):
                matched.append(name)
        if not matched:
            top = ", ".join(n for n, _ in root.named_children()) or "none"
            raise NoMatchError(f"modules_to_save={pattern!r} matched no module. The top modules here are: {top}.")
        names += matched
    return list(dict.fromkeys(names))


def new_modules(root: nn.Module) -> list[str]:
    """Modules whose values come from no checkpoint: from_pretrained did not fill them, or our code added them."""
    fresh: list[str] = []
    _warn_of_lost_marks(root)
    loaded = any(_filled(p) for p in root.parameters())
    for name, module in root.named_modules():
        if not name or any(name.startswith(f + ".") for f in fresh):
            continue
        parameters = list(module.parameters())
        unfilled = loaded and parameters and not any(_filled(p) for p in parameters)
        if module.__dict__.get(NEW) or (unfilled and _within_pretrained(root, name)):
            fresh.append(name)
    return fresh


def unmarked_heads(root: nn.Module) -> list[str]:
    """Output layers of timm and torchvision models that no pretrained weights have filled.

    These packages leave no mark on what they load. But an output layer is new if it has another number of classes than
    the package's own weights, or if it is all zeros.
    """
    found = []
    for model_name, model in root.named_modules():
        for place, known_sizes in _output_places(model):
            layer_name, weight = _last_weight(model.get_submodule(place), place)
            if weight is None or weight.is_meta:
                continue
            if weight.shape[0] not in known_sizes or not bool(weight.detach().any()):
                found.append(f"{model_name}.{layer_name}" if model_name else layer_name)
    return found


def _output_places(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Where a model of timm or torchvision has its output layer, and how many classes its package's weights have."""
    children = dict(model.named_children())
    settings = model.__dict__.get("pretrained_cfg")  # timm's
    if isinstance(settings, Mapping) and settings.get("classifier") and settings.get("num_classes"):
        named = settings["classifier"]
        places = [named] if isinstance(named, str) else list(named)
        return [(place, (settings["num_classes"],)) for place in places if place.split(".")[0] in children]
    if base_class(model).__module__.startswith("torchvision.models."):
        return [(place, _TORCHVISION_CLASSES) for place in ("fc", "classifier", "head", "heads") if place in children]
    return []


def _last_weight(module: nn.Module, name: str) -> tuple[str, nn.Parameter | None]:
    """Name and weight of the last layer in a module that maps to classes."""
    found: tuple[str, nn.Parameter | None] = (name, None)
    for layer_name, layer in module.named_modules(prefix=name):
        if isinstance(layer, Delta):
            continue
        weight = layer._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            found = (layer_name, weight)
    return found


def _warn_of_lost_marks(root: nn.Module) -> None:
    """A deep copy of a loaded model has lost transformers' marks, so a new head in it looks like a loaded one."""
    heads = head_names(root)
    path = getattr(getattr(root, "config", None), "_name_or_path", "")
    if path and heads and not any(_filled(p) for p in root.parameters()) and any(True for _ in root.parameters()):
        tops = sorted({h.split(".")[0] for h in heads if any(True for _ in root.get_submodule(h).parameters())})
        if tops:
            warnings.warn(
                f"{type(root).__name__} from {path} does not say which of its weights were loaded (a copy loses that),"
                f" so {', '.join(tops)} stays frozen. If it is new, name it: modules_to_save={tops}.",
                stacklevel=2,
            )


def _filled(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _within_pretrained(root: nn.Module, name: str) -> bool:
    """Whether a module lies in a transformers model that from_pretrained filled: elsewhere nothing is guessed."""
    parts = name.split(".")
    owners = [root.get_submodule(".".join(parts[:i])) if i else root for i in range(len(parts))]
    return any(hasattr(o, "base_model_prefix") and any(_filled(p) for p in o.parameters()) for o in owners)


def label_names(root: nn.Module) -> list[str] | None:
    """Names of the classes in a transformers configuration, in order; None where they are only numbered."""
    names = getattr(getattr(root, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or all(str(n).startswith("LABEL_") for n in names.values()):
        return None
    return [str(names[i]) for i in sorted(names)]


def listed_labels(names: Sequence[Any]) -> str:
    """Names of classes for a message; of many, the first.

    >>> listed_labels(["no", "yes"])
    '2 labels (no, yes)'
    """
    shown = ", ".join(short(name, 60) for name in names[:12]) + (", …" if len(names) > 12 else "")
    return f"{len(names)} label{'s' if len(names) != 1 else ''} ({shown})"
