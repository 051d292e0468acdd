"""What the tests of the bottleneck adapters share: golden values put in place, and a zoo of tiny architectures."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft import inject
from lightning_peft.method import Method
from tests.golden_case import Golden

_PLACES = {
    "attention_adapters": {"gpt2": "attn", "llama": "self_attn"},
    "output_adapters": {"gpt2": "mlp", "llama": "mlp"},
}
_LEAVES = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "adapter_down.0.W_left": "down_left",
    "adapter_down.0.W_right": "down_right",
    "adapter_down.0.b": "down_bias",
    "adapter_up.W_left": "up_left",
    "adapter_up.W_right": "up_right",
    "adapter_up.b": "up_bias",
    "scaling": "scale",
}


def place_of(case: Golden, key: str, norm: bool) -> str:
    """The module that carries the adapter a golden key belongs to."""
    owner = key.partition(".adapters.")[0]
    kind = case.meta["model"]["model_type"]
    if kind == "bert":
        return f"{owner}.{'LayerNorm' if norm else 'dropout'}"
    layer, _, part = owner.rpartition(".")
    return f"{layer}.{_PLACES[part][kind]}"


def inject_golden(case: Golden, method: Method, norm: bool = False) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The case's model with its adapter values; the case's keys to our parameters."""
    model = case.model()
    inject(model, method)
    parameters = {}
    for key, value in case.part("adapter").items():
        if key.startswith("shared_parameters."):
            ours = next(p for n, p in model.named_parameters() if n.endswith("shared.rule"))
        else:
            leaf = key.partition(".adapters.golden.")[2]
            ours = getattr(model.get_submodule(place_of(case, key, norm)).delta, _LEAVES[leaf])
        assert ours.shape == value.shape, key
        ours.data.copy_(value)
        parameters[key] = ours
    return model, parameters


def check_golden(name: str, method: Method, norm: bool = False) -> None:
    """Output, loss, gradients and the number of trained parameters of a golden case."""
    from lightning_peft import summarize

    for attention in ("eager", "sdpa"):
        case = Golden(name, attention)
        model, parameters = inject_golden(case, method, norm)
        assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
        torch.testing.assert_close(
            case.run(case.model()), case.tensors["output.base"], atol=case.meta["tolerance"]["suggested_atol"], rtol=0
        )
        case.check(model, parameters)
