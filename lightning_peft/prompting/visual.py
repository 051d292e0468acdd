"""Virtual tokens among image patches: behind the class token, gone after the last hidden state.

The hooks of one forward pass of a vision transformer; see `virtual` for text::

    model(pixel_values)              open_inner_call       opens a call
      embeddings(pixel_values)       PromptedImage         puts the vectors in
      layers
      pooler(states)                 shorten_pooler_input  sees the image's own tokens
    -> states                        shorten               cuts the states back to them
                                     close_call            drops the call
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapted import Adapted
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.backbone import argument_names, pretrained_model_class
from lightning_peft.prompting.insertion import Insertion
from lightning_peft.prompting.virtual import InsertedTokens


class PromptedImage(Adapted):
    """The embeddings of a vision transformer, with learned vectors between the class token and the patches."""

    _adapter: InsertedTokens

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments of the base -> embeddings (batch, 1 + n + patches, dim)."""
        tokens = self._adapter
        embedded = self._base_forward(*args, **kwargs)
        if not tokens.active:
            return embedded
        if not isinstance(embedded, Tensor):
            raise ConfigError(
                f"{type(self).__name__} gives a {type(embedded).__name__}, not one row of tokens, so PromptTuning has"
                " no place in it. PrefixTuning and LoRA work on this model."
            )
        # The class token stays first, where poolers and heads look for it.
        has_class_token = hasattr(self, "cls_token") or hasattr(self, "class_embedding")
        insertion = Insertion(int(has_class_token), tokens.num_virtual_tokens, embedded.shape[1])
        call = tokens.calls.current()
        if call is not None:  # None where the embeddings are called on their own
            call.insertion = insertion
        return insertion.insert(embedded, self.delta.vectors())


def vision_backbones(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Vision transformers of transformers whose embeddings give one row of tokens: the model, and its embeddings."""
    pretrained_model = pretrained_model_class()
    for module in model.modules():
        if not isinstance(module, pretrained_model) or "pixel_values" not in argument_names(module):
            continue
        embeddings = getattr(module, "embeddings", None)
        if isinstance(embeddings, nn.Module) and position_table(embeddings) is not None:
            yield module, embeddings


def position_table(embeddings: nn.Module) -> Tensor | None:
    """The positions of an image's tokens (…, tokens, dim), or None."""
    # A parameter in ViT, an `nn.Embedding` in CLIP.
    for name in ("position_embeddings", "position_embedding"):
        table = getattr(embeddings, name, None)
        table = getattr(table, "weight", table)
        if isinstance(table, Tensor):
            return table
    return None


def connect(tokens: InsertedTokens, backbone: nn.Module) -> None:
    """Hook visual tokens to their backbone."""
    tokens.before(backbone, tokens.open_inner_call)
    tokens.hook_poolers(backbone)
    tokens.after(backbone, tokens.shorten)
    tokens.after(backbone, tokens.close_call, always_call=True)
