"""Prefix-tuning: learned keys and values in every attention (Li & Liang 2021)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta, adapt
from lightning_peft.errors import ConfigError, NoMatchError
from lightning_peft.match import candidates, select
from lightning_peft.method import Method, check_number
from lightning_peft.model.adapters import Adapters
from lightning_peft.prompting.attention import SUPPORTED, PrefixedConfig, RegistryAttention, kind_of
from lightning_peft.prompting.backbone import parameters_of
from lightning_peft.prompting.positions import ShiftedPositions, ShiftState, shiftable
from lightning_peft.prompting.prefix import Prefix, PrefixedAttention, PrefixEncoder, ProjectedPrefix, heads_of
from lightning_peft.prompting.virtual import disconnect
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
    default_lr: ClassVar[float] = 5e-3
    lr_range: ClassVar[tuple[float, float]] = (5e-5, 5e-2)
    lr_source: ClassVar[str] = (
        "scripts of P-tuning v2 (arXiv:2110.07602) for prefixes without projection: 5e-3 to 1e-2; with projection=True"
        " the default is 5e-4 (ours: MiniLM, BBC headlines), the paper's is 5e-5"
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
        if self.projection:  # a step in the network moves every key and value: the plain prefix's rate diverges
            object.__setattr__(self, "default_lr", 5e-4)

    def adapts(self, module: nn.Module) -> bool:
        """Attention modules."""
        return kind_of(module) is not None

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The attentions that take part, then the position modules to shift."""
        found = attention_modules(self, model, prefix)
        switches = {"encoder": self.encoder, "decoder": self.decoder, "cross": self.cross}
        chosen = {n: m for n, m in found.items() if switches.get(part_of(n), True)}
        if not chosen:
            raise NoMatchError(
                f"{type(self).__name__}(encoder={self.encoder}, decoder={self.decoder}, cross={self.cross}) leaves out"
                f" all {len(found)} attentions of {type(model).__name__}: {', '.join(list(found)[:3])}, …"
            )
        return chosen | (position_modules(model, chosen) if self.positions == "shift" else {})

    def adapt(self, module: nn.Module, name: str) -> None:
        """Give an attention its prefix, or let a position module shift."""
        kind = kind_of(module)
        if kind is None:
            adapt(module, ShiftedPositions, Delta(), ShiftState(self.num_virtual_tokens, type(module)), name)
            return
        delta: Delta = Delta()  # with a projection, `connect` gives it the network of its stack
        if not self.projection:
            heads = heads_of(module, name)
            delta = Prefix(_like(module), self.num_virtual_tokens, heads)
            delta.fill(self.generator(name), self.init_std)
        adapt(module, kind, delta, kind._new_state(module), name)
        if kind is RegistryAttention:
            module.config = PrefixedConfig(module.config, module)

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """One reparametrisation network for each stack; T5's position bias; positions of rotary backbones."""
        attentions = {n: m for n, m in adapted.items() if isinstance(m, PrefixedAttention)}
        shared: dict[str, PrefixEncoder] = {}
        for name, module in attentions.items() if self.projection else ():
            heads, stack = heads_of(module, name), stack_of(name)
            if stack not in shared:
                width = heads.count * heads.key
                shared[stack] = PrefixEncoder(_like(module), self.num_virtual_tokens, width, self.hidden_size)
                shared[stack].fill(self.generator(stack))
            module.delta = ProjectedPrefix(shared[stack], heads)
            module.delta.fill(self.generator(name))
        link_biases(model, attentions)
        for home in rotary_backbones(model):
            inside = next((m for m in home.modules() if isinstance(m, PrefixedAttention)), None)
            if inside is not None:
                home.register_forward_pre_hook(inside._adapter.place, with_kwargs=True)
        keep_open(model, attentions.values())

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the prefixes out; attentions get their own config back."""
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, PrefixedAttention):
                module._undo()
                disconnect(model, module._adapter)
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
    if not any(method.adapts(m) for m in modules.values()):
        raise NoMatchError(
            f"{type(method).__name__} found no attention in {type(model).__name__} that it can put a prefix into. It"
            f" works with {SUPPORTED}. PTuning with placeholder ids, or LoRA, work on this model."
        )
    patterns = method.target_modules or "*"
    options = {"exclude": method.exclude_modules, "layers": method.layers, "prefix": prefix}
    return select(modules, patterns, method.adapts, method.is_linear, method=type(method).__name__, **options)


def position_modules(model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What turns positions into embeddings in the stacks whose self-attention was chosen."""
    parts = {part_of(n) for n in chosen}
    modules = candidates(model)
    found = {}
    for name, module in modules.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if shiftable(module, name, parent) and part_of(name) in parts | {""}:
            found[name] = module
    if not found and not any(kind_of(m) is RegistryAttention for m in chosen.values()):
        raise ConfigError(
            f"positions='shift': {type(model).__name__} has no rotary embedding and no table of positions that could"
            " be recognised. Use positions='keep'."
        )
    return found


def rotary_backbones(model: nn.Module) -> list[nn.Module]:
    """The modules that turn position ids into rotary embeddings for their attentions."""
    return [
        module
        for module in model.modules()
        if any(type(child).__name__.endswith("RotaryEmbedding") for child in module.children())
        and {"position_ids", "attention_mask"} <= set(parameters_of(module))
    ]


def part_of(name: str) -> str:
    """The part of an encoder-decoder model a module belongs to: ``encoder``, ``decoder``, ``cross``, or none.

    >>> part_of("model.decoder.layers.0.encoder_attn"), part_of("bert.encoder.layer.0"), part_of("layers.0.self_attn")
    ('cross', 'encoder', '')
    """
    if _CROSS.search(name):
        return "cross"
    return next((p for p in ("decoder", "encoder") if p in name.split(".")), "")


def stack_of(name: str) -> str:
    """The name with layer numbers as stars: equal for the layers of one stack."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def link_biases(model: nn.Module, attentions: Mapping[str, nn.Module]) -> None:
    """Tell attentions with a relative position bias which module of their stack computes it (T5: the first layer's)."""
    relative: dict[str, Any] = {n: m for n, m in attentions.items() if hasattr(m, "has_relative_attention_bias")}
    if not relative:
        return
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            owners.setdefault(stack_of(name), module)
    for name, module in relative.items():
        owner = module if module.has_relative_attention_bias else owners.get(stack_of(name))
        module._adapter.bias_owner = () if owner is None else (owner,)


def _like(module: nn.Module) -> Tensor:
    """A tensor of the attention, for dtype and device; some attentions have none."""
    return next(module.parameters(), torch.empty(()))
