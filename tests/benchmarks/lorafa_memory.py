"""Bytes kept for the backward pass: the frozen model as the floor, LoRA, and LoRA-FA.

python -m tests.benchmarks.lorafa_memory
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lightning_peft import LoRA, LoRAFA, inject


def kept(model: nn.Module, embeddings: torch.Tensor) -> int:
    """Bytes of all storages that one pass keeps, each once, parameters of the model left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # a storage that is freed in between would give its address to another
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(inputs_embeds=embeddings)
    return sum(found.values())


def network() -> nn.Module:
    """A Llama of 8 layers in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    return transformers.LlamaForCausalLM(config).train()


def measure() -> dict[str, int]:
    """Bytes by name."""
    embeddings = torch.randn(4, 128, 256, requires_grad=True)
    result = {"floor": kept(network().requires_grad_(False), embeddings)}
    for method in (LoRA(r=8), LoRAFA(r=8)):
        model = network()
        inject(model, method)
        result[type(method).__name__] = kept(model, embeddings)
    return result


if __name__ == "__main__":
    found = measure()
    for name, size in found.items():
        print(f"{name:<7} {size / 1e6:7.1f} MB   {size / found['floor']:.3f} of the floor")
