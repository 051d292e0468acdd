"""Adapters combined from their files: right where a sum of the factors is wrong, refused where nothing is right."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    PEFT,
    AdaLoRA,
    CheckpointError,
    ConfigError,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRAFA,
    VeRA,
    combine,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    summarize,
    trainable_names,
)
from tests.layers import Experts, places
from tests.models import Foreign, loader, logits, trainer


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.fused = nn.Linear(8, 10), Conv1D(12, 10)
        self.table, self.conv, self.one = nn.Embedding(9, 6), nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 1)
        self.attention, self.experts = nn.MultiheadAttention(8, 2, kdim=5, vdim=5), Experts()
        self.head = nn.Linear(3, 2)


EVERYTHING = ["linear", "fused", "table", "conv", "one", "attention", "experts"]


def trained(path, method: LoRA, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """A file with random values, and its corrections by parameter."""
    net = Net()
    inject(net, method)
    g = torch.Generator().manual_seed(seed)
    for i in range(2):
        if i and isinstance(method, DeltaLoRA):
            method.after_step(net, method.start(None) + 1, None)
        for p in net.parameters():
            if p.requires_grad:
                p.data += torch.randn(p.shape, generator=g) * 0.5
    save_adapter(net, path)
    return corrections(net), str(path)


def corrections(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: d.product().detach() for n, d in places(net).items()}


@pytest.fixture
def files(tmp_path):
    """Two ranks, two scalings, a pattern, rank-stabilised scaling, start values from the weight, a missing module."""
    methods = [
        LoRA(r=2, alpha=3, target_modules=EVERYTHING, rank_pattern={"linear": 3}, modules_to_save="head"),
        LoRA(r=4, alpha=5, use_rslora=True, target_modules=EVERYTHING[1:], modules_to_save="head"),
        LoRA(r=2, alpha=7, init="pissa", target_modules=EVERYTHING, modules_to_save="head"),
    ]
    return [trained(tmp_path / f"{i}.safetensors", m, i) for i, m in enumerate(methods)]


def loaded(new) -> nn.Module:
    net = Net()
    load_adapter(net, new)
    return net


def total(files, weights):
    names = dict.fromkeys(n for changes, _ in files for n in changes)
    return {n: sum(w * c[n] for w, (c, _) in zip(weights, files, strict=True) if n in c) for n in names}


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_sums_are_exact(files, how, tmp_path):
    """On all layers; a module that a file lacks counts as zero; written, read, and loaded into a fresh base."""
    weights, path = [0.7, -0.4, 1.3], tmp_path / "new.safetensors"
    new = combine([p for _, p in files], weights, how, path=path)
    for source in (new, path):
        ours = corrections(loaded(source))
        expected = total(files, weights)
        assert ours.keys() == expected.keys()
        for name, matrix in expected.items():
            torch.testing.assert_close(ours[name], matrix, atol=2e-5, rtol=1e-4)


def test_linear_is_as_small_as_can_be(files):
    """The same file twice needs no more than its own rank; ``cat`` keeps every direction."""
    path = files[1][1]
    linear, cat = (combine([path, path], [0.5, 0.5], how) for how in ("linear", "cat"))
    assert linear["lightning_peft"]["methods"][0]["config"]["r"] == 4
    assert cat["lightning_peft"]["methods"][0]["config"]["r"] == 8
    for name, matrix in files[1][0].items():
        torch.testing.assert_close(corrections(loaded(linear))[name], matrix, atol=2e-5, rtol=1e-4)


def test_svd_is_the_best_of_its_rank(files):
    """Eckart and Young: the rest is what the smaller singular values hold."""
    new, weights = combine([p for _, p in files], [1, 1, 1], "svd", r=3), [1, 1, 1]
    ours = corrections(loaded(new))
    for name, matrix in total(files, weights).items():
        rest = torch.linalg.svdvals(matrix)[..., 3:].norm()
        torch.testing.assert_close((ours[name] - matrix).norm(), rest, atol=1e-4, rtol=1e-3)
    default = combine([p for _, p in files], weights, "svd")
    assert default["lightning_peft"]["methods"][0]["config"]["r"] == 4


def test_ties(files):
    """By hand: trim, elect, average those that agree. At full rank the result is exact."""
    weights, density = [1.0, 0.5], 0.4
    new = combine([files[0][1], files[2][1]], weights, "ties", density=density, r=12)
    ours = corrections(loaded(new))
    for name in files[0][0]:
        trimmed = []
        for w, (changes, _) in zip(weights, (files[0], files[2]), strict=True):
            matrix = changes[name]
            top = matrix.abs().flatten().sort(descending=True).values[int(density * matrix.numel()) - 1]
            trimmed.append(torch.where(matrix.abs() >= top, w * matrix, 0.0))
        first, second = trimmed
        elected = torch.sign(first + second)
        count = ((first * elected > 0).float() + (second * elected > 0).float()).clamp(min=1)
        expected = (first * (first * elected > 0) + second * (second * elected > 0)) / count
        torch.testing.assert_close(ours[name], expected, atol=2e-5, rtol=1e-3)


def test_dare(files):
    """Seeded; kept entries are rescaled, so that the sum is right on average."""
    path, changes = files[0][1], files[0][0]["linear.weight"]
    once, again = (combine([path], [1.0], "dare", density=0.5, seed=3, r=12) for _ in range(2))
    assert all(torch.equal(a, again["state_dict"][n]) for n, a in once["state_dict"].items())
    ours = corrections(loaded(once))["linear.weight"]
    kept = ours.abs() > 1e-5
    torch.testing.assert_close(ours[kept], 2 * changes[kept], atol=1e-4, rtol=1e-3)
    assert 0.3 < kept.float().mean() < 0.7
    many = [combine([path], [1.0], "dare", density=0.5, seed=i, r=12) for i in range(60)]
    mean = torch.stack([corrections(loaded(m))["linear.weight"] for m in many]).mean(0)
    assert (mean - changes).norm() < 0.25 * changes.norm()


@pytest.mark.parametrize("other", [LoRAFA(r=3), DeltaLoRA(r=3, start_step=0), AdaLoRA(init_r=3, target_r=2)], ids=repr)
def test_relatives_become_lora(files, other, tmp_path):
    changes, path = trained(tmp_path / "b.safetensors", other, 9)
    lora, plain = trained(tmp_path / "a.safetensors", LoRA(r=2), 1)
    net = loaded(combine([path, plain], [2.0, -1.0]))
    for name, matrix in corrections(net).items():
        expected = 2 * changes.get(name, 0) - lora.get(name, 0)
        torch.testing.assert_close(matrix, expected, atol=5e-5, rtol=1e-3)
    assert set(corrections(net)) == set(changes) | set(lora)


def test_heads_become_a_mean(files):
    states = [loaded(p).head.weight for _, p in files[:2]]
    net = loaded(combine([p for _, p in files[:2]], [3.0, 1.0]))
    torch.testing.assert_close(net.head.weight, 0.75 * states[0] + 0.25 * states[1])
    with pytest.raises(ConfigError, match="the weights sum to 0"):
        combine([p for _, p in files[:2]], [1.0, -1.0])


def test_refusals(files, tmp_path):
    path = files[0][1]
    _, dora = trained(tmp_path / "dora.safetensors", DoRA(r=2), 0)
    with pytest.raises(CheckpointError, match="trained with DoRA, which cannot be combined: its magnitudes rescale"):
        combine([path, dora])
    _, vera = trained(tmp_path / "vera.safetensors", VeRA(r=2), 0)
    with pytest.raises(CheckpointError, match="trained with VeRA, which cannot be combined"):
        combine([vera])
    other = Net(seed=1)
    inject(other, LoRA(r=2, modules_to_save="head"))
    save_adapter(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="trained on different base models"):
        combine([path, tmp_path / "other.safetensors"])
    _, headless = trained(tmp_path / "headless.safetensors", LoRA(r=2), 0)
    with pytest.raises(CheckpointError, match=r"trains \[\] in full"):
        combine([path, headless])
    for fields, message in (
        ({"weights": [1.0]}, "2 files and 1 weights"),
        ({"how": "sum"}, "choose one of linear, cat"),
        ({"how": "cat", "r": 3}, "can be set, from 1 on, for svd"),
        ({"density": 0.0}, "density must be above 0"),
        ({"path": "new.bin"}, "the file is safetensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            combine([path, path], **fields)


def test_scenarios(tmp_path):
    """One adapter for each of two tasks; combined, then trained on from there, in a LightningModule."""
    paths = []
    for i in range(2):
        module = Foreign()
        run = trainer(tmp_path, PEFT(LoRA(r=2 + i)), max_epochs=1)
        run.fit(module, loader("bert"))
        run.save_checkpoint(tmp_path / f"{i}.ckpt")
        paths.append(tmp_path / f"{i}.ckpt")
    combine(paths, [0.5, 0.5], path=tmp_path / "both.safetensors")
    module, plain = Foreign(), Foreign()
    trainer(tmp_path, PEFT(init_from=str(tmp_path / "both.safetensors")), max_epochs=1).fit(module, loader("bert"))
    assert module.trainer.global_step == 4 and summarize(module)["trainable"] > 0
    with disabled(module):
        assert torch.equal(logits(module.net, "bert"), logits(plain.net, "bert"))
    assert trainable_names(module)[0].startswith("net.")


def test_names_like_ours(tmp_path):
    """Networks may call their own parts ``base`` and ``delta``."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.ModuleDict({"base": nn.Sequential(nn.Linear(4, 4))})
            self.delta = nn.Linear(4, 4)

    net, path = Named(), tmp_path / "a.safetensors"
    inject(net, LoRA(r=2, rank_pattern={"net.base.0": 3}, target_modules="net.base.0", modules_to_save="delta"))
    wrapped = net.net["base"][0]
    wrapped.delta.lora_B.data.normal_()
    net.delta.weight.data.add_(1)
    save_adapter(net, path)
    again = Named()
    load_adapter(again, combine([path, path], [0.5, 1.0]))
    torch.testing.assert_close(again.net["base"][0].delta.product(), 1.5 * wrapped.delta.product())
    torch.testing.assert_close(again.delta.weight, net.delta.weight)
