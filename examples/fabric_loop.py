"""Fabric: train in a loop of your own, with checkpoints that hold the adapter alone, and resume from one exactly.

Run it: python examples/fabric_loop.py
"""

from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_peft import LoRA, adapter_state_dict, inject, load_adapter


def network():
    """Stands for any network; its weights stay frozen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 4))


def start(fabric):
    """A fresh adapter, set up for training."""
    net = network()
    inject(net, LoRA(r=4))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    return fabric.setup(net, optimizer)


def train(fabric, model, optimizer, steps):
    """Optimizer steps, each on a batch of its own."""
    for step in steps:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        y = (x[:, :4] + x[:, 4:8]).argmax(-1)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    return loss.item()


def save(fabric, path, model, optimizer, step):
    """The filter keeps the frozen weights out of the file."""
    kept = set(adapter_state_dict(model.module))
    state = {"model": model, "optimizer": optimizer, "step": step}
    fabric.save(path, state, filter={"model": lambda name, tensor: name in kept})


def resume(fabric, path):
    """`load_adapter` is strict; ``fabric.load(path, state, strict=False)`` would not notice missing tensors."""
    model, optimizer = start(fabric)
    content = fabric.load(path)
    load_adapter(model.module, content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return model, optimizer, content["step"]


def main(folder="runs/fabric_loop"):
    """Train 60 steps at once, then 30, a checkpoint, and the other 30 from there: the same adapter."""
    path = Path(folder) / "step30.ckpt"
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()

    whole, optimizer = start(fabric)
    loss = train(fabric, whole, optimizer, range(60))

    first, optimizer = start(fabric)
    train(fabric, first, optimizer, range(30))
    save(fabric, path, first, optimizer, step=30)

    resumed, optimizer, step = resume(fabric, path)
    train(fabric, resumed, optimizer, range(step, 60))

    expected, found = adapter_state_dict(whole.module), adapter_state_dict(resumed.module)
    equal = all(torch.equal(expected[name], found[name]) for name in expected)
    base = sum(p.numel() * p.element_size() for p in network().parameters())
    size = path.stat().st_size
    print(f"loss {loss:.3f}; resumed {'exactly' if equal else 'otherwise'}; {size:,} bytes beside a base of {base:,}")
    return loss, equal, size / base


if __name__ == "__main__":
    main()
