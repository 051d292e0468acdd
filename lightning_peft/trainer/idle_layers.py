"""A warning for adapted layers that take no part in training.

Injection sees which layers a forward calls, or reads the weights of, only where the code says so. A layer that is never
called, and whose weight is read through a reference that was kept since ``__init__``, has an adapter that never acts.
"""

from __future__ import annotations

from lightning_peft.adapted import Adapted
from lightning_peft.lightning_packages import rank_zero_warn
from lightning_peft.model.adapters import Adapters

#: optimizer steps after which is judged: a part of a network may be used in some batches only
_STEPS = 3


class IdleLayers:
    """The adapted layers none of whose tensors has had a gradient in this fit.

    Whether there is a gradient is asked of the tensors themselves, not of their values, so nothing waits for a device.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.waiting: dict[str, Adapted] = {adapters.path + name: layer for name, layer in adapters.layers()}
        self.steps = 0

    def look(self) -> None:
        """Before an optimizer step: forget the layers that take part in it, and those that are switched off."""
        for name, layer in list(self.waiting.items()):
            trained = [parameter for parameter in layer.delta.parameters() if parameter.requires_grad]
            takes_part = any(parameter.grad is not None for parameter in trained)
            if takes_part or not trained or not layer._adapter.active:
                del self.waiting[name]

    def step_taken(self) -> None:
        """After an optimizer step: warn, once, when it is time to judge."""
        self.steps += 1
        if self.steps != _STEPS or not self.waiting:
            return
        names = list(self.waiting)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        rank_zero_warn(
            f"The adapters of {shown} got no gradient in the first {_STEPS} optimizer steps, so they do not train. If"
            f" the forward does not use these layers, leave them out: exclude_modules={names[:3]!r}. If it does, it"
            " reads their weights in a way that injection cannot see, such as a reference that was kept in"
            " `__init__`: read them in the forward, as in self.layer.weight, or call the layers."
        )
