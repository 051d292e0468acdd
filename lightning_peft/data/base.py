"""What the data modules share: splits, labels, loaders, and what they leave in a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_peft.data.labels import as_indices, as_names, is_empty, need_column, vocabulary
from lightning_peft.data.loaders import BatchLoader, LengthGroupedBatches
from lightning_peft.data.sources import split_name
from lightning_peft.data.splits import carve, choose, first_of_each, size_of, take
from lightning_peft.errors import ConfigError
from lightning_peft.lightning_packages import (
    L,
    LightningDataModule,
    every,
    package_of,
    rank_zero_info,
    restricted_classmethod,
)
from lightning_peft.requirements import require_package
from lightning_peft.trainer.reload import rebuild

if TYPE_CHECKING:
    from datasets import Dataset

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
_SPLIT_FIELDS = {"train": "train_split", "validation": "val_split", "test": "test_split"}
ROW = "_row"
#: fewer rows than this cannot give one each to validation and test and leave some to learn from
_FEWEST = 5


class SplitDataModule(LightningDataModule, ABC):
    """Base of the data modules; a subclass reads a source, prepares a split and names a collator.

    After ``setup``, ``label_names`` lists the classes in the order of their numbers (None where there are none). It
    is saved in every checkpoint and wins over the order found in the data when a checkpoint is loaded.
    """

    #: arguments that may be import paths, which a file does not choose, each with a test whether a value is one
    import_fields: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}

    #: set by subclasses in __init__, see TextDataModule
    data: Any
    predict_data: Any
    predict_split: str
    split_names: dict[str, str | None]
    label_column: str
    label_names: list[str] | None
    val_size: int | float
    test_size: int | float
    drop_duplicates: bool
    max_train_samples: int | None
    max_eval_samples: int | None
    batch_size: int
    eval_batch_size: int | None
    group_by_length: bool
    num_workers: int
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._raw: dict[str, Dataset] = {}
        self._ready: dict[str, Dataset] = {}
        self._names_given = False

    @restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> SplitDataModule:
        """As `LightningDataModule.load_from_checkpoint`; nothing in the checkpoint chooses code.

        Raises:
            CheckpointError: the checkpoint is damaged, or names a function; the message says which argument to give.
        """
        return rebuild(cls, checkpoint_path, *args, **kwargs)

    def _take_fields(self, given: Mapping[str, Any]) -> None:
        """Fields of the constructor become attributes of the same names."""
        for name, value in given.items():
            setattr(self, name, value)
        self.split_names = {split: getattr(self, field, None) for split, field in _SPLIT_FIELDS.items()}
        self._names_given = self.label_names is not None
        for name in ("batch_size", "eval_batch_size", "max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1.")
        if (workers := getattr(self, "num_workers", 0)) is not None and workers < 0:
            raise ConfigError(f"num_workers={workers}: give at least 0.")

    # what subclasses define

    @abstractmethod
    def read(self, data: Any) -> dict[str, Dataset]:
        """Raw rows by split."""

    @abstractmethod
    def contents(self, rows: Dataset) -> list[Hashable]:
        """What makes two rows exact duplicates of each other."""

    @abstractmethod
    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Rows ready for the collator, with a column ``length``."""

    @abstractmethod
    def collator(self, split: str) -> Any:
        """What makes a batch of rows of a split."""

    @property
    def classifies(self) -> bool:
        """Whether labels are classes."""
        return True

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode what the stage needs, once."""
        for split in _STAGES[getattr(stage, "value", stage) or "fit"]:
            self._prepare(split)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled batches; a run that resumes inside an epoch gets the rest of it."""
        overfit = bool(getattr(self.trainer, "overfit_batches", 0))
        return self._loader("train", self.batch_size, shuffle=not overfit, completed=self._completed)

    def val_dataloader(self) -> BatchLoader | list:
        """Batches in a fixed order; an empty list without validation rows."""
        return self._loader("validation", self._eval_batch_size) if "validation" in self._ready else []

    def test_dataloader(self) -> BatchLoader:
        """Batches in a fixed order."""
        return self._loader("test", self._eval_batch_size)

    def predict_dataloader(self) -> BatchLoader:
        """Batches in the order of the rows, without labels, with ``meta``."""
        loader = self._loader("predict", self._eval_batch_size, group_by_length=False, repeat=False)
        steps = [step.rows for step in loader.batch_sampler.steps()]
        # prediction writers of Lightning take row numbers from here
        package = package_of(self.trainer) if isinstance(self.trainer, every("Trainer")) else L
        loader.batch_sampler = package.overrides.distributed._IndexBatchSamplerWrapper(loader.batch_sampler)
        loader.batch_sampler.seen_batch_indices = steps
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The order of the labels."""
        return {"label_names": self.label_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the order of the labels the checkpoint was trained with.

        Raises:
            ConfigError: ``label_names`` were given and differ.
        """
        names = state_dict.get("label_names")
        if names is None or names == self.label_names:
            return
        if self._names_given:
            raise ConfigError(f"label_names={self.label_names}, but the checkpoint was trained with {names}.")
        self.label_names = list(names)
        for split in [split for split in self._ready if split != "predict"]:  # rows to predict have no labels
            del self._ready[split]
            self._prepare(split)

    @property
    def num_labels(self) -> int | None:
        """Outputs a head needs: the number of classes, else None."""
        return len(self.label_names) if self.label_names else None

    # loaders

    @property
    def _eval_batch_size(self) -> int:
        return self.eval_batch_size or self.batch_size

    def _loader(self, split: str, size: int, **options: Any) -> BatchLoader:
        if split not in self._ready:
            self._prepare(split)
        rows = self._ready[split]
        place = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        completed = options.pop("completed", None)
        order = {"group_by_length": self.group_by_length, "shuffle": False, "seed": self.seed, **options}
        ranks = {"rank": place.get("rank", 0), "world_size": place.get("num_replicas", 1)}
        batches = LengthGroupedBatches(rows["length"][:], size, **order, **ranks)
        return BatchLoader(rows, batches, self.collator(split), self.num_workers, completed if self.trainer else None)

    def _completed(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed

    # rows

    def _prepare(self, split: str) -> None:
        """Make a split ready; a missing validation split is no error, any other is."""
        if split in self._ready:
            return
        require_package("datasets", type(self).__name__)
        rows = self._predicted() if split == "predict" else self._rows(split)
        if rows is not None:
            self._ready[split] = self.encode(rows, split)

    def _rows(self, split: str) -> Dataset | None:
        self._load()
        if split in self._raw:
            return self._raw[split]
        if split == "validation":
            return None
        raise ConfigError(
            f"data={self.data!r} has no {split} rows (splits: {', '.join(self._raw)}; {split}_size=0)."
            f" Add a {split} file, or choose one of the source's splits with {split}_split."
        )

    def _predicted(self) -> Dataset:
        if self.predict_data is None:
            split = split_name(self.predict_split)
            if split is None:
                raise ConfigError(f"predict_split={self.predict_split!r}: choose train, validation or test.")
            rows = self._rows(split)
            if rows is None:
                raise ConfigError(f"data={self.data!r} has no {split} rows to predict.")
            return rows
        found = {key: _numbered(rows) for key, rows in self.read(self.predict_data).items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return self._pick(found, split_name(self.predict_split) or "test", self.predict_split) or found["train"]

    def _load(self) -> None:
        """Read the source, split it where it is not split, and settle the labels; once."""
        if self._raw:
            return
        found = {key: _numbered(rows) for key, rows in self.read(self.data).items()}
        named = {split: self._pick(found, split, self.split_names[split]) for split in ("train", "validation", "test")}
        raw = {split: rows for split, rows in named.items() if rows is not None}
        if not raw:
            raise ConfigError(f"data={self.data!r} has the splits {', '.join(found)}; name one with train_split.")
        raw = {split: self._checked(rows, split) for split, rows in raw.items()}
        split_rows = self._limited(self._split(raw))
        if self.classifies and self.label_names is None:
            self.label_names = self._found_names(split_rows)
        test = split_rows.get("test")
        if self.classifies and test is not None and len(self._without_label(test)) < len(test):
            self.encoded_labels(test, "test")  # an unknown label is found now, not when all is trained
        self._raw = split_rows

    def _found_names(self, split_rows: Mapping[str, Dataset]) -> list[str]:
        """The classes of the training rows, or of the only rows there are."""
        split, rows = next(iter(split_rows.items()))
        typed = _class_names(rows.features[self.label_column])
        return typed or vocabulary(self._flat_names(rows, split))

    def _checked(self, rows: Dataset, split: str) -> Dataset:
        """Rows of the source that can be used, in every split before any training; unlabelled ones left out if asked.

        Raises:
            ConfigError: a missing column, an unusable cell.
        """
        empty = self._without_label(rows)
        unlabelled = len(empty) == len(rows)
        if getattr(self, "drop_unlabelled", False) and empty and not unlabelled:
            rank_zero_info(f"{len(empty):,} of {len(rows):,} {split} rows have no label and are left out.")
            rows = take(rows, [i for i in range(len(rows)) if i not in empty])
        self.check_rows(rows, split)
        if self.classifies and not (split == "test" and unlabelled):
            self._flat_names(rows, split)
        return rows

    def check_rows(self, rows: Dataset, split: str) -> None:
        """Raise a `ConfigError` for rows of the source that cannot be used; a subclass knows which."""

    def _without_label(self, rows: Dataset) -> set[int]:
        """Places of the rows whose label is empty, or -1 in a column of typed classes."""
        if self.label_column not in rows.column_names:
            return set()
        typed = _class_names(rows.features[self.label_column])
        values = rows[self.label_column][:]
        return {i for i, value in enumerate(values) if is_empty(value) or (typed and value == -1)}

    def _pick(self, found: Mapping[str, Dataset], split: str, name: str | None) -> Dataset | None:
        """The source's split that serves as ``split``: by its name, else by the usual ones."""
        if name is not None and name in found:
            return found[name]
        usual = [key for key in found if split_name(key) == split]
        if name is not None and split_name(name) != split:
            raise ConfigError(f"data={self.data!r} has no split {name!r}; it has {', '.join(found)}.")
        return found[usual[0]] if usual else None

    def _split(self, raw: dict[str, Dataset]) -> dict[str, Dataset]:
        """Carve validation and test rows out of training rows where the source has none of its own."""
        asked = {"validation": self.val_size, "test": self.test_size if len(raw) == 1 else 0}
        if "train" not in raw or not any(size for split, size in asked.items() if split not in raw):
            return raw
        train = self._distinct(raw["train"])
        if len(train) < _FEWEST and all(isinstance(size, float) for size in asked.values() if size):
            raise ConfigError(
                f"data={self.data!r} has {len(train)} different rows, too few to split off rows for validation and"
                f" test. Give at least {_FEWEST}, or a file for each split, or numbers of rows (val_size=1)."
            )
        fields = {"validation": "val_size", "test": "test_size"}
        sizes = {s: size_of(size, len(train), fields[s]) for s, size in asked.items() if size and s not in raw}
        by_class = self.classifies and not isinstance(train[0].get(self.label_column), list)
        parts = carve(len(train), sizes, self.seed, self._flat_names(train, "train") if by_class else None)
        how = ", every class its share" if by_class else ""
        said = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
        rank_zero_info(f"Split {len(train):,} rows: {said} (seed {self.seed}{how}).")
        return {**raw, **{name: take(train, part) for name, part in parts.items() if part}}

    def _distinct(self, rows: Dataset) -> Dataset:
        if not self.drop_duplicates:
            return rows
        kept = first_of_each(self.contents(rows))
        if len(kept) == len(rows):
            return rows
        rank_zero_info(f"{len(rows) - len(kept):,} exact duplicates dropped, {len(kept):,} rows left.")
        return take(rows, kept)

    def _limited(self, raw: dict[str, Dataset]) -> dict[str, Dataset]:
        """Random subsets of splits that are larger than asked for."""
        limited = {}
        for split, rows in raw.items():
            limit = self.max_train_samples if split == "train" else self.max_eval_samples
            limited[split] = rows if limit is None or limit >= len(rows) else take(rows, self._subset(rows, limit))
        return limited

    def _subset(self, rows: Dataset, count: int) -> list[int]:
        by_class = self.classifies and not isinstance(rows[0].get(self.label_column), list)
        return choose(range(len(rows)), count, self.seed, self._flat_names(rows, "data") if by_class else None)

    # labels

    def _flat_names(self, rows: Dataset, split: str) -> list[str]:
        """Label names of rows; those of all words one behind the other where labels are lists."""
        need_column(self.label_column, rows.column_names, "label_column", f"The {split} data")
        values, numbers = rows[self.label_column][:], rows[ROW][:]
        if values and isinstance(values[0], list):
            numbers = [number for number, tags in zip(numbers, values, strict=True) for _ in tags]
            values = [tag for tags in values for tag in tags]
        return as_names(values, numbers, split, _class_names(rows.features[self.label_column]))

    def encoded_labels(self, rows: Dataset, split: str) -> list[int]:
        """Class numbers of rows (flat, as `_flat_names`)."""
        numbers = rows[ROW][:]
        names = self._flat_names(rows, split)
        if len(names) != len(numbers):
            numbers = [n for n, tags in zip(numbers, rows[self.label_column][:], strict=True) for _ in tags]
        return as_indices(names, self.label_names or [], numbers, split)

    def with_numbers(self, rows: Dataset, split: str, lengths: list[int]) -> Dataset:
        """Rows of files or arrays with ``length``, and with ``labels``, or ``_id`` where they are to be predicted."""
        if split == "predict":
            names = rows["file"][:] if "file" in rows.column_names else rows[ROW][:]
            rows = rows.add_column("_id", [str(name) for name in names])
        else:
            rows = rows.add_column("labels", self.encoded_labels(rows, split))
        return rows.add_column("length", lengths)


def _class_names(feature: Any) -> list[str] | None:
    """Names of a ``ClassLabel``, also of a list of them."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _numbered(rows: Dataset) -> Dataset:
    """Rows with their number in the source, which messages and predictions name."""
    return rows if ROW in rows.column_names else rows.add_column(ROW, list(range(len(rows))))
