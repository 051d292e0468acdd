"""Prompt tuning: learned vectors before or behind the text (Lester et al. 2021), or among image patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import adapt
from lightning_peft.errors import ConfigError, NoMatchError
from lightning_peft.match import select
from lightning_peft.method import Method, check_number
from lightning_peft.prompting.backbone import backbones
from lightning_peft.prompting.prefix import normal_
from lightning_peft.prompting.prompt import Prompt
from lightning_peft.prompting.virtual import (
    SUPPORTED,
    InsertedTokens,
    PromptedEmbedding,
    VirtualTokens,
    connect,
    disconnect,
)
from lightning_peft.prompting.visual import PromptedImage, position_table, vision_backbones
from lightning_peft.prompting.visual import connect as connect_visual
from lightning_peft.requirements import require_package

CHOICES = {"position": ("prepend", "append"), "init": ("vocab", "random", "text")}


@dataclass(frozen=True)
class PromptTuning(Method):
    """Train ``n`` input vectors; every weight stays frozen.

    Batch, labels and call stay as they are. The sequence is longer only between the backbone's input embedding and
    its last hidden state: positions count the virtual tokens, the cache holds them, and outputs, pooling and labels
    refer to the caller's tokens. The virtual tokens stand directly at the first (last) real token, whatever the
    padding. In an encoder-decoder they join the encoder, whose states the decoder attends to; in a vision
    transformer they stand between class token and patches. Trains ``n·dim`` numbers.

    Appended on a causal model they stand where the text ends and the answer begins: behind the prompt given to
    ``generate``, before the first label that is not -100, else behind the last token, whose place in the output is
    taken by the last virtual token (it predicts what follows).

    Args:
        num_virtual_tokens: number n of vectors.
        position: ``prepend`` or ``append``.
        init: start from random rows of the ``vocab``, from the rows of a ``text`` (repeated or cut to n), or at
            ``random`` with the spread of the vocabulary. A vision model has no vocabulary and starts at random.
        init_text: the text, split by the tokenizer in the model's folder, or token ids.
        target_modules: which input embedding, where a model has several (``vision_model.embeddings`` of CLIP).
        modules_to_save: further modules, trained and saved in full (heads).
        init_seed: seed of the start values.

    Raises:
        NoMatchError: the model is of no supported kind.
        ConfigError: a value that cannot work; text and prompt are longer than the model's maximum (at the call).

    >>> import transformers
    >>> from lightning_peft import PromptTuning, inject, trainable_names
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    >>> net = transformers.BertModel(transformers.BertConfig(**sizes))
    >>> inject(net, PromptTuning(num_virtual_tokens=3))
    >>> trainable_names(net)
    ['embeddings.word_embeddings.delta.prompt']
    """

    paper: ClassVar[str] = (
        "The Power of Scale for Parameter-Efficient Prompt Tuning, Lester et al. 2021, arXiv:2104.08691"
    )
    mergeable: ClassVar[bool] = False
    why_not_mergeable: ClassVar[str] = "its vectors are inputs of the model, not a change of weights."
    identity_at_init: ClassVar[bool] = False
    reference_lr: ClassVar[float] = 1e-1
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = (
        "ours on MiniLM; peft's example for causal language modelling: 3e-2; the paper's 0.3 is for Adafactor"
    )
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"init", "init_text"}

    num_virtual_tokens: int = 20
    position: Literal["prepend", "append"] = "prepend"
    init: Literal["vocab", "random", "text"] = "vocab"
    init_text: str | list[int] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_number("PromptTuning", "num_virtual_tokens", self.num_virtual_tokens, 1)
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(
                    f"PromptTuning({field}={getattr(self, field)!r}): choose one of {', '.join(allowed)}."
                )
        if (self.init == "text") != bool(self.init_text):
            raise ConfigError(
                f"PromptTuning(init={self.init!r}, init_text={self.init_text!r}): init='text' needs a text or token"
                " ids in init_text, and the others take none."
            )

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The input embedding of the first text backbone, else of the first vision backbone."""
        images = [embeddings for _, embeddings in vision_backbones(model)]
        return input_embeddings(self, model, prefix, images)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Give the embedding its prompt; the start values are drawn here, those of a text in `connect`."""
        count, generator = self.num_virtual_tokens, self.generator(name)
        table: Any = module
        if not is_table(table):
            positions = position_table(table)
            assert positions is not None  # `vision_backbones` chose it by them
            delta = Prompt(positions, count, positions.shape[-1])
            normal_(delta.prompt, generator, 0.02)
            adapt(table, PromptedImage, delta, InsertedTokens(count), name)
            return
        delta = Prompt(table.weight, count, table.embedding_dim)
        if self.init == "vocab":
            ids = torch.randint(table.num_embeddings, (count,), generator=generator)
            copy_rows(delta.prompt, table, ids)
        elif self.init == "random":
            normal_(delta.prompt, generator, spread(table))
        adapt(table, PromptedEmbedding, delta, VirtualTokens(count, self.position), name)

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """Hook the embeddings to their backbones."""
        backbone_of = {id(table): backbone for backbone, table in backbones(model)}
        backbone_of.update({id(embeddings): backbone for backbone, embeddings in vision_backbones(model)})
        for embedding in adapted.values():
            backbone = backbone_of[id(embedding)]
            if isinstance(embedding, PromptedImage):
                connect_visual(embedding._adapter, backbone)
                continue
            assert isinstance(embedding, PromptedEmbedding)
            connect(model, embedding._adapter, backbone)
            if self.init == "text" and not embedding.weight.is_meta:
                ids = torch.tensor(token_ids(self.init_text, backbone.config), dtype=torch.long)
                repeated = ids.repeat(self.num_virtual_tokens)[: self.num_virtual_tokens]
                copy_rows(embedding.delta.prompt, embedding._base_forward, repeated)

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the vectors and the hooks out again."""
        detach_tokens(model, names)
        super().detach(model, names)


def input_embeddings(
    method: Method, model: nn.Module, prefix: str, images: Iterable[nn.Module] = ()
) -> dict[str, nn.Module]:
    """The input embeddings that a method's patterns choose, the first one without patterns.

    Args:
        method: the method, for its patterns and its name.
        model: the model.
        prefix: path of the model in what the user gave.
        images: embeddings of vision transformers, where the method works on these as well.
    """
    embeddings = [table for _, table in backbones(model)] + list(images)
    names = {module: name for name, module in model.named_modules()}
    candidates = {names[embedding]: embedding for embedding in embeddings}
    if not candidates:
        raise NoMatchError(
            f"{type(method).__name__} found no input embedding in {type(model).__name__} that it can work with. It"
            f" supports {SUPPORTED}. PTuning(target_modules=<name of an nn.Embedding>) with placeholder ids in the"
            " batch, PrefixTuning and LoRA work on other models."
        )
    if method.target_modules is None:
        first_name = next(iter(candidates))
        return {first_name: candidates[first_name]}
    options: dict[str, Any] = {"prefix": prefix, "method": type(method).__name__}
    return select(candidates, method.target_modules, lambda module: True, lambda module: False, **options)


def detach_tokens(model: nn.Module, names: list[str]) -> None:
    """Take away the hooks of virtual tokens at the embeddings of these names."""
    for name in names:
        state = model.get_submodule(name)._adapter
        assert isinstance(state, InsertedTokens)
        disconnect(model, state)


def is_table(module: nn.Module) -> bool:
    """Whether a module looks ids up."""
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def copy_rows(prompt: nn.Parameter, table: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    """Let a prompt (n, dim) start from the embeddings of ids (n), scaled as the model scales them."""
    if not prompt.is_meta:
        with torch.no_grad():
            prompt.copy_(table(ids.to(prompt.device)))


def spread(table: nn.Module) -> float:
    """Standard deviation of a table's numbers."""
    return 0.0 if table.weight.is_meta else float(table.weight.detach().float().std())


def token_ids(text: str | list[int] | None, config: Any) -> list[int]:
    """Ids of a text, by the tokenizer beside the model; nothing is downloaded."""
    if not isinstance(text, str):
        return list(text or [])
    transformers = require_package("transformers", f"PromptTuning(init_text={text!r})")
    source = getattr(config, "_name_or_path", "")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"PromptTuning(init_text={text!r}): no tokenizer in {source or 'a model built without from_pretrained'!r}."
            " Give token ids instead: init_text=[17, 4, …]."
        ) from error
    if not ids:
        raise ConfigError(f"PromptTuning(init_text={text!r}): the text has no tokens.")
    return ids
