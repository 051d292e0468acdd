"""The networks of the table: the same base, adapted by us, by peft, by hand, in full, or frozen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, Houlsby, LoRA, LoRAFA, Method, PrefixTuning, PromptTuning, VeRA, inject

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA_1B = SMOLLM2 | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_labels": 5,
}
#: so small that a step is calls and not products
TINY = SMOLLM2 | {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS = {"smollm2": SMOLLM2, "minilm": MINILM, "llama-1b": LLAMA_1B, "tiny": TINY}


def base(name: str, layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A topology with random weights, in train mode and frozen; ``layers`` cuts it short."""
    torch.manual_seed(0)
    sizes = MODELS[name] | ({"num_hidden_layers": layers} if layers else {})
    with torch.device(device):
        if name == "minilm":
            net: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        else:
            net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return net.to(dtype).train().requires_grad_(False)


def twin(net: nn.Module) -> nn.Module:
    """A copy that shares all parameters."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters()})


def batch(net: nn.Module, rows: int, length: int, masked: float = 0.0) -> dict[str, Tensor]:
    """Random tokens; labels of a language model are the tokens, the first share of them masked (a prompt)."""
    generator, config = torch.Generator().manual_seed(0), net.config
    ids = torch.randint(5, config.vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : int(length * masked)] = -100
    if config.model_type == "bert":
        labels = torch.randint(0, config.num_labels, (rows,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(net.device) for name, tensor in made.items()}


class PlainLoRA(nn.Module):
    """``base(x) + s·B(A(x))``, as one writes it."""

    def __init__(self, layer: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": layer.weight.device}
        self.base, self.scaling = layer, alpha / r
        self.A = nn.Parameter(torch.empty(r, layer.in_features, **options))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r, **options))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (self.scaling * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)


def floor(net: nn.Module) -> nn.Module:
    """Frozen: forward, and backward to the input embeddings."""
    net = twin(net)
    net.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return net


def full(net: nn.Module) -> nn.Module:
    """Everything trains."""
    return copy.deepcopy(net).requires_grad_(True)


def plain(net: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """LoRA by hand on the layers whose name ends so."""
    net = twin(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in names:
                setattr(parent, name, PlainLoRA(child, 8, 16))
    return net


def ours(net: nn.Module, method: Method) -> nn.Module:
    """One of our methods."""
    net = twin(net)
    inject(net, method)
    return net


def theirs(net: nn.Module, config: Any) -> nn.Module:
    """One of peft's."""
    import peft

    return peft.get_peft_model(twin(net), config)


#: names of query and value, of all linear layers but the head, and where IA3 acts
NAMES = {
    "llama": (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "bert": (("query", "value"), ("query", "key", "value", "dense")),
}


def contestants(net: nn.Module) -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """Row of the table -> who takes part -> how to build it. Houlsby adapters are not in peft."""
    import peft

    kind = net.config.model_type
    (query_value, linear), decoder = NAMES[kind], kind == "llama"
    task = {"task_type": "CAUSAL_LM" if decoder else "SEQ_CLS"}
    wide = list(linear) if decoder else r".*encoder.*\.(query|key|value|dense)"
    saved = {} if decoder else {"exclude_modules": "pooler.dense"}

    def lora(kind: str, targets: Any) -> dict[str, Callable[[], nn.Module]]:
        options = {"dora": {"use_dora": True}}.get(kind, {})
        method = {"dora": DoRA, "fa": LoRAFA}.get(kind, LoRA)
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=wide if targets is linear else list(targets), **task, **options
        )
        mine = method(r=8, target_modules=list(targets), **(saved if targets is linear else {}))
        return {"ours": lambda: ours(net, mine), "peft": lambda: theirs(net, config)}

    ia3 = (
        (["k_proj", "v_proj", "down_proj"], ["down_proj"])
        if decoder
        else (["key", "value", "output.dense"], ["output.dense"])
    )
    vera = peft.VeraConfig(r=256, target_modules=list(query_value), **task)
    rows: dict[str, dict[str, Callable[[], nn.Module]]] = {
        "LoRA all-linear": lora("", linear) | {"plain": lambda: plain(net, linear)},
        "LoRA q,v": lora("", query_value) | {"plain": lambda: plain(net, query_value)},
        "LoRA-FA all-linear": {"ours": lora("fa", linear)["ours"]},  # in peft an optimizer, with LoRA's step
        "DoRA q,v": lora("dora", query_value),
        "VeRA q,v": {
            "ours": lambda: ours(net, VeRA(r=256, target_modules=list(query_value))),
            "peft": lambda: theirs(net, vera),
        },
        "IA3": {
            "ours": lambda: ours(net, IA3()),
            "peft": lambda: theirs(net, peft.IA3Config(target_modules=ia3[0], feedforward_modules=ia3[1], **task)),
        },
        "Houlsby": {"ours": lambda: ours(net, Houlsby())},
        "prefix": {
            "ours": lambda: ours(net, PrefixTuning(20)),
            "peft": lambda: theirs(net, peft.PrefixTuningConfig(num_virtual_tokens=20, **task)),
        },
        "prompt": {
            "ours": lambda: ours(net, PromptTuning(20)),
            "peft": lambda: theirs(net, peft.PromptTuningConfig(num_virtual_tokens=20, **task)),
        },
    }
    rows["full fine-tuning"] = {"torch": lambda: full(net)}
    return rows
