"""What every method promises, on an encoder and a decoder. A new method joins by its config."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_peft import (
    Adapted,
    CheckpointError,
    ConfigError,
    Delta,
    MergeError,
    PEFTError,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    state_names,
    summarize,
    trainable_names,
    unload,
    unmerge,
)
from tests.contract.battery import CONFIGS, example, same, shake, state_copy, train
from tests.models import MODELS, batch, frozen_copy, logits


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(params=CONFIGS, ids=lambda c: c.stem)
def method(request, tmp_path, kind):
    made = example(request.param, tmp_path, kind)
    try:
        inject(MODELS[kind](), made)
    except ConfigError as error:
        if made.encoders_only and kind != "bert":
            assert "PrefixTuning" in str(error)
            pytest.skip("for encoders only, and says so")
        if type(made).__name__ == "BitFit" and kind == "llama":
            pytest.skip("no biases in this model, and says so")
        raise
    return made


@pytest.fixture
def model(method, kind):
    net = MODELS[kind]()
    inject(net, method)
    return net


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_names_are_one_set(model):
    names = trainable_names(model) + state_names(model)
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    assert len(set(names)) == len(names) and set(names) <= set(known)
    assert list(adapter_state_dict(model)) == names
    assert summarize(model)["trainable"] == sum(known[n].numel() for n in trainable_names(model))


def test_start_is_the_base(model, method, kind):
    if method.identity_at_init:
        close(logits(model, kind), logits(MODELS[kind](), kind), 1e-5)


def test_every_tensor_trains_and_nothing_else_moves(model, kind):
    model.train()
    before = frozen_copy(model)
    seen = train(model, kind)
    assert [n for n, hit in seen.items() if not hit] == []
    after, trained = model.state_dict(), set(trainable_names(model)) | set(state_names(model))
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    shared = {after[n].data_ptr() for n in trained if n in after}  # one tensor under several names
    tied = {n for n in moved if after[n].data_ptr() in shared}
    assert moved - trained - tied == set()
    assert set(trainable_names(model)) - moved == set()


def test_rng_is_left_alone_and_injection_repeats(method, kind):
    first, second = MODELS[kind](), MODELS[kind]()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    inject(first, method)
    assert torch.equal(torch.get_rng_state(), state)
    inject(second, method)
    inject(second, method)  # equal: nothing happens
    assert same(state_copy(first), state_copy(second))


def test_save_load_swap(model, method, kind, tmp_path):
    train(model, kind)
    shake(model)
    model.eval()
    expected, path = logits(model, kind), tmp_path / "a.safetensors"
    save_adapter(model, path)
    fresh = MODELS[kind]()
    load_adapter(fresh, path)
    assert torch.equal(logits(fresh, kind), expected)
    assert same(adapter_state_dict(fresh), adapter_state_dict(model))
    other = MODELS[kind]()
    inject(other, method)
    shake(other)
    load_adapter(other, path)  # swap
    assert torch.equal(logits(other, kind), expected)
    load_adapter(other, adapter_state_dict(model))  # from a state dict
    assert torch.equal(logits(other, kind), expected)


def test_wrong_files_change_nothing(model, method, kind, tmp_path):
    shake(model)
    save_adapter(model, tmp_path / "a.safetensors")
    before, state = frozen_copy(model), adapter_state_dict(model)
    name = next(iter(state))
    for broken, message in (
        ({k: v for k, v in state.items() if k != name}, "lacks"),
        (state | {"foreign.weight": torch.zeros(1)}, "in excess"),
        (state | {name: torch.zeros(*state[name].shape, 2)}, "other shapes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, broken)
    assert same(before, frozen_copy(model))
    if method.complete:
        return  # the file is the whole model, any base of this shape will do
    for other in (MODELS[kind](seed=5), MODELS["llama" if kind == "bert" else "bert"]()):
        plain = frozen_copy(other)
        with pytest.raises(CheckpointError, match=r"another base model|lacks|do not fit"):
            load_adapter(other, tmp_path / "a.safetensors")
        assert same(plain, frozen_copy(other))


def test_merge(model, method, kind):
    train(model, kind)
    shake(model)
    model.eval()
    expected, base = logits(model, kind), frozen_copy(model)
    if not method.mergeable:
        with pytest.raises(MergeError, match="cannot be merged"):
            merge(model)
        assert method.why_not_mergeable and torch.equal(logits(model, kind), expected)
        return
    objects = dict(model.named_parameters())
    merge(model)
    close(logits(model, kind), expected)
    with pytest.raises(MergeError, match="merged already"):
        merge(model)
    unmerge(model)
    assert same(base, frozen_copy(model)) and all(objects[n] is p for n, p in model.named_parameters())
    assert torch.equal(logits(model, kind), expected)
    merge(model)
    load_adapter(model, state_copy(model))  # loading unmerges first
    assert torch.equal(logits(model, kind), expected)
    merge_and_unload(model)
    close(logits(model, kind), expected)
    plain = MODELS[kind]()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_disabled_and_unload(model, method, kind):
    plain = MODELS[kind]()
    base = logits(plain, kind)
    train(model, kind)
    shake(model)
    model.eval()
    if method.complete:
        for verb in (lambda: disabled(model).__enter__(), lambda: unload(model)):
            with pytest.raises(PEFTError, match="full fine-tuning"):
                verb()
        return
    expected = logits(model, kind)
    with disabled(model), disabled(model):
        assert torch.equal(logits(model, kind), base)
    assert torch.equal(logits(model, kind), expected)
    if method.mergeable:
        merge(model)
        with disabled(model):
            assert torch.equal(logits(model, kind), base)
        close(logits(model, kind), expected)
    unload(model)
    assert same(model.state_dict(), plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(logits(model, kind), base)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(method, kind, reentrant):
    grads = []
    for on in (False, True):
        model = MODELS[kind]()
        inject(model, method)
        shake(model)
        model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch(kind)).loss.backward()
        names = set(trainable_names(model))
        grads.append({n: p.grad for n, p in model.named_parameters() if n in names})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_dtypes(method, kind):
    """Factors never get narrower than float32: bf16 base, later casts, autocast; float64 stays."""
    model = MODELS[kind]().bfloat16()
    inject(model, method)
    if method.complete:
        return
    shake(model)
    kept = [p.clone() for m in model.modules() if isinstance(m, Delta) for p in m.parameters()]
    assert all(p.dtype == torch.float32 for p in kept)
    assert torch.isfinite(logits(model, kind)).all()
    model.half()
    now = [p for m in model.modules() if isinstance(m, Delta) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    wide = MODELS[kind]().double()
    inject(wide, method)
    assert all(p.dtype == torch.float64 for m in wide.modules() if isinstance(m, Delta) for p in m.parameters())
    mixed = MODELS[kind]()
    inject(mixed, method)
    shake(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(**batch(kind)).loss
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None for p in mixed.parameters())


def test_copy_and_pickle(model, kind):
    shake(model)
    expected = logits(model, kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, kind), expected)
        before = frozen_copy(model)
        train(other, kind, steps=1)
        assert same(before, frozen_copy(model)), "the copy shares tensors with the original"
        assert trainable_names(other) == trainable_names(model)


def test_compile(model, kind):
    shake(model)
    expected = logits(model, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    close(logits(compiled, kind), expected)
    compiled(**batch(kind)).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in set(trainable_names(model)))
    torch._dynamo.reset()


def test_wrappers_are_ours(model):
    """No adapter tensor lives in an nn.Linear, which precision plugins would swallow."""
    for module in model.modules():
        if isinstance(module, Adapted):
            assert isinstance(module.delta, Delta)
            assert not any(isinstance(m, torch.nn.Linear) for m in module.delta.modules())
