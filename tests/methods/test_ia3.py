"""IA3 against peft's numbers, and where its vectors go."""

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import IA3, NoMatchError, inject, merge, summarize, trainable_names, unmerge
from lightning_peft.methods.ia3 import IA3Input, IA3Output
from tests.golden_case import Golden, adapter_parameters
from tests.models import MODELS

CASES = ["ia3_bert", "ia3_llama"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, attention):
    """The default targets are those of the paper, found by role."""
    case = Golden(name, attention)
    model = case.model()
    inject(model, IA3())
    assert sorted(n.removesuffix(".delta.ia3_l") for n in trainable_names(model)) == sorted(
        case.meta["adapted_modules"]
    )
    parameters = adapter_parameters(case, model)
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    case.check(model, parameters)


@pytest.mark.parametrize("name", CASES)
def test_golden_merged(name):
    case = Golden(name)
    model = case.model()
    inject(model, IA3())
    adapter_parameters(case, model)
    merge(model)
    for part, leaf in (("output.merged_weight", "weight"), ("output.merged_bias", "bias")):
        for key, value in case.part(part).items():
            ours = getattr(model.get_submodule(key), leaf)
            torch.testing.assert_close(ours.data, value, atol=2e-6, rtol=0)
    atol = case.meta["tolerance"]["suggested_atol"]
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=atol, rtol=0)


def test_unmerge_of_a_zero_is_exact():
    """peft divides by the vector on the way back, which a zero does not survive."""
    net = nn.ModuleDict({"k_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
    before = dict(net.named_parameters())
    inject(net, IA3())
    net["k_proj"].delta.ia3_l.data.zero_()
    merge(net)
    assert not net["k_proj"].weight.any()
    unmerge(net)
    assert all(p is before[n] for n, p in net.named_parameters() if ".delta." not in n)


def test_fused_and_transposed_layers():
    """GPT-2: one vector over the fused projection, one over the feed-forward activations; merged equals forward."""
    config = transformers.GPT2Config(vocab_size=61, n_positions=28, n_embd=32, n_layer=2, n_head=4, n_inner=36)
    torch.manual_seed(0)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2, 3]])
    inject(model, IA3())
    block = model.transformer.h[0]
    assert isinstance(block.attn.c_attn, IA3Output) and isinstance(block.mlp.c_proj, IA3Input)
    assert not isinstance(block.attn.c_proj, (IA3Input, IA3Output))
    assert summarize(model)["trainable"] == 2 * (96 + 36)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    live = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, live, atol=2e-5, rtol=1e-4)


def test_feedforward_by_name():
    """A pattern names whole parts of a path: 'two' does not mean 'net.xtwo', as it does in peft."""
    net = nn.ModuleDict({"two": nn.Linear(4, 8), "xtwo": nn.Linear(8, 4)})
    inject(net, IA3(target_modules=["two", "xtwo"], feedforward_modules=["two"]))
    assert isinstance(net["two"], IA3Input) and isinstance(net["xtwo"], IA3Output)


def test_no_roles_no_match():
    with pytest.raises(NoMatchError, match=r"'key-value', 'down-projection' matched no module"):
        inject(nn.Sequential(nn.Linear(2, 2)), IA3())


@pytest.mark.parametrize("kind", MODELS)
def test_starts_as_the_base_exactly(kind):
    model = MODELS[kind]()
    inject(model, IA3())
    assert all((p == 1).all() for n, p in model.named_parameters() if n.endswith("ia3_l"))
