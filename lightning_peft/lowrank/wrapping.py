"""Which layer carries the factors of which module."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapted import Adapted, is_conv1d
from lightning_peft.errors import ConfigError
from lightning_peft.lowrank.factors import LowRank, Place
from lightning_peft.lowrank.layers import LowRankConv, LowRankConv1D, LowRankEmbedding, LowRankLinear
from lightning_peft.lowrank.weights import DeltaSet, LowRankAttention, LowRankProjection, LowRankStack
from lightning_peft.match import as_patterns, excluded, matcher

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: names of projections whose output is queries, keys and values one after another, a third each
_FUSED = ("c_attn", "qkv", "Wqkv", "in_proj")


def adapts(module: nn.Module) -> bool:
    """Linear layers, transformers' Conv1D, embeddings, convolutions, `nn.MultiheadAttention`, stacked experts."""
    return isinstance(module, (nn.Embedding, *_CONVS)) or is_linear(module) or bool(stacked(module))


def is_linear(module: nn.Module) -> bool:
    """Whether ``all-linear`` means this module: attention with packed projections counts."""
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D expert weights of a module that is no layer of torch's."""
    if type(module).__module__.startswith("torch."):
        return {}
    found = {n: p for n, p in module._parameters.items() if p is not None and p.ndim == 3 and p.is_floating_point()}
    counts = {len(p) for p in found.values()}
    return found if len(counts) == 1 and min(min(p.shape) for p in found.values()) > 1 else {}


def with_output(chosen: dict[str, nn.Module], exclude: str | list[str] | None, prefix: str) -> dict[str, nn.Module]:
    """An attention module brings its ``out_proj`` along, unless that is excluded."""
    bans = [matcher(p) for p in as_patterns(exclude)]
    found: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        found[name] = module
        output = f"{name}.out_proj"
        packed = isinstance(module, nn.MultiheadAttention) and output not in chosen
        if packed and not excluded(output, prefix, bans):
            found[output] = module.out_proj
    return found


def wrap(module: nn.Module, name: str, make: Callable[[Place], LowRank]) -> Adapted:
    """Wrap one layer.

    Args:
        module: the layer.
        name: its path, for messages.
        make: gives the factors of a matrix.

    Raises:
        ConfigError: dropout on a layer that corrects its weight, an embedding that rewrites its rows.
    """
    if getattr(module, "max_norm", None) is not None:
        raise ConfigError(
            f"{name!r} is nn.Embedding(max_norm={module.max_norm}), which writes into its rows at each look-up, so the"
            f" base would not stay what it was. Set max_norm=None, or exclude_modules={name!r}."
        )
    deltas = {place.name: make(place) for place in places(module, name)}
    kind = _kind(module)
    if kind in (LowRankAttention, LowRankProjection, LowRankStack) and any(d.dropout for d in deltas.values()):
        raise ConfigError(
            f"{name!r} ({type(module).__name__}) is adapted at its weight, where no input can be dropped: set dropout=0"
            f" or exclude_modules={name!r}."
        )
    if kind in (LowRankAttention, LowRankStack):
        return kind(module, DeltaSet(deltas))
    layer = kind(module, deltas["weight"])
    layer.direct = kind is LowRankLinear and deltas["weight"].direct()
    return layer


def read_by_parents(model: nn.Module) -> None:
    """Tell layers whose parents read their weights and do not call them (see `read_children`)."""
    for name, child in read_children(model):
        if isinstance(child, LowRankLinear):
            child.read = True
            if child.delta.dropout and not isinstance(model.get_submodule(name), nn.TransformerEncoderLayer):
                warnings.warn(
                    f"{type(model.get_submodule(name)).__name__} reads the weights of its projections, where no input"
                    f" can be dropped: dropout={child.delta.dropout} does not act in {name}.",
                    stacklevel=2,
                )


def read_children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of modules that read their parts' weights, each with its parent's name.

    `nn.TransformerEncoderLayer` does so on its fast path, and attention that hands its projections to torch's
    ``multi_head_attention_forward`` (WavLM) always.
    """
    for name, parent in model.named_modules():
        if _reads(type(parent)):
            yield from ((name, child) for child in parent.children())


@functools.cache
def _reads(kind: type) -> bool:
    functions = (f for c in kind.__mro__ for f in vars(c).values() if isinstance(f, types.FunctionType))
    return issubclass(kind, nn.TransformerEncoderLayer) or any(
        "multi_head_attention_forward" in f.__code__.co_names for f in functions
    )


def factors_of(module: Adapted) -> Iterator[LowRank]:
    """The factors in a wrapped module: one pair, or one for each parameter."""
    yield from (d for d in module.delta.modules() if isinstance(d, LowRank))


def frozen_names(model: nn.Module, kind: type[LowRank]) -> list[str]:
    """Names of frozen tensors among the factors that one method made."""
    names = []
    for name, module in model.named_modules():
        if type(module) is kind:
            names += [f"{name}.{n}" for n, p in module.named_parameters() if not p.requires_grad]
    return names


def places(module: Any, name: str) -> list[Place]:
    """The matrices of a module; sizes come from its attributes (a sharded or packed weight has another shape)."""
    if isinstance(module, nn.Embedding):
        return [Place(module.weight, module.num_embeddings, module.embedding_dim, transposed=True, table=True)]
    if isinstance(module, _CONVS):
        size_in = module.in_channels // module.groups
        return [Place(module.weight, size_in, module.out_channels, kernel=tuple(module.kernel_size))]
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    fused = name.rpartition(".")[2] in _FUSED
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        fused = fused and module.out_features % 3 == 0
        return [Place(module.weight, module.in_features, module.out_features, fused=fused)]
    if is_conv1d(module):
        return [Place(module.weight, module.nx, module.nf, transposed=True, fused=fused and module.nf % 3 == 0)]
    return _experts(module)


def _attention(module: nn.MultiheadAttention) -> list[Place]:
    if module.in_proj_weight is not None:
        size_out, size_in = module.in_proj_weight.shape
        return [Place(module.in_proj_weight, size_in, size_out, "in_proj_weight", fused=True)]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = {n: module._parameters[n] for n in names}
    return [Place(w, w.shape[1], w.shape[0], n) for n, w in weights.items()]


def _experts(module: nn.Module) -> list[Place]:
    transposed = bool(getattr(module, "is_transposed", False))  # transformers' mark for (expert, in, out)
    found = []
    for name, weight in stacked(module).items():
        count, rows, columns = weight.shape
        size_out, size_in = (columns, rows) if transposed else (rows, columns)
        found.append(Place(weight, size_in, size_out, name, experts=(count,), transposed=transposed))
    return found


def _kind(module: nn.Module) -> type[Adapted]:
    if isinstance(module, nn.Embedding):
        return LowRankEmbedding
    if isinstance(module, _CONVS):
        return LowRankConv
    if isinstance(module, nn.MultiheadAttention):
        return LowRankAttention
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return LowRankProjection
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        return LowRankLinear
    return LowRankConv1D if is_conv1d(module) else LowRankStack
