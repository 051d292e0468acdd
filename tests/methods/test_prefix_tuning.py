"""Prefix-tuning: reference values, and the same promises on every kind of model."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from lightning_peft import (
    PEFT,
    ConfigError,
    LoRA,
    NoMatchError,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    suggest_lr,
    trainable_names,
    unload,
)
from lightning_peft.methods.prefix_tuning import part_of
from lightning_peft.prompting.attention import PrefixedConfig
from lightning_peft.prompting.prefix import PrefixedAttention, ProjectedPrefix
from tests.golden_case import Golden
from tests.grid import GENERATORS, GRID, OTHERS, TEXT, greedy, padded_alone
from tests.models import Foreign, loader, trainer


def attentions(model: nn.Module, part: str = "") -> list[PrefixedAttention]:
    return [m for n, m in model.named_modules() if isinstance(m, PrefixedAttention) and part in n]


def give(modules: list[PrefixedAttention], flat: torch.Tensor) -> None:
    """flat (n, 2L, heads, width): keys at even indices."""
    for i, module in enumerate(modules):
        module.delta.prefix_key.data.copy_(flat[:, 2 * i])
        module.delta.prefix_value.data.copy_(flat[:, 2 * i + 1])


def grads(modules: list[PrefixedAttention]) -> torch.Tensor:
    rows = [g for m in modules for g in (m.delta.prefix_key.grad, m.delta.prefix_value.grad)]
    return torch.stack(rows, dim=1)


def compare(case: Golden, out: torch.Tensor, ours: dict[str, torch.Tensor]) -> None:
    tolerance, expected = case.meta["tolerance"], case.part("grad")
    torch.testing.assert_close(out, case.tensors["output.adapted"], atol=tolerance["suggested_atol"], rtol=0)
    assert expected
    for key, grad in expected.items():
        torch.testing.assert_close(ours[key].reshape(grad.shape), grad, atol=tolerance["suggested_grad_atol"], rtol=0)


FLAT = [
    "prefix_concat_bert",
    "prefix_concat_llama_gqa",
    "prefix_shift_bert",
    "prefix_shift_gpt2",
    "prefix_shift_llama_gqa",
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FLAT)
def test_reference(name, attention):
    case = Golden(name, attention)
    model, n = case.model(), case.meta["hyperparameters"]["n"]
    inject(model, PrefixTuning(n, positions="shift" if "shift" in name else "keep"))
    (key, flat), modules = next(iter(case.part("adapter").items())), attentions(model)
    give(modules, flat.view(n, 2 * len(modules), *modules[0].delta.prefix_key.shape[1:]))
    out = case.run(model)
    (out**2).mean().backward()
    compare(case, out, {key: grads(modules)})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["prefix_encdec_bart", "prefix_encdec_t5"])
def test_encoder_decoder_reference(name, attention):
    case = Golden(name, attention)
    model, n = case.model(), case.meta["hyperparameters"]["n"]
    inject(model, PrefixTuning(n))
    every = dict(model.named_modules())
    places = {"encoder_prefix": "encoder", "self_prefix": "decoder", "cross_prefix": "cross"}
    parts = {}
    for key, flat in case.part("adapter").items():
        part = next(p for k, p in places.items() if k in key)
        parts[key] = [m for n, m in every.items() if isinstance(m, PrefixedAttention) and part_of(n) == part]
        give(parts[key], flat.view(n, 2 * len(parts[key]), *parts[key][0].delta.prefix_key.shape[1:]))
    out = case.run(model)
    (out**2).mean().backward()
    compare(case, out, {k: grads(m) for k, m in parts.items()})


@pytest.mark.parametrize("name", ["prefix_mlp_gpt2", "prefix_mlp_llama_gqa"])
def test_projection_reference_and_fold(name, tmp_path):
    case = Golden(name)
    model, h, a = case.model(), case.meta["hyperparameters"], case.part("adapter")
    inject(model, PrefixTuning(h["n"], projection=True, hidden_size=h["mlp_hidden"], positions="shift"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case.meta["trainable_parameters"]
    deltas = [m.delta for m in attentions(model)]
    ours = {
        "prompt_encoder.embedding.weight": deltas[0].shared.embedding,
        "prompt_encoder.transform.0.weight": deltas[0].shared.weight,
        "prompt_encoder.transform.0.bias": deltas[0].shared.bias,
    }
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(a[key])
        for part in ("weight", "bias"):
            rows = a[f"prompt_encoder.transform.2.{part}"].chunk(len(deltas))
            for delta, value in zip(deltas, rows, strict=True):
                getattr(delta, part).copy_(value)
    out = case.run(model)
    (out**2).mean().backward()
    found = {k: p.grad for k, p in ours.items()}
    for part in ("weight", "bias"):
        found[f"prompt_encoder.transform.2.{part}"] = torch.cat([getattr(d, part).grad for d in deltas])
    compare(case, out, found)

    save_adapter(model, tmp_path / "a.safetensors")  # the network itself is in the file: training resumes
    other = case.model()
    load_adapter(other, tmp_path / "a.safetensors")
    assert isinstance(attentions(other)[0].delta, ProjectedPrefix)
    PrefixTuning(h["n"], projection=True, hidden_size=h["mlp_hidden"], positions="shift").fold(other)
    torch.testing.assert_close(case.run(other), out, atol=1e-5, rtol=0)
    flat = torch.stack([t for m in attentions(other) for t in m.delta.pair()], dim=1)
    torch.testing.assert_close(flat.flatten(1), a["prompt_embeddings"], atol=1e-5, rtol=0)
    save_adapter(other, tmp_path / "b.safetensors")
    plain = case.model()
    load_adapter(plain, tmp_path / "b.safetensors")
    assert torch.equal(case.run(plain), case.run(other))


@pytest.fixture(params=GRID)
def kind(request):
    return GRID[request.param]


@pytest.mark.parametrize("projection", [False, True])
def test_grid(kind, projection):
    """The prefix changes the output, every tensor gets a gradient, off is the base, and out is the base itself."""
    model, base = kind.make(), kind.make()
    before = kind.output(base)
    inject(model, PrefixTuning(4, projection=projection, hidden_size=8, init_std=1.0))
    names = list(base.state_dict())
    changed = kind.output(model)
    assert changed.shape == before.shape and not torch.allclose(changed, before, atol=1e-4)
    (kind.output(model, grad=True) ** 2).sum().backward()
    tensors = dict(model.named_parameters())
    dead = [n for n in trainable_names(model) if tensors[n].grad is None or not tensors[n].grad.any()]
    assert dead == []
    with disabled(model):
        assert torch.equal(kind.output(model), before)
    assert torch.equal(kind.output(copy.deepcopy(model)), changed)
    unload(model)
    assert list(model.state_dict()) == names and torch.equal(kind.output(model), before)
    assert not any(isinstance(getattr(m, "config", None), PrefixedConfig) for m in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_is_sdpa_and_padding_does_not_matter(kind, attention):
    if not kind.padding:
        pytest.skip("fixed sizes")
    model = kind.make(attention)
    inject(model, PrefixTuning(4, init_std=1.0))
    padded_alone(kind, model)
    if attention == "eager" and kind.transformers:
        other = kind.make("sdpa")
        inject(other, PrefixTuning(4, init_std=1.0))
        torch.testing.assert_close(kind.output(model), kind.output(other), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["keep", "shift"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_is_a_recompute(name, positions):
    kind = GRID[name]
    model = kind.make()
    inject(model, PrefixTuning(4, positions=positions, init_std=1.0))
    greedy(kind, model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "whisper", "pegasus"])
def test_a_shift_is_a_later_row_of_the_positions(name):
    """positions="shift" equals "keep" in a model whose tables of positions start n rows later."""
    kind, outputs = (GRID | OTHERS)[name], {}
    for positions in ("keep", "shift"):
        model = kind.make()
        for key, table in model.named_parameters():
            moved = ("position_embeddings", "wpe", "embed_positions")
            if positions == "keep" and key.split(".")[-2] in moved and not (name == "whisper" and "encoder" in key):
                table.data = table.data.roll(-3, 0)
        inject(model, PrefixTuning(3, positions=positions, init_std=1.0))
        outputs[positions] = kind.output(model)
    torch.testing.assert_close(outputs["keep"], outputs["shift"], atol=1e-5, rtol=1e-4)
    model = kind.make()
    inject(model, PrefixTuning(3, init_std=1.0))
    assert not torch.allclose(kind.output(model), outputs["shift"], atol=1e-3)


def numbered(name: str, batch: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    """The positions that transformers gives to a batch behind ``n`` cached tokens."""
    if name == "roberta":
        return RobertaEmbeddings.create_position_ids_from_input_ids(batch["input_ids"], 0, n)
    mask = batch["attention_mask"]
    return (mask.cumsum(1) + n) * mask - 1


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("roberta", PrefixTuning(3, positions="shift")),
        ("roberta", PTuningV2(3)),
        ("opt", PrefixTuning(3, positions="shift")),
    ],
    ids=["roberta", "roberta, PTuningV2", "opt"],
)
def test_a_shift_leaves_padded_tokens_where_transformers_leaves_them(name, method):
    """RoBERTa puts them at ``padding_idx``, OPT at -1, with and without a cache."""
    if name == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**TEXT, pad_token_id=0)).eval()
    else:
        options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 36, "vocab_size": 61}
        config = transformers.OPTConfig(**options, word_embed_proj_dim=32, max_position_embeddings=64)
        model = transformers.OPTModel(config).eval()
    plain, batch = copy.deepcopy(model), GRID["bert"].batch()
    embedded = {"output_hidden_states": True, "use_cache": False}
    expected = plain(**batch, position_ids=numbered(name, batch, 3), **embedded).hidden_states[0]
    unmoved = plain(**batch, **embedded).hidden_states[0]
    inject(model, method)
    moved = model(**batch, **embedded).hidden_states[0]
    torch.testing.assert_close(moved, expected)
    padded = batch["attention_mask"] == 0
    assert padded.any() and torch.equal(moved[padded], unmoved[padded])


@pytest.mark.parametrize("positions", ["keep", "shift"])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_left_padding_without_position_ids(name, positions):
    """Rotary models number left-padded rows from the padding on; the prefix stands before the first real token."""
    kind = GRID[name]
    model = kind.make()
    inject(model, PrefixTuning(4, positions=positions, init_std=1.0))
    batch = kind.batch()
    left = {k: v.roll(3, 1)[-1:] for k, v in batch.items()}
    alone = {k: v[-1:, :6] for k, v in batch.items()}
    torch.testing.assert_close(kind.run(model, left)[:, 3:], kind.run(model, alone), atol=2e-5, rtol=1e-4)
    assert torch.equal(kind.output(copy.deepcopy(model)), kind.output(model))
    unload(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_full_attention_without_mask_is_causal():
    """Short and long inputs take different ways (a mask, idle queries): both equal eager attention with its mask."""
    torch.manual_seed(1)
    for length in (9, 40):  # 40 > 16 · 2
        outputs = []
        for attention in ("eager", "sdpa"):
            model = GRID["llama"].make(attention)
            inject(model, PrefixTuning(2, init_std=1.0))
            ids = torch.arange(length)[None] % 50 + 4
            outputs.append(model(ids).logits)
            outputs[-1].sum().backward()
            outputs.append(attentions(model)[0].delta.prefix_key.grad)
        torch.testing.assert_close(outputs[0], outputs[2], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[1], outputs[3], atol=2e-4, rtol=1e-3)
    for length in (9, 40):
        model = GRID["hand_written"].make()
        inject(model, PrefixTuning(2, init_std=1.0))
        ids = torch.arange(length)[None] % 50 + 4
        changed = torch.cat([ids[:, :5], ids[:, 5:] + 3], 1)
        torch.testing.assert_close(model(ids)[:, :5], model(changed)[:, :5], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(ids)[:, 5:], model(changed)[:, 5:])


def test_sliding_window_never_hides_the_prefix():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, vocab_size=61, num_key_value_heads=2, sliding_window=3, head_dim=8)
    model = transformers.MistralForCausalLM(config).eval()
    inject(model, PrefixTuning(4, init_std=1.0))
    ids = torch.randint(3, 61, (2, 12))
    key = attentions(model)[0].delta.prefix_key
    model(ids).logits[:, -1].sum().backward()
    assert key.grad.any()
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for step in range(6):
        expected = model(out[:, : 12 + step], use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(expected, out[:, 12 + step])


def test_two_models_do_not_meet():
    """The registry's entry acts for adapted modules only, and the model's config stays as it was."""
    kind = GRID["gpt2"]
    plain, adapted = kind.make(), kind.make()
    before, name = kind.output(plain), adapted.config._attn_implementation
    inject(adapted, PrefixTuning(2, init_std=1.0))
    kind.output(adapted)
    assert torch.equal(kind.output(plain), before)
    assert adapted.config._attn_implementation == name == plain.config._attn_implementation
    expected = kind.output(adapted)
    adapted.set_attn_implementation("eager")  # later changes reach the adapted attention
    torch.testing.assert_close(kind.output(adapted), expected, atol=2e-5, rtol=1e-4)
    adapted.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"flex_attention.*set_attn_implementation"):
        kind.output(adapted)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_the_closed_form(need_weights, batch_first):
    """Against keys and values concatenated by hand, with both masks, other key sizes, and the extra rows of torch."""
    torch.manual_seed(0)
    options = {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": batch_first}
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, **options)}).double()
    inject(net, PrefixTuning(3, init_std=1.0))
    q, k, v = torch.randn(2, 5, 8).double(), torch.randn(2, 7, 6).double(), torch.randn(2, 7, 10).double()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    attn_mask = torch.rand(5, 7) > 0.8
    given = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    out, weights = net["mha"](*given, padding, need_weights, attn_mask, is_causal=False)
    base, delta = net["mha"], net["mha"].delta
    heads = [
        F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w, b in zip(
            (q, k, v),
            (base.q_proj_weight, base.k_proj_weight, base.v_proj_weight),
            base.in_proj_bias.chunk(3),
            strict=True,
        )
    ]
    rows = []
    for x, p, extra in ((heads[1], delta.prefix_key, base.bias_k), (heads[2], delta.prefix_value, base.bias_v)):
        tail = extra.view(1, 1, 2, 4).transpose(1, 2).expand(2, -1, -1, -1)
        rows.append(torch.cat([p.transpose(0, 1).expand(2, -1, -1, -1), x, tail, torch.zeros_like(tail)], 2))
    hidden = F.pad(attn_mask[None, None] | padding[:, None, None], (3, 2))
    scores = (heads[0] @ rows[0].mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = base.out_proj((scores @ rows[1]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)
    if need_weights:
        torch.testing.assert_close(weights, scores.mean(1)[..., 3:])
    else:
        assert weights is None


def test_multihead_attention_unbatched_and_float_masks():
    torch.manual_seed(0)
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)})
    inject(net, PrefixTuning(3, init_std=1.0))
    x = torch.randn(2, 5, 8)
    alone, weights = net["mha"](x[0], x[0], x[0], average_attn_weights=False)
    together, _ = net["mha"](x, x, x, need_weights=False)
    torch.testing.assert_close(alone, together[0])
    assert weights.shape == (2, 5, 5)
    per_head = torch.zeros(4, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    a, b = (net["mha"](x, x, x, attn_mask=m, need_weights=False)[0] for m in (per_head, causal))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a[:, :1], net["mha"](x[:, :1], x[:, :1], x[:, :1], need_weights=False)[0])


def test_fused_encoder_path_does_not_skip_the_prefix():
    """`nn.TransformerEncoder` in eval mode without gradients fuses layers, and nests padded batches."""
    kind = GRID["torch_encoder"]
    model = kind.make()
    inject(model, PrefixTuning(4, init_std=1.0))
    slow = kind.output(model, grad=True)
    torch.testing.assert_close(kind.output(model), slow.detach(), atol=1e-5, rtol=1e-4)
    padded_alone(kind, model)


def test_errors():
    with pytest.raises(NoMatchError, match=r"no attention in Sequential.*scaled_dot_product_attention"):
        inject(nn.Sequential(nn.Linear(2, 2)), PrefixTuning())
    sizes = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}
    deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, vocab_size=61))
    with pytest.raises(NoMatchError, match=r"DebertaV2Model.*attention interface"):
        inject(deberta, PrefixTuning())
    with pytest.raises(NoMatchError, match="encoder=False"):
        inject(GRID["bert"].make(), PrefixTuning(encoder=False))
    with pytest.raises(ConfigError, match="num_virtual_tokens=0"):
        PrefixTuning(0)
    model = GRID["bert"].make()
    inject(model, PrefixTuning(60, positions="shift"))
    with pytest.raises(ConfigError, match=r"60 virtual tokens.*has 64"):
        GRID["bert"].output(model)


def test_the_projection_has_its_own_rate():
    net = nn.Linear(2, 2)
    plain, projected = (suggest_lr(net, PrefixTuning(projection=p)).lr for p in (False, True))
    assert projected < plain / 10
    assert copy.deepcopy(PrefixTuning(projection=True)) == PrefixTuning(projection=True) != PrefixTuning()


def test_encoder_decoder_switches():
    for name in ("t5", "bart", "whisper"):
        for off in ("encoder", "decoder", "cross"):
            model = GRID[name].make()
            inject(model, PrefixTuning(2, **{off: False}))
            assert {part_of(n) for n in adapter_state_dict(model)} == {"encoder", "decoder", "cross"} - {off}


def test_layers_without_the_first_still_know_the_bias():
    """T5 computes its position bias in the first layer; a prefix in the second alone needs it too."""
    kind = GRID["t5"]
    both, second = kind.make(), kind.make()
    inject(both, PrefixTuning(3, init_std=1.0))
    inject(second, PrefixTuning(3, init_std=1.0, layers=[1]))
    greedy(kind, second)
    assert attentions(second, "SelfAttention")[0]._adapter.bias_owner
    assert not torch.equal(kind.output(both), kind.output(second))


def test_training_resumes_with_the_projection(tmp_path):
    """Two epochs, a resume and two more equal four epochs: the network is in the checkpoint, not its result."""
    method = PrefixTuning(3, projection=True, hidden_size=8)
    straight, first, second = Foreign(), Foreign(), Foreign()
    trainer(tmp_path, PEFT(method), max_epochs=4).fit(straight, loader("bert"))
    saver = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, PEFT(method), saver, max_epochs=2).fit(first, loader("bert"))
    trainer(tmp_path, PEFT(method), max_epochs=4).fit(second, loader("bert"), ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
    ends = adapter_state_dict(straight), adapter_state_dict(second)
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert any("shared.embedding" in k for k in ends[0])


def test_a_fresh_process_unpickles(tmp_path):
    kind = GRID["gpt2"]
    model = kind.make()
    inject(model, PrefixTuning(3, init_std=1.0))
    torch.save((model, kind.output(model)), tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\nfrom tests.grid import GRID\n"
        "model, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(GRID['gpt2'].output(model), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("method", [PrefixTuning(3), PrefixTuning(3, projection=True, hidden_size=8), PromptTuning(3)])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "modernbert", "whisper", "vit", "llava"])
def test_gradient_checkpointing(name, reentrant, method):
    kind, grads = GRID[name], []
    for on in (False, True):
        model = kind.make()
        inject(model, method)
        model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant and kind.inputs in ("image", "whisper"):
                model.enable_input_require_grads()  # transformers does this by itself for models that take ids
        with disabled_randomness(model):
            (kind.output(model, grad=True) ** 2).mean().backward()
        tensors = dict(model.named_parameters())
        grads.append({n: tensors[n].grad for n in trainable_names(model)})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4)


@contextmanager
def disabled_randomness(model: nn.Module):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("name", ["hand_written", "torch_encoder", "gpt2", "t5", "vit"])
def test_compile(name):
    kind = GRID[name]
    model = kind.make()
    inject(model, PrefixTuning(3, init_std=1.0))
    expected = kind.output(model, grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    out = kind.output(compiled, grad=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    out.sum().backward()
    tensors = dict(model.named_parameters())
    assert all(tensors[n].grad.any() for n in trainable_names(model))
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["lora", "prefix"])
def test_together_with_lora(first):
    kind = GRID["llama"]
    model = kind.make()
    before, names = kind.output(model), list(model.state_dict())
    methods = [LoRA(r=2, target_modules=["q_proj", "v_proj", "k_proj"]), PrefixTuning(3, init_std=1.0)]
    inject(model, methods if first == "lora" else methods[::-1])
    (kind.output(model, grad=True) ** 2).mean().backward()
    tensors = dict(model.named_parameters())
    assert all(tensors[n].grad.any() for n in trainable_names(model) if "lora_A" not in n)
    with disabled(model):
        assert torch.equal(kind.output(model), before)
    unload(model)
    assert list(model.state_dict()) == names and torch.equal(kind.output(model), before)
