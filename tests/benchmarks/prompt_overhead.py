"""Step time and FLOPs of prefixes and prompts on a small Llama, against the frozen floor, 20 more keys, and peft.

    python -m tests.benchmarks.prompt_overhead [--length 128] [--tokens 20] [--rounds 9]

The floor is forward and backward to the inputs of the frozen model. Times are medians of interleaved rounds on one
thread; FLOPs come from torch's counter (matrix products and attention, forward and backward).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import LoRA, PrefixTuning, PromptTuning, PTuning, inject

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}


def model() -> nn.Module:
    """Six layers of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=3, vocab_size=2048, max_position_embeddings=4096)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def floor() -> nn.Module:
    """Frozen, with a gradient to the input embeddings only."""
    net = model()
    net.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return net


def adapted(method) -> nn.Module:
    """The model with one of our methods."""
    net = model()
    inject(net, method)
    return net


def of_peft(config) -> nn.Module:
    """The model under peft."""
    import peft

    return peft.get_peft_model(model(), config)


def contestants(n: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> how to build it."""
    import peft

    causal = {"task_type": "CAUSAL_LM", "num_virtual_tokens": n}
    return {
        "floor": floor,
        "PrefixTuning": lambda: adapted(PrefixTuning(n)),
        "PrefixTuning, projection": lambda: adapted(PrefixTuning(n, projection=True)),
        "peft prefix": lambda: of_peft(peft.PrefixTuningConfig(**causal)),
        "PromptTuning": lambda: adapted(PromptTuning(n)),
        "peft prompt": lambda: of_peft(peft.PromptTuningConfig(**causal)),
        "PTuning": lambda: adapted(PTuning(n)),
        "LoRA r=8": lambda: adapted(LoRA(r=8)),
    }


def step(net: nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward."""
    net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


def flops(net: nn.Module, ids: torch.Tensor) -> int:
    """Of one step."""
    with FlopCounterMode(display=False) as counter:
        step(net, ids)
    return counter.get_total_flops()


def more_keys(n: int, ids: torch.Tensor) -> int:
    """FLOPs of attention over n more keys: two products forward, four backward, in every layer."""
    return 6 * 2 * ids.numel() * n * SIZES["hidden_size"] * SIZES["num_hidden_layers"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("length", 128), ("batch", 4), ("tokens", 20), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(4, 2048, (args.batch, args.length))
    nets = {name: build().train() for name, build in contestants(args.tokens).items()}
    counts = {name: flops(net, ids) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(args.rounds):
        for name, net in nets.items():
            start = time.perf_counter()
            step(net, ids)
            times[name].append(time.perf_counter() - start)
    base, extra = statistics.median(times["floor"]), more_keys(args.tokens, ids)
    print(f"{'':26} {'ms':>8} {'/ floor':>8} {'GFLOP':>8} {'/ floor':>8}")
    for name in nets:
        middle = statistics.median(times[name])
        print(
            f"{name:26} {middle * 1e3:8.1f} {middle / base:8.3f} {counts[name] / 1e9:8.2f}"
            f" {counts[name] / counts['floor']:8.4f}"
        )
    print(f"{args.tokens} more keys: {extra / 1e9:.2f} GFLOP, {1 + extra / counts['floor']:.4f} of the floor")


if __name__ == "__main__":
    main()
