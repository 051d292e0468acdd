"""The tasks of `TextDataModule`, and which of its fields go with which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_peft.errors import ConfigError

TextTask = Literal[
    "sequence-classification",
    "regression",
    "token-classification",
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "causal-cloze",
    "masked-cloze",
]
CLOZE = ("causal-cloze", "masked-cloze")
CLASSES = ("sequence-classification", "token-classification", *CLOZE)
UNLABELLED = ("causal-lm", "masked-lm", "seq2seq-lm")
WITH_PLACES = (*CLOZE, "sequence-classification", "regression")


def check_fields(given: Mapping[str, Any], *, places: bool) -> None:
    """Raise a `ConfigError` for fields that contradict each other; ``places``: whether the template has any."""
    task, prompt, answer = given["task"], given["prompt_column"], given["answer_column"]
    if task not in TextTask.__args__:
        raise ConfigError(f"TextDataModule(task={task!r}): choose one of {', '.join(TextTask.__args__)}.")
    if (prompt or answer) and task not in ("causal-lm", "seq2seq-lm"):
        raise ConfigError(f"prompt_column and answer_column belong to causal-lm and seq2seq-lm, not to {task}.")
    if prompt and not answer:
        raise ConfigError(f"prompt_column={prompt!r} needs an answer_column: what is to be learnt?")
    if task == "seq2seq-lm" and not answer:
        raise ConfigError("seq2seq-lm needs an answer_column.")
    if given["text_pair_column"] and (places or task not in ("sequence-classification", "regression")):
        where = "a template with places: name both columns in it" if places else task
        raise ConfigError(f"text_pair_column belongs to sequence-classification and regression, not to {where}.")
    if places and task not in WITH_PLACES:
        raise ConfigError(f"{{prompt:N}} in a template belongs to {', '.join(WITH_PLACES)}, not to {task}.")
    if given["verbalizer"] is not None and task not in CLOZE:
        raise ConfigError(f"verbalizer belongs to {' and '.join(CLOZE)}, not to {task}.")
    if given["packing"] and task != "causal-lm":
        raise ConfigError(f"packing belongs to causal-lm, not to {task}, where a row is seen as a whole.")
    if given["max_length"] is not None and given["max_length"] < 2:
        raise ConfigError(f"max_length={given['max_length']}: give at least 2.")
