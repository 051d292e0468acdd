"""Methods on the blocks of vision packages, on recurrent layers, convolutions and experts: where they go."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    ConfigError,
    Houlsby,
    LoRA,
    NoMatchError,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    describe,
    disabled,
    drop_layers,
    export_peft,
    inject,
    merge,
    summarize,
    trainable_names,
    unload,
)
from lightning_peft.bottleneck.sites import find_sites
from lightning_peft.compare.cost import kept_bytes
from tests.contract.battery import shake
from tests.foreign import blocks
from tests.foreign.blocks import BLOCKS, Network
from tests.foreign.cases import anatomy, close
from tests.foreign.patterns import Hold, RunsCell
from tests.models import bert


def adapters(model: nn.Module) -> list[str]:
    """Names of the modules that carry something trained."""
    return list(dict.fromkeys(name.partition(".delta.")[0] for name in trainable_names(model)))


# ---- bottlenecks and prefixes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    [Houlsby(reduction_factor=4), Pfeiffer(reduction_factor=4, non_linearity="tanh"), ParallelAdapter()],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("name", BLOCKS)
def test_bottlenecks_find_their_places(name, method):
    """One for each of the method's sub-layers, where the sub-layer's h ends; they train, switch off and leave."""
    _, _, attention, feed_forward, _ = BLOCKS[name]
    ends = {"attention": attention, "mlp": feed_forward}
    model, x = blocks.build(name).requires_grad_(False), blocks.inputs()
    before, base = anatomy(model), model(x)
    inject(model, method)
    found = adapters(model)
    for number in range(2):
        for role in method.roles:
            assert len([p for p in found if p in {f"blocks.{number}.{end}" for end in ends[role]}]) == 1, (role, found)
    assert len(found) == 2 * len(method.roles)
    close(model(x), base, 1e-5)
    shake(model)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3
    with torch.no_grad():
        close(model(x), adapted.detach(), 1e-5)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    unload(model)
    assert anatomy(model) == before and torch.equal(model(x), base)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_bottleneck_reads_what_its_sub_layer_gives(name):
    """Houlsby: x + h + up(act(down(h))), whichever module gives h."""
    kind, arguments, *_, takes_residual = BLOCKS[name]
    model, x = blocks.build(name), blocks.inputs()
    inject(model, Houlsby(reduction_factor=4, non_linearity="tanh", target_modules="mlp", layers=[1]))
    shake(model)
    (place,) = adapters(model)
    delta = model.get_submodule(place).delta
    plain = kind(*arguments)
    plain.load_state_dict({n: t for n, t in model.blocks[1].state_dict().items() if ".delta." not in n})
    with torch.no_grad():
        entering = model.blocks[0](model.embed(x))
        attended = {}
        plain.get_submodule(takes_residual).register_forward_pre_hook(lambda _, args: attended.update(x=args[0]))
        h = plain(entering) - attended["x"]
        correction = F.linear(torch.tanh(F.linear(h, delta.down_weight, delta.down_bias)), delta.up_weight)
        expected = attended["x"] + h + correction + delta.up_bias
        close(model.blocks[1](entering), expected, 1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_source_of_a_place_add_up_to_the_residual(name):
    """h + x is what the feed-forward part starts from, or what the block gives (Pfeiffer's and parallel adapters)."""
    model, x = blocks.build(name), blocks.inputs()
    modules, taken, given = dict(model.named_modules()), {}, {}
    for path, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, path=path: taken.update({path: args[0]}))
        module.register_forward_hook(lambda _, args, out, path=path: given.update({path: out}))
    model(x)
    sites = find_sites(modules)
    assert [(site.output[:9], site.role) for site in sites] == [
        (f"blocks.{number}.", role) for number in range(2) for role in ("attention", "mlp")
    ]
    for site in sites:
        block = site.output[:8]
        total = given[site.output] + taken[site.source]
        close(total, taken[f"{block}.{BLOCKS[name][-1]}"] if site.role == "attention" else given[block], 1e-6)


def test_blocks_that_only_share_the_names_are_refused():
    windows, maps = blocks.Block(), blocks.Block()
    windows.window_size = 2  # timm's SAM takes the input apart between norm and attention
    maps.norm1, maps.norm2 = nn.BatchNorm2d(blocks.WIDTH), nn.BatchNorm2d(blocks.WIDTH)  # timm's Visformer
    for block in (windows, maps):
        with pytest.raises(NoMatchError, match=r"timm's ViT, DeiT;.*name modules"):
            inject(nn.Sequential(block), Houlsby())


@pytest.mark.parametrize("name", BLOCKS)
def test_prefixes_in_the_attention_of_vision_packages(name):
    model, x = blocks.build(name).requires_grad_(False), blocks.inputs()
    before, base = anatomy(model), model(x)
    inject(model, PrefixTuning(num_virtual_tokens=3))
    assert len(adapters(model)) == 2
    shake(model)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3
    with torch.no_grad():
        close(model(x), adapted.detach(), 1e-5)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with disabled(model):
        assert torch.equal(model(x), base)
    unload(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("projection", [False, True])
def test_attention_without_parameters_takes_no_prefix_and_says_why(projection):
    """x-transformers keeps the projections around the module that attends."""
    model, x = Hold(blocks.Attention()), torch.randn(2, 5, blocks.WIDTH)
    base, before = model(x), anatomy(model)
    with pytest.raises(NoMatchError, match=r"'m.attend' \(Attend\) has no projections of its own.*LoRA adapts those"):
        inject(model, PrefixTuning(num_virtual_tokens=3, projection=projection))
    assert anatomy(model) == before and torch.equal(model(x), base)


class PooledAttention(nn.Module):
    """timm's pooling at the end of a SigLIP tower: one learned query, keys and values from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.latent = blocks.HEADS, nn.Parameter(torch.randn(1, 1, blocks.WIDTH))
        self.q, self.kv = nn.Linear(blocks.WIDTH, blocks.WIDTH), nn.Linear(blocks.WIDTH, 2 * blocks.WIDTH)

    def forward(self, x):
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (blocks.HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, blocks.HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_prefix_in_attention_that_projects_keys_and_values_together():
    model, x = Hold(PooledAttention()), torch.randn(2, 5, blocks.WIDTH)
    inject(model, PrefixTuning(num_virtual_tokens=3))
    delta = model.m.delta
    assert delta.prefix_key.shape == (3, blocks.HEADS, blocks.WIDTH // blocks.HEADS)
    shake(model)
    q = model.m.q(model.m.latent[0]).unflatten(-1, (blocks.HEADS, -1))[0]
    k, v = model.m.kv(x[0]).unflatten(-1, (2, blocks.HEADS, -1)).unbind(1)
    keys, values = torch.cat([delta.prefix_key, k]), torch.cat([delta.prefix_value, v])
    weights = torch.einsum("hd,nhd->hn", q, keys).div(q.shape[-1] ** 0.5).softmax(-1)
    close(model(x)[0, 0], torch.einsum("hn,nhd->hd", weights, values).flatten(), 1e-5)


class Named(nn.Module):
    """A layer in no table, with a part that is called as a word for parts is."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = nn.Linear(6, 6), mlp

    def forward(self, x):
        return x + self.mlp(torch.tanh(self.mixer(x)))


@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
@pytest.mark.parametrize("targets", ["mlp", ["mlp"], ["mlp", "mixer"]], ids=str)
def test_a_module_called_like_a_word_is_meant(method, targets):
    layers = [Named(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))) for _ in range(2)]
    model, x = nn.Sequential(*layers), torch.randn(3, 6)
    base = model(x)
    inject(model, method(reduction_factor=2, target_modules=targets))
    expected = {"0.mlp", "1.mlp"} | ({"0.mixer", "1.mixer"} if "mixer" in targets else set())
    assert set(adapters(model)) == expected
    close(model(x), base, 1e-6)
    shake(model)
    assert not torch.allclose(model(x), base)


@pytest.mark.parametrize("targets", ["mlp", "attention"])
def test_a_layer_called_like_a_word_is_meant(targets):
    model = nn.Sequential(nn.ModuleDict({targets: nn.Linear(6, 6), "other": nn.Linear(6, 6)}))
    inject(model, LoRA(r=2, target_modules=targets))
    assert adapters(model) == [f"0.{targets}"]


def test_a_layer_called_like_a_word_is_scaled_at_its_input():
    model = nn.Sequential(nn.ModuleDict({"mlp": nn.Linear(6, 8), "other": nn.Linear(8, 6)}))
    inject(model, IA3(target_modules="mlp", feedforward_modules="mlp"))
    assert adapters(model) == ["0.mlp"] and len(model[0]["mlp"].delta.ia3_l) == 6


@pytest.mark.parametrize("method", [LoRA, Houlsby])
def test_a_word_keeps_its_meaning_where_layers_are_known(method):
    """A further module of that name is not meant; its full name says it."""
    model = nn.ModuleDict({"encoder": encoder(), "mlp": nn.Linear(8, 8)})
    inject(model, method(target_modules="mlp"))
    assert all(name.startswith("encoder.layers.") for name in adapters(model))


def test_words_keep_their_meaning_where_no_module_has_the_name():
    model = bert()
    inject(model, Houlsby(target_modules="mlp"))
    assert all(name.endswith("output.dropout") and "attention" not in name for name in adapters(model))


def test_a_word_means_projections_where_the_module_of_that_name_is_a_block():
    """LoRA cannot adapt the block itself, so the word stands for what is inside."""
    model = Network(blocks.Block)
    inject(model, LoRA(r=2, target_modules="mlp"))
    assert adapters(model) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("layers", [{0, 2}, [2], (1, 2), range(2), []], ids=str)
def test_any_set_of_layers_can_be_dropped(layers):
    model, other, x = encoder(), encoder(), torch.randn(2, 4, 8)
    inject(model, Houlsby(reduction_factor=2))
    inject(other, Houlsby(reduction_factor=2))
    shake(model)
    whole = model(x)
    kept = {n: p for n, p in model.named_parameters() if not any(n.startswith(f"layers.{i}.") for i in layers)}
    other.load_state_dict(kept, strict=False)  # the adapters of dropped layers stay at their start and add nothing
    drop_layers(model, layers)
    close(model(x), other(x), 1e-5)
    drop_layers(model, 0)
    assert torch.equal(model(x), whole)


# ---- convolutions --------------------------------------------------------------------------------------------------
CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
}


@pytest.mark.parametrize("at_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_ia3_scales_the_channels_of_convolutions(name, at_input):
    make, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    model, x = Hold(make()).double(), torch.randn(*shape, dtype=torch.float64)
    plain = copy.deepcopy(model)
    inject(model, IA3(target_modules="m", feedforward_modules="m" if at_input else []))
    close(model(x), plain(x), 1e-12)
    (scale,) = [p for p in model.parameters() if p.requires_grad]
    assert scale.shape == (model.m.in_channels if at_input else model.m.out_channels,)
    shake(model)
    channels = scale.view(-1, *(1,) * (len(model.m.kernel_size)))
    expected = plain(channels * x) if at_input else channels * plain(x)
    close(model(x), expected, 1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), scale, retain_graph=True)[0] for out in (model(x), expected)]
    close(*gradients, 1e-9)
    merge(model)
    close(model(x), expected.detach(), 1e-10)


def test_adalora_convolutions_are_exported(tmp_path):
    """peft computes the same from the folder."""
    peft = pytest.importorskip("peft", minversion="0.20")

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.conv(x)).mean((-1, -2)))

    model, x = Images(), torch.randn(2, 3, 5, 5)
    inject(model, AdaLoRA(init_r=3, target_r=2, target_modules=["conv", "head"]))
    shake(model)
    export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        other = peft.PeftModel.from_pretrained(Images(), tmp_path).eval()
    with torch.no_grad():
        close(other(x), model(x), 1e-5)


def test_a_prefix_for_a_classifier_is_exported_so_that_peft_runs_it(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = bert(), torch.tensor([[5, 6, 7, 8]])
    inject(model, PrefixTuning(num_virtual_tokens=3, positions="shift", modules_to_save="classifier"))
    shake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_peft(model, tmp_path)
        other = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    with torch.no_grad():
        close(other(input_ids=ids).logits, model(ids).logits, 1e-4)


# ---- recurrent layers ----------------------------------------------------------------------------------------------
RECURRENT = {
    "lstm": lambda: Hold(nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True)),
    "lstm_projected": lambda: Hold(nn.LSTM(8, 5, batch_first=True, proj_size=3)),
    "gru": lambda: Hold(nn.GRU(8, 5, batch_first=True, bias=False)),
    "rnn": lambda: Hold(nn.RNN(8, 5, batch_first=True)),
    "lstm_cell": lambda: RunsCell(nn.LSTMCell(8, 5)),
    "gru_cell": lambda: RunsCell(nn.GRUCell(8, 5)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_lora_on_recurrent_layers(name):
    """Every weight matrix gets factors: W + s·B·A; biases stay; nothing of a pass stays behind."""
    torch.manual_seed(0)
    model, x = RECURRENT[name]().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    inject(model, LoRA(r=2, alpha=6, target_modules="m"))
    matrices = [n for n, p in plain.named_parameters() if p.ndim == 2]
    assert len(trainable_names(model)) == 2 * len(matrices)
    close(model(x), plain(x), 1e-12)
    shake(model)
    factors = {n: (model.get_parameter(n.replace("m.", "m.delta.", 1) + ".lora_A"),) for n in matrices}
    factors = {n: (*f, model.get_parameter(n.replace("m.", "m.delta.", 1) + ".lora_B")) for n, f in factors.items()}
    corrected = {n: plain.get_parameter(n).detach() + 3 * B @ A for n, (A, B) in factors.items()}
    expected = torch.func.functional_call(plain, corrected, (x,))
    out = model(x)
    close(out, expected, 1e-10)
    trained = [p for pair in factors.values() for p in pair]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for found, right in zip(torch.autograd.grad(out.square().sum(), trained), wanted, strict=True):
        close(found, right, 1e-9)
    if isinstance(model.m, nn.RNNBase):
        assert all(held is p for held, p in zip(model.m._flat_weights, _flat(model.m), strict=True))
        model.m.flatten_parameters()
        model.double()
        assert all(held is p for held, p in zip(model.m._flat_weights, _flat(model.m), strict=True))
    assert torch.equal(copy.deepcopy(model)(x), out)
    merge(model)
    close(model(x), expected.detach(), 1e-10)
    unload(model)
    assert torch.equal(model(x), plain(x))
    if isinstance(model.m, nn.RNNBase):
        assert all(held is p for held, p in zip(model.m._flat_weights, _flat(model.m), strict=True))


def _flat(layer: nn.RNNBase) -> list[nn.Parameter]:
    return [getattr(layer, name) for name in layer._flat_weights_names]


def test_packed_sequences():
    torch.manual_seed(0)
    layer = nn.LSTM(8, 5, batch_first=True)
    model = nn.ModuleDict({"m": layer})
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 8), torch.tensor([5, 3]), batch_first=True)
    base = layer(packed)[0].data
    inject(model, LoRA(r=2, target_modules="m"))
    assert torch.equal(layer(packed)[0].data, base)
    shake(model)
    layer(packed)[0].data.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_dropout_cannot_act_inside_recurrent_layers():
    with pytest.raises(ConfigError, match=r"'?m'?.*dropout"):
        inject(Hold(nn.LSTM(8, 5)), LoRA(dropout=0.1, target_modules="m"))


# ---- experts -------------------------------------------------------------------------------------------------------
def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 61, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, pad_token_id=0)).eval()


def test_all_linear_leaves_experts_frozen_and_says_so():
    model = mixture()
    inject(model, LoRA(r=2))
    experts = model.model.layers[0].mlp.experts
    assert not hasattr(experts, "delta") and not any(p.requires_grad for p in experts.parameters())
    frozen = [row for row in summarize(model)["frozen"] if row["name"].endswith("experts")]
    assert frozen and frozen[0]["parameters"] == sum(p.numel() for p in experts.parameters())
    text = describe(model)
    assert "frozen experts: model.layers.*.mlp.experts (4,608)" in text and max(map(len, text.splitlines())) <= 80
    assert "target_modules=['all-linear', 'experts'] trains them too" in " ".join(text.split())
    unload(model)
    inject(model, LoRA(r=2, target_modules=["all-linear", "experts"]))
    assert "frozen experts" not in describe(model) and "model.layers.0.mlp.experts" in adapters(model)


@pytest.mark.parametrize("method", [LoRA(target_modules="attention"), Houlsby()])
def test_how_to_train_experts_is_said_to_those_who_may_expect_it(method):
    """Not after other words, and not by methods that cannot adapt them."""
    model = mixture()
    inject(model, method)
    assert "frozen experts: model.layers.*.mlp.experts" in describe(model) and "target_modules" not in describe(model)


def test_experts_in_a_part_that_is_frozen_as_a_whole_are_not_told_apart():
    model = mixture()
    inject(model, LoRA(target_modules="lm_head"))
    assert summarize(model)["frozen"] == [{"name": "model", "parameters": 6720}]


def test_named_experts_train_and_the_table_says_what_they_keep():
    """A corrected copy of their weights lives until the backward pass."""
    model, ids = mixture(), torch.randint(1, 61, (2, 12))
    inject(model, LoRA(r=2, target_modules="experts"))
    experts = model.model.layers[0].mlp.experts
    assert adapters(model) and all(name.startswith("model.layers.0.mlp.experts") for name in adapters(model))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in experts.delta.parameters())
    assert summarize(model)["corrected_weights"] == {"modules": 1, "bytes": 4 * 4608}
    assert "corrected at the weight: 1 module, a copy of 18.4 kB kept until backward" in describe(model)


class OwnForward(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_what_the_table_says_is_what_a_step_keeps():
    model, x = nn.Sequential(OwnForward(64, 64), nn.Linear(64, 64)).bfloat16(), torch.randn(1, 64).bfloat16()
    x.requires_grad_()
    inject(model, LoRA(r=1))
    assert summarize(model)["corrected_weights"] == {"modules": 1, "bytes": 2 * 64 * 64}
    kept = kept_bytes(model, lambda: model[0](x).sum())
    assert 0 <= kept - 2 * 64 * 64 < 2 * 64 * 64 / 8  # beside the copy only x and scaled B


def test_torch_attention_keeps_copies_of_both_its_weights():
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    inject(model, LoRA(r=1))
    assert summarize(model)["corrected_weights"] == {"modules": 2, "bytes": 4 * (3 + 1) * 16 * 16}
