"""No Trainer at all: inject, train in a plain loop or with Fabric, save, load, merge.

Run it: python examples/plain_loop.py
"""

import lightning as L
import torch
from torch import nn

from lightning_peft import LoRA, disabled, inject, load_adapter, merge, save_adapter, summarize


def network():
    """Stands for any network; its weights stay frozen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def main(path="runs/plain_loop/adapter.safetensors", steps=200):
    """Teach the network another function of its input, through a sixth of its parameters."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net = network()
    inject(net, LoRA(r=4))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = fabric.setup(net, optimizer)

    x = torch.randn(256, 16)
    y = (x[:, :4] + x[:, 4:8]).argmax(-1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        fabric.backward(loss)
        optimizer.step()

    save_adapter(net, path)
    other = network()
    load_adapter(other, path)
    merge(other)
    with disabled(net):
        before = nn.functional.cross_entropy(net(x), y).item()
    after = nn.functional.cross_entropy(other(x), y).item()
    print(f"trained {summarize(net)['percent']:.1f} %: loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
