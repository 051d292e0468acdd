"""LoRA and what is a LoRA for inference, as peft stores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapted import is_conv1d
from lightning_peft.errors import PEFTError
from lightning_peft.formats.folder import CHOOSING, HARMLESS, TUNER, Folder, Incoming, Outgoing
from lightning_peft.formats.naming import differing, exact, searched
from lightning_peft.lowrank import (
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    LowRankWeights,
)
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.deltalora import DeltaFactors
from lightning_peft.methods.dora import DoRA, DoRAFactors
from lightning_peft.methods.lora import LoRA

#: stands for "no target at all" in peft; with bias="all" that is BitFit
NO_TARGETS = "dummy-target-modules"
_KNOWN = CHOOSING | {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "eva_config"),
}
#: start values after which a file of peft's still fits the untouched base
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)
_LEAVES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_magnitude_vector": "lora_magnitude",
}


# ---- out -----------------------------------------------------------------------------------------------------------
def write_lora(root: nn.Module, method: LoRA, names: list[str]) -> Outgoing:
    """Plain LoRA tensors: starts that are taken off, parts of fused projections and followed weights are further ranks.

    Raises:
        PEFTError: a layer that peft adapts in another way, or not at all.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in names:
        module: Any = root.get_submodule(name)
        _check_layer(name, module)
        if isinstance(module, NonDynamicallyQuantizableLinear):  # an untouched one, which peft wraps with its attention
            continue
        delta = module.delta.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.delta
        A, B = plain_factors(delta)
        times = len(A) / delta.rank
        ranks[name] = len(A)
        alphas[name] = number(method.numerator(name) * (times**0.5 if method.use_rslora else times))
        tensors |= {f"{TUNER}{name}{leaf}": t for leaf, t in _spell(module, delta, A, B).items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": differing(ranks, r),
        "alpha_pattern": differing(alphas, alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "use_dora": isinstance(method, DoRA),
        "bias": method.bias,
        "fan_in_fan_out": any(is_conv1d(root.get_submodule(n)) for n in ranks),
        "init_lora_weights": True,
        "target_modules": list(ranks),
    }
    return Outgoing(fields, tensors)


def write_biases(root: nn.Module, method: BitFit, names: list[str]) -> Outgoing:
    """BitFit: peft's LoRA without a target, with all biases."""
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "all", "target_modules": NO_TARGETS}
    return Outgoing(fields, {})


def plain_factors(delta: LowRank) -> tuple[Tensor, Tensor]:
    """A (R, in, …) and B (out, R, …) whose product, times the scaling of the layer, is the whole correction."""
    kind = type(delta)
    ours = kind.factors in (LowRank.factors, DeltaFactors.factors)
    if not ours or kind.combine not in (LowRank.combine, DoRAFactors.combine):
        raise PEFTError(f"{type(delta).__name__} computes its correction in a way of its own, which peft cannot hold.")
    spread = delta.spread if delta.parts is not None else _same
    A, B = [delta.lora_A], [spread(delta.lora_B)]
    if delta.start_A is not None and delta.start_B is not None:
        A, B = [*A, delta.start_A], [*B, -delta.start_B]
    if isinstance(delta, DeltaFactors) and bool(delta.follow):
        gain = delta.follow
        A, B = [*A, delta.snapshot_A], [B[0] * (1 + gain), *B[1:], spread(delta.snapshot_B) * -gain]
    return torch.cat(A).detach(), torch.cat(B, 1).detach()


def number(value: float) -> float:
    """A whole number as an int, as peft writes it."""
    return int(value) if float(value).is_integer() else float(value)


def _same(B: Tensor) -> Tensor:
    return B


def _spell(module: Any, delta: LowRank, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Tensors by the end of peft's key."""
    if isinstance(module, LowRankEmbedding):
        found = {".lora_embedding_A": A, ".lora_embedding_B": B}
    else:
        found = {".lora_A.weight": A, ".lora_B.weight": B}
    if isinstance(module, nn.MultiheadAttention):  # absent, they would start at random beside a zero B
        width = module.embed_dim
        found[".base_layer.out_proj.lora_A.weight"] = A.new_zeros(len(A), width)
        found[".base_layer.out_proj.lora_B.weight"] = A.new_zeros(width, len(A))
    if isinstance(delta, DoRAFactors):
        ones = (1,) * (delta.lora_A.ndim - 2)
        m = delta.lora_magnitude
        found[".lora_magnitude_vector"] = m.reshape(1, -1, *ones) if ones else m
    return found


def _check_layer(name: str, module: Any) -> None:
    """Refuse layers that peft would compute in another way."""
    attention = isinstance(module, nn.MultiheadAttention)
    several = not isinstance(module.delta, LowRank) and not attention
    reason = ""
    if several:
        reason = "several parameters of one module (experts, recurrent layers) are corrected, which is not written"
    elif isinstance(module, LowRankWeights) and not attention:
        reason = f"{type(module).__name__} has a forward of its own, which peft would not correct in the same way"
    elif isinstance(module, NonDynamicallyQuantizableLinear) and bool(module.delta.lora_B.any()):
        reason = (
            "peft adds the correction of an attention's out_proj twice; train with"
            " exclude_modules='re:.*out_proj' to export the input projections"
        )
    elif attention and not isinstance(module.delta._modules.get("in_proj_weight"), LowRank):
        reason = "peft adapts an nn.MultiheadAttention only where queries, keys and values have one width"
    elif attention and isinstance(module.delta.in_proj_weight, DoRAFactors):
        reason = "peft has no DoRA for nn.MultiheadAttention"
    elif isinstance(module, LowRankConv) and module.groups > 1:
        reason = f"peft splits a convolution with groups={module.groups} in another way and cannot merge it"
    elif isinstance(module, LowRankConv) and (set(module.dilation) != {1} or module.padding_mode != "zeros"):
        reason = f"peft ignores dilation={module.dilation} and padding_mode={module.padding_mode!r} of a convolution"
    if reason:
        raise PEFTError(
            f"{name!r} ({type(module).__name__}) cannot be exported to peft: {reason}. save_merged(model, folder)"
            " writes the merged model, save_adapter(model, path) our own file."
        )


# ---- in ------------------------------------------------------------------------------------------------------------
def read_lora(folder: Folder, root: nn.Module) -> Incoming:
    """LoRA, DoRA or BitFit.

    Raises:
        CheckpointError: options of peft's that mean another computation.
    """
    config = folder.config
    folder.neutral(_KNOWN, HARMLESS)
    if config.get("bias") == "all" and config.get("target_modules") == NO_TARGETS:
        return Incoming(BitFit(), {}, {}, set())
    found, known = group(folder, _LEAVES)
    projections = {n for n in found if n.endswith(".base_layer.out_proj")}
    if any(bool(found[n]["lora_B"].any()) for n in projections):
        raise folder.refuse(
            "it adapts the out_proj of an nn.MultiheadAttention, whose correction peft adds twice. Merge it with peft"
            " (merge_and_unload) and go on from the merged model."
        )
    modules = {n: root.get_submodule(n) for n in ordered(folder, root, set(found) - projections)}
    r, alpha = int(config.get("r", 8)), config.get("lora_alpha", 8)
    ranks = {n: len(found[n]["lora_A"]) for n in modules}
    alphas = {n: alpha_of(config, n, alpha) for n in modules}
    kind = DoRA if config.get("use_dora") else LoRA
    method = kind(
        r=r,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=list(modules),
        use_rslora=bool(config.get("use_rslora")),
        init=_start(folder),
        rank_pattern={exact(n, modules): v for n, v in ranks.items() if v != r},
        alpha_pattern={exact(n, modules): v for n, v in alphas.items() if v != alpha},
        bias=config.get("bias") or "none",
    )
    tensors = {}
    for name, module in modules.items():
        place = f"{name}.delta" + (".in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "")
        tensors |= {
            f"{place}.{leaf}": t.flatten() if leaf == "lora_magnitude" else t for leaf, t in found[name].items()
        }
    return Incoming(method, modules, tensors, known)


def group(folder: Folder, leaves: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Tensors of the file by module and by our name of them, and the keys they came from."""
    found: dict[str, dict[str, Tensor]] = {}
    known = set()
    for key, tensor in folder.tensors.items():
        end = next((e for e in leaves if key.endswith(e) and key.startswith(TUNER)), None)
        if end is None:
            continue
        known.add(key)
        found.setdefault(key.removeprefix(TUNER).removesuffix(end), {})[leaves[end]] = tensor
    if not found:
        raise folder.refuse(f"it holds no tensors of {folder.kind}.")
    return found, known


def ordered(folder: Folder, root: nn.Module, names: set[str]) -> list[str]:
    """The names in the order of the model; all must be there."""
    here = [n for n, _ in root.named_modules(remove_duplicate=False) if n in names]
    lost = sorted(names - set(here))
    if lost:
        raise folder.refuse(
            f"it adapts {len(lost)} modules that {type(root).__name__} lacks, {lost[0]!r} for one. It was made for"
            f" {folder.config.get('base_model_name_or_path') or 'another base'}."
        )
    return here


def alpha_of(config: Mapping[str, Any], name: str, default: float) -> float:
    """peft's alpha for a module."""
    patterns = config.get("alpha_pattern") or {}
    return next((a for p, a in patterns.items() if searched(p, name)), default)


def _start(folder: Folder) -> Any:
    """``pissa`` and ``olora`` were taken off the base, and are again; others leave it alone."""
    start = folder.config.get("init_lora_weights", True)
    if start in _PLAIN_STARTS:
        return "kaiming"
    if start in ("pissa", "olora"):
        return start
    raise folder.refuse(
        f"init_lora_weights={start!r} changed the base in a way that cannot be repeated. Save it from peft with"
        " path_initial_model_for_weight_conversion=…, which makes a plain LoRA of it."
    )
