"""Virtual tokens among image patches: behind the class token, gone after the last hidden state."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapted import Adapted, AdapterState
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.backbone import parameters_of
from lightning_peft.prompting.insertion import Insertion, trim


class VisualTokens(AdapterState):
    """Virtual tokens of a vision transformer; hooks on its backbone are bound methods of this object."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.places: Insertion | None = None

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the backbone's output back."""
        places, self.places = self.places, None
        return output if places is None else trim(output, places)

    def pool(self, module: nn.Module, args: tuple) -> tuple | None:
        """A pooler inside the backbone sees the image's own tokens."""
        return None if self.places is None or not args else (trim(args[0], self.places), *args[1:])


class PromptedImage(Adapted):
    """The embeddings of a vision transformer, with learned vectors between the class token and the patches."""

    _adapter: VisualTokens

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings (batch, 1 + n + patches, dim)."""
        tokens = self._adapter
        states = self._base_forward(*args, **kwargs)
        if not tokens.active:
            return states
        if not isinstance(states, Tensor):
            raise ConfigError(
                f"{type(self).__name__} gives a {type(states).__name__}, not one row of tokens, so PromptTuning has no"
                " place in it. PrefixTuning and LoRA work on this model."
            )
        first = 1 if any(hasattr(self, name) for name in ("cls_token", "class_embedding")) else 0
        tokens.places = Insertion(first, tokens.n, states.shape[1])
        return tokens.places.insert(states, self.delta.vectors())


def vision_backbones(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Vision transformers of transformers whose embeddings give one row of tokens: the model, and its embeddings."""
    known = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    for module in model.modules():
        if not isinstance(module, known) or "pixel_values" not in parameters_of(module):
            continue
        embeddings = getattr(module, "embeddings", None)
        if isinstance(embeddings, nn.Module) and positions_of(embeddings) is not None:
            yield module, embeddings


def positions_of(embeddings: nn.Module) -> Tensor | None:
    """The positions of an image's tokens (…, tokens, width)."""
    for name in ("position_embeddings", "position_embedding"):
        value = getattr(embeddings, name, None)
        value = getattr(value, "weight", value)
        if isinstance(value, Tensor):
            return value
    return None


def connect(tokens: VisualTokens, backbone: nn.Module) -> None:
    """Hook visual tokens to their backbone."""
    backbone.register_forward_hook(tokens.after, with_kwargs=True)
    for name in ("pooler", "head"):
        if isinstance(getattr(backbone, name, None), nn.Module):
            getattr(backbone, name).register_forward_pre_hook(tokens.pool)
