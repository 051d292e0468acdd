"""Bytes kept for the backward pass: the frozen model as the floor, LoRA, and LoRA-FA.

python -m tests.benchmarks.lorafa_memory
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lightning_peft import LoRA, LoRAFA, inject
from tests.benchmarks.measure import counts


def network() -> nn.Module:
    """A Llama of 8 layers in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    return transformers.LlamaForCausalLM(config).train()


def measure() -> dict[str, float]:
    """Bytes by name."""
    embeddings = torch.randn(4, 128, 256, requires_grad=True)

    def step(net: nn.Module) -> torch.Tensor:
        return net(inputs_embeds=embeddings).logits.sum()

    result = {"floor": counts(network().requires_grad_(False), step)["kept"]}
    for method in (LoRA(r=8), LoRAFA(r=8)):
        model = network()
        inject(model, method)
        result[type(method).__name__] = counts(model, step)["kept"]
    return result


if __name__ == "__main__":
    found = measure()
    for name, size in found.items():
        print(f"{name:<7} {size / 1e6:7.1f} MB   {size / found['floor']:.3f} of the floor")
