"""Prefix-tuning: learned keys and values in every attention (Li & Liang 2021)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta, adapt
from lightning_peft.errors import ConfigError, NoMatchError
from lightning_peft.match import candidates, select
from lightning_peft.method import Method, check_number
from lightning_peft.model.adapters import Adapters
from lightning_peft.prompting.attention import (
    SUPPORTED,
    PrefixedConfig,
    RegistryAttention,
    RegistryState,
    kind_of,
)
from lightning_peft.prompting.backbone import argument_names
from lightning_peft.prompting.positions import ShiftedPositions, ShiftState, shiftable
from lightning_peft.prompting.prefix import Prefix, PrefixedAttention, PrefixEncoder, ProjectedPrefix, heads_of
from lightning_peft.torch_encoder import keep_open, restore

_CROSS = re.compile(r"(^|\.)(\w*cross\w*|encoder_attn|EncDecAttention|multihead_attn)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Put ``n`` learned keys and values in front of those of every attention: ``softmax(q [P_K; K]ᵀ) [P_V; V]``.

    Works inside the attention, after rotary embeddings and after the generation cache, so batches, masks, labels,
    caches and lengths stay as they are; the prefix is visible to every query. Trains ``2·n·heads·width`` numbers per
    attention. For transformers models on the attention interface (text, vision, speech, several modalities; sdpa and
    eager), `nn.MultiheadAttention`, and modules that call ``F.scaled_dot_product_attention``.

    Args:
        num_virtual_tokens: length n of the prefix.
        projection: train ``W tanh(W' E + b') + b`` instead, one network for each stack of layers as in the paper;
            saved as it is, so training resumes; `fold` replaces it by its result.
        hidden_size: width of that network.
        positions: ``keep`` leaves the positions of tokens alone; ``shift`` moves them on by n, as a key-value cache
            of length n does (compatible with peft). Models without position ids (relative distances, image patches)
            are the same either way.
        encoder, decoder, cross: which attentions of an encoder-decoder model take part.
        init_std: standard deviation of the start values (without projection).
        target_modules: patterns of attention modules; all of them by default.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        init_seed: seed of the start values.

    Raises:
        NoMatchError: no attention is of a supported kind.
        ConfigError: a value that cannot work; an attention implementation whose masks cannot be widened.

    >>> from torch import nn
    >>> from lightning_peft import PrefixTuning, inject, trainable_names
    >>> net = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> inject(net, PrefixTuning(num_virtual_tokens=3))
    >>> trainable_names(net)
    ['self_attn.delta.prefix_key', 'self_attn.delta.prefix_value']
    """

    paper: ClassVar[str] = (
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li and Liang 2021, arXiv:2101.00190"
    )
    mergeable: ClassVar[bool] = False
    why_not_mergeable: ClassVar[str] = "its keys and values are inputs of the attention, not a change of weights."
    identity_at_init: ClassVar[bool] = False
    reference_lr: ClassVar[float] = 2e-2
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = (
        "scripts of P-tuning v2 (arXiv:2110.07602) for prefixes without projection: 5e-3 to 1e-2; ours on MiniLM: 5e-2;"
        " with projection 5e-4 (ours: MiniLM, BBC headlines), the paper's is 5e-5"
    )
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"encoder", "decoder", "cross", "init_std"}

    num_virtual_tokens: int = 20
    projection: bool = False
    hidden_size: int = 512
    positions: Literal["keep", "shift"] = "keep"
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    init_std: float = 0.02
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(name, "num_virtual_tokens", self.num_virtual_tokens, 1)
        check_number(name, "hidden_size", self.hidden_size, 1)
        check_number(name, "init_std", self.init_std, 0.0)
        if self.positions not in ("keep", "shift"):
            raise ConfigError(f"{name}(positions={self.positions!r}): choose 'keep' or 'shift'.")

    def lr_factors(self) -> dict[str, float]:
        """A step in the network of ``projection`` moves every key and value: the plain prefix's rate diverges."""
        return {"0.05 (projection)": 0.05} if self.projection else {}

    def adapts(self, module: nn.Module) -> bool:
        """Attention modules."""
        return kind_of(module) is not None

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The attentions that take part, then the position modules to shift."""
        attentions = attention_modules(self, model, prefix)
        takes_part = {"encoder": self.encoder, "decoder": self.decoder, "cross": self.cross, "": True}
        chosen = {}
        for name, module in attentions.items():
            if takes_part[part_of(name)]:
                chosen[name] = module
        if not chosen:
            raise NoMatchError(
                f"{type(self).__name__}(encoder={self.encoder}, decoder={self.decoder}, cross={self.cross}) leaves out"
                f" all {len(attentions)} attentions of {type(model).__name__}: {', '.join(list(attentions)[:3])}, …"
            )
        if self.positions == "shift":
            return chosen | position_modules(model, chosen)
        return chosen

    def adapt(self, module: nn.Module, name: str) -> None:
        """Give an attention its prefix, or let a position module shift."""
        kind = kind_of(module)
        if kind is None:
            adapt(module, ShiftedPositions, Delta(), ShiftState(self.num_virtual_tokens, type(module)), name)
            return
        delta: Delta = Delta()  # with a projection, `connect` gives it the network of its stack
        if not self.projection:
            delta = Prefix(any_tensor(module), self.num_virtual_tokens, heads_of(module, name))
            delta.fill(self.generator(name), self.init_std)
        state = kind._new_state(module)
        attention = adapt(module, kind, delta, state, name)
        if isinstance(state, RegistryState):
            attention.config = PrefixedConfig(attention.config, state)

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """One reparametrisation network for each stack; T5's position bias; positions of rotary backbones."""
        attentions: dict[str, PrefixedAttention] = {}
        for name, module in adapted.items():
            if isinstance(module, PrefixedAttention):
                attentions[name] = module
        if self.projection:
            self._share_networks(attentions)
        link_biases(model, attentions)
        for backbone in rotary_backbones(model):
            inside = next((part for part in backbone.modules() if isinstance(part, PrefixedAttention)), None)
            if inside is not None:
                state = inside._adapter
                state.before(backbone, state.number_positions, with_kwargs=True)
        keep_open(model, attentions.values())

    def _share_networks(self, attentions: Mapping[str, PrefixedAttention]) -> None:
        """Give attentions their projections, and those of one stack the network before them."""
        networks: dict[str, PrefixEncoder] = {}
        for name, attention in attentions.items():
            heads, stack = heads_of(attention, name), stack_of(name)
            if stack not in networks:
                like, width = any_tensor(attention), heads.count * heads.key
                networks[stack] = PrefixEncoder(like, self.num_virtual_tokens, width, self.hidden_size)
                networks[stack].fill(self.generator(stack))
            attention.delta = ProjectedPrefix(networks[stack], heads)
            attention.delta.fill(self.generator(name))

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the prefixes out; attentions get their own config back."""
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, PrefixedAttention):
                module._undo()
                module._adapter.unhook()
        super().detach(model, names)
        restore(model)

    def fold(self, model: nn.Module) -> None:
        """Replace the reparametrisation networks by the keys and values they give, for inference and export.

        In place; the model then holds, saves and loads as the same method with ``projection=False``.

        >>> from torch import nn
        >>> from lightning_peft import PrefixTuning, inject, trainable_names
        >>> net, method = nn.TransformerEncoderLayer(8, 2), PrefixTuning(projection=True)
        >>> inject(net, method); method.fold(net); trainable_names(net)
        ['self_attn.delta.prefix_key', 'self_attn.delta.prefix_value']
        """
        adapters = Adapters.of(model)
        for module in adapters.modules_of(self):
            if isinstance(module, PrefixedAttention) and isinstance(module.delta, ProjectedPrefix):
                module.delta = module.delta.folded()
        adapters.replace_method(self, dataclasses.replace(self, projection=False))


def attention_modules(method: Method, model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The attention modules a method's patterns choose."""
    modules = candidates(model)
    if not any(method.adapts(module) for module in modules.values()):
        raise NoMatchError(
            f"{type(method).__name__} found no attention in {type(model).__name__} that it can put a prefix into. It"
            f" works with {SUPPORTED}. PTuning with placeholder ids, or LoRA, work on this model."
        )
    patterns = method.target_modules or "*"
    options = {"exclude": method.exclude_modules, "layers": method.layers, "prefix": prefix}
    return select(modules, patterns, method.adapts, method.is_linear, method=type(method).__name__, **options)


def position_modules(model: nn.Module, attentions: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What turns positions into embeddings in the stacks whose self-attentions were chosen.

    Raises:
        ConfigError: nothing was recognised, in a model that is not of transformers, whose positions are known.
    """
    parts = {part_of(name) for name in attentions} | {""}
    shifted = {}
    for name, module in candidates(model).items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if part_of(name) in parts and shiftable(module, name, parent):
            shifted[name] = module
    is_known = any(kind_of(module) is RegistryAttention for module in attentions.values())
    if not shifted and not is_known:
        raise ConfigError(
            f"positions='shift': {type(model).__name__} has no rotary embedding and no table of positions that could"
            " be recognised. Use positions='keep'."
        )
    return shifted


def rotary_backbones(model: nn.Module) -> list[nn.Module]:
    """The modules that turn position ids into rotary embeddings for their attentions."""
    backbones = []
    for module in model.modules():
        is_rotary = any(type(child).__name__.endswith("RotaryEmbedding") for child in module.children())
        if is_rotary and {"position_ids", "attention_mask"} <= set(argument_names(module)):
            backbones.append(module)
    return backbones


def part_of(name: str) -> str:
    """The part of an encoder-decoder model a module belongs to: ``encoder``, ``decoder``, ``cross``, or none.

    >>> part_of("model.decoder.layers.0.encoder_attn"), part_of("bert.encoder.layer.0"), part_of("layers.0.self_attn")
    ('cross', 'encoder', '')
    """
    if _CROSS.search(name):
        return "cross"
    for part in ("decoder", "encoder"):
        if part in name.split("."):
            return part
    return ""


def stack_of(name: str) -> str:
    """The name with layer numbers as stars: equal for the layers of one stack.

    >>> stack_of("encoder.block.3.layer.0.SelfAttention")
    'encoder.block.*.layer.*.SelfAttention'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def link_biases(model: nn.Module, attentions: Mapping[str, nn.Module]) -> None:
    """Tell attentions with a relative position bias which module of their stack computes it (T5: the first layer's)."""
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            owners.setdefault(stack_of(name), module)
    for name, attention in attentions.items():
        state = attention._adapter
        if isinstance(state, RegistryState) and hasattr(attention, "has_relative_attention_bias"):
            computes_it = attention.has_relative_attention_bias
            state.bias_owner = attention if computes_it else owners.get(stack_of(name))


def any_tensor(module: nn.Module) -> Tensor:
    """A tensor of a module, for dtype and device; torch's defaults for a module without one."""
    return next(module.parameters(), torch.empty(()))
