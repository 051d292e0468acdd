"""From a batch to the loss and to what the metrics need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.task.batches import call, class_logits, inputs_of, labels_of, rows_in
from lightning_peft.task.kinds import Task
from lightning_peft.task.losses import IGNORE, TokenLoss, class_loss, import_callable, number_loss


def task_loss(
    task: Task, network: nn.Module, batch: Any, tokens: TokenLoss, words: list[list[int]] | None = None
) -> tuple[Tensor, int, tuple[Any, Any]]:
    """The mean loss, over how many labels it is a mean (so that epochs average exactly), and the metrics' arguments.

    ``words``: token ids of each class's words, where classes are words.
    """
    inputs, labels = inputs_of(network, batch), labels_of(batch)
    if task.target == "text":
        loss, count = tokens(network, inputs, labels)
        return loss, count, (loss.detach(), count)
    logits = class_logits(network, batch, words)
    if task.target == "number":
        seen = (logits.detach().float().flatten(), labels.float().flatten())
        return number_loss(logits, labels), len(labels), seen
    count = int((labels != IGNORE).sum()) if task.target == "token" else len(labels)
    return class_loss(logits, labels), count, (logits.detach().argmax(-1), labels)


def custom_loss(
    function: Callable[..., Any] | str | None, network: nn.Module, batch: Any
) -> tuple[Tensor, int, dict[str, Any]]:
    """The loss a function of (outputs, batch) gives, the number of examples, and further values to log."""
    if function is None:
        raise ConfigError("task='custom' trains and tests with a loss: give a function of (outputs, batch).")
    function = import_callable(function) if isinstance(function, str) else function
    result = function(call(network, batch), batch)
    values = dict(result) if isinstance(result, Mapping) else {"loss": result}
    if not isinstance(values.get("loss"), Tensor):
        raise ConfigError(f"The custom loss returned {result!r}; return a tensor, or a dict with 'loss'.")
    return values.pop("loss"), rows_in(batch), values
