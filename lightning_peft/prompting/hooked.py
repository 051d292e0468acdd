"""Adapters that also act through hooks on modules around the one that they adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.adapted import AdapterState


class HookedState(AdapterState):
    """What such an adapter remembers. Hooks are its bound methods, so that models copy and pickle with them."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Run ``hook`` before the forward of ``module``; options as of ``register_forward_pre_hook``."""
        self.handles.append(module.register_forward_pre_hook(hook, **options))

    def after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Run ``hook`` after the forward of ``module``; options as of ``register_forward_hook``."""
        self.handles.append(module.register_forward_hook(hook, **options))

    def unhook(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
