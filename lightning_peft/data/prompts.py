"""Prompt and answer as token ids: what a causal language model reads, and what it is to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IGNORED = -100


@dataclass(frozen=True)
class Prompts:
    """Renders prompts and answers, with the tokenizer's chat template if it has one and it is wanted.

    A prompt has a lead (the user's text, cut at its end if all is too long) and a tail (an instruction behind it and
    the template's own closing, always kept). Answers are cut only if they are too long alone.
    """

    tokenizer: Any
    max_length: int
    use_chat_template: bool
    separator: str

    @property
    def chat(self) -> bool:
        """Whether the chat template is applied."""
        return self.use_chat_template and bool(getattr(self.tokenizer, "chat_template", None))

    def prompt(self, lead: str, tail: str) -> tuple[list[int], bool]:
        """Ids of a prompt that asks for an answer, and whether it was cut."""
        return self._fit(*self._render(lead, tail), self.max_length)

    def with_answer(self, lead: str, tail: str, answer: str) -> tuple[list[int], list[int], bool]:
        """Ids, labels (-100 on the prompt) and whether something was cut."""
        lead, tail = self._render(lead, tail)
        reply = self._reply(answer)[: self.max_length]
        ids, cut = self._fit(lead, tail, self.max_length - len(reply))
        return ids + reply, [IGNORED] * len(ids) + reply, cut

    def fit(self, lead: str, tail: str) -> str:
        """The text with its lead shortened until the whole fits (encoders, where special tokens stand at both ends)."""
        excess = len(self.tokenizer(lead + tail, verbose=False)["input_ids"]) - self.max_length
        if excess <= 0 or not tail:
            return lead + tail
        ids = self._ids(lead, special=False)
        return self.tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=True) + tail

    def _render(self, lead: str, tail: str) -> tuple[str, str]:
        if not self.chat:
            return lead, tail + self.separator
        # most templates strip the message; done here first, it can be found again in the result
        lead, tail = (lead.lstrip(), tail.rstrip()) if tail.strip() else (lead.strip(), "")
        text = self._apply([{"role": "user", "content": lead + tail}], add_generation_prompt=True)
        end = text.rfind(lead) + len(lead) if lead in text else len(text)
        return text[:end], text[end:]

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _reply(self, answer: str) -> list[int]:
        """The answer up to and with the end token."""
        end, end_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        text = self._rendered_reply(answer) if self.chat else answer
        if end and end in text:
            text = text[: text.rindex(end)]  # templates put a line break behind it, which nobody has to learn
        return self._ids(text, special=False) + ([] if end_id is None else [end_id])

    def _rendered_reply(self, answer: str) -> str:
        """The answer in the form the template gives it; any prompt before it does."""
        asked = [{"role": "user", "content": "?"}]
        both = self._apply([*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        start = self._apply(asked, add_generation_prompt=True)
        return both[len(start) :] if both.startswith(start) else answer

    def _fit(self, lead: str, tail: str, room: int) -> tuple[list[int], bool]:
        whole = self._ids(lead + tail, special=not self.chat)
        if len(whole) <= room:
            return whole, False
        if room <= 0:
            return [], True
        end = self._ids(tail, special=False)[-room:]
        return self._ids(lead, special=not self.chat)[: room - len(end)] + end, True

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        ended = special and ids and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ended else ids
