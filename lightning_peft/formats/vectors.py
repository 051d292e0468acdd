"""AdaLoRA, VeRA and (IA)³ as peft stores them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapted import is_conv1d
from lightning_peft.errors import PEFTError
from lightning_peft.formats.folder import CHOOSING, HARMLESS, TUNER, Folder, Incoming, Outgoing
from lightning_peft.formats.lowrank import group, number, ordered
from lightning_peft.formats.naming import ends_anyhow, exact, expression, module_names, suffixes
from lightning_peft.lowrank import LowRankConv, LowRankEmbedding, LowRankLinear
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.ia3 import IA3, IA3Attention, IA3Input
from lightning_peft.methods.vera import VeRA

_ADALORA = CHOOSING | {
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("lora_alpha", "lora_dropout", "rank_pattern", "r", "init_lora_weights"),
}


# ---- AdaLoRA -------------------------------------------------------------------------------------------------------
def write_adalora(root: nn.Module, method: AdaLoRA, names: list[str]) -> Outgoing:
    """All triplets; a pruned one has E = 0, so nothing needs to be cut. ``total_step`` is the least that peft takes.

    Raises:
        PEFTError: a layer that peft's AdaLoRA does not take, or computes in another way.
    """
    tensors = {}
    for name in names:
        module: Any = root.get_submodule(name)
        if reason := _adalora_obstacle(module):
            raise PEFTError(
                f"{name!r} ({type(module).__name__}) cannot be exported to peft: {reason}. save_merged(model, folder)"
                " writes the merged model, save_adapter(model, path) our own file."
            )
        delta = module.delta
        # peft keeps the factors of a convolution as matrices
        tensors |= {
            f"{TUNER}{name}.lora_A": delta.lora_A.flatten(1),
            f"{TUNER}{name}.lora_B": delta.lora_B.flatten(1),
            f"{TUNER}{name}.lora_E": delta.lora_E.unsqueeze(1),
        }
    fields = {
        "peft_type": "ADALORA",
        "init_r": method.init_r,
        "target_r": method.target_r,
        "lora_alpha": number(method.alpha),
        "lora_dropout": method.dropout,
        "tinit": method.tinit,
        "tfinal": method.tfinal,
        "deltaT": method.delta_t,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orth_reg_weight,
        "total_step": method.tinit + method.tfinal + 1,
        "rank_pattern": None,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(root.get_submodule(n)) for n in names),
        "init_lora_weights": True,
        "target_modules": names,
    }
    return Outgoing(fields, tensors)


def _adalora_obstacle(module: Any) -> str:
    """Why peft's AdaLoRA cannot take a layer, or nothing."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight, which peft does not correct"
    if isinstance(module, LowRankEmbedding) or not isinstance(module, LowRankLinear):
        return "its AdaLoRA takes linear layers, Conv1D and Conv2d only"
    if isinstance(module, LowRankConv):
        if not isinstance(module, nn.Conv2d):
            return "of convolutions its AdaLoRA takes Conv2d only"
        if module.groups > 1:
            return f"its AdaLoRA cannot take a convolution with groups={module.groups}"
        if module.padding_mode != "zeros":
            return f"its AdaLoRA ignores padding_mode={module.padding_mode!r} of a convolution"
    return ""


def read_adalora(folder: Folder, root: nn.Module) -> Incoming:
    """Triplets that peft has cut off come back with E = 0."""
    config = folder.config
    folder.neutral(_ADALORA, HARMLESS)
    found, known = group(folder, {".lora_A": "lora_A", ".lora_B": "lora_B", ".lora_E": "lora_E"})
    modules = {n: root.get_submodule(n) for n in ordered(folder, root, set(found))}
    names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT"}
    same = ("init_r", "target_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight")
    given = {ours: config[theirs] for ours, theirs in {**names, **{n: n for n in same}}.items() if theirs in config}
    method = AdaLoRA(**given, target_modules=list(modules))
    kept = {k.removesuffix(".lora_E"): v for k, v in (config.get("rank_pattern") or {}).items()}
    tensors = {}
    for name, module in modules.items():
        A, B, E = (found[name][leaf] for leaf in ("lora_A", "lora_B", "lora_E"))
        mask = torch.tensor(kept.get(name) or [True] * method.init_r)
        if int(mask.sum()) != len(A):
            raise folder.refuse(f"{name!r} holds {len(A)} triplets, its rank_pattern says {int(mask.sum())}.")
        A, B = _put(A, mask, 0), _put(B, mask, 1)
        kernel = module.kernel_size if isinstance(module, nn.Conv2d) else ()
        if kernel and A.shape[1] % math.prod(kernel) == 0:  # else it is another convolution's, which shapes will say
            A, B = A.unflatten(1, (-1, *kernel)), B.view(*B.shape, *(1,) * len(kernel))
        tensors[f"{name}.delta.lora_A"] = A
        tensors[f"{name}.delta.lora_B"] = B
        tensors[f"{name}.delta.lora_E"] = _put(E.flatten(), mask, 0)
    return Incoming(method, modules, tensors, known)


def _put(kept: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Rows or columns at the places of ``mask``, zeros elsewhere."""
    shape = list(kept.shape)
    shape[dim] = len(mask)
    return kept.new_zeros(shape).index_copy(dim, mask.nonzero().flatten(), kept)


# ---- VeRA ----------------------------------------------------------------------------------------------------------
def write_vera(root: nn.Module, method: VeRA, names: list[str]) -> Outgoing:
    """The vectors of each layer, and the shared matrices once."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        delta: Any = root.get_submodule(name).delta
        tensors |= {f"{TUNER}{name}.vera_lambda_d": delta.vera_d, f"{TUNER}{name}.vera_lambda_b": delta.vera_b}
        tensors |= {"base_model.vera_A": delta.shared.vera_A, "base_model.vera_B": delta.shared.vera_B}
    fields = {
        "peft_type": "VERA",
        "r": method.r,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "projection_prng_key": method.init_seed,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(root.get_submodule(n)) for n in names),
        "init_weights": True,
        "target_modules": names,
    }
    return Outgoing(fields, tensors)


def read_vera(folder: Folder, root: nn.Module) -> Incoming:
    """Matrices that are not in the file are drawn again from peft's key."""
    config = folder.config
    own = {"r", "d_initial", "vera_dropout", "projection_prng_key", "save_projection", "init_weights"}
    folder.neutral(CHOOSING | own, {})
    found, known = group(folder, {".vera_lambda_d": "vera_d", ".vera_lambda_b": "vera_b"})
    modules = {n: root.get_submodule(n) for n in ordered(folder, root, set(found))}
    method = VeRA(
        r=int(config.get("r", 256)),
        d_initial=float(config.get("d_initial", 0.1)),
        dropout=float(config.get("vera_dropout") or 0.0),
        init_seed=int(config.get("projection_prng_key") or 0),
        target_modules=list(modules),
    )
    tensors = {f"{n}.delta.{leaf}": t for n, leaves in found.items() for leaf, t in leaves.items()}
    first = next(iter(modules))
    wide = max(_size_in(m) for m in modules.values()), max(len(v["vera_b"]) for v in found.values())
    drawn = _draw(method.r, *wide, seed=method.init_seed)
    for leaf, value in zip(("vera_A", "vera_B"), drawn, strict=True):
        known.add(f"base_model.{leaf}")
        tensors[f"{first}.delta.shared.{leaf}"] = folder.tensors.get(f"base_model.{leaf}", value)
    return Incoming(method, modules, tensors, known)


def _size_in(module: Any) -> int:
    return module.nx if is_conv1d(module) else module.in_features


def _draw(r: int, size_in: int, size_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """peft's matrices: Kaiming-uniform with gain √2 from one generator on the CPU, A first."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.empty(r, size_in), torch.empty(size_out, r)
    for matrix in (A, B):
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B


# ---- (IA)³ ---------------------------------------------------------------------------------------------------------
def write_ia3(root: nn.Module, method: IA3, names: list[str]) -> Outgoing:
    """Vectors as columns at outputs and as rows at inputs."""
    modules: dict[str, Any] = {n: root.get_submodule(n) for n in names}
    for name, module in modules.items():
        if isinstance(module, IA3Attention):
            raise PEFTError(
                f"{name!r} (MultiheadAttention) cannot be exported to peft: its IA3 takes linear layers and Conv1D"
                " only. save_merged(model, folder) writes the merged model."
            )
    inputs = [n for n, m in modules.items() if isinstance(m, IA3Input)]
    tensors = {}
    for name, module in modules.items():
        scale = module.delta.ia3_l
        tensors[f"{TUNER}{name}.ia3_l"] = scale.unsqueeze(0 if name in inputs else 1)
    targets, feedforward = _two_lists(root, names, inputs)
    fields = {
        "peft_type": "IA3",
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(is_conv1d(m) for m in modules.values()),
        "init_ia3_weights": True,
        "target_modules": targets,
    }
    return Outgoing(fields, tensors)


def _two_lists(root: nn.Module, names: list[str], inputs: list[str]) -> tuple[list[str] | str, list[str] | str]:
    """Targets, and those of them at whose input the vector stands; peft wants the second inside the first."""
    every = module_names(root)
    outputs = [n for n in names if n not in inputs]
    first, second = suffixes(outputs, every), suffixes(inputs, every)
    if first is not None and second is not None and not any(ends_anyhow(p, n) for p in second for n in outputs):
        return sorted({*first, *second}), second
    return expression(names), expression(inputs)


def read_ia3(folder: Folder, root: nn.Module) -> Incoming:
    """A row stands at the input of a layer, a column at its output."""
    folder.neutral(CHOOSING | {"feedforward_modules", "init_ia3_weights"}, {})
    found, known = group(folder, {".ia3_l": "ia3_l"})
    modules = {n: root.get_submodule(n) for n in ordered(folder, root, set(found))}
    inputs = [n for n in modules if found[n]["ia3_l"].shape[0] == 1 != found[n]["ia3_l"].numel()]
    odd = next((n for n, m in modules.items() if not (isinstance(m, nn.Linear) or is_conv1d(m))), None)
    if odd is not None:
        raise folder.refuse(f"it rescales {odd!r} ({type(modules[odd]).__name__}); IA3 here takes linear layers only.")
    method = IA3(target_modules=list(modules), feedforward_modules=[exact(n, modules) for n in inputs])
    return Incoming(method, modules, {f"{n}.delta.ia3_l": found[n]["ia3_l"].flatten() for n in modules}, known)
