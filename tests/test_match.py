"""Patterns, words, roles and the messages of a failed match."""

import pytest
import torch
import torchmetrics
import transformers
from torch import nn

from lightning_peft import ConfigError, LoRA, NoMatchError, inject, summarize, trainable_names
from tests.models import bert, llama


def adapted(model, **fields):
    inject(model, LoRA(r=1, **fields))
    return [t[: -len(".delta.lora_A")] for t in trainable_names(model) if t.endswith("lora_A")]


def layer(i, *names):
    return [f"model.layers.{i}.{n}" for n in names]


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "q_proj"}, layer(0, ATTENTION[0]) + layer(1, ATTENTION[0])),
        ({"target_modules": ["self_attn.q_proj"]}, layer(0, ATTENTION[0]) + layer(1, ATTENTION[0])),
        ({"target_modules": "model.layers.1.self_attn.v_proj"}, layer(1, ATTENTION[2])),
        ({"target_modules": "model.layers.0.*_proj"}, layer(0, *ATTENTION, *MLP)),
        ({"target_modules": r"re:.*\.1\..*(up|down)_proj"}, layer(1, *MLP[1:])),
        ({"target_modules": "attention", "layers": [1]}, layer(1, *ATTENTION)),
        ({"target_modules": "mlp", "layers": [0]}, layer(0, *MLP)),
        ({"target_modules": "all-linear", "layers": [0]}, layer(0, *ATTENTION, *MLP)),
        ({"exclude_modules": ["mlp", "re:.*_proj"], "target_modules": "lm_head"}, ["lm_head"]),
        ({"exclude_modules": ["layers.1", "mlp.gate_proj"]}, layer(0, *ATTENTION, *MLP[1:])),
    ],
)
def test_patterns_on_llama(fields, expected):
    assert adapted(llama(), **fields) == expected


def test_layers_that_are_numbered_as_torchvision_does():
    net = nn.ModuleDict({f"encoder_layer_{i}": nn.ModuleDict({"mlp": nn.Linear(4, 4)}) for i in range(3)})
    assert adapted(net, target_modules="mlp", layers=[1]) == ["encoder_layer_1.mlp"]


def test_all_linear_leaves_the_head_of_a_classifier():
    names = adapted(bert())
    assert "pooler.dense" not in adapted(bert().bert), "a bare encoder's pooler is often unused"
    assert "classifier" not in names and "bert.pooler.dense" in names and len(names) == 2 * 6 + 1


def test_words_mean_roles_in_every_architecture():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, vocab_size=20)
    distil = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=20, vocab_size=20)
    modern = transformers.ModernBertConfig(**small, vocab_size=20, pad_token_id=0)
    vit = transformers.ViTConfig(**small, image_size=8, patch_size=4)
    both = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 1), ("ffn_dim", 20))}
    bart = transformers.BartConfig(
        d_model=16, **both, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=20
    )
    auto = transformers.AutoModel.from_config
    counts = ((gpt2, 2, 2), (t5, 12, 4), (distil, 4, 2), (modern, 2, 2), (vit, 4, 2), (bart, 12, 4))
    for config, attention, mlp in counts:
        assert len(adapted(auto(config), target_modules="attention")) == attention, config.model_type
        assert len(adapted(auto(config), target_modules="mlp")) == mlp, config.model_type
    names = adapted(auto(transformers.BertConfig(**small, vocab_size=20)), target_modules="mlp")
    assert names == ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"]


def test_words_never_reach_into_metrics():
    class Judge(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def update(self):
            pass

        def compute(self):
            return torch.zeros(1)

    net = nn.ModuleDict({"body": nn.Linear(4, 4), "metric": Judge()})
    assert adapted(net) == ["body"]
    assert trainable_names(net) == ["body.delta.lora_A", "body.delta.lora_B"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "q_prj"}, r"'q_prj' matched no .* 15 Linear, 1 Embedding.*layers.0.self_attn.q_proj"),
        ({"target_modules": "q_proj", "layers": [7]}, r"2 hits were dropped by layers=\[7\]; layers here: \[0, 1\]"),
        ({"exclude_modules": "self_attn.*"}, r"exclude_modules='self_attn.\*' matches no module"),
        ({"target_modules": "q_proj", "exclude_modules": "self_attn"}, "dropped by exclude_modules="),
        ({"target_modules": "input_layernorm"}, "'model.layers.0.input_layernorm' is a LlamaRMSNorm"),
        ({"target_modules": "re:["}, "is not a regular expression"),
        ({"modules_to_save": "head"}, r"='head' matched no module. The top modules here are: model, lm_head"),
    ],
)  # fmt: skip
def test_no_match_says_what_would(fields, message):
    model = llama()
    before = [type(m) for m in model.modules()]
    with pytest.raises(NoMatchError, match=message):
        inject(model, LoRA(**fields))
    assert [type(m) for m in model.modules()] == before and all(p.requires_grad for p in model.parameters())


def test_a_name_that_cannot_be_adapted_is_not_hidden_by_one_that_can():
    net = nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 2)})
    for patterns in (["norm", "fc"], ["all-linear", "norm"], ["re:norm|bn", "fc"]):
        with pytest.raises(NoMatchError, match="'norm' is a LayerNorm"):
            inject(net, LoRA(target_modules=patterns))
    with pytest.raises(NoMatchError, match="'norm' is a LayerNorm"):
        inject(net, LoRA(target_modules=["norm", "fc"], exclude_modules="re:f.+"))
    assert adapted(net, target_modules=["norm", "fc"], exclude_modules="norm") == ["fc"]


def test_a_model_without_usable_types():
    with pytest.raises(NoMatchError, match=r"has none of the types it can adapt; it has 1 LayerNorm"):
        inject(nn.Sequential(nn.LayerNorm(4)), LoRA())


def test_methods_must_not_meet():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="Both LoRA and LoRA would adapt 'a'"):
        inject(net, [LoRA(target_modules="a"), LoRA(r=4)])
    inject(net, [LoRA(target_modules="a", r=1), LoRA(target_modules="b", r=2)])
    assert summarize(net)["trainable"] == 4 + 8
    with pytest.raises(ConfigError, match="Expected a method such as LoRA"):
        inject(net, "lora")


def test_modules_shared_under_two_names_and_in_lists():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    inject(net, LoRA(r=1))
    assert net["a"] is net["b"][0] and len(trainable_names(net)) == 2
