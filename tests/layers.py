"""Every kind of layer the low-rank methods adapt, with an input, in float64; and the closed form of each method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.lowrank import LowRank
from lightning_peft.model.adapters import adapted_modules


class Experts(nn.Module):
    """A mixture with stacked weights, each row of the input sent to one expert."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (3, 6, 4), (3, 4, 6)
        shapes = [(e, b, a) if is_transposed else (e, a, b) for e, a, b in (up, down)]
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]) * 0.5)
        self.down_proj = nn.Parameter(torch.randn(shapes[1]) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        return torch.bmm(torch.tanh(torch.bmm(x, up)), down)


def attend(layer: nn.Module, *inputs: Tensor) -> Tensor:
    out, weights = layer(*inputs, need_weights=True)
    return torch.cat([out.flatten(), weights.flatten()])


def _image(channels: int) -> Tensor:
    return torch.randn(2, channels, 7, 7)


def _sequences(dim: int, width: int | None = None) -> tuple[Tensor, ...]:
    other = torch.randn(2, 7, width or dim)
    return torch.randn(2, 5, dim), other, other.clone()


#: kind -> (layer, inputs)
KINDS = {
    "linear": lambda: (nn.Linear(5, 7), (torch.randn(2, 3, 5),)),
    "no_bias": lambda: (nn.Linear(5, 7, bias=False), (torch.randn(3, 5),)),
    "transformers_conv1d": lambda: (Conv1D(9, 6), (torch.randn(2, 3, 6),)),
    "embedding": lambda: (nn.Embedding(11, 7, padding_idx=0), (torch.tensor([[0, 4, 10], [4, 4, 1]]),)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (torch.randn(2, 4, 9),)),
    "conv2d_circular": lambda: (nn.Conv2d(4, 6, (3, 1), padding=(2, 0), padding_mode="circular"), (_image(4),)),
    "conv2d_same_reflect": lambda: (
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False),
        (_image(4),),
    ),
    "conv2d_grouped": lambda: (nn.Conv2d(4, 6, 3, padding=1, groups=2), (_image(4),)),
    "conv2d_depthwise": lambda: (nn.Conv2d(6, 12, 3, dilation=2, padding=2, groups=6), (_image(6),)),
    "conv2d_unbatched": lambda: (nn.Conv2d(4, 6, 3), (_image(4)[0],)),
    "conv3d_pointwise": lambda: (nn.Conv3d(4, 6, 1), (torch.randn(2, 4, 3, 3, 3),)),
    "conv3d": lambda: (nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1)), (torch.randn(2, 4, 4, 5, 3),)),
    "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), _sequences(8)),
    "attention_no_bias": lambda: (
        nn.MultiheadAttention(8, 2, bias=False),
        tuple(x.transpose(0, 1) for x in _sequences(8)),
    ),
    "attention_other_widths": lambda: (
        nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True),
        _sequences(8, 5),
    ),
    "experts": lambda: (Experts(), (torch.randn(3, 5, 4),)),
    "experts_transposed": lambda: (Experts(is_transposed=True), (torch.randn(3, 5, 4),)),
}


def build(kind: str) -> tuple[nn.ModuleDict, tuple[Tensor, ...]]:
    """A network that holds the layer as ``m``, and the layer's inputs, in float64."""
    torch.manual_seed(3)
    layer, inputs = KINDS[kind]()
    net = nn.ModuleDict({"m": layer}).double()
    return net, tuple(x.double() if x.is_floating_point() else x for x in inputs)


def call(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The layer's output; of attention also the weights."""
    return attend(layer, *inputs) if len(inputs) == 3 else layer(*inputs)


def places(net: nn.Module) -> dict[str, LowRank]:
    """The factors by the name that their parameter had before injection."""
    found = {}
    for name, module in adapted_modules(net):
        plain = name
        if isinstance(module.delta, LowRank):
            found[f"{plain}.weight"] = module.delta
        else:
            found |= {f"{plain}.{child}": delta for child, delta in module.delta.named_children()}
    return found


def product(delta: LowRank, a: str = "lora_A", b: str = "lora_B", gain: Tensor | None = None) -> Tensor:
    """``s·B·diag(gain)·A`` from the raw tensors, (…, out, in · kernel)."""
    A, B = getattr(delta, a), getattr(delta, b)
    if delta.stacked:
        A = A if gain is None else A * gain.unsqueeze(-1)
        return delta.scaling * torch.einsum("eor,eri->eoi", B, A)
    A, B = A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)
    A = A if gain is None else A * gain.unsqueeze(-1)
    return delta.scaling * torch.einsum("or,ri->oi", B, A)


def corrected(delta: LowRank, matrix: Tensor) -> Tensor:
    """The closed form of each method: W' (…, out, in · kernel) from W."""
    kind = type(delta).__name__
    if kind == "VeRAFactors":
        A, B = delta.shared.vera_A[:, : matrix.shape[1]], delta.shared.vera_B[: matrix.shape[0]]
        return matrix + torch.diag(delta.vera_b) @ B @ torch.diag(delta.vera_d) @ A
    if kind == "AdaLoRAFactors":
        return matrix + product(delta, gain=delta.lora_E)
    if kind == "DeltaFactors":
        change = product(delta).detach() - product(delta, "snapshot_A", "snapshot_B")
        return matrix + delta.follow * change + product(delta)
    whole = matrix + product(delta)
    if delta.start_A is not None:
        whole = whole - product(delta, "start_A", "start_B")
    if kind == "DoRAFactors":
        norm = whole.pow(2).sum(-1, keepdim=True).sqrt().detach()
        return delta.lora_magnitude.unsqueeze(-1) * whole / norm
    return whole


def reference(plain: nn.ModuleDict, factors: dict[str, LowRank], inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of the plain layer with every weight replaced by its closed form."""
    weights = {}
    for name, delta in factors.items():
        weight = plain.get_parameter(name)
        turned = isinstance(plain["m"], (Conv1D, nn.Embedding)) or getattr(plain["m"], "is_transposed", False)
        matrix = weight.mT if turned else weight if weight.ndim == 3 and delta.stacked else weight.flatten(1)
        new = corrected(delta, matrix)
        weights[name] = new.mT if turned else new.reshape(weight.shape)
    table = plain["m"]
    if isinstance(table, nn.Embedding):  # F.embedding keeps gradients off the padding row; ours reach B there
        found = F.embedding(inputs[0], weights["m.weight"])
        return found
    names = {n.removeprefix("m."): w for n, w in weights.items()}
    if len(inputs) == 3:
        out, attention = torch.func.functional_call(table, names, inputs, {"need_weights": True})
        return torch.cat([out.flatten(), attention.flatten()])
    return torch.func.functional_call(table, names, inputs)
