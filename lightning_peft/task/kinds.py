"""The tasks of `TaskModule`: which transformers class fits, and what a label is."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from lightning_peft.errors import ConfigError
from lightning_peft.untrusted import short


@dataclass(frozen=True)
class Task:
    """One task.

    ``target`` is what a label stands for: one ``class`` a row, one ``class`` a ``token``, one ``number`` a row, the
    next or the hidden ``text``, or whatever a ``custom`` loss makes of it.
    """

    name: str
    auto: str  # the transformers class that loads a model with the right head
    target: Literal["class", "token", "number", "text", "custom"]

    @property
    def has_new_head(self) -> bool:
        """Whether the head belongs to the user's labels, so that it usually comes from no checkpoint."""
        return self.target in ("class", "token", "number") and not self.is_cloze

    @property
    def is_cloze(self) -> bool:
        """Whether classes are words that a language model puts in a gap."""
        return self.name.endswith("-cloze")


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("sequence-classification", "AutoModelForSequenceClassification", "class"),
        Task("regression", "AutoModelForSequenceClassification", "number"),
        Task("token-classification", "AutoModelForTokenClassification", "token"),
        Task("causal-lm", "AutoModelForCausalLM", "text"),
        Task("masked-lm", "AutoModelForMaskedLM", "text"),
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "text"),
        Task("causal-cloze", "AutoModelForCausalLM", "class"),
        Task("masked-cloze", "AutoModelForMaskedLM", "class"),
        Task("image-classification", "AutoModelForImageClassification", "class"),
        Task("audio-classification", "AutoModelForAudioClassification", "class"),
        Task("custom", "AutoModel", "custom"),
    )
}


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ConfigError: there is none; the message names the nearest.

    >>> find_task("causal-lm").auto
    'AutoModelForCausalLM'
    >>> find_task("casual-lm")
    Traceback (most recent call last):
    lightning_peft.errors.ConfigError: task='casual-lm' is unknown; did you mean 'causal-lm'? Tasks: sequence-...
    """
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name)[:100].lower().replace("_", "-"), TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"task={short(repr(name), 120)} is unknown{hint} Tasks: {', '.join(TASKS)}.")
