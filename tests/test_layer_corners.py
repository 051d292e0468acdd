"""Layers with habits of their own: rows of zeros, tables that rewrite themselves, parents that read weights."""

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    ConfigError,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRAFA,
    VeRA,
    inject,
    merge,
    trainable_names,
)
from tests.layers import build, call


def shake(net: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=g)


def test_dora_on_rows_of_zeros():
    """A layer that starts at zero (as in ControlNet) has rows without a direction: exact at first, and trains."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    net[0].weight.data[1] = 0
    before = net(x)
    inject(net, DoRA(r=2))
    assert torch.equal(net(x), before)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (net(x) - 1).pow(2).mean().backward()
        optimizer.step()
    after = net(x)
    assert torch.isfinite(after).all() and (after - before)[:, 1].abs().max() > 1e-3
    merge(net)
    torch.testing.assert_close(net(x), after)


def test_embedding_that_rewrites_its_rows():
    net = nn.ModuleDict({"e": nn.Embedding(9, 4, max_norm=1.0), "l": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match=r"'e' is nn.Embedding\(max_norm=1.0\), which writes into its rows"):
        inject(net, LoRA(target_modules=["e", "l"]))
    assert [type(m) for m in net.values()] == [nn.Embedding, nn.Linear]


def test_embedding_with_sparse_gradients():
    """The base's own gradient would be sparse; the factors take dense ones."""
    net, ids = nn.ModuleDict({"e": nn.Embedding(9, 4, sparse=True)}), torch.tensor([1, 1, 3])
    inject(net, LoRA(r=2, target_modules="e"))
    net["e"](ids).sum().backward()
    expected = torch.zeros(9)
    expected[ids] = 1
    assert torch.equal((net["e"].delta.lora_A.grad.abs().sum(0) > 0).float(), expected)


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), VeRA(r=4), IA3()], ids=lambda m: type(m).__name__)
def test_attention_that_reads_its_projections(method):
    """WavLM hands the weights of its projections to torch and calls none of them: they live all the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    convolutions = {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2}
    config = transformers.WavLMConfig(
        **sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    model, sound = transformers.WavLMModel(config).eval(), torch.randn(2, 200)
    before = model(sound).last_hidden_state
    inject(model, method)
    torch.testing.assert_close(model(sound).last_hidden_state, before)
    shake(model)
    after = model(sound).last_hidden_state
    (after * torch.randn(after.shape)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still and any(".k_proj." in n for n in trainable_names(model))
    merge(model)
    torch.testing.assert_close(model(sound).last_hidden_state, after, atol=1e-4, rtol=1e-3)


def test_dropout_where_weights_are_read():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.multi_head_attention_forward(x, x, x, 4, 1, q_proj_weight=self.q_proj.weight)

    with pytest.warns(UserWarning, match=r"Attention reads the weights .* dropout=0.1 does not act in a"):
        inject(nn.ModuleDict({"a": Attention()}), LoRA(dropout=0.1))


def test_fast_path_reads_a_rescaled_output():
    """IA3 at the output of `linear1`, whose weight and bias torch's encoder reads without gradients."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"e": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)}).eval()
    inject(net, IA3(target_modules="linear1"))
    shake(net)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = net["e"](x)
    torch.testing.assert_close(fast, net["e"](x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [LoRAFA, AdaLoRA, DeltaLoRA])
def test_one_method_twice_in_a_list(method):
    """Each would project, prune or follow for the other as well."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=f"2 {method.__name__} in one list"):
        inject(net, [method(target_modules="0"), method(target_modules="1")])
    inject(net, [LoRA(r=2, target_modules="0"), LoRA(r=3, target_modules="1")])
    assert net[0].delta.rank == 2 and net[1].delta.rank == 3


@pytest.mark.parametrize("kind", ["linear", "conv2d_grouped", "attention", "experts"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_one_graph(kind, method):
    """`torch.compile` takes a layer as one graph, also where the weight is corrected."""
    net, inputs = build(kind)
    inject(net.float(), method(r=2, target_modules="m"))
    shake(net)
    inputs = tuple(x.float() for x in inputs)
    expected = call(net["m"], inputs)
    torch._dynamo.reset()
    found = call(torch.compile(net["m"], backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
