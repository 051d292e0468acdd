"""Text from files, folders and hubs, tokenised and padded for a language model."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.base import ROW, SplitDataModule
from lightning_peft.data.collate import Masking, TextCollator
from lightning_peft.data.labels import as_names, as_numbers, need_column, need_text, need_values, need_words
from lightning_peft.data.packing import pack, refuse_virtual_tokens
from lightning_peft.data.sources import STANDARD_INPUT, read, read_lines
from lightning_peft.data.tasks import CLASSES, CLOZE, UNLABELLED, TextTask, check_fields
from lightning_peft.data.template import Fields, Places, word_ids
from lightning_peft.data.tokenise import DEFAULT_MAX_LENGTH, Encoder, load_tokenizer, source_of, tokenise
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


class TextDataModule(SplitDataModule):
    """Text for every text task of `TaskModule`.

    Batches are dicts of tensors, padded to their longest row: ``input_ids`` and ``attention_mask`` (rows, length),
    ``token_type_ids`` where the tokenizer makes them, and ``labels``: class numbers or floats (rows,), or
    (rows, length) with -100 where nothing is to be learnt. Predict batches have no labels but
    ``meta = {"id": [...], "text": [...]}`` (and ``word_ids`` for token classification), and for causal models they
    end in the open prompt, padded on the left. The cloze tasks classify by a word that the language model puts at the
    ``{mask}`` of the template (Schick and Schütze 2021, arXiv:2001.07676); their batches have ``answer_at`` (rows,),
    the position whose logits tell it.

    Args:
        data: a csv, tsv, json, jsonl, parquet or txt file (one row a line); a folder with such files named train,
            validation, test, or with ``<label>/*.txt`` (columns ``text``, ``title`` = first line, ``body`` = the
            rest, ``label``, ``file``); a hub id; ``pkg://PACKAGE/PATH``; or a file a split: ``{train: …, test: …}``.
        task: what the labels are.
        text_column: text, or for token classification a list of words.
        text_pair_column: second text of a pair.
        label_column: class name or number, float for regression, list of tags for token classification.
        label_names: classes in the order of their numbers; by default those of the training rows, sorted.
        prompt_column: what a language model is given; with ``answer_column``, in place of ``text_column``.
        answer_column: what it is to answer; without it causal and masked models learn the text itself.
        template: text built from columns, ``"{title}\\n{body}\\nTopic:"``, in place of ``text_column`` or
            ``prompt_column``. What stands behind the last column is kept when a long row is cut. ``{prompt:3}``
            leaves three places for the virtual tokens of `PTuning`, as many in all as it has (classification and
            regression); ``{mask}`` is where a cloze task finds its word.
        verbalizer: for the cloze tasks, label -> word, or several words whose logits are averaged; each one token. By
            default the labels themselves.
        placeholder_id: the id of a place for a virtual token; by default that of the `PTuning` in the model.
        use_chat_template: put prompt and answer into the tokenizer's chat template, if it has one.
        separator: between prompt and answer where no chat template is used.
        id_column: column that names rows in predictions; by default the file, else the row number.
        tokenizer: hub id, folder, ``pkg://`` path, GGUF file or object; by default that of the trained model
            (``hparams.model`` of the LightningModule).
        max_length: most tokens of a row; by default the tokenizer's limit, at most 512.
        mlm_probability: share of tokens masked for masked-lm.
        val_size: rows of the validation split if the source has none: a fraction, or a count.
        test_size: the same for the test split, if the source has training rows only.
        drop_duplicates: drop exact duplicates before such a split, so that no test row was trained on.
        drop_unlabelled: leave out rows whose label is empty; by default such a row is an error.
        train_split: the source's split to train on, if not called train.
        val_split: the same for validation, if not called validation, val, valid or dev.
        test_split: the same for test.
        predict_data: what to predict, in any form of ``data``, or ``-`` for the lines of standard input. Labels are not
            needed.
        predict_split: which split to predict without ``predict_data``.
        max_train_samples: train on a random subset.
        max_eval_samples: validate and test on random subsets.
        batch_size: rows of a training batch in one process.
        eval_batch_size: rows of any other batch; by default ``batch_size``.
        group_by_length: batches of rows of similar length, which need less padding; see `LengthGroupedBatches`.
        packing: for causal-lm, lay rows end to end in rows of ``max_length`` tokens (train, validation and test), so
            that nearly nothing is padding; no row sees another (`TaskModule` tries that out and refuses models where
            it is not so; a loop of your own must pass ``use_cache=False``: with a cache transformers takes no note of
            positions). ``batch_size`` counts the packed rows.
        pad_to_multiple_of: round widths up, for kernels that like it.
        num_workers: processes that build batches; rows are tokenised beforehand, so 0 is usually fastest.
        seed: for the split, subsets, the order of batches and masks.
        cache_dir: keep tables and tokens here for later runs; without it only hub ids write (to their own cache).
        load_kwargs: further arguments of `datasets.load_dataset`: ``name``, ``revision``, ``sep`` …

    Raises:
        ConfigError: at construction for contradictory fields; at setup for missing or unusable data.

    >>> TextDataModule("reviews.csv", label_column="stars", batch_size=8).batch_size
    8
    """

    def __init__(
        self,
        data: str | dict[str, str],
        task: TextTask = "sequence-classification",
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        template: str | None = None,
        verbalizer: dict[str, str | list[str]] | None = None,
        placeholder_id: int | None = None,
        use_chat_template: bool = True,
        separator: str = "\n",
        id_column: str | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        mlm_probability: float = 0.15,
        val_size: int | float = 0.1,
        test_size: int | float = 0.1,
        drop_duplicates: bool = True,
        drop_unlabelled: bool = False,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        predict_data: str | None = None,
        predict_split: str = "test",
        max_train_samples: int | None = None,
        max_eval_samples: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        group_by_length: bool = True,
        packing: bool = False,
        pad_to_multiple_of: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        load_kwargs: dict[str, Any] | None = None,
    ) -> None:
        data = {k: str(v) for k, v in data.items()} if isinstance(data, dict) else str(data)
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "tokenizer")}
        super().__init__()
        # not to the logger: a name that the LightningModule has too, with another value, would stop the run there
        self.save_hyperparameters(ignore=None if isinstance(tokenizer, str | None) else ["tokenizer"], logger=False)
        self._take_fields(given)
        self.tokenizer: Any = None
        self._tokenizer_source, self._tokenizer_found = tokenizer, None
        self.places = Places.of(template, task in CLOZE)
        check_fields(given, places=self.places is not None)
        self.fields = Fields.of(prompt_column or text_column, None if self.places else template)
        self._columns = list(dict.fromkeys(self.places.columns if self.places else self.fields.columns))

    @property
    def classifies(self) -> bool:
        """Whether labels are classes."""
        return self.task in CLASSES

    @property
    def label_words(self) -> list[list[int]] | None:
        """Token ids of each class's words, for the cloze tasks."""
        if self.task not in CLOZE or self.label_names is None or self.tokenizer is None:
            return None
        return word_ids(self.tokenizer, self.label_names, self.verbalizer, self.places.spaced)

    def prepare_data(self) -> None:
        """One process downloads and fills the cache, if there is any to fill."""
        if self.cache_dir:
            self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None = None) -> None:
        """Find the tokenizer, then read, split and tokenise what the stage needs."""
        self._find_tokenizer()
        if self.packing:
            refuse_virtual_tokens(getattr(self.trainer, "callbacks", []))
        super().setup(stage)
        if self.num_workers:  # tokenizers complains in each worker otherwise: it was used before the fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def _find_tokenizer(self) -> None:
        source = self._tokenizer_source
        if source is None:
            source = source_of(getattr(self.trainer, "lightning_module", None))
        if source is None:
            raise ConfigError("TextDataModule has no tokenizer, and the module has no hparams.model to take it from.")
        if self.tokenizer is None or source != self._tokenizer_found:
            self.tokenizer, self._tokenizer_found = load_tokenizer(source), source
            self._ready.clear()

    def read(self, data: Any) -> dict[str, Dataset]:
        """Raw rows by split."""
        if data == STANDARD_INPUT:
            if self.trainer is not None and self.trainer.world_size > 1:
                raise ConfigError("Standard input is read by one process: predict with devices=1, or from a file.")
            return {"train": read_lines(sys.stdin, self._columns)}
        return read(data, self.load_kwargs, self.cache_dir)

    def contents(self, rows: Dataset) -> list[Hashable]:
        """Everything the model sees of a row."""
        used = [*self._columns, self.text_pair_column, self.answer_column]
        used += [] if self.task in UNLABELLED else [self.label_column]
        columns = [rows[name][:] for name in dict.fromkeys(used) if name in rows.column_names]
        return [repr(row) for row in zip(*columns, strict=True)]

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Check columns, number the labels, tokenise."""
        predict = split == "predict"
        used = self._need(rows, split) if predict else [name for name, _ in self._used(split)]
        keep: list[str] = []
        if predict:
            rows, keep = self._with_meta(rows), ["_id", "_text"]
        elif self.task not in UNLABELLED:
            rows, keep = self._with_labels(rows, split), ["labels"]
        rows = rows.select_columns([*dict.fromkeys([*used, *keep])])
        longest = self.max_length or min(self.tokenizer.model_max_length, DEFAULT_MAX_LENGTH)
        encoder = Encoder(
            self.tokenizer,
            self.task,
            longest,
            self.fields,
            pair_column=self.text_pair_column,
            answer_column=self.answer_column,
            use_chat_template=self.use_chat_template,
            separator=self.separator,
            predict=predict,
            places=self.places,
        )
        done = tokenise(rows, encoder, keep, split, self.cache_dir)
        return pack(done, longest, split) if self.packing and not predict else done

    def check_rows(self, rows: Dataset, split: str) -> None:
        """Texts and labels: the columns are there, and every cell can be read."""
        self._need(rows, split)
        if self.task in UNLABELLED:
            return
        columns = [name for name in rows.column_names if name != ROW]
        need_column(self.label_column, columns, "label_column", f"The {split} data")
        labels = rows[self.label_column][:]
        if self.task == "regression":
            as_numbers(labels, rows[ROW][:], split)
        elif self.task != "token-classification" and isinstance(labels[0], list):
            as_names(labels, rows[ROW][:], split, None)

    def _found_names(self, split_rows: Mapping[str, Dataset]) -> list[str]:
        """As for all data; one class for whole texts cannot be meant."""
        self._refuse_numbers(next(iter(split_rows.values())))
        names = super()._found_names(split_rows)
        if len(names) == 1 and self.task != "token-classification":
            raise ConfigError(
                f"All rows have the label {names[0]!r} (label_column={self.label_column!r}), so there is nothing to"
                " tell apart. Choose another column, or name all classes with label_names."
            )
        return names

    def _refuse_numbers(self, rows: Dataset) -> None:
        """Labels with fractions are what a regression predicts; as classes, each number would be one."""
        values = rows[self.label_column][:]
        fractions = [value for value in values if isinstance(value, float) and not value.is_integer()]
        if fractions:
            raise ConfigError(
                f"label_column={self.label_column!r} holds numbers with fractions, such as {fractions[0]}. To predict"
                " numbers, take task='regression' (--model.task regression). If each number is a class, name the"
                " classes with label_names."
            )

    def _used(self, split: str) -> list[tuple[str, str]]:
        """Columns that are read, and the field that names each."""
        field = "template" if self.template else "prompt_column" if self.prompt_column else "text_column"
        used = [(name, field) for name in self._columns]
        used += [(self.text_pair_column, "text_pair_column")] if self.text_pair_column else []
        used += [(self.answer_column, "answer_column")] if self.answer_column and split != "predict" else []
        return used

    def _need(self, rows: Dataset, split: str) -> list[str]:
        """Columns that are read, all there and without empty cells."""
        used = self._used(split)
        for name, field in used:
            need_column(name, rows.column_names, field, f"The {split} data")
            values, numbers = rows[name][:], rows[ROW][:]
            need_values(values, numbers, name, split)
            if self.task == "token-classification":
                need_words(values, numbers, name, split)
            else:
                need_text(values, numbers, name, field, split)
        return [name for name, _ in used]

    def _with_meta(self, rows: Dataset) -> Dataset:
        """Name and text of each row, for those who read the predictions."""
        if self.id_column:
            need_column(self.id_column, rows.column_names, "id_column", "The data to predict")
        names = self.id_column or ("file" if "file" in rows.column_names else ROW)
        words = self.task == "token-classification"
        texts = [
            " ".join(row[self.text_column])
            if words
            else self.places.text(row)
            if self.places
            else "".join(self.fields.split(row))
            for row in rows.select_columns(self._columns)
        ]
        return rows.add_column("_id", [str(name) for name in rows[names][:]]).add_column("_text", texts)

    def _with_labels(self, rows: Dataset, split: str) -> Dataset:
        need_column(self.label_column, [c for c in rows.column_names if c != ROW], "label_column", f"The {split} data")
        if self.task == "regression":
            numbers: list = as_numbers(rows[self.label_column][:], rows[ROW][:], split)
        else:
            numbers = self.encoded_labels(rows, split)
        if self.task == "token-classification":
            numbers = self._by_row(numbers, rows, split)
        bare = rows.remove_columns("labels") if "labels" in rows.column_names else rows
        return bare.add_column("labels", numbers)

    def _by_row(self, numbers: Sequence[int], rows: Dataset, split: str) -> list[list[int]]:
        """Tag numbers of all words, row by row."""
        left, tagged = iter(numbers), []
        for row, words, tags in zip(rows[ROW][:], rows[self.text_column][:], rows[self.label_column][:], strict=True):
            if len(words) != len(tags):
                raise ConfigError(f"{split}, row {row} (from 0): {len(words)} words but {len(tags)} labels.")
            tagged.append([next(left) for _ in tags])
        return tagged

    def collator(self, split: str) -> TextCollator:
        """Pads; masks for masked-lm; prompts of causal models are padded on the left."""
        predict = split == "predict"
        masked = self.task == "masked-lm" and not predict
        return TextCollator(
            self.tokenizer.pad_token_id,
            self.pad_to_multiple_of,
            left=predict and self.task == "causal-lm",
            meta=predict,
            masking=self._masking() if masked else None,
            virtual=self._placeholder() if self.places and self.places.count else None,
        )

    def _placeholder(self) -> int:
        """The id of a virtual token: the one given, else that of the method in the model."""
        if self.placeholder_id is not None:
            return self.placeholder_id
        module = getattr(self.trainer, "lightning_module", None)
        states = [getattr(part, "_adapter", None) for part in module.modules()] if module is not None else []
        found = [state for state in states if hasattr(state, "placeholder")]
        if not found or found[0].num_virtual_tokens != self.places.count:
            has = f"has {found[0].num_virtual_tokens}" if found else "has no PTuning"
            raise ConfigError(
                f"template={self.template!r} has places for {self.places.count} virtual tokens, the model {has}: train"
                f" with PTuning(num_virtual_tokens={self.places.count}), or change the template."
            )
        return found[0].placeholder

    def _masking(self) -> Masking:
        if self.tokenizer.mask_token_id is None:
            raise ConfigError("masked-lm needs a tokenizer with a mask token; this one is for causal models.")
        special = tuple(self.tokenizer.all_special_ids)
        return Masking(self.tokenizer.mask_token_id, len(self.tokenizer), special, self.mlm_probability, self.seed)
