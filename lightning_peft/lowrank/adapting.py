"""Which matrices of a module take a correction, and where the correction is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapted import Adapted, adapt, is_conv1d, make_readable, runs_as_torch
from lightning_peft.errors import ConfigError
from lightning_peft.lowrank.factors import LowRank, Place
from lightning_peft.lowrank.layers import DeltaSet, LowRankConv, LowRankEmbedding, LowRankLinear, LowRankState
from lightning_peft.lowrank.weights import LowRankRecurrent, LowRankWeights
from lightning_peft.match import as_patterns, excluded, matcher
from lightning_peft.quantized import packed

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CELLS = (nn.RNNCellBase, nn.RNNBase)
#: names of projections whose output is queries, keys and values one after another, a third each
_FUSED = ("c_attn", "qkv", "Wqkv", "in_proj")
#: attributes by which a module says how many matrices its one 3-D weight stacks
_COUNTS = ("num_experts", "n_experts", "num_local_experts", "num_types", "num_groups")


# ---- what can be adapted -------------------------------------------------------------------------------------------
def adapts(module: nn.Module) -> bool:
    """Every module whose own weights are matrices or stacks of them: see `places`."""
    if isinstance(module, nn.Linear) or packed(module) is not None:
        return isinstance(module, nn.Linear) or hasattr(module, "in_features")
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention, *_CONVS, *_CELLS)) or is_conv1d(module):
        return True
    return bool(stacked(module)) or is_matrix(own_weight(module))


def is_linear(module: nn.Module) -> bool:
    """Whether ``all-linear`` means this module: attention with packed projections and linear layers of others count."""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module):
        return True
    weight = own_weight(module)
    return "linear" in type(module).__name__.lower() and is_matrix(weight) and weight.ndim == 2


def own_weight(module: nn.Module) -> Any:
    """The tensor called ``weight`` of a module, wherever it stands; None if there is none."""
    return getattr(module, "weight", None) if not isinstance(module, nn.ModuleDict) else None


def is_matrix(weight: Any) -> bool:
    """Whether a weight is a floating tensor that can be seen as a matrix (vectors of norms cannot)."""
    return isinstance(weight, Tensor) and weight.is_floating_point() and 2 <= weight.ndim <= 5


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module that is no layer of torch's and keeps one matrix for each expert or type."""
    if type(module).__module__.startswith("torch."):
        return {}
    found = {}
    for name, parameter in module._parameters.items():
        # `X_orig`, `X_g` and `X_v` are what pruning and norms compute X from
        computed = name.endswith(("_orig", "_g", "_v")) and hasattr(module, name.rpartition("_")[0])
        if parameter is not None and parameter.ndim == 3 and parameter.is_floating_point() and not computed:
            found[name] = parameter
    counts = {len(parameter) for parameter in found.values()}
    if len(counts) != 1 or any(min(parameter.shape) == 1 for parameter in found.values()):
        return {}
    if list(found) == ["weight"] and not counts & {getattr(module, name, None) for name in _COUNTS}:
        return {}  # one dense layer over several dimensions
    return found


def with_output(chosen: dict[str, nn.Module], exclude: str | list[str] | None, prefix: str) -> dict[str, nn.Module]:
    """An attention module brings its ``out_proj`` along, unless that is excluded."""
    banned = [matcher(pattern) for pattern in as_patterns(exclude)]
    found: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        found[name] = module
        output = f"{name}.out_proj"
        has_output = isinstance(module, nn.MultiheadAttention) and output not in chosen
        if has_output and not excluded(output, prefix, banned):
            found[output] = module.out_proj
    return found


def places(module: Any, name: str) -> list[Place]:
    """The matrices of a module; sizes come from its attributes (a sharded or packed weight has another shape)."""
    if isinstance(module, nn.Embedding):
        return [Place(module.weight, module.num_embeddings, module.embedding_dim, transposed=True, table=True)]
    if isinstance(module, _CONVS):
        size_in = module.in_channels // module.groups
        return [Place(module.weight, size_in, module.out_channels, kernel=tuple(module.kernel_size))]
    if isinstance(module, nn.MultiheadAttention):
        return _attention_places(module)
    if isinstance(module, _CELLS):
        return _recurrent_places(module, name)
    fused = name.rpartition(".")[2] in _FUSED
    if isinstance(module, nn.Linear) or packed(module) is not None:
        fused = fused and module.out_features % 3 == 0
        return [Place(module.weight, module.in_features, module.out_features, fused=fused)]
    if is_conv1d(module):
        return [Place(module.weight, module.nx, module.nf, transposed=True, fused=fused and module.nf % 3 == 0)]
    if stacked(module):
        return _expert_places(module)
    weight = module.weight
    return [Place(weight, prod(weight.shape[1:]), len(weight))]


def _attention_places(module: nn.MultiheadAttention) -> list[Place]:
    if module.in_proj_weight is not None:
        size_out, size_in = module.in_proj_weight.shape
        return [Place(module.in_proj_weight, size_in, size_out, "in_proj_weight", fused=True)]
    found = []
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight: Any = module._parameters[name]
        found.append(Place(weight, weight.shape[1], weight.shape[0], name))
    return found


def _recurrent_places(module: Any, name: str) -> list[Place]:
    """The weight matrices of a recurrent layer or cell; they must be plain parameters."""
    names = getattr(module, "_flat_weights_names", ["weight_ih", "weight_hh"])
    found = []
    for tensor_name in names:
        if not tensor_name.startswith("weight"):
            continue
        weight = module._parameters.get(tensor_name)
        if weight is None:
            raise ConfigError(
                f"{name!r} ({type(module).__name__}): its {tensor_name} is computed at each call (weight_norm,"
                " spectral_norm, pruning), where no correction can act. Remove that before injection, or leave the"
                " module out with exclude_modules."
            )
        found.append(Place(weight, weight.shape[1], weight.shape[0], tensor_name))
    return found


def _expert_places(module: nn.Module) -> list[Place]:
    transposed = bool(getattr(module, "is_transposed", False))  # transformers' mark for (expert, in, out)
    found = []
    for name, weight in stacked(module).items():
        count, rows, columns = weight.shape
        size_out, size_in = (columns, rows) if transposed else (rows, columns)
        found.append(Place(weight, size_in, size_out, name, experts=(count,), transposed=transposed))
    return found


# ---- adapting ------------------------------------------------------------------------------------------------------
def adapt_layer(module: nn.Module, name: str, make: Callable[[Place], LowRank]) -> Adapted:
    """Adapt one layer in place.

    Args:
        module: the layer.
        name: its path, for messages.
        make: gives the factors of a matrix.

    Raises:
        ConfigError: dropout on a layer that corrects its weight, an embedding that rewrites its rows, a class that
            cannot be adapted.
    """
    if getattr(module, "max_norm", None) is not None:
        raise ConfigError(
            f"{name!r} is nn.Embedding(max_norm={module.max_norm}), which writes into its rows at each look-up, so the"
            f" base would not stay what it was. Set max_norm=None, or exclude_modules={name!r}."
        )
    kind = kind_of(module)
    deltas = {place.name: make(place) for place in places(module, name)}
    read_only = issubclass(kind, LowRankWeights) or isinstance(module, NonDynamicallyQuantizableLinear)
    if read_only and any(delta.dropout for delta in deltas.values()):
        raise ConfigError(
            f"{name!r} ({type(module).__name__}) is adapted at its weight, where no input can be dropped: set dropout=0"
            f" or exclude_modules={name!r}."
        )
    if not issubclass(kind, LowRankWeights):
        delta = deltas["weight"]
        fast = type(module) is nn.Linear and "forward" not in module.__dict__ and delta.is_plain()
        return adapt(module, kind, delta, LowRankState(fast), name)
    one_matrix = list(deltas) == ["weight"] and not deltas["weight"].stacked
    layer = adapt(module, kind, deltas["weight"] if one_matrix else DeltaSet(deltas), name=name)
    make_readable(layer, layer._readable_names())
    return layer


def kind_of(module: nn.Module) -> type[Adapted]:
    """Where the correction of a layer is made.

    On activations where the forward is torch's own, so that its output is linear in the weight as it stands; there
    nothing as large as the weight is made. Also for weights in few bits, which no sum can be written to. At the weight
    everywhere else.
    """
    if packed(module) is not None:
        return LowRankLinear
    forward = type(module).forward if runs_as_torch(module) else None
    scaled = hasattr(module, "embed_scale")  # Gemma's embeddings: a table too large to be made a second time
    if isinstance(module, nn.Embedding) and (forward is not None or scaled):
        return LowRankEmbedding
    if isinstance(module, _CONVS) and runs_as_torch(module):
        return LowRankConv
    if isinstance(module, nn.RNNBase):
        return LowRankRecurrent
    if forward is nn.Linear.forward or is_conv1d(module):
        return LowRankLinear
    return LowRankWeights


# ---- what adapted layers hold --------------------------------------------------------------------------------------
def factors_of(module: Adapted) -> Iterator[LowRank]:
    """The factors in an adapted layer: one pair, or one for each parameter."""
    yield from (part for part in module.delta.modules() if isinstance(part, LowRank))


def frozen_names(model: nn.Module, kind: type[LowRank]) -> list[str]:
    """Names of frozen tensors among the factors that one method made."""
    names = []
    for name, module in model.named_modules():
        if type(module) is kind:
            names += [f"{name}.{n}" for n, p in module.named_parameters() if not p.requires_grad]
    return names
