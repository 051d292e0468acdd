"""Rows of text to rows of token ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_peft.data.prompts import Prompts
from lightning_peft.data.template import Fields, Places
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.files import locate
from lightning_peft.lightning_packages import rank_zero_info, rank_zero_only
from lightning_peft.requirements import require_package
from lightning_peft.untrusted import short

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
DEFAULT_MAX_LENGTH = 512


def load_tokenizer(source: Any) -> Any:
    """A tokenizer from a hub id, folder, ``pkg://`` path or GGUF file; an object is taken as it is.

    One without a padding token pads with its end token (the attention mask hides it).

    Raises:
        ConfigError: nothing that can be loaded, or no token to pad with.
    """
    tokenizer = _from_source(source) if isinstance(source, str) else source
    if not hasattr(tokenizer, "pad_token_id"):
        raise ConfigError(f"tokenizer={short(repr(source), 120)} is neither a tokenizer nor the name of one.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"tokenizer={source!r} has neither a pad token nor an end token. Set tokenizer.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
        rank_zero_info(f"The tokenizer has no pad token: {tokenizer.eos_token!r} pads.")
    return tokenizer


def _from_source(source: str) -> Any:
    AutoTokenizer = require_package("transformers", f"tokenizer={source!r}").AutoTokenizer
    try:
        place = locate(source)
        options: dict[str, Any] = {"trust_remote_code": False}  # without it transformers would ask at the terminal
        if place.suffix == ".gguf" and os.path.isfile(place):
            return AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name, **options)
        return AutoTokenizer.from_pretrained(str(place) if os.path.exists(place) else source, **options)
    except (OSError, ValueError, KeyError, ImportError, PEFTError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".: ")
        raise ConfigError(
            f"tokenizer={source!r} cannot be loaded: {reason}. Give a hub id (with network, or cached), a folder or a"
            " .gguf file; without data.tokenizer it is that of the model."
        ) from None


@dataclass(frozen=True)
class Encoder:
    """Columns of a batch of rows to columns of token ids; the function that `datasets.Dataset.map` calls.

    Gives ``input_ids``, ``token_type_ids`` where the model takes them, ``labels`` where the text is its own label,
    ``answer_at`` where a word is to be found, ``length`` and ``cut`` (whether something was left out).
    """

    tokenizer: Any
    task: str
    max_length: int
    fields: Fields
    pair_column: str | None = None
    answer_column: str | None = None
    use_chat_template: bool = True
    separator: str = "\n"
    predict: bool = False
    places: Places | None = None

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        count = len(next(iter(columns.values())))
        rows = [{key: values[i] for key, values in columns.items()} for i in range(count)]
        encode: dict[str, Callable[[list[dict]], dict[str, list]]] = {
            "token-classification": self._words,
            "causal-lm": self._causal,
            "seq2seq-lm": self._seq2seq,
        }
        out = self._placed(rows) if self.places else encode.get(self.task, self._plain)(rows)
        out["length"] = [len(ids) for ids in out["input_ids"]]
        return out

    def key(self) -> str:
        """Changes when the result would."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = _vocabulary(backend.to_str()) if backend is not None else repr(self.tokenizer)
        options = {k: v for k, v in vars(self).items() if k != "tokenizer"}
        chat = getattr(self.tokenizer, "chat_template", None)
        return hashlib.sha256(repr((words, chat, options)).encode()).hexdigest()

    def _plain(self, rows: list[dict]) -> dict[str, list]:
        texts = ["".join(self.fields.split(row)) for row in rows]
        pairs = [str(row[self.pair_column]) for row in rows] if self.pair_column else None
        return self._columns(self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length))

    def _placed(self, rows: list[dict]) -> dict[str, list]:
        """Texts with places in them; their token types are all 0, as models take them by themselves."""
        ids, at, cut = zip(*(self.places.encode(self.tokenizer, row, self.max_length) for row in rows), strict=True)
        return {"input_ids": list(ids), "cut": list(cut)} | ({} if at[0] < 0 else {"answer_at": list(at)})

    def _columns(self, encoded: Any) -> dict[str, list]:
        kept = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        return {**{name: encoded[name] for name in kept}, "cut": self._cut(encoded)}

    def _cut(self, encoded: Any) -> list[bool]:
        if encoded.encodings:
            return [bool(row.overflowing) for row in encoded.encodings]
        return [len(ids) >= self.max_length for ids in encoded["input_ids"]]  # a tokenizer in Python does not tell

    def _words(self, rows: list[dict]) -> dict[str, list]:
        words = [row[self.fields.columns[0]] for row in rows]
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        out = self._columns(encoded)
        if "labels" in rows[0]:
            out["labels"] = [align(encoded.word_ids(i), row["labels"]) for i, row in enumerate(rows)]
        elif self.predict:
            out["word_ids"] = [encoded.word_ids(i) for i in range(len(rows))]
        return out

    def _causal(self, rows: list[dict]) -> dict[str, list]:
        parts = [self.fields.split(row) for row in rows]
        if self.answer_column is None:
            return self._continued(["".join(part) for part in parts])
        prompts = Prompts(self.tokenizer, self.max_length, self.use_chat_template, self.separator)
        if self.predict:
            encoded = [prompts.prompt(lead, tail) for lead, tail in parts]
            return {"input_ids": [ids for ids, _ in encoded], "cut": [cut for _, cut in encoded]}
        answers = [str(row[self.answer_column]) for row in rows]
        triples = [prompts.with_answer(*part, answer) for part, answer in zip(parts, answers, strict=True)]
        return {"input_ids": [t[0] for t in triples], "labels": [t[1] for t in triples], "cut": [t[2] for t in triples]}

    def _continued(self, texts: list[str]) -> dict[str, list]:
        """Text that is its own label, ended; in predict it is left open, to be continued."""
        end = [] if self.predict or self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length - len(end))
        cut = self._cut(encoded)
        bare = [ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids for ids in encoded["input_ids"]]
        ids = [row if short else row + end for row, short in zip(bare, cut, strict=True)]
        return {"input_ids": ids, "cut": cut} | ({} if self.predict else {"labels": [list(row) for row in ids]})

    def _seq2seq(self, rows: list[dict]) -> dict[str, list]:
        parts = [self.fields.split(row) for row in rows]
        prompts = Prompts(self.tokenizer, self.max_length, False, "")
        texts = [prompts.fit(*part) for part in parts]
        out = self._columns(self.tokenizer(texts, truncation=True, max_length=self.max_length))
        shortened = [text != "".join(part) for text, part in zip(texts, parts, strict=True)]
        out["cut"] = [cut or short for cut, short in zip(out["cut"], shortened, strict=True)]
        out.pop("token_type_ids", None)
        if not self.predict:
            answers = [str(row[self.answer_column]) for row in rows]
            targets = self.tokenizer(text_target=answers, truncation=True, max_length=self.max_length)
            out["labels"] = targets["input_ids"]
        return out


def source_of(module: Any) -> str | None:
    """Where the tokenizer of a LightningModule's model lies: what its hyper-parameters say, else the model itself."""
    known = dict(getattr(module, "hparams", {}) or {})
    sources = (known.get("tokenizer"), known.get("model"), getattr(module, "model", None))
    names = [source if isinstance(source, str) else getattr(source, "name_or_path", None) for source in sources]
    return next((name for name in names if name), None)


def _vocabulary(written: str) -> str:
    """A tokenizer without what using it leaves behind."""
    return json.dumps({**json.loads(written), "truncation": None, "padding": None})


def align(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Tags of words to labels of tokens: on the first token of each word, -100 elsewhere.

    >>> align([None, 0, 0, 1, None], [3, 4])
    [-100, 3, -100, 4, -100]
    """
    pairs = zip(word_ids, [None, *word_ids[:-1]], strict=True)
    return [IGNORED if word is None or word == before else tags[word] for word, before in pairs]


def tokenise(rows: Dataset, encoder: Encoder, keep: Sequence[str], split: str, cache_dir: str | None) -> Dataset:
    """Encode a table once, with a progress bar; in memory, or in a file under ``cache_dir`` that later runs find."""
    from datasets import disable_progress_bars

    drop = [name for name in rows.column_names if name not in keep]
    # a fingerprint of our own: datasets would pickle the tokenizer for one, which depends on how often it was used
    options: dict[str, Any] = {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": "memory"}
    if cache_dir:
        key = hashlib.sha256((_content(rows) + encoder.key()).encode()).hexdigest()[:16]
        folder = locate(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"cache_file_name": str(folder / f"{split}-{key}.arrow"), "new_fingerprint": key}
    if rank_zero_only.rank != 0:
        disable_progress_bars()
    done = rows.map(encoder, batched=True, remove_columns=drop, desc=f"Tokenising {split}", **options)
    cut = sum(done["cut"]) if len(done) else 0
    if cut and cut * 100 >= len(done):
        share = f"{cut:,} of {len(done):,} {split} rows ({cut / len(done):.0%})"
        rank_zero_info(f"{share} are longer than max_length={encoder.max_length} tokens and were cut.")
    return done


class _Digest:
    """A file that only remembers the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return len(content)

    def flush(self) -> None:
        """Nothing is held back."""


def _content(rows: Dataset) -> str:
    """A hash of the cells, whatever file they came from."""
    import pyarrow as pa

    digest = _Digest()
    view = rows.with_format("arrow")
    with pa.ipc.new_stream(pa.PythonFile(digest, mode="w"), view[:1].schema) as stream:
        for start in range(0, len(rows), 10_000):
            stream.write_table(view[start : start + 10_000].combine_chunks())
    return digest.hash.hexdigest()
