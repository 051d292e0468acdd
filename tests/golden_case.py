"""Reference cases: a base model, adapter tensors and the outputs an independent implementation gave for them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One case of `tests/golden` (its README tells the layout)."""

    def __init__(self, name: str, attention: str = "eager") -> None:
        self.meta = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.attention = attention

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below ``prefix``."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def model(self) -> nn.Module:
        """The base model with its weights."""
        spec = self.meta["model"]
        if spec["kind"] == "transformers":
            config = transformers.AutoConfig.for_model(spec["model_type"], **spec["config"])
            auto = getattr(transformers, spec["auto_class"])
            model = auto.from_config(config, attn_implementation=self.attention).eval()
        elif "layers" in spec:
            model = nn.Sequential(OrderedDict((n, getattr(nn, c)(**kw)) for n, c, kw in spec["layers"])).eval()
        else:
            model = nn.ModuleDict({spec["name"]: getattr(nn, spec["class"])(**spec["kwargs"])}).eval()
        model.load_state_dict(self.part("base"))
        return model

    def run(self, model: nn.Module) -> torch.Tensor:
        """The output the case compares."""
        spec, inputs = self.meta["model"], self.part("input")
        if spec["kind"] != "transformers":
            out = model(inputs["x"]) if "layers" in spec else model[spec["name"]](**inputs)
            return out[0] if isinstance(out, tuple) else out
        out = model(**inputs)
        return getattr(out, self.meta["output"])

    def check(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Compare output, loss and gradients; ``parameters`` maps the case's adapter keys to ours."""
        tolerance = self.meta["tolerance"]
        out = self.run(model)
        torch.testing.assert_close(
            out, self.tensors["output.adapted"], atol=tolerance["suggested_atol"], rtol=0, check_dtype=False
        )
        (out**2).mean().backward()
        grads = self.part("grad")
        assert grads and set(grads) <= set(parameters)
        for key, grad in grads.items():
            ours = parameters[key].grad
            assert ours is not None, key
            torch.testing.assert_close(
                ours.reshape(grad.shape),
                grad,
                atol=tolerance["suggested_grad_atol"],
                rtol=0,
                msg=lambda m, k=key: f"{k}: {m}",
            )


#: the reference's names of tensors, and ours
_LEAVES = {
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "vera_lambda_b": "vera_b",
    "vera_lambda_d": "vera_d",
}


def adapter_parameters(case: Golden, model: nn.Module) -> dict[str, nn.Parameter]:
    """The case's adapter keys to the parameters of the adapted model, filled with the case's values."""
    found = {}
    for key, value in case.part("adapter").items():
        name, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        leaf = _LEAVES.get(leaf, leaf)
        if key.startswith("base_model.vera_"):  # one pair of matrices for all layers
            delta = next(m for m in model.modules() if hasattr(m, leaf := key.removeprefix("base_model.")))
        else:
            delta = model.get_submodule(name.replace(".base_layer", "")).delta
            delta = getattr(delta, "in_proj_weight", delta)
        found[key] = getattr(delta, leaf)
        found[key].data.copy_(value.reshape(found[key].shape))
    return found
