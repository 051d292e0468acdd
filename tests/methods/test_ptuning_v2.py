"""P-tuning v2: reference values, encoders of every kind, refusal of decoders."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import ConfigError, PTuningV2, inject, trainable_names
from lightning_peft.prompting.prefix import PrefixedAttention
from tests.golden_case import Golden
from tests.grid import GRID, padded_alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["ptuningv2_bert_sequence", "ptuningv2_bert_token"])
def test_reference(name, attention):
    case = Golden(name, attention)
    model, n, tolerance = case.model(), case.meta["hyperparameters"]["n"], case.meta["tolerance"]
    head = list(case.meta["also_trainable"])
    inject(model, PTuningV2(n, modules_to_save=head))
    modules = [m for m in model.modules() if isinstance(m, PrefixedAttention)]
    trained = {k: dict(model.named_parameters())[k] for k in trainable_names(model)}
    prompts = [p for k, p in trained.items() if "prefix" in k]
    assert sum(p.numel() for p in prompts) == case.meta["trainable_parameters"]
    flat = case.part("adapter")["prompt_embeddings"].view(n, 2 * len(modules), 4, -1)
    for i, parameter in enumerate(prompts):
        parameter.data.copy_(flat[:, i])
    out = case.run(model)
    torch.testing.assert_close(out, case.tensors["output.adapted"], atol=tolerance["suggested_atol"], rtol=0)
    (out**2).mean().backward()
    grad = torch.stack([p.grad for p in prompts], 1).flatten(1)
    torch.testing.assert_close(
        grad, case.part("grad")["prompt_embeddings"], atol=tolerance["suggested_grad_atol"], rtol=0
    )
    assert all(trained[k].grad.any() for k in trained)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "vit", "wav2vec2", "clip"])
def test_encoders(name):
    kind = GRID[name]
    model = kind.make()
    before = kind.output(model)
    inject(model, PTuningV2(4, init_std=1.0))
    out = kind.output(model, grad=True)
    assert out.shape == before.shape and not torch.allclose(out, before, atol=1e-4)
    (out**2).sum().backward()
    tensors = dict(model.named_parameters())
    assert all(tensors[n].grad.any() for n in trainable_names(model))
    if kind.padding:
        padded_alone(kind, model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "whisper", "llava"])
def test_decoders_are_refused(name):
    with pytest.raises(ConfigError, match=r"belongs to a decoder.*PrefixTuning"):
        inject(GRID[name].make(), PTuningV2(4))
