"""Train and eval mode of a base with adapters, and recomputed activations."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_peft.adapted import Delta
from lightning_peft.errors import ConfigError
from lightning_peft.model.adapters import Adapters


def train_mode(network: nn.Module, base: Literal["train", "eval"]) -> str:
    """Set the modes for training; ``from_pretrained`` returns eval mode, and Lightning keeps what it finds.

    Args:
        network: adapted or not.
        base: ``train`` puts everything into train mode; ``eval`` only what trains: adapters, heads, saved modules.

    Returns:
        What to tell the user.

    >>> train_mode(nn.Sequential(nn.Dropout(0.1)), "train")
    'Base in train mode: 1 dropout layer is on.'
    >>> train_mode(nn.Sequential(nn.Linear(1, 1)), "train")
    'Base in train mode. It has no dropout.'
    """
    network.train(base == "train")
    drops = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
    count = f"{drops} dropout layer{'' if drops == 1 else 's'}"
    if base == "train":
        state = f": {count} {'is' if drops == 1 else 'are'} on." if drops else ". It has no dropout."
        return f"Base in train mode{state}"
    adapters = Adapters.find(network)
    saved_modules = adapters.record.modules_to_save if adapters is not None else []
    for name, module in network.named_modules():
        is_saved = any(name == module_name or name.startswith(f"{module_name}.") for module_name in saved_modules)
        if is_saved or isinstance(module, Delta):
            module.train()
    return f"Base in eval mode: {count} of the model off, except in what trains."


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute the activations of each layer in backward.

    Raises:
        ConfigError: the network cannot.
    """
    enable = getattr(network, "activation_checkpointing_enable", None)  # transformers ≥ 5.20; the older name warns
    options = {"use_reentrant": False}  # the reentrant kind loses gradients where the inputs are frozen
    try:
        if enable is not None:
            enable(options)
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"gradient_checkpointing: {type(network).__name__} does not support it ({error}).") from None
