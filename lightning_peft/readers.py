"""Code that reads the weights of adapted layers instead of calling them.

Many modules hand ``self.qkv.weight`` to a function (timm's EVA and BEiT, torchvision's Swin, `nn.MultiheadAttention`
with its ``out_proj``). What they read must be corrected, or the adapter would never act. Such modules are found by
their compiled code, and while their forward runs, the tensors that they read answer the corrected values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import (
    Adapted,
    Delta,
    adapt,
    adapted_parts,
    base_class,
    make_readable,
    part_at,
    release,
    thread_key,
)
from lightning_peft.bytecode import tensor_reads


class ReadingParent(Adapted):
    """A module that is not adapted itself, but whose forward reads tensors of adapted layers inside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base; the layers whose tensors it reads answer the corrected ones meanwhile."""
        return self._own_forward(*args, **kwargs)

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Nothing: it has no tensors of an adapter."""
        return {}


class RootReader:
    """Opens windows around the forward of a network's root that reads tensors of adapted layers.

    A root keeps its class, so hooks do it. They are there only while adapters are on: torch's encoder layers look for
    hooks when they decide how to compute, and the base must be exactly what it was.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.handles: list[Any] = []
        #: how many forwards of the root each thread is in
        self.depths: dict[int, int] = {}

    def switch(self, root: nn.Module, on: bool) -> None:
        """Set the hooks, or take them away; a root that reads nothing gets none."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.depths = [], {}
        if on and self.paths:
            self.handles.append(root.register_forward_pre_hook(self.open))
            self.handles.append(root.register_forward_hook(self.close, always_call=True))

    def open(self, root: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the forward."""
        thread = thread_key()
        self.depths[thread] = self.depths.get(thread, 0) + 1
        if self.depths[thread] == 1:
            for layer in adapted_parts(root, self.paths):
                layer._adapter.windows[thread] = {}

    def close(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward, also one that failed."""
        thread = thread_key()
        self.depths[thread] = self.depths.get(thread, 1) - 1
        if self.depths[thread] == 0:
            del self.depths[thread]
            for layer in adapted_parts(root, self.paths):
                layer._adapter.windows.pop(thread, None)


def open_to_readers(root: nn.Module) -> tuple[RootReader, list[tuple[str, Any]]]:
    """Find modules whose code reads tensors of adapted layers instead of calling them, and let them read the corrected.

    Returns:
        What does it for the root itself, and all readers' names with the layers they read.
    """
    found: list[tuple[str, Any]] = []
    of_root: tuple[str, ...] = ()
    readable = {name for layer in root.modules() if isinstance(layer, Adapted) for name in layer._readable_names()}
    for reader_name, reader in list(root.named_modules()):
        if isinstance(reader, (Delta, torch.jit.ScriptModule)):
            continue
        paths: dict[str, None] = {}
        for path, tensor in tensor_reads(reader, base_class(reader)):
            if tensor not in readable:
                continue
            for place, layer in _meant_by(reader, path):
                if tensor in layer._readable_names():
                    make_readable(layer, layer._readable_names())
                    paths[place] = None
                    found.append((reader_name, layer))
        if reader is root:
            of_root = tuple(paths)
        elif paths:
            if not isinstance(reader, Adapted):
                adapt(reader, ReadingParent, None, name=reader_name)
            reader._adapter.reads += tuple(paths)
    root_reader = RootReader(of_root)
    root_reader.switch(root, True)
    return root_reader, found


def close_to_readers(root: nn.Module, root_reader: RootReader) -> None:
    """Undo `open_to_readers`."""
    root_reader.switch(root, False)
    for module in root.modules():
        if isinstance(module, ReadingParent):
            release(module)


def _meant_by(reader: nn.Module, path: str) -> list[tuple[str, Any]]:
    """Adapted layers inside a reader that an expression in its code may mean, with their paths.

    ``*`` stands for a variable that may hold any module below the reader, or the reader itself (in a function inside
    its forward).
    """
    if not path.startswith("*"):
        part = part_at(reader, path)
        return [(path, part)] if isinstance(part, Adapted) else []
    ending = path[1:]
    found = []
    for name, layer in reader.named_modules():
        if name and isinstance(layer, Adapted) and f".{name}".endswith(ending):
            found.append((name, layer))
    return found
