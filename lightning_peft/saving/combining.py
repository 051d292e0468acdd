"""New adapters out of trained ones, from their files alone."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.files import SECTION
from lightning_peft.fingerprint import difference
from lightning_peft.methods.lora import LoRA
from lightning_peft.saving.saved_adapter import SavedAdapter, Source
from lightning_peft.saving.section import SavedMethod

How = Literal["linear", "cat", "svd", "ties", "dare"]
#: A and B of one matrix, (…, r, in) and (…, out, r), with everything in them: the correction is B·A
Factors = tuple[Tensor, Tensor]
#: the dimensions of A and B, in the file, behind (…, r, ·) and (…, out, r): the kernel of a convolution
Tails = tuple[tuple[int, ...], tuple[int, ...]]


def combine(
    paths: Sequence[Source],
    weights: Sequence[float] | None = None,
    how: How = "linear",
    *,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    path: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Combine low-rank adapters of one base model into a new one.

    What is combined are the corrections ``ΔW_i = s_i·B_i·A_i`` themselves, each with its own rank and scaling. (A sum
    of the A and of the B, as elsewhere, is no sum of corrections.) A module that a file does not adapt counts as a
    correction of zero. Tensors trained in full (heads, biases) become their weighted mean.

    Args:
        paths: adapter files or checkpoints of `LoRA`, `LoRAFA`, `DeltaLoRA`, `AdaLoRA`, or what this function returned.
        weights: a factor for each; None: equal ones that sum to 1, for ``ties`` 1 each, since it takes means itself.
        how: ``cat`` stacks the factors: exactly ``Σ w_i·ΔW_i``, rank ``Σ r_i``. ``linear`` is the same sum in the
            fewest directions that hold it, ``svd`` its best approximation of rank ``r``. ``ties`` (Yadav et al. 2023,
            arXiv:2306.01708) keeps the largest entries of each correction, elects a sign for each entry and averages
            the weighted ones that agree; ``dare`` (Yu et al. 2023, arXiv:2311.03099) keeps random entries, rescales
            them, and sums. Both approximate the result by rank ``r``.
        r: rank of the result for ``svd`` (default: the largest rank given), ``ties`` and ``dare`` (default: ``Σ r_i``).
        density: share of entries that ``ties`` and ``dare`` keep.
        seed: of the entries that ``dare`` drops.
        path: a ``.safetensors`` file to write.

    Returns:
        A new `LoRA` adapter as `load_adapter` takes it: ``{"state_dict": …, "lightning_peft": …}``.

    Raises:
        CheckpointError: another base model or method; `DoRA` and its reason.
        ConfigError: values that cannot work.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import LoRA, combine, inject, load_adapter, save_adapter
    >>> net, path = nn.Sequential(nn.Linear(4, 4)), os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> inject(net, LoRA(r=2)); save_adapter(net, path)
    >>> new = combine([path, path], [0.5, 0.5], "cat")
    >>> new["lightning_peft"]["methods"][0]["config"]["r"]
    4
    """
    weights = _checked(paths, weights, how, r, density, path)
    read = [_read(source) for source in paths]
    network = read[0].section.network
    adapters = [saved.under("") for saved in read]  # the networks may have stood at different paths
    for other in adapters[1:]:
        _check_same_base(adapters[0], other)
    generator = torch.Generator().manual_seed(seed)
    corrections = [_corrections(saved) for saved in adapters]
    combined: dict[str, tuple[Factors, Tails]] = {}
    for name in dict.fromkeys(name for correction in corrections for name in correction):
        parts, tails = [], None
        for weight, correction in zip(weights, corrections, strict=True):
            if name in correction:
                factors, own_tails = correction[name]
                parts.append((weight, factors))
                tails = tails or own_tails
        if len({(A.shape[-1], B.shape[:-1]) for _, (A, B) in parts}) > 1:
            raise CheckpointError(f"combine: the files correct {name} in different shapes, so they do not add up.")
        combined[name] = _combined(how, parts, r, density, generator), tails
    result = _result(adapters, weights, combined).under(network)
    if path is not None:
        result.write(Path(path))
    return {"state_dict": result.tensors, SECTION: result.section.as_dict()}


def _checked(paths, weights, how, r, density, path) -> list[float]:
    if how not in ("linear", "cat", "svd", "ties", "dare"):
        raise ConfigError(f"combine(how={how!r}): choose one of linear, cat, svd, ties, dare.")
    if not paths:
        raise ConfigError("combine: give at least one adapter file.")
    equal = 1.0 if how == "ties" else 1 / len(paths)
    weights = [equal] * len(paths) if weights is None else [float(w) for w in weights]
    if len(weights) != len(paths):
        raise ConfigError(f"combine: {len(paths)} files and {len(weights)} weights; give one weight for each file.")
    if not 0 < density <= 1:
        raise ConfigError(f"combine(density={density!r}): density must be above 0 and at most 1.")
    if path is not None and Path(path).suffix != ".safetensors":
        raise ConfigError(f"combine(path={str(path)!r}): the file is safetensors; let its name end so.")
    if r is not None and (how in ("linear", "cat") or r < 1):
        raise ConfigError(f"combine(r={r!r}, how={how!r}): the rank can be set, from 1 on, for svd, ties and dare.")
    return weights


# ---- files ---------------------------------------------------------------------------------------------------------
def _read(source: Source) -> SavedAdapter:
    """An adapter whose corrections add up, without a base beside it."""
    if isinstance(source, Mapping) and SECTION not in source:
        raise CheckpointError(f"combine: the state dict holds no {SECTION!r} section, so it does not say what it is.")
    saved = SavedAdapter.read(source).without_base()
    saved.check_finite(saved.section.keys)
    if len(saved.methods) != 1:
        raise CheckpointError(f"{saved.where} holds {len(saved.methods)} methods; combine takes files with one.")
    method: Any = saved.methods[0]
    if not getattr(method, "additive", False):
        reason = getattr(method, "why_not_additive", "it is no sum of a weight and a product of two factors.")
        raise CheckpointError(
            f"{saved.where} was trained with {type(method).__name__}, which cannot be combined: {reason}"
        )
    if getattr(method, "fused_parts", None):
        raise CheckpointError(f"{saved.where} has factors for parts of fused projections, which combine does not take.")
    return saved


def _check_same_base(first: SavedAdapter, other: SavedAdapter) -> None:
    theirs, ours = other.section.modules_to_save, first.section.modules_to_save
    if set(theirs) != set(ours):
        raise CheckpointError(
            f"{other.where} trains {theirs} in full, {first.where} trains {ours}: they do not combine."
        )
    reason = difference(first.section.base, other.section.base)
    if reason:
        raise CheckpointError(f"{other.where} and {first.where} were trained on different base models: {reason}.")


def _corrections(saved: SavedAdapter) -> dict[str, tuple[Factors, Tails]]:
    """By the name of a pair of factors: A and B in float32 or wider, and what their last dimensions were folded from.

    Raises:
        CheckpointError: the factors are not those of the file's method.
    """
    try:
        corrections = {}
        for key in saved.tensors:
            name, _, leaf = key.rpartition(".")
            if leaf == "lora_A":
                corrections[name] = _correction(saved, name)
        return corrections
    except (LookupError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        kind = type(saved.methods[0]).__name__
        raise CheckpointError(f"{saved.where} is damaged: its factors are none of {kind}: {error}.") from error


def _correction(saved: SavedAdapter, name: str) -> tuple[Factors, Tails]:
    """The pair of factors called ``name``."""
    method: Any = saved.methods[0]
    own = {}
    for key, tensor in saved.tensors.items():
        owner, _, leaf = key.rpartition(".")
        if owner == name:
            if not tensor.is_floating_point():
                raise ValueError("they are no real numbers")
            # sums of several adapters need the headroom of float32
            own[leaf] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    stacked = _stacked(own["lora_A"], own["lora_B"])
    tails = tuple(own["lora_A"].shape[stacked + 1 :]), tuple(own["lora_B"].shape[stacked + 2 :])
    scaling = method.scaling(_target(name, saved.section.targets))
    A, B = method.factors.saved(own, scaling, stacked)
    if A.shape[-2] != B.shape[-1]:
        raise ValueError("A and B have different ranks")
    return (A, B), tails


def _target(name: str, targets: Sequence[str]) -> str:
    """The adapted module that a tensor belongs to; empty for one that is trained in full."""
    owners = [target for target in targets if f"{name}.".startswith(f"{target}.delta.")]
    return max(owners, key=len, default="")


def _stacked(A: Tensor, B: Tensor) -> int:
    """1 for the stacked factors of experts, (n, r, in) and (n, out, r); a convolution has (r, in, k), (out, r, 1)."""
    return int(A.ndim == 3 and not (A.shape[0] == B.shape[1] and B.shape[2] == 1))


def _result(
    adapters: list[SavedAdapter], weights: list[float], combined: dict[str, tuple[Factors, Tails]]
) -> SavedAdapter:
    """A `LoRA` adapter with the combined factors, and the means of what was trained in full."""
    targets = list(dict.fromkeys(name for saved in adapters for name in saved.section.targets))
    ranks: dict[str, int] = {}
    for name, ((A, _), _) in combined.items():  # the matrices of one module share its rank
        target = _target(name, targets)
        ranks[target] = max(ranks.get(target, 0), A.shape[-2])
    tensors: dict[str, Tensor] = {}
    for name, ((A, B), (kernel, ones)) in combined.items():
        more = ranks[_target(name, targets)] - A.shape[-2]
        A, B = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        tensors[f"{name}.lora_A"] = A.reshape(*A.shape[:-1], *kernel).contiguous()
        tensors[f"{name}.lora_B"] = B.reshape(*B.shape, *ones).contiguous()
    tensors |= _means(adapters, weights)
    method = _method(adapters[0].methods[0], targets, ranks)
    section = dataclasses.replace(
        adapters[0].section,
        methods=[SavedMethod("LoRA", method.config(), targets)],
        keys=list(tensors),
        trainable=list(tensors),
    )
    return SavedAdapter(section, tensors)


def _method(old: Any, targets: list[str], ranks: dict[str, int]) -> LoRA:
    """LoRA with scaling 1 everywhere, whatever the ranks."""
    r = max(ranks.values())
    odd = {f"re:{re.escape(target)}": rank for target, rank in ranks.items() if rank != r}
    kept = {"bias": getattr(old, "bias", "none"), "modules_to_save": old.modules_to_save}
    return LoRA(r=r, alpha=r, rank_pattern=odd, alpha_pattern=dict(odd), target_modules=targets, **kept)


def _means(adapters: list[SavedAdapter], weights: list[float]) -> dict[str, Tensor]:
    """Everything trained in full, as a weighted mean."""
    names = []
    for saved in adapters:
        names.append([name for name in saved.tensors if not _target(name, saved.section.targets)])
    different = set().union(*names) - set(names[0]).intersection(*names)
    if different:
        raise CheckpointError(
            f"combine: not all files hold {min(different)!r}, which is trained in full, so it has no mean."
        )
    total = sum(weights)
    if names[0] and abs(total) < 1e-6:
        raise ConfigError("combine: the weights sum to 0, which gives no mean of the heads and biases in the files.")
    means = {}
    for name in names[0]:
        values = [saved.tensors[name] for saved in adapters]
        means[name] = values[0]
        if values[0].is_floating_point():
            mean = sum(w * v.double() for w, v in zip(weights, values, strict=True)) / (total or 1)
            means[name] = mean.to(values[0].dtype)
    return means


# ---- arithmetic ----------------------------------------------------------------------------------------------------
def _combined(how: str, parts: list[tuple[float, Factors]], r, density: float, generator) -> Factors:
    if how in ("cat", "linear", "svd"):
        A = torch.cat([A for _, (A, _) in parts], -2)
        B = torch.cat([w * B for w, (_, B) in parts], -1)
        if how == "cat":
            return A, B
        largest = max(A.shape[-2] for _, (A, _) in parts)
        return _compressed(A, B, None if how == "linear" else r or largest)
    dense = [(w, B @ A) for w, (A, B) in parts]
    merge: Callable = _ties if how == "ties" else _dare
    matrix = merge(dense, density, generator)
    limit = r or sum(A.shape[-2] for _, (A, _) in parts)
    return _split(*torch.linalg.svd(matrix, full_matrices=False), limit)


def _compressed(A: Tensor, B: Tensor, r: int | None) -> Factors:
    """B·A in r directions, or in as few as hold all of it; the product itself, out × in, is never formed."""
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    if r is None:
        top = S.amax(-1, keepdim=True)
        r = max(1, int((top * 1e-6 < S).sum(-1).max()))
    lead, tail = _split(left.Q @ U, S, V @ right.Q.mT, r)
    return lead.to(A.dtype), tail.to(B.dtype)


def _split(U: Tensor, S: Tensor, V: Tensor, r: int) -> Factors:
    """Singular directions as A and B of rank at most r, the singular values shared between them."""
    root = S[..., :r].sqrt()
    return root.unsqueeze(-1) * V[..., :r, :], U[..., :r] * root.unsqueeze(-2)


def _ties(dense: list[tuple[float, Tensor]], density: float, _: Any) -> Tensor:
    stacked = torch.stack([w * _largest(m, density) for w, m in dense])
    agree = torch.sign(stacked) == torch.sign(stacked.sum(0))
    agree &= stacked != 0
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(matrix: Tensor, density: float) -> Tensor:
    count = max(1, int(matrix.numel() * density))
    threshold = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
    return matrix * (matrix.abs() >= threshold)


def _dare(dense: list[tuple[float, Tensor]], density: float, generator: torch.Generator) -> Tensor:
    kept = [w * m * (torch.rand(m.shape, generator=generator) < density) / density for w, m in dense]
    return torch.stack(kept).sum(0)
