"""Templates: text from columns, with places for virtual tokens and for a word to be found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from lightning_peft.errors import ConfigError

#: stands for a virtual token in tokenised rows until the method's placeholder is known
VIRTUAL = -1
#: no model takes as many virtual tokens in one place; a number is made into a list of that length
_MOST = 100_000
_PLACE = re.compile(r"\{(?:prompt:(\d+)|(mask))\}")


@dataclass(frozen=True)
class Fields:
    """Which text of a row is read: a column, or a template over columns.

    >>> Fields.of(None, "{title}: {body}\\nTopic:").split({"title": "Hi", "body": "you"})
    ('Hi: you', '\\nTopic:')
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, column: str | None, template: str | None) -> Fields:
        """From one of both; the template wins."""
        if template is None:
            return cls((("", column),))
        fields = cls.parse(template)
        if not fields.columns:
            raise ConfigError(f"template={template!r} names no column; write for example '{{text}}'.")
        return fields

    @classmethod
    def parse(cls, template: str) -> Fields:
        """A template, or a part of one without columns.

        Only the syntax is that of `str.format`. A field is the name of a column, which is looked up in the row and made
        a text; it reaches no attribute and no element of a value.
        """
        pieces = []
        try:
            for text, name, form, conversion in Formatter().parse(template):
                if form or conversion or name == "":
                    spelled = (name or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                    raise ConfigError(
                        f"template={template!r}: {{{spelled}}} is no column name. A column stands in braces by its name"
                        " alone, for example {text}."
                    )
                pieces.append((text, name))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"template={template!r}: {error}.") from None
        return cls(tuple(pieces))

    @property
    def columns(self) -> list[str]:
        """Columns that are read."""
        return [name for _, name in self.pieces if name]

    def split(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The row's text up to its last column (which may be cut), and the fixed text behind it (which may not)."""
        last = max((i for i, (_, name) in enumerate(self.pieces) if name), default=-1)
        texts = [text + (str(row[name]) if name else "") for text, name in self.pieces]
        return "".join(texts[: last + 1]), "".join(texts[last + 1 :])


@dataclass(frozen=True)
class Places:
    """A template with places: ``{prompt:3}`` for virtual tokens, ``{mask}`` for the word to be found.

    ``parts`` alternate between text and places: a number of virtual tokens, or None for the word. A causal model finds
    the word behind the last token before ``{mask}``; what follows it is left out.

    >>> Places.of("{prompt:3} {text} {prompt:2} {mask} .", cloze=True).count
    5
    >>> Places.of("{text}", cloze=False) is None
    True
    """

    parts: tuple[Fields | int | None, ...]

    @classmethod
    def of(cls, template: str | None, cloze: bool) -> Places | None:
        """The places of a template; None if it has none."""
        parts: list[Fields | int | None] = []
        template, end = template or "", 0
        for found in _PLACE.finditer(template):
            if found[2] and not cloze:
                continue  # a column of this name
            count = int(found[1]) if found[1] else None
            if count is not None and count > _MOST:
                raise ConfigError(f"template={template!r}: {found[0]} asks for more than {_MOST:,} virtual tokens.")
            parts += [Fields.parse(template[end : found.start()]), count]
            end = found.end()
        if cloze and parts.count(None) != 1:
            raise ConfigError(f"template={template!r}: a cloze task needs one {{mask}}, where the word is to be found.")
        return cls((*parts, Fields.parse(template[end:]))) if parts else None

    @property
    def columns(self) -> list[str]:
        """Columns that are read."""
        return [name for part in self.parts if isinstance(part, Fields) for name in part.columns]

    @property
    def count(self) -> int:
        """Number of virtual tokens."""
        return sum(part for part in self.parts if isinstance(part, int))

    @property
    def spaced(self) -> bool:
        """Whether a space stands before the word."""
        place = self.parts.index(None)
        before = self.parts[place - 1]
        return isinstance(before, Fields) and bool(before.pieces) and before.pieces[-1][0].endswith(" ")

    def text(self, row: Mapping[str, Any]) -> str:
        """The row as a person reads it: without the places."""
        return " ".join("".join(p.split(row)).strip() for p in self.parts if isinstance(p, Fields)).strip()

    def encode(self, tokenizer: Any, row: Mapping[str, Any], max_length: int) -> tuple[list[int], int, bool]:
        """Ids of a row, the position that answers (-1 without ``{mask}``), and whether it was cut.

        Texts are cut at the end of a column, the last column first; what follows a column, and the places, stay.
        """
        parts, (begin, end) = self.parts, ends(tokenizer)
        causal = None in parts and tokenizer.mask_token_id is None
        if causal:
            parts, end = self._before_the_word(), []
        pieces = [self._piece(tokenizer, part, row) for part in parts]
        ids = [whole for whole, _, _ in pieces]
        cut = False
        for i in reversed(range(len(ids))):
            excess = len(begin) + sum(map(len, ids)) + len(end) - max_length
            _, lead, tail = pieces[i]
            if excess > 0 and lead:
                ids[i], cut = lead[: max(0, len(ids[i]) - excess - len(tail))] + tail, True
        total = len(begin) + sum(map(len, ids)) + len(end)
        if total > max_length:
            raise ConfigError(f"max_length={max_length} is too small: the template alone takes {total} tokens.")
        before = len(begin) + sum(map(len, ids[: parts.index(None)])) if None in parts else -1
        return [*begin, *(i for piece in ids for i in piece), *end], total - 1 if causal else before, cut

    def _before_the_word(self) -> tuple[Fields | int | None, ...]:
        place = self.parts.index(None)
        if any(isinstance(part, int) for part in self.parts[place:]):
            raise ConfigError("A causal model reads nothing behind {mask}: put every {prompt:N} before it.")
        return self.parts[:place]

    def _piece(self, tokenizer: Any, part: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Ids of a part, and those of what may be cut and of what follows it."""
        if not isinstance(part, Fields):
            return [tokenizer.mask_token_id] if part is None else [VIRTUAL] * part, [], []
        lead, tail = part.split(row)
        lead, tail = (lead, tail.rstrip(" ")) if tail.strip(" ") else (lead.rstrip(" "), "")
        return ids_of(tokenizer, lead + tail), ids_of(tokenizer, lead), ids_of(tokenizer, tail)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; a space at its start belongs to its first word, as in running text."""
    bare = _bare(tokenizer, text)
    if text[:1] != " ":
        return bare
    start, both = _bare(tokenizer, "a"), _bare(tokenizer, "a" + text)
    return both[len(start) :] if both[: len(start)] == start else bare


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    whole, bare = tokenizer("a")["input_ids"], _bare(tokenizer, "a")
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _bare(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def word_ids(
    tokenizer: Any, labels: Sequence[str], verbalizer: Mapping[str, str | list[str]] | None, spaced: bool
) -> list[list[int]]:
    """Token ids of each label's words, in the order of the labels; a label without a verbalizer is its own word.

    Raises:
        ConfigError: labels and verbalizer differ, a word is not one token, or two labels share a word.
    """
    words = {label: label for label in labels} if verbalizer is None else dict(verbalizer)
    if set(words) != set(labels):
        raise ConfigError(f"verbalizer names the labels {sorted(words)}, the data has {sorted(labels)}.")
    found: dict[int, str] = {}
    rows = []
    for label in labels:
        several = [words[label]] if isinstance(words[label], str) else words[label]
        rows.append([_one_token(tokenizer, word, spaced) for word in several])
        for number, word in zip(rows[-1], several, strict=True):
            if found.setdefault(number, label) != label:
                raise ConfigError(f"verbalizer: {word!r} stands for {found[number]!r} and for {label!r}.")
    return rows


def _one_token(tokenizer: Any, word: str, spaced: bool) -> int:
    ids = ids_of(tokenizer, " " * spaced + word)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(f"verbalizer: {word!r} is not one token of the tokenizer ({pieces}); choose another word.")
    return ids[0]
