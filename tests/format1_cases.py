"""Networks, batches and methods of `tests/golden/format1`, built the same on every machine.

The generator (`tests/golden/make_format1.py`) and the test (`tests/test_format1.py`) share this module. What is here
must not change any more: the files were written with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    IA3,
    PEFT,
    AdaLoRA,
    AdapterFusion,
    BitFit,
    Compacter,
    CompacterPlusPlus,
    DeltaLoRA,
    DoRA,
    FullFineTuning,
    Houlsby,
    LoRA,
    LoRAFA,
    Method,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoRA,
    VeRA,
)
from tests.models import trainer

FOLDER = Path(__file__).parent / "golden" / "format1"
#: optimizer steps in an epoch; files are written after one epoch, and a run has two
STEPS = 3
ROWS, LENGTH, WIDTH, VOCAB = 4, 6, 8, 17


# ---- numbers -------------------------------------------------------------------------------------------------------
def numbers(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Numbers between -scale and scale that depend on the name alone.

    Python promises that `random.Random(text).random()` gives the same numbers in every version; torch does not.
    """
    source = random.Random(name)
    values = [scale * (2 * source.random() - 1) for _ in range(torch.Size(shape).numel())]
    return torch.tensor(values, dtype=torch.float64).reshape(shape).float()


def ids(name: str, count: int = VOCAB) -> Tensor:
    """Rows of token ids from 1 on; 0 is padding."""
    source = random.Random(name)
    return torch.tensor([[1 + int(source.random() * (count - 1)) for _ in range(LENGTH)] for _ in range(ROWS)])


def fill(network: nn.Module, salt: str = "") -> nn.Module:
    """Give every parameter values that depend on its name; another ``salt`` makes another base."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            center = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(center + numbers(salt + name, tuple(parameter.shape), 0.5))
    return network


# ---- networks ------------------------------------------------------------------------------------------------------
def bert(layers: int = 1) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 12}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **quiet, vocab_size=VOCAB, max_position_embeddings=24, num_labels=3)
    config._attn_implementation = "eager"
    return transformers.BertForSequenceClassification(config)


def bert_of_two_layers() -> nn.Module:
    return bert(layers=2)


def llama(layers: int = 1) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 12}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(
        **sizes, **special, num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=24
    )
    config._attn_implementation = "eager"
    return transformers.LlamaForCausalLM(config)


def llama_of_two_layers() -> nn.Module:
    return llama(layers=2)


def vit() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    config._attn_implementation = "eager"
    return transformers.ViTModel(config, add_pooling_layer=False)


class Attention(nn.Module):
    """`nn.MultiheadAttention` with one weight for queries, keys and values, and with one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, kdim=5, vdim=3, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        return x + self.cross(x, keys, values)[0]


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, whose layers read the weights of their parts."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Convolutions(nn.Module):
    """Convolutions in one and two dimensions, one of them in groups, with a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(2, 4, 3, padding=1, bias=False)  # a bias before a normalisation has no gradient
        self.norm = nn.BatchNorm2d(4)
        self.conv_b = nn.Conv2d(4, 4, 3, groups=2)
        self.conv_c = nn.Conv1d(4, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv_a(x)))
        x = torch.relu(self.conv_b(x)).mean(-1)
        return self.head(torch.relu(self.conv_c(x)).mean(-1))


class Words(nn.Module):
    """An embedding, transformers' Conv1D as in GPT-2, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB + 1, WIDTH, padding_idx=0)
        self.c_attn = Conv1D(3 * WIDTH, WIDTH)
        self.c_proj = Conv1D(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        q, k, v = self.c_attn(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).softmax(-1)
        return self.head(x + self.c_proj(scores @ v))


class Experts(nn.Module):
    """A mixture with stacked weights: each row of the input has an expert of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(ROWS // 2, 6, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(ROWS // 2, WIDTH, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.bmm(x, self.gate_up_proj.mT))
        return torch.bmm(x, self.down_proj.mT)


class Mixture(nn.Module):
    """Stacked experts behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x).reshape(ROWS // 2, -1, WIDTH)).reshape(x.shape)


class Tower(nn.Module):
    """Layers called `base` and `delta`, beside a norm that stands in a list called `base`."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.delta = nn.Linear(WIDTH, WIDTH)
        self.plain = nn.ModuleDict({"base": nn.LayerNorm(WIDTH), "delta": nn.LayerNorm(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain["base"](torch.tanh(self.base(x)))
        return x + self.plain["delta"](torch.tanh(self.delta(x)))


class BaseAndDelta(nn.Module):
    """Towers called `base` and `delta`: a file names `base.base.base.bias` and `base.plain.base.bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Tower()
        self.delta = Tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(self.base(x))


class Sublayer(nn.Module):
    """A module that has a known width, weights of its own, and a child called `base`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = WIDTH
        self.bias = nn.Parameter(torch.empty(WIDTH))
        self.base = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x)) + self.bias


class Nested(nn.Module):
    """Layers in which a part called `base` belongs to the model, inside of what is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Sublayer()
        self.base = Sublayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.block(x))


def four_bits() -> nn.Module:
    """Linear layers that bitsandbytes has packed; a base in 4 bits needs 64 numbers a block."""
    import bitsandbytes

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
            self.first = bitsandbytes.nn.Linear4bit(64, 64, **options)
            self.second = bitsandbytes.nn.Linear4bit(64, 64, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    return Packed()


# ---- batches -------------------------------------------------------------------------------------------------------
def text(number: int) -> dict[str, Tensor]:
    """Token ids; the last row is shorter."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[-1, 4:] = 0
    return {"input_ids": ids(f"text {number}") * mask, "attention_mask": mask}


def words(number: int) -> dict[str, Tensor]:
    return {"input_ids": ids(f"words {number}")}


def with_placeholders(number: int) -> dict[str, Tensor]:
    """Token ids that begin with two placeholders, the last row of the table."""
    found = ids(f"placeholders {number}")
    found[:, :2] = VOCAB
    return {"input_ids": found}


def vectors(number: int) -> dict[str, Tensor]:
    return {"x": numbers(f"vectors {number}", (ROWS, LENGTH, WIDTH))}


def wide_vectors(number: int) -> dict[str, Tensor]:
    return {"x": numbers(f"wide vectors {number}", (ROWS, 64))}


def images(number: int) -> dict[str, Tensor]:
    return {"x": numbers(f"images {number}", (ROWS, 2, 6, 6))}


def pixels(number: int) -> dict[str, Tensor]:
    return {"pixel_values": numbers(f"pixels {number}", (ROWS, 1, 8, 8))}


def three_sequences(number: int) -> dict[str, Tensor]:
    keys, values = numbers(f"keys {number}", (ROWS, 5, 5)), numbers(f"values {number}", (ROWS, 5, 3))
    return {**vectors(number), "keys": keys, "values": values}


# ---- cases ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A network, what it eats, and what adapts it."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    methods: tuple[Method, ...]
    whole: bool = False  # there is also a checkpoint with save="full"
    shards: bool = False  # there is also a folder of shards
    place: str = "net"  # the name that the LightningModule has for the network

    def network(self, salt: str = "") -> nn.Module:
        """The base with its weights; another ``salt`` makes another base."""
        network = fill(self.build(), salt)
        return network.to("cpu")  # here bitsandbytes packs its weights

    def outputs(self, network: nn.Module) -> Tensor:
        """What the network makes of one batch, without gradient, in eval mode."""
        was_training = network.training
        network.eval()
        with torch.no_grad():
            found = first(network(**self.batch(0)))
        network.train(was_training)
        return found

    def loss(self, network: nn.Module, number: int, rows: slice = slice(None)) -> Tensor:
        """The mean squared distance of outputs from numbers."""
        inputs = {name: value[rows] for name, value in self.batch(number).items()}
        found = first(network(**inputs))
        wanted = numbers(f"wanted {number}", (ROWS, *found.shape[1:]))[rows]
        return (found - wanted.reshape(found.shape)).square().mean()


def first(found: object) -> Tensor:
    """The output tensor: logits or hidden states of transformers' models."""
    if isinstance(found, Tensor):
        return found
    return found[0]  # type: ignore[index]


_FUSED = {name: f"pkg://tests/golden/format1/adapter_fusion/{name}.safetensors" for name in ("news", "mail")}
_SMALL = {"reduction_factor": 4}
_SHORT = {"num_virtual_tokens": 2}

CASES = {
    "full_fine_tuning": Case(Convolutions, images, (FullFineTuning(),)),
    "bitfit": Case(bert, text, (BitFit(modules_to_save="classifier"),)),
    "ia3": Case(bert, text, (IA3(),)),
    "ia3_llama": Case(llama, text, (IA3(),)),
    # low rank
    "lora": Case(llama, text, (LoRA(r=2),)),
    "lora_pissa": Case(llama, text, (LoRA(r=2, init="pissa", target_modules=["q_proj", "up_proj"]),)),
    "lora_olora": Case(bert, text, (LoRA(r=2, init="olora", target_modules=["query", "value"]),)),
    "lora_bias_all": Case(
        bert,
        text,
        (LoRA(r=2, bias="all", target_modules=["query", "dense"], modules_to_save="classifier"),),
        whole=True,
        shards=True,
    ),
    "lora_bias_lora_only": Case(bert, text, (LoRA(r=2, bias="lora_only", target_modules=["key", "pooler.dense"]),)),
    "lora_attention": Case(Attention, three_sequences, (LoRA(r=2, bias="all"),), whole=True),
    "lora_torch_encoder": Case(Encoder, vectors, (LoRA(r=2, bias="lora_only"),)),
    "lora_convolutions": Case(
        Convolutions,
        images,
        (LoRA(r=2, target_modules=["conv_a", "conv_b", "conv_c"], bias="all", modules_to_save=["norm", "head"]),),
    ),
    "lora_embedding": Case(Words, words, (LoRA(r=2, target_modules=["table", "head"]),)),
    "lora_conv1d": Case(Words, words, (LoRA(r=2, target_modules="c_*", bias="lora_only"),)),
    "lora_fused_parts": Case(Words, words, (LoRA(r=2, target_modules="c_attn", fused_parts=["q", "v"]),)),
    "lora_experts": Case(Mixture, vectors, (LoRA(r=2, target_modules=["first", "experts"]),)),
    "lora_base_and_delta": Case(BaseAndDelta, vectors, (LoRA(r=2, bias="all"),), whole=True, shards=True, place="base"),
    "dora": Case(bert, text, (DoRA(r=2, modules_to_save="classifier"),)),
    "dora_convolutions": Case(Convolutions, images, (DoRA(r=2, target_modules=["conv_a", "conv_b", "head"]),)),
    "lorafa": Case(bert, text, (LoRAFA(r=2),)),
    "vera": Case(bert_of_two_layers, text, (VeRA(r=3, target_modules=["query", "value"]),)),
    "deltalora": Case(llama, text, (DeltaLoRA(r=2, start_step=1, update_ratio=0.5),)),
    "adalora": Case(bert, text, (AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1),)),
    "adalora_attention": Case(Attention, three_sequences, (AdaLoRA(init_r=3, target_r=2, tfinal=4),)),
    "qlora": Case(four_bits, wide_vectors, (QLoRA(r=2, compute_dtype="float32"),)),
    # bottlenecks
    "houlsby": Case(bert, text, (Houlsby(**_SMALL),)),
    "houlsby_layer_norms": Case(llama, text, (Houlsby(**_SMALL, train_layer_norms=True),)),
    "pfeiffer": Case(llama, text, (Pfeiffer(**_SMALL),)),
    "pfeiffer_layer_norms": Case(
        bert, text, (Pfeiffer(**_SMALL, train_layer_norms=True, modules_to_save="classifier"),), whole=True, shards=True
    ),
    "pfeiffer_base_inside": Case(Nested, vectors, (Pfeiffer(**_SMALL, target_modules=["block", "base"]),), whole=True),
    "parallel_adapter": Case(bert, text, (ParallelAdapter(),)),
    "compacter": Case(bert_of_two_layers, text, (Compacter(),)),
    "compacter_plus_plus": Case(bert_of_two_layers, text, (CompacterPlusPlus(),)),
    "adapter_fusion": Case(bert, text, (AdapterFusion(_FUSED),)),
    # prefixes and prompts
    "prefix_tuning": Case(bert, text, (PrefixTuning(**_SHORT),)),
    "prefix_tuning_shift": Case(llama, text, (PrefixTuning(**_SHORT, positions="shift"),)),
    "prefix_tuning_projection": Case(
        llama_of_two_layers, text, (PrefixTuning(**_SHORT, projection=True, hidden_size=4),)
    ),
    "prefix_tuning_torch_encoder": Case(Encoder, vectors, (PrefixTuning(**_SHORT),)),
    "ptuning": Case(bert, text, (PTuning(**_SHORT),)),
    "ptuning_placeholders": Case(
        Words, with_placeholders, (PTuning(**_SHORT, encoder="mlp", placeholder_id=VOCAB, target_modules="table"),)
    ),
    "ptuning_v2": Case(bert, text, (PTuningV2(**_SHORT, modules_to_save="classifier"),)),
    "prompt_tuning": Case(llama, text, (PromptTuning(**_SHORT),), whole=True),
    "prompt_tuning_image": Case(vit, pixels, (PromptTuning(**_SHORT),), whole=True),
    # several
    "three_methods": Case(
        bert,
        text,
        (
            LoRA(
                r=2, target_modules=["query", "attention.output.dense"], bias="lora_only", modules_to_save="classifier"
            ),
            IA3(target_modules=["key", "value"], feedforward_modules=[]),
            Pfeiffer(**_SMALL, train_layer_norms=True),
        ),
        whole=True,
    ),
    "methods_inside_each_other": Case(
        bert,
        text,
        (LoRA(r=2, target_modules=["query", "value"], bias="all"), PrefixTuning(**_SHORT), Houlsby(**_SMALL)),
        whole=True,
    ),
}


class Trained(L.LightningModule):
    """Trains the network of a case: AdamW, matrices and vectors in groups of their own."""

    def __init__(self, case: str, salt: str = "") -> None:
        super().__init__()
        self.save_hyperparameters("case")
        self.case = CASES[case]
        self.add_module(self.case.place, self.case.network(salt))

    @property
    def network(self) -> nn.Module:
        """The network of the case."""
        return getattr(self, self.case.place)

    def configure_model(self) -> None:
        """Under FSDP2 shard each layer and the rest."""
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for module in list(self.network.modules()):
            for layer in module if isinstance(module, nn.ModuleList) else ():
                fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Each process takes its share of the rows."""
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return self.case.loss(self.network, int(batch), share)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self)


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW with an epsilon that keeps rounding errors small."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-2, eps=1e-4)


def fit(
    module: Trained,
    folder: Path,
    *callbacks: L.Callback,
    save: str = "trainable",
    ckpt_path: Path | None = None,
    **options,
) -> L.Trainer:
    """Two epochs, or what is left of them."""
    peft = PEFT(list(module.case.methods), save=save)
    run = trainer(folder, peft, *callbacks, max_epochs=2, use_distributed_sampler=False, **options)
    run.fit(module, DataLoader(range(STEPS), batch_size=1), ckpt_path=ckpt_path, weights_only=True)
    return run
