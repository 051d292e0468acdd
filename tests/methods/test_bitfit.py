"""BitFit: the biases train, and nothing else."""

import pytest
import torch
from torch import nn

from lightning_peft import BitFit, NoMatchError, disabled, inject, summarize, trainable_names, unload
from tests.models import bert, frozen_copy, llama


def test_every_bias_and_the_head():
    model = bert()
    inject(model, BitFit(modules_to_save="classifier"))
    names = trainable_names(model)
    biases = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert set(names) == {*biases, "classifier.weight"} and len(biases) == 2 * 8 + 3
    assert summarize(model)["trainable"] == sum(model.get_parameter(n).numel() for n in names)


def test_packed_attention_has_its_bias_under_another_name():
    net = nn.ModuleDict({"m": nn.MultiheadAttention(4, 2), "n": nn.LayerNorm(4)})
    inject(net, BitFit())
    assert trainable_names(net) == ["m.in_proj_bias", "m.out_proj.bias", "n.bias"]


def test_choice():
    model = bert()
    inject(model, BitFit(layers=[1], exclude_modules=["*.output"]))
    names = trainable_names(model)
    assert names and all(".layer.1." in n and ".output." not in n for n in names)
    with pytest.raises(NoMatchError, match=r"all 19 were dropped by exclude_modules=None and layers=\[7\]"):
        inject(bert(), BitFit(layers=[7]))


def test_a_model_without_biases_says_so():
    model = llama()
    before = frozen_copy(model)
    with pytest.raises(NoMatchError, match=r"LlamaForCausalLM has no bias to train.*use LoRA or IA3"):
        inject(model, BitFit())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_base_comes_back():
    """peft's switch leaves trained biases in place; here they return bit for bit."""
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    before = net(x)
    inject(net, BitFit())
    net[0].bias.data += 1
    torch.testing.assert_close(net(x), before + 1)
    with disabled(net):
        assert torch.equal(net(x), before)
    unload(net)
    assert torch.equal(net(x), before)
