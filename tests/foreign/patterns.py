"""Tiny networks, each doing one thing that foreign code does with its layers: ask for types, read weights, loop over
parts, keep references, compute with a forward of its own.

`PATTERNS` says for each network which of its modules the methods of each family adapt, and what is expected of them.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from tests.layers import Experts

Inputs = tuple[Tensor, ...]


# ---- inputs --------------------------------------------------------------------------------------------------------
def _normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(5))


def rows() -> Inputs:
    """For layers of 6 features."""
    return (_normal(3, 6),)


def sequences() -> Inputs:
    """For attention of 8 features."""
    return (_normal(2, 5, 8),)


def images() -> Inputs:
    """For convolutions of 4 channels."""
    return (_normal(2, 4, 7, 7),)


def ids() -> Inputs:
    """For tables of 11 rows."""
    return (torch.tensor([[0, 4, 10], [4, 7, 1]]),)


# ---- parents -------------------------------------------------------------------------------------------------------
class Parent(nn.Module):
    """A layer ``fc`` of 6 to 5 features and a head; subclasses say how they use ``fc``."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5) if layer is None else layer
        self.head = nn.Linear(5, 4)

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


class Hold(nn.Module):
    """Gives the output of its part ``m``, of a tuple the first."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.m(*inputs)
        return out[0] if isinstance(out, tuple) else out


class AsksType(Parent):
    """Leaves the layer out, without a word, where it is no `nn.Linear`."""

    def hidden(self, x):
        return self.fc(x) if isinstance(self.fc, nn.Linear) else x.new_zeros(len(x), 5)


class AsksName(Parent):
    """Looks at the name of the class, as initialisation functions do."""

    def hidden(self, x):
        return self.fc(x) if self.fc.__class__.__name__ == "Linear" else x.new_zeros(len(x), 5)


class CallsForward(Parent):
    """Calls ``forward`` of the layer and so passes its hooks by."""

    def hidden(self, x):
        return self.fc.forward(x)


class ReadsWeight(Parent):
    """Calls the layer never (timm's EVA, BEiT and Swin V2 do so with ``qkv``)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5, bias=False))
        self.own_bias = nn.Parameter(torch.zeros(5))

    def hidden(self, x):
        return F.linear(input=x, weight=self.fc.weight, bias=torch.cat((self.own_bias[:2], self.own_bias[2:])))


class ReadsWeightAndBias(Parent):
    """Hands both on to a function."""

    def hidden(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class ReadsInAnotherMethod(Parent):
    """Reads in a property that its forward uses."""

    @property
    def fused_weight(self) -> Tensor:
        return 2 * self.fc.weight

    def hidden(self, x):
        return x @ self.fused_weight.T


class ReadsAndCalls(Parent):
    """Does both in one pass."""

    def hidden(self, x):
        return self.fc(x) + F.linear(x.flip(0), self.fc.weight)


class ReadsByName(Parent):
    """Asks for the tensors by constant names."""

    def hidden(self, x):
        return F.linear(x, getattr(self.fc, "weight"), getattr(self.fc, "bias", None))  # noqa: B009


class CallsWithReadWeight(Parent):
    """Calls the layer with a weight that it has made of the layer's own."""

    def hidden(self, x):
        weight = self.fc.weight * torch.linspace(0.5, 1.5, 6)
        return torch.func.functional_call(self.fc, {"weight": weight}, (x,))


class ReadsLocal(Parent):
    """Reads through a local name."""

    def hidden(self, x):
        layer = self.fc
        return F.linear(x, layer.weight, layer.bias)


class ReadsInALoop(nn.Module):
    """Reads the weights of a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(F.linear(x, layer.weight, layer.bias))
        return x


class ReadsGrandchild(nn.Module):
    """Reads the weight of a layer that belongs to a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Parent()

    def forward(self, x):
        return F.linear(x, self.part.fc.weight)


class ReadsTwo(nn.Module):
    """Reads the weights of two layers in one expression while it does not train, else calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            return self.linear2(torch.relu(self.linear1(x)))
        return self.fused(x, self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)

    @staticmethod
    def fused(x, w1, b1, w2, b2):
        return F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2)


class ReadsTable(nn.Module):
    """Looks ids up in a table and multiplies by the same table at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids):
        return torch.tanh(self.table(ids)) @ self.table.weight.T


class ReadsFacts(Parent):
    """Reads dtype, device and shape of the weight alone, to cast its input (T5's ``wo``)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(nn.Linear(6, 5).to(dtype))

    def hidden(self, x):
        if isinstance(self.fc.weight, Tensor) and x.dtype != self.fc.weight.dtype:
            x = x.to(self.fc.weight.dtype)
        x = x.to(self.fc.weight.device)
        assert self.fc.weight.shape[1] == x.shape[-1] and self.fc.weight.size(0) == 5
        return self.fc(x).to(self.head.weight.dtype)


class RunsCell(nn.Module):
    """Runs a recurrent cell over a sequence."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.m(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class KeepsTuple(nn.Module):
    """Keeps its layers a second time in a tuple and calls those."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.pair = (self.a, self.b)

    def forward(self, x):
        for layer in self.pair:
            x = torch.tanh(layer(x))
        return x


class KeepsClosure(Parent):
    """Calls its layer through a function made when it was built."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.fc
        self.run = lambda x: layer(x)

    def hidden(self, x):
        return self.run(x)


class KeepsMethod(Parent):
    """Calls a bound method of its layer, taken when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.run = self.fc.__call__

    def hidden(self, x):
        return self.run(x)


class KeptElsewhere(nn.Module):
    """A part holds the layer of another one as a plain attribute and in a list, outside its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.owner, self.user = Parent(), nn.Identity()
        object.__setattr__(self.user, "layer", self.owner.fc)
        self.user.__dict__["layers"] = [self.owner.fc]

    def forward(self, x):
        return self.owner.head(self.user.layer(x) - torch.tanh(self.user.layers[0](x)))


class TwoNames(nn.Module):
    """The backbone of its network is registered a second time, in front."""

    def __init__(self) -> None:
        super().__init__()
        net = Parent()
        self.backbone = net.fc
        self.net = net

    def forward(self, x):
        return self.net(x) + self.net.head(self.backbone(x))


class Hooked(Parent):
    """Works with what a hook on the layer has seen, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.fc.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.features.append(out)

    def hidden(self, x):
        self.fc(x)
        return self.features.pop()


class HooksChange(Parent):
    """One hook on the layer changes its input, another its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.register_forward_pre_hook(add_one)
        self.fc.register_forward_hook(double)


def add_one(module, args):
    return (args[0] + 1,)


def double(module, args, out):
    return 2 * out


class AsksAttention(nn.Module):
    """Attention under two conditions on its class; torch_geometric's GPSConv leaves it out silently."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        if isinstance(self.attn, nn.MultiheadAttention):
            x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.norm(x)


# ---- parts that loop over their own parts --------------------------------------------------------------------------
class LoopsChildren(nn.Module):
    """Runs everything it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class LoopsNamed(LoopsChildren):
    def forward(self, x):
        for _, child in self.named_children():
            x = child(x)
        return x


class LoopsModules(LoopsChildren):
    def forward(self, x):
        for child in self._modules.values():
            x = child(x)
        return x


class DictBlock(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({"a": nn.Linear(6, 8), "act": nn.Tanh(), "b": nn.Linear(8, 6)})

    def forward(self, x):
        for _, layer in self.items():
            x = layer(x)
        return x


class ListBlock(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__([nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)])

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class MLPBlock(nn.Sequential):
    """torchvision's: a Sequential with a constructor of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 6), nn.Dropout(0.0))


class SkipSequential(nn.Sequential):
    """A Sequential with a forward of its own: a residual sum around each part."""

    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x / len(self)


class SlicesPart(Hold):
    """Cuts its Sequential in two, which makes a second one of the same class."""

    def forward(self, x):
        return self.m[-1](self.m[:-1](x))


# ---- layers with a forward of their own ----------------------------------------------------------------------------
class MaskedLinear(nn.Linear):
    """As in MADE and in flows."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.register_buffer("mask", torch.ones(5, 6).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class CosineLinear(nn.Linear):
    """Rows of any length give the same output."""

    def forward(self, x):
        return 3 * F.linear(F.normalize(x), F.normalize(self.weight))


class EqualizedLinear(nn.Linear):
    """Scales weight and bias when it runs."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias * 2)


class ScaledLinear(nn.Linear):
    """Changes what torch's own forward gives."""

    def forward(self, x):
        return 2 * super().forward(x + 1)


class DeepLinear(nn.Linear):
    """A subclass that adds nothing to the computation."""

    def extra_repr(self):
        return "deep, " + super().extra_repr()


class AbstractLayer(nn.Linear, ABC):
    @abstractmethod
    def kind(self) -> str: ...


class ConcreteLayer(AbstractLayer):
    """Its class has a metaclass."""

    def kind(self):
        return "concrete"


class Registered(nn.Linear):
    """Wants a name from every class that is derived from it."""

    known: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, title: str, **options) -> None:
        super().__init_subclass__(**options)
        cls.known[title] = cls


class RegisteredLayer(Registered, title="layer"):
    pass


class StdConv2d(nn.Conv2d):
    """timm's (BiT): every filter standardised."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        )
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class ScaledStdConv2d(nn.Conv2d):
    """timm's (NFNet): the same with a gain."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * 0.3).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Conv2dSame(nn.Conv2d):
    """timm's: pads to the size that TensorFlow gives, depending on the input."""

    def forward(self, x):
        size, step, width = x.shape[-1], self.stride[0], self.kernel_size[0]
        extra = max((-(-size // step) - 1) * step + width - size, 0)
        x = F.pad(x, [extra // 2, extra - extra // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Conv2dStaticPadding(nn.Conv2d):
    """Pads by a part of its own (segmentation-models-pytorch)."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvThatStandardises(nn.Conv2d):
    """Leaves torch's forward alone and changes what that calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight - weight.mean((1, 2, 3), keepdim=True), bias)


# ---- linear layers that are not torch's ----------------------------------------------------------------------------
class GraphLinear(nn.Module):
    """As in torch_geometric."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) * 0.4)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class MatmulLinear(nn.Module):
    """Its weight is (in, out), and nothing else is said about it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5) * 0.4)

    def forward(self, x):
        return x @ self.weight


class DenseGeneral(nn.Module):
    """Projects to several heads at once, with a weight of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3) * 0.4)
        self.bias = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return (torch.einsum("bi,iho->bho", x, self.weight) + self.bias).flatten(1)


# ---- attention -----------------------------------------------------------------------------------------------------
class OwnAttention(nn.Module):
    """Written by hand around torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.num_heads = 2

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def project(self, x):
        return self.qkv(x)


class ReadingAttention(OwnAttention):
    """timm's EVA: query and value have biases, the key has none, so the weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("k_bias", torch.zeros(8), persistent=False)

    def project(self, x):
        return F.linear(x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias, self.v_bias)))


class KeepsAttention(nn.Module):
    """Asks for the class of its attention and calls it from a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = OwnAttention()
        self.parts = (self.attn,)

    def forward(self, x):
        return x + self.parts[0](x) if isinstance(self.attn, OwnAttention) else x


class KeepsBackbone(nn.Module):
    """A transformers model, of whose table of words it asks the class, and which it calls from a tuple."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes, **quiet)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.parts = (self.bert, self.bert.embeddings.word_embeddings)

    def forward(self, ids):
        backbone, words = self.parts
        assert isinstance(self.bert.get_input_embeddings(), nn.Embedding) and words is self.bert.get_input_embeddings()
        return backbone(input_ids=ids).last_hidden_state


# ---- layers that must be refused -----------------------------------------------------------------------------------
class HasDelta(nn.Linear):
    """Has a parameter called ``delta``."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.delta = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return super().forward(x) + self.delta


class HasDeltaNumber(nn.Linear):
    """Has a plain attribute called ``delta``."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.delta = 0.5

    def forward(self, x):
        return super().forward(x) * self.delta


class HasDeltaMethod(nn.Linear):
    """Has a method called ``delta``."""

    def delta(self, x):
        return x * 0.1

    def forward(self, x):
        return super().forward(x + self.delta(x))


class OwnClass(nn.Linear):
    """Would call itself for ever once its class is another one."""

    def forward(self, x):
        return super(self.__class__, self).forward(x)


class IntegerLinear(nn.Module):
    """Weights in eight bits, with their scales beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        weight = torch.randint(-127, 127, (5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.full((5, 1), 0.01))

    def forward(self, x):
        return F.linear(x, self.weight * self.scale)


# ---- functions that prepare layers ---------------------------------------------------------------------------------
def transparent(layer: nn.Module) -> nn.Module:
    """Put a forward on the instance that computes the same, as accelerate's hooks do."""
    layer._hf_hook, layer._old_forward = "hook", layer.forward
    layer.calls = 0
    layer.forward = functools.update_wrapper(functools.partial(_transparent, layer), layer._old_forward)
    return layer


def _transparent(module, x):
    module.calls += 1
    return module._old_forward(x.to(module.weight.dtype))


def changing(layer: nn.Module) -> nn.Module:
    """Put a forward on the instance that computes something else."""
    layer._old_forward = layer.forward
    layer.forward = functools.partial(_changing, layer)
    return layer


def _changing(module, x):
    return 2 * module._old_forward(x + 1)


def quietly(make: Callable, *arguments, **options) -> nn.Module:
    """Call a function that torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


def pruned(layer: nn.Module) -> nn.Module:
    """A layer of which a third is pruned."""
    return prune.l1_unstructured(layer, "weight", 0.3)


# ---- the table -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pattern:
    """A network, and what the families of methods adapt in it; None where a family has nothing to do."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = rows
    #: what methods that correct weights adapt
    weights: str | list[str] | None = "fc"
    #: the module that a bottleneck follows; "" leaves the choice to the method
    bottleneck: str | None = None
    #: the attention that takes a prefix; "" for all
    prefix: str | None = None
    #: the table that takes virtual tokens; "" for the one that is found
    prompt: str | None = None
    #: what the weights belong to: some methods may refuse some kinds (see `METHODS`)
    kind: str = "linear"
    #: part of the message with which every method refuses
    refused: str | None = None
    #: whether every method may refuse, if it says why
    may_refuse: bool = False
    #: part of the message with which `merge` refuses
    no_merge: str | None = None
    atol: float = 1e-4
    #: whether a pickle may be refused
    may_not_pickle: bool = False
    #: trained tensors that cannot matter to this network, by the end of their names
    no_gradient: tuple[str, ...] = field(default=())

    def build(self) -> nn.Module:
        """The network with its random weights, always the same, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().eval()
            with torch.no_grad():
                for parameter in model.parameters():  # biases that start at zero would hide mistakes
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


def _conv(kind: type[nn.Module] = nn.Conv2d, *sizes, **options) -> Callable[[], nn.Module]:
    return lambda: Hold(kind(*(sizes or (4, 6, 3)), **options))


def _held(make: Callable[..., nn.Module], *arguments, **options) -> Callable[[], nn.Module]:
    return lambda: Hold(make(*arguments, **options))


def _parent(make: Callable[..., nn.Module], *arguments, **options) -> Callable[[], nn.Module]:
    return lambda: Parent(make(*arguments, **options))


_SCALE_FREE = {"kind": "scale-free", "no_gradient": ("lora_magnitude",)}
_NORMED = {"no_merge": "computed|parametri|weight_norm|spectral_norm|prun"}
_ENCODER = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}

PATTERNS: dict[str, Pattern] = {
    # parents
    "plain": Pattern(Parent, bottleneck="fc"),
    "asks_type": Pattern(AsksType, bottleneck="fc"),
    "asks_name": Pattern(AsksName, bottleneck="fc"),
    "calls_forward": Pattern(CallsForward, bottleneck="fc"),
    "reads_weight": Pattern(ReadsWeight),
    "reads_weight_and_bias": Pattern(ReadsWeightAndBias),
    "reads_in_another_method": Pattern(ReadsInAnotherMethod),
    "reads_and_calls": Pattern(ReadsAndCalls),
    "reads_by_name": Pattern(ReadsByName),
    "calls_with_read_weight": Pattern(CallsWithReadWeight),
    "reads_local": Pattern(ReadsLocal),
    "reads_in_a_loop": Pattern(ReadsInALoop, weights=["layers.0", "layers.1"]),
    "reads_grandchild": Pattern(ReadsGrandchild, weights="part.fc"),
    "reads_two": Pattern(ReadsTwo, weights=["linear1", "linear2"]),
    "reads_table": Pattern(ReadsTable, ids, weights="table", kind="embedding"),
    "reads_facts": Pattern(ReadsFacts, bottleneck="fc"),
    "reads_facts_bf16": Pattern(lambda: ReadsFacts(torch.bfloat16), atol=5e-2, bottleneck="fc"),
    "keeps_tuple": Pattern(KeepsTuple, weights=["a", "b"], bottleneck="b"),
    "keeps_closure": Pattern(KeepsClosure, bottleneck="fc"),
    "keeps_method": Pattern(KeepsMethod, bottleneck="fc"),
    "kept_elsewhere": Pattern(KeptElsewhere, weights="owner.fc", bottleneck="owner.fc"),
    "two_names": Pattern(TwoNames, weights="backbone", bottleneck="backbone"),
    "hooked": Pattern(Hooked, bottleneck="fc"),
    "hooks_change": Pattern(HooksChange, bottleneck="fc"),
    # parts that loop over their parts
    "loops_children": Pattern(_held(LoopsChildren), weights=["m.a", "m.b"], bottleneck="m"),
    "loops_named": Pattern(_held(LoopsNamed), weights=["m.a", "m.b"], bottleneck="m"),
    "loops_modules": Pattern(_held(LoopsModules), weights=["m.a", "m.b"], bottleneck="m", may_refuse=True),
    "dict_block": Pattern(_held(DictBlock), weights=["m.a", "m.b"], bottleneck="m", may_refuse=True),
    "list_block": Pattern(_held(ListBlock), weights=["m.0", "m.2"], bottleneck="m", may_refuse=True),
    "mlp_block": Pattern(_held(MLPBlock), weights=["m.0", "m.3"], bottleneck="m"),
    "sequential": Pattern(
        lambda: Hold(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))), weights="m.2", bottleneck="m"
    ),
    "skip_sequential": Pattern(
        lambda: Hold(SkipSequential(nn.Linear(6, 6), nn.Linear(6, 6))), weights=["m.0", "m.1"], bottleneck="m"
    ),
    "slices_part": Pattern(
        lambda: SlicesPart(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))), weights=["m.0", "m.2"]
    ),
    # layers with a forward of their own
    "masked": Pattern(_parent(MaskedLinear), kind="own", bottleneck="fc"),
    "cosine": Pattern(_parent(CosineLinear, 6, 5, bias=False), **_SCALE_FREE, bottleneck="fc"),
    "equalized": Pattern(_parent(EqualizedLinear, 6, 5), kind="own", bottleneck="fc"),
    "scaled": Pattern(_parent(ScaledLinear, 6, 5), kind="own", bottleneck="fc"),
    "subclass": Pattern(_parent(DeepLinear, 6, 5), bottleneck="fc"),
    "abstract": Pattern(_parent(ConcreteLayer, 6, 5), bottleneck="fc"),
    "registered": Pattern(_parent(RegisteredLayer, 6, 5), bottleneck="fc", may_refuse=True),
    "std_conv": Pattern(_conv(StdConv2d), images, "m", bottleneck="m", **_SCALE_FREE),
    "scaled_std_conv": Pattern(_conv(ScaledStdConv2d), images, "m", bottleneck="m", **_SCALE_FREE),
    "same_conv": Pattern(_conv(Conv2dSame, stride=2), images, "m", bottleneck="m", kind="own-conv"),
    "same_conv_grouped": Pattern(_conv(Conv2dSame, stride=2, groups=2), images, "m", kind="own-conv"),
    "static_padding": Pattern(_conv(Conv2dStaticPadding), images, "m", bottleneck="m", kind="own-conv"),
    "conv_forward": Pattern(_conv(ConvThatStandardises), images, "m", bottleneck="m", kind="own-conv"),
    # linear layers that are not torch's
    "graph_linear": Pattern(_parent(GraphLinear, 6, 5), kind="foreign"),
    "matmul_linear": Pattern(_parent(MatmulLinear), kind="foreign-odd"),
    "dense_general": Pattern(_held(DenseGeneral), weights="m", kind="foreign-odd"),
    "transformers_conv1d": Pattern(_parent(Conv1D, 5, 6), bottleneck="fc"),
    # weights that are computed
    "weight_norm": Pattern(lambda: Parent(parametrizations.weight_norm(nn.Linear(6, 5))), **_NORMED),
    "old_weight_norm": Pattern(lambda: Parent(quietly(nn.utils.weight_norm, nn.Linear(6, 5))), **_NORMED),
    "weight_norm_conv": Pattern(
        lambda: Hold(quietly(nn.utils.weight_norm, nn.Conv1d(7, 5, 3))),
        lambda: (_normal(2, 7, 9),),
        "m",
        kind="conv",
        **_NORMED,
    ),
    "spectral_norm": Pattern(lambda: Parent(parametrizations.spectral_norm(nn.Linear(6, 5))), **_NORMED),
    "old_spectral_norm": Pattern(lambda: Parent(nn.utils.spectral_norm(nn.Linear(6, 5))), **_NORMED),
    "orthogonal": Pattern(lambda: Parent(parametrizations.orthogonal(nn.Linear(6, 5))), **_NORMED),
    "pruned": Pattern(lambda: Parent(pruned(nn.Linear(6, 5))), **_NORMED),
    # convolutions and tables
    "conv1d": Pattern(_conv(nn.Conv1d, 7, 5, 3, stride=2), lambda: (_normal(2, 7, 9),), "m", kind="conv"),
    "conv2d": Pattern(_conv(padding=1, padding_mode="reflect"), images, "m", bottleneck="m", kind="conv"),
    "conv2d_grouped": Pattern(_conv(groups=2, bias=False), images, "m", kind="conv"),
    "conv3d": Pattern(_conv(nn.Conv3d, 4, 5, 2), lambda: (_normal(1, 4, 3, 3, 3),), "m", kind="conv"),
    "transposed_conv": Pattern(_conv(nn.ConvTranspose2d, stride=2), images, "m", kind="other", may_refuse=True),
    "embedding": Pattern(_held(nn.Embedding, 11, 6), ids, "m", kind="embedding", bottleneck="m"),
    # recurrent layers, experts
    "lstm": Pattern(
        _held(nn.LSTM, 8, 5, 2, batch_first=True, bidirectional=True), sequences, "m", kind="rnn", bottleneck="m"
    ),
    "gru": Pattern(_held(nn.GRU, 8, 5, batch_first=True), sequences, "m", kind="rnn", bottleneck="m"),
    "lstm_cell": Pattern(lambda: RunsCell(nn.LSTMCell(8, 5)), sequences, "m", kind="rnn"),
    "gru_cell": Pattern(lambda: RunsCell(nn.GRUCell(8, 5)), sequences, "m", kind="rnn"),
    "experts": Pattern(_held(Experts), lambda: (_normal(3, 5, 4),), "m", kind="experts"),
    # attention
    "asks_attention": Pattern(AsksAttention, sequences, "attn", prefix="", kind="attention"),
    "reading_attention": Pattern(_held(ReadingAttention), sequences, ["m.qkv", "m.proj"], bottleneck="m", prefix=""),
    "keeps_attention": Pattern(KeepsAttention, sequences, ["attn.qkv"], bottleneck="attn", prefix=""),
    "encoder_layer": Pattern(
        lambda: Hold(nn.TransformerEncoderLayer(8, 2, **_ENCODER)),
        sequences,
        ["self_attn", "linear1", "linear2"],
        bottleneck="",
        prefix="",
        kind="attention",
    ),
    "encoder": Pattern(
        lambda: Hold(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **_ENCODER), 2)),
        sequences,
        ["self_attn", "linear1"],
        bottleneck="",
        prefix="",
        kind="attention",
    ),
    "keeps_backbone": Pattern(KeepsBackbone, ids, "query", bottleneck="", prefix="", prompt=""),
    # a forward on the instance
    "forward_on_instance": Pattern(
        lambda: Parent(transparent(nn.Linear(6, 5))), bottleneck="fc", kind="own", may_not_pickle=True
    ),
    "other_forward_on_instance": Pattern(
        lambda: Parent(changing(nn.Linear(6, 5))), bottleneck="fc", kind="own", may_refuse=True, may_not_pickle=True
    ),
    # refused
    "has_delta": Pattern(_parent(HasDelta), bottleneck="fc", refused="delta"),
    "has_delta_number": Pattern(_parent(HasDeltaNumber), bottleneck="fc", refused="delta"),
    "has_delta_method": Pattern(_parent(HasDeltaMethod, 6, 5), bottleneck="fc", refused="delta"),
    "own_class": Pattern(_parent(OwnClass, 6, 5), bottleneck="fc", refused=r"super\(self\.__class__"),
    "script": Pattern(
        lambda: Parent(quietly(torch.jit.script, nn.Linear(6, 5))), bottleneck="fc", refused="Script|jit"
    ),
    "integers": Pattern(_parent(IntegerLinear), refused="int8|integer|8 bits|IntegerLinear"),
}
