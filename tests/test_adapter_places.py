"""Where bottleneck adapters go: the table of layers against what the models compute, and all kinds on all of them."""

import pytest
import torch

from lightning_peft import (
    CompacterPlusPlus,
    Houlsby,
    ParallelAdapter,
    Pfeiffer,
    disabled,
    inject,
    unload,
)
from lightning_peft.bottleneck import AdapterWrapper
from lightning_peft.placement import originals
from lightning_peft.sites import find_sites
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
    modules = originals(model)
    sites = find_sites(modules)
    numbers = {s.role: len([t for t in sites if t.role == s.role]) for s in sites}
    assert numbers == dict.fromkeys(("attention", "mlp"), 2 * (1 + ("decoder_input_ids" in inputs(kind))))
    seen = {}

    def watch(name, module):
        def hook(module, args, kwargs, out):
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            seen[name] = (x.detach(), first(out).detach())

        module.register_forward_hook(hook, with_kwargs=True)

    wanted = {n for s in sites for n in (s.output, s.source, s.norm, _owner(s))}
    wanted |= {f"{_owner(s)}.{c}" for s in sites for c in ("encoder_attn_layer_norm", "norm2")}
    for name in wanted & set(modules):
        watch(name, modules[name])
    outputs(model, kind)  # with gradients: torch's fused path stays closed
    for site in sites:
        total = seen[site.output][1] + seen[site.source][0]
        layer = _owner(site)
        if site.post:
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
        first_place = next(m for m in model.modules() if isinstance(m, AdapterWrapper))
        adapted = outputs(model, kind)
        first_place.active = False
        assert not torch.allclose(outputs(model, kind), adapted, atol=1e-4)
        first_place.active = True
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
