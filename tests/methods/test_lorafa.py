"""LoRA-FA: the projected gradient against golden steps, and what the backward pass keeps."""

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, ConfigError, LoRA, LoRAFA, inject, state_names, trainable_names
from tests.benchmarks.lorafa_memory import measure
from tests.golden_case import Golden, adapter_parameters
from tests.models import Plain, plain_loader, trainer


def test_golden_steps():
    """Three steps: raw gradients, projection, and AdamW in the form of the reference (eps outside the correction)."""
    case = Golden("lorafa_3_steps")
    h, model = case.meta["hyperparameters"], case.model()
    method = LoRAFA(r=h["r"], alpha=h["alpha"], target_modules=h["targets"])
    inject(model, method)
    tensors = {k: p for k, p in adapter_parameters(case, model).items() if "lora_B" in k}
    assert set(trainable_names(model)) == {f"{n}.delta.lora_B" for n in h["targets"]}
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=1e-5, rtol=0)
    (b1, b2), moments = h["betas"], {k: [torch.zeros_like(p), torch.zeros_like(p)] for k, p in tensors.items()}
    for t in range(1, h["steps"] + 1):
        model.zero_grad()
        loss = case.run(model).pow(2).mean()
        torch.testing.assert_close(loss, case.tensors[f"step{t}.loss"], atol=1e-5, rtol=0)
        loss.backward()
        for key, p in tensors.items():
            torch.testing.assert_close(p.grad, case.tensors[f"step{t}.grad.{key}"], atol=1e-5, rtol=0)
        method.transform_grads(model)
        for key, p in tensors.items():
            m, v = moments[key]
            m.mul_(b1).add_(p.grad, alpha=1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            rate = h["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
            p.data -= rate * m / (v.sqrt() + h["eps"])
            p.data -= h["lr"] * h["weight_decay"] * p.data
            torch.testing.assert_close(p.data, case.tensors[f"step{t}.adapter.{key}"], atol=1e-5, rtol=0)


def test_projection_is_the_nearest_step():
    """With it, s·B·A moves along the full gradient projected on A's rows, whatever A's scale."""
    net = nn.Sequential(nn.Linear(12, 7, bias=False)).double()
    inject(net, LoRAFA(r=3, alpha=6))
    delta = net[0].delta
    delta.lora_A.data *= 50
    full = torch.randn(7, 12, dtype=torch.float64)
    delta.lora_B.grad = delta.scaling * full @ delta.lora_A.T  # what backward gives for a weight gradient `full`
    LoRAFA().transform_grads(net)
    basis = torch.linalg.qr(delta.lora_A.detach().T)[0]
    torch.testing.assert_close(delta.scaling * delta.lora_B.grad @ delta.lora_A, full @ basis @ basis.T)


def test_the_inverse_follows_loaded_values():
    net = nn.Sequential(nn.Linear(12, 7))
    inject(net, LoRAFA(r=3))
    first = net[0].delta.inverse()
    assert net[0].delta.inverse() is first
    with torch.no_grad():
        net[0].delta.lora_A.mul_(2)
    torch.testing.assert_close(net[0].delta.inverse(), first / 4, rtol=1e-3, atol=1e-3)


def kept(net: nn.Module, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """The storages one pass keeps for backward, parameters left out."""
    own, found = {p.data_ptr() for p in net.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return found


def test_backward_keeps_only_the_small_product():
    """Of a layer's input (256 numbers a row) LoRA keeps all, LoRA-FA the 4 numbers of A·x."""
    x, count = torch.randn(128, 256, requires_grad=True), {}
    for method in (LoRA(r=4), LoRAFA(r=4)):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
        inject(net, method)
        count[type(method)] = sum(t.numel() for t in kept(net, x).values() if t.numel() in (128 * 4, 128 * 256))
    assert count[LoRAFA] == 4 * 128 * 4
    assert count[LoRA] == 4 * 128 * (256 + 4)


def test_near_the_frozen_floor():
    """In a Llama of eight layers (the script prints the bytes): hundredths above the frozen model; so is LoRA."""
    found = measure()
    assert found["LoRAFA"] <= found["LoRA"] < 1.05 * found["floor"]


def test_trainer_projects(tmp_path):
    """The callback applies the projection before clipping; A is in every file and does not move."""
    torch.manual_seed(0)
    module, method = Plain(), LoRAFA(r=2)
    inject(module, method)
    start = {n: module.get_parameter(n).clone() for n in state_names(module) if n.endswith("lora_A")}
    seen = []

    run = trainer(tmp_path, PEFT(method), max_epochs=1)
    delta = next(m for m in module.modules() if hasattr(m, "project"))
    original = type(delta).project

    def project(self):
        raw = self.lora_B.grad.clone()
        original(self)
        seen.append(torch.equal(self.lora_B.grad, raw @ self.inverse() / self.scaling**2))

    type(delta).project = project
    try:
        run.fit(module, plain_loader())
    finally:
        type(delta).project = original
    assert len(seen) == 2 * 4 and all(seen)
    assert len(start) == 2 and all(torch.equal(module.get_parameter(n), a) for n, a in start.items())


def test_embedding_can_train():
    """A starts random and B at zero: frozen at zero, as LoRA's A there, nothing would ever move."""
    net = nn.Sequential(nn.Embedding(9, 4))
    inject(net, LoRAFA(r=2, target_modules="0"))
    net(torch.tensor([1, 2])).pow(2).sum().backward()
    assert net[0].delta.lora_A.any() and not net[0].delta.lora_B.any() and net[0].delta.lora_B.grad.any()


def test_no_ratio():
    with pytest.raises(ConfigError, match="A is frozen, so there is no ratio"):
        LoRAFA(lr_ratio=16)
