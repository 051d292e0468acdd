"""Where bottleneck adapters go: the table of layers against what the models compute, and all kinds on all of them."""

import copy
import dataclasses
import pickle
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import (
    CompacterPlusPlus,
    ConfigError,
    Houlsby,
    LoRA,
    NoMatchError,
    ParallelAdapter,
    PEFTError,
    Pfeiffer,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    trainable_names,
    unload,
)
from lightning_peft.bottleneck.layers import WithBottleneck
from lightning_peft.bottleneck.placement import base_modules
from lightning_peft.bottleneck.sites import find_sites
from tests.adapters import TORCH, ZOO, build, inputs, outputs
from tests.contract.battery import shake

KINDS = [*ZOO, *TORCH]
METHODS = [Houlsby(reduction_factor=4), Pfeiffer(reduction_factor=2), ParallelAdapter(), CompacterPlusPlus()]


def first(value):
    return value[0] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_true(kind):
    """h is what the row calls output, x what goes into its source: h + x is what the norm takes, or the layer gives."""
    model = build(kind)
    modules = base_modules(model)
    sites = find_sites(modules)
    numbers = {s.role: len([t for t in sites if t.role == s.role]) for s in sites}
    assert numbers == dict.fromkeys(("attention", "mlp"), 2 * (1 + ("decoder_input_ids" in inputs(kind))))
    seen = {}

    def watch(name, module):
        def hook(module, args, kwargs, out):
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            seen.setdefault(name, (x.detach(), first(out).detach()))

        module.register_forward_hook(hook, with_kwargs=True)

    wanted = {n for s in sites for n in (s.output, s.source, s.norm, _owner(s))}
    wanted |= {f"{_owner(s)}.{c}" for s in sites for c in ("encoder_attn_layer_norm", "norm2")}
    for name in wanted & set(modules):
        watch(name, modules[name])
    outputs(model, kind)  # with gradients: torch's fused path stays closed
    for site in sites:
        total = seen[site.output][1] + seen[site.source][0]
        layer = _owner(site)
        if site.post or (kind == "xmod" and site.role == "mlp"):  # X-MOD's language adapter starts with that norm
            taken = seen[site.norm][0]
        elif site.role == "mlp" or "SelfAttention" in modules[layer]._modules:
            taken = seen[layer][1]
        else:
            # the next sub-layer takes it: feed-forward, or cross-attention in between
            layer_parts = modules[layer]._modules
            if "encoder_attn_layer_norm" in layer_parts:
                following = f"{layer}.encoder_attn_layer_norm"
            elif "multihead_attn" in layer_parts:
                following = f"{layer}.norm2"
            else:
                following = next(s.source for s in sites if s.role == "mlp" and _owner(s) == layer)
            taken = seen[following][0]
        torch.testing.assert_close(total, taken.reshape(total.shape), atol=1e-6, rtol=1e-5)


def _owner(site) -> str:
    """The layer of a site: what its three places have in common."""
    parts = [n.split(".") for n in (site.output, site.source, site.norm)]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return ".".join(parts[0][:depth])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_works(method, kind):
    """Starts at the base, acts in eval mode, every tensor gets a gradient; switched off and out, it leaves no trace."""
    model, plain = build(kind), build(kind)
    with torch.no_grad():
        base = outputs(plain, kind)
        frozen = outputs(build(kind).requires_grad_(False), kind)  # torch's attention computes it another way then
        inject(model, method)
        torch.testing.assert_close(outputs(model, kind), base, atol=1e-5, rtol=1e-4)
        shake(model)
        first_place = next(m for m in model.modules() if isinstance(m, WithBottleneck))
        adapted = outputs(model, kind)
        first_place._adapter.switch(first_place, False)
        assert not torch.allclose(outputs(model, kind), adapted, atol=1e-4)
        first_place._adapter.switch(first_place, True)
        with disabled(model):
            assert torch.equal(outputs(model, kind), frozen)
    torch.testing.assert_close(outputs(model, kind), adapted, atol=1e-5, rtol=1e-4)
    model.train()
    outputs(model, kind).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    unload(model.eval())
    assert [(n, type(m).__name__, len(m._forward_pre_hooks)) for n, m in model.named_modules()] == [
        (n, type(m).__name__, 0) for n, m in plain.named_modules()
    ]
    with torch.no_grad():
        assert torch.equal(outputs(model, kind), base)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_adapter_in_x_mod_corrects_once_a_pass(method, pre_norm):
    """X-MOD's own language adapter calls the dropout and the normalisation of the feed-forward part once more."""
    options = {**ZOO["xmod"][1], "pre_norm": pre_norm}
    model = transformers.XmodModel(transformers.XmodConfig(**options)).eval()
    inject(model, dataclasses.replace(method, target_modules=["attention", "mlp"]))
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, WithBottleneck)}
    assert len(adapters) == 4
    calls = Counter()
    for name, adapter in adapters.items():
        adapter.delta.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(**inputs("xmod"))
    assert calls == dict.fromkeys(adapters, 1)


@pytest.mark.parametrize("method", [Houlsby(), ParallelAdapter()], ids=lambda m: type(m).__name__)
def test_adapters_give_the_same_in_x_mod_and_roberta_where_the_layers_are_the_same(method):
    """Without its language adapter X-MOD's layer is RoBERTa's."""
    bert, xmod = build("roberta"), build("xmod")
    xmod.load_state_dict(bert.state_dict(), strict=False)
    for layer in xmod.encoder.layer:
        layer.output.lang_adapter = lambda lang_ids, hidden_states: hidden_states
    given = inputs("xmod")
    torch.testing.assert_close(xmod(**given)[0], bert(**given)[0])
    for model in (bert, xmod):
        inject(model, method)
    torch.manual_seed(0)
    for name, value in bert.named_parameters():
        if value.requires_grad:
            value.data.normal_(0, 0.1)
            same = name.replace(".output.dropout.", ".output.dense.") if "attention" not in name else name
            dict(xmod.named_parameters())[same].data.copy_(value)
    torch.testing.assert_close(xmod(**given)[0], bert(**given)[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "t5", "bart", "vit", "whisper", "modernbert"])
def test_gradient_checkpointing(method, kind):
    """Both kinds give the gradients of a plain backward pass (the battery does BERT and Llama)."""
    grads = []
    for reentrant in (None, True, False):
        model = build(kind)
        inject(model, method)
        shake(model)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads() if kind != "vit" else None
        given = inputs(kind)
        if kind in ("vit", "whisper"):
            name = next(n for n in given if n.startswith(("pixel", "input")))
            given[name] = given[name].clone().requires_grad_()  # a reentrant checkpoint needs one input with a gradient
        model(**given)[0].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_generate_with_cache(method, kind):
    """Token by token with a cache gives the logits of a full recomputation; nothing of the prompt stays behind."""
    model = build(kind)
    inject(model, method)
    shake(model)
    given = {k: v for k, v in inputs(kind).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    runs = [
        model.generate(**given, **options, return_dict_in_generate=True, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for a, b in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    states = [m._adapter for m in model.modules() if isinstance(m, WithBottleneck)]
    assert all(state.slot is None or not state.slot.values for state in states)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", METHODS[2]), ("t5", METHODS[1]), ("encoder_post", METHODS[2]), ("encoder_pre", METHODS[1])],
    ids=["gpt2", "t5", "encoder_post", "encoder_pre"],
)
def test_compile(kind, method):
    """One graph, forward and backward, the layer's input handed on inside it (the battery does BERT and Llama)."""
    model = build(kind)
    inject(model, method)
    shake(model)
    model.train()
    expected = outputs(model, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(outputs(compiled, kind), expected, atol=1e-5, rtol=1e-4)
    outputs(compiled, kind).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(outputs(compiled, kind), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda m: type(m).__name__)
def test_a_pass_that_broke_off(method):
    """The input it left behind is neither used by the next pass nor copied; a part called alone says what it needs."""
    model = build("llama")
    inject(model, method)
    shake(model)
    expected = outputs(model, "llama")
    layer = model.model.layers[0]
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(model, "llama")
    handle.remove()
    layer.post_attention_layernorm(torch.randn(1, 1, 32, requires_grad=True) * 2)  # leaves a tensor with a graph
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(outputs(other, "llama"), expected)
        mlp = other.model.layers[0].mlp
        mlp._adapter.switch(mlp, False)
        assert not other.model.layers[0].post_attention_layernorm._forward_pre_hooks
        mlp._adapter.switch(mlp, True)
    with pytest.raises(PEFTError, match="called alone"):
        layer.mlp(torch.zeros(1, 1, 32))


@pytest.mark.parametrize("padding", ["left_aligned", "scattered"])
@pytest.mark.parametrize("kind", ["encoder_post", "encoder_pre"])
def test_torch_fused_path(kind, padding):
    """Closed while adapters are on, in the layers and for nested tensors; open again once all are off."""
    model, given = build(kind), inputs(kind)
    if padding == "scattered":
        given["padding"] = given["padding"].flip(1)
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
        base = model(**given)
        assert len(calls) == 2
        inject(model, Houlsby(layers=[1]))
        shake(model)
        assert not torch.allclose(model(**given)[~given["padding"]], base[~given["padding"]], atol=1e-3)
        assert len(calls) == 3  # only the layer without adapters
        with disabled(model):
            assert torch.equal(model(**given), base)
        assert len(calls) == 5
        unload(model)
        assert torch.equal(model(**given), base) and len(calls) == 7


class ConvNet(nn.Module):
    """Convolutions, a block that returns a tuple, a head."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x))), "rest"

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), self.Block(), nn.Linear(8, 2)

    def forward(self, x):
        x, rest = self.block(self.stem(x))
        assert rest == "rest"
        return self.head(x.mean((-1, -2)))


def test_any_module_by_name():
    """On a convolutional net an adapter acts on the channels at each position; tuples stay tuples."""
    model, x = ConvNet().eval(), torch.randn(2, 3, 6, 6)
    base = model(x)
    inject(model, Houlsby(reduction_factor=2, target_modules=["stem", "block", "head"]))
    assert [n for n in trainable_names(model) if n.endswith("down_weight")] == [
        "stem.delta.down_weight",
        "block.delta.down_weight",
        "head.delta.down_weight",
    ]
    assert torch.equal(model(x), base)
    shake(model)
    h, delta = model.stem._base_forward(x), model.stem.delta
    middle = torch.nn.functional.conv2d(h, delta.down_weight[..., None, None], delta.down_bias)
    up = torch.nn.functional.conv2d(middle * middle.sigmoid(), delta.up_weight[..., None, None], delta.up_bias)
    torch.testing.assert_close(model.stem(x), h + up)
    model(x).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [ParallelAdapter(target_modules="0"), Pfeiffer(target_modules="0")])
def test_mlp_by_name(method):
    """A parallel adapter reads the module's own input, whose width may be another."""
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(3, 6)
    inject(model, method)
    shake(model)
    layer = model[0]
    y = layer._base_forward(x)
    torch.testing.assert_close(layer(x), y + layer.delta(x if isinstance(method, ParallelAdapter) else y))


def test_words_choose_sub_layers():
    model = build("bert")
    inject(model, Houlsby(target_modules="attention", layers=[1]))
    assert {n.partition(".delta")[0] for n in trainable_names(model)} == {"encoder.layer.1.attention.output.dropout"}
    model = build("gpt2")
    inject(model, Pfeiffer(target_modules=["attention", "mlp"], exclude_modules="h.0"))
    assert {n.partition(".delta")[0] for n in trainable_names(model)} == {"transformer.h.1.attn", "transformer.h.1.mlp"}


def test_beside_another_method(tmp_path):
    """LoRA inside the sub-layers, adapters at their ends, in either order; one file holds both."""
    for methods in ([LoRA(), Pfeiffer()], [Pfeiffer(), LoRA()]):
        model = build("llama")
        inject(model, methods)
        shake(model)
        save_adapter(model, tmp_path / "both.safetensors")
        other = build("llama")
        load_adapter(other, tmp_path / "both.safetensors")
        assert torch.equal(outputs(other, "llama"), outputs(model, "llama"))
        unload(model)
        assert list(model.state_dict()) == list(build("llama").state_dict())


def test_train_layer_norms():
    """The normalisations of the adapted sub-layers train on request, and go back with the adapters."""
    for method in (Houlsby(train_layer_norms=True), Pfeiffer(train_layer_norms=True)):
        model = build("bert")
        before = {n: p.clone() for n, p in model.named_parameters()}
        inject(model, method)
        norms = [n for n in trainable_names(model) if "LayerNorm" in n and ".delta." not in n]
        assert len(norms) == 4 * len(method.roles)
        shake(model)
        unload(model)
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_errors():
    mlp = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    with pytest.raises(NoMatchError, match=r"no attention or feed-forward sub-layers in Sequential.*BERT.*Whisper"):
        inject(mlp, Houlsby())
    with pytest.raises(NoMatchError, match=r"'1' is a ReLU"):
        inject(mlp, Houlsby(target_modules="1"))
    with pytest.raises(NoMatchError, match="layers here: \\[0, 1\\]"):
        inject(build("bert"), Houlsby(layers=[7]))
    with pytest.raises(NoMatchError, match="NonDynamicallyQuantizableLinear"):
        inject(nn.Sequential(nn.MultiheadAttention(8, 2)), Houlsby(target_modules="out_proj"))
    with pytest.raises(NoMatchError, match="Conv2d"):
        inject(ConvNet(), ParallelAdapter(target_modules="stem"))
    with pytest.raises(ConfigError, match="not a multiple of 5"):
        inject(build("bert"), CompacterPlusPlus(phm_dim=5))
    for bad in ({"reduction_factor": 0}, {"non_linearity": "sin"}, {"dropout": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Houlsby(**bad)
    with pytest.raises(ConfigError, match="learned"):
        ParallelAdapter(scaling="big")
    odd = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Flatten(0)))
    inject(odd, Houlsby(target_modules="0"))
    with pytest.raises(ConfigError, match=r"built for 4 features got a tensor of shape \(8,\)"):
        odd(torch.randn(2, 6))
    inject(whole := nn.ModuleDict({"m": build("bert")}), Houlsby(target_modules="m"))
    with pytest.raises(ConfigError, match="returns BaseModelOutput"):
        whole["m"](**inputs("bert"))
