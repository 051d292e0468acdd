"""Where rows come from: files, folders and hub ids, as `datasets.Dataset` tables in memory."""

from __future__ import annotations

import csv
import difflib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.files import locate
from lightning_peft.lightning_packages import rank_zero_info
from lightning_peft.paths import missing

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "eval"),
}
_CHUNK = 10_000
#: in place of a file: the lines of standard input
STANDARD_INPUT = "-"


def split_name(name: str) -> str | None:
    """The split a file, folder or key stands for, or None.

    >>> split_name("dev"), split_name("test"), split_name("notes")
    ('validation', 'test', None)
    """
    return next((split for split, aliases in _SPLITS.items() if name.lower() in aliases), None)


def read(
    data: str | Mapping[str, str], load_kwargs: Mapping[str, Any] | None = None, cache_dir: str | None = None
) -> dict[str, Dataset]:
    """Rows by split, named as the source names them (one file without splits is ``train``).

    Args:
        data: file, folder, ``pkg://`` path, hub id, or ``{split: file}``.
        load_kwargs: further arguments of `datasets.load_dataset` (``name``, ``revision``, ``sep`` …).
        cache_dir: where `datasets` may keep tables; without it local files are read into memory and nothing is written
            (what comes from the hub is kept in its usual cache).

    Raises:
        ConfigError: nothing there, nothing in it, or not readable.
    """
    if isinstance(data, Mapping):
        splits = {key: _table([_file(path)], load_kwargs, cache_dir) for key, path in data.items()}
    else:
        path = _path(data)
        if path is None:
            splits = _hub(data, load_kwargs, cache_dir)
        elif path.is_dir():
            splits = _folder(path, load_kwargs, cache_dir)
        else:
            splits = {"train": _table([path], load_kwargs, cache_dir)}
    if not splits or not any(len(rows) for rows in splits.values()):
        raise ConfigError(f"data={data!r} has no rows.")
    return splits


def read_lines(lines: Iterable[str], columns: Sequence[str]) -> Dataset:
    """Rows from lines: each a JSON object with the columns, or each the text of the one column that is read.

    Raises:
        ConfigError: no line, or plain lines where several columns are read.

    >>> read_lines(["a good one\\n", "\\n"], ["text"])["text"][:]
    ['a good one']
    """
    import datasets

    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError(
            "Standard input has no lines. Give a text a line: echo 'some text' | lightning-peft predict …"
        )
    rows = [_json_object(text) for text in texts]
    if all(row is not None for row in rows):
        return datasets.Dataset.from_list(rows)
    if len(columns) != 1:
        raise ConfigError(
            f"Standard input has lines of text, but several columns are read: {', '.join(columns)}. Give a JSON object"
            " a line."
        )
    return datasets.Dataset.from_dict({columns[0]: texts})


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _path(data: str) -> Path | None:
    """The file or folder meant, or None for a hub id."""
    try:
        place = locate(data)
    except PEFTError as error:
        raise ConfigError(str(error)) from None
    try:
        exists = place.exists()
    except OSError as error:  # a name that is too long for any file
        raise missing(place) from error
    if exists:
        return place
    local = "://" in data or data.startswith(("/", "./", "../", "~")) or data.count("/") > 1
    if local or place.suffix.lower() in KINDS:
        raise ConfigError(_missing(data, place))
    return None


def _missing(data: str, place: Path) -> str:
    there: list[str] = []
    if os.path.isdir(place.parent):
        there = sorted(p.name for p in place.parent.glob("*") if not p.name.startswith("."))
    near = difflib.get_close_matches(place.name, there, n=3, cutoff=0.5) or there[:5]
    return f"data={data!r} does not exist." + (f" {_folder_name(place)} has: {', '.join(near)}." if near else "")


def _folder_name(place: Path) -> str:
    return "This folder" if place.parent == Path() else str(place.parent)


def _file(path: str) -> Path:
    place = _path(str(path))
    if place is None or place.is_dir():
        raise ConfigError(f"data: {str(path)!r} is not a file; give one csv, json(l), parquet or txt file a split.")
    return place


def _table(files: Sequence[Path], load_kwargs: Mapping[str, Any] | None, cache_dir: str | None) -> Dataset:
    """Files of one kind as one table, typed by `datasets`."""
    kind = KINDS.get(files[0].suffix.lower())
    if kind is None:
        raise ConfigError(f"{files[0]}: cannot tell the kind of file; known are {', '.join(KINDS)}.")
    for file in files:
        if file.stat().st_size == 0:
            raise ConfigError(f"{file} is empty.")
    names = [str(file) for file in files]
    options = {"sep": _separator(files[0])} if kind == "csv" else {}
    options = {"data_files": {"train": names}, **options, **(load_kwargs or {})}
    # streaming reads the file without datasets' own copy in Arrow; what it writes all the same is a lock file
    with nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory() as place:
        try:
            rows = _load(kind, on_disk=bool(cache_dir), cache_dir=place, **options)
        except Exception as error:  # pandas, pyarrow and datasets each raise their own kinds
            raise ConfigError(f"{names[0]} cannot be read as {kind}: {_why(error)}") from None
    if not len(rows):
        raise ConfigError(f"{names[0]} has no rows.")
    return rows


def _separator(file: Path) -> str:
    """What stands between the columns of a table: a tab in .tsv; else what divides its first line most, or a comma.

    The first line holds names, so unlike the rows it has few of these signs in texts.
    """
    if file.suffix.lower() == ".tsv":
        return "\t"
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = lines.readline()
    columns = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in (",", ";", "\t", "|")}
    return max(columns, key=lambda sign: columns[sign])


def _load(kind: str, on_disk: bool, **options: Any) -> Dataset:
    import datasets

    if on_disk:
        return datasets.load_dataset(kind, split="train", **options)
    import pyarrow as pa

    rows = datasets.load_dataset(kind, split="train", streaming=True, **options)
    tables = list(rows.with_format("arrow").iter(batch_size=_CHUNK))
    if not tables:
        return datasets.Dataset.from_dict({})
    info = datasets.DatasetInfo(features=rows.features) if rows.features else None
    # some releases of datasets (3.0 to 5.0) give one table a row, and a table of so many pieces takes all memory
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    return datasets.Dataset(table, info=info)


def _why(error: Exception) -> str:
    """The innermost cause in one line: datasets wraps parser errors in its own."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _hub(data: str, load_kwargs: Mapping[str, Any] | None, cache_dir: str | None) -> dict[str, Dataset]:
    import datasets

    if data == "pandas":  # a reader that datasets brings along, as it does "csv"
        raise ConfigError("data='pandas' reads pickles, which can run code. Save the table as csv or parquet.")
    try:
        found = datasets.load_dataset(data, cache_dir=cache_dir, **load_kwargs or {})
    except Exception as error:  # network, missing id, missing config name: many kinds
        here = difflib.get_close_matches(data, [p.name for p in Path().iterdir()], n=1)
        near = f" Did you mean {here[0]!r}?" if here else ""
        raise ConfigError(
            f"data={data!r} is no file or folder here, and as a hub id it cannot be loaded: {_why(error)}.{near}"
        ) from None
    return {str(key): rows for key, rows in found.items()} if isinstance(found, dict) else {"train": found}


def _folder(path: Path, load_kwargs: Mapping[str, Any] | None, cache_dir: str | None) -> dict[str, Dataset]:
    """A folder of split files, of one kind of file, of ``<label>/*.txt``, or one written by ``save_to_disk``."""
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path), keep_in_memory=True)
        return {str(key): rows for key, rows in saved.items()} if isinstance(saved, dict) else {"train": saved}
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in KINDS and f.is_file() and f.suffix != ".txt")
    named = {split: [f for f in files if split_name(f.stem) == split] for split in _SPLITS}
    if any(named.values()):
        return {split: _table(found, load_kwargs, cache_dir) for split, found in named.items() if found}
    if len({f.suffix for f in files}) == 1:
        return {"train": _table(files, load_kwargs, cache_dir)}
    return {split: _texts(rows) for split, rows in labelled_files(path, (".txt",)).items()}


def file_tables(path: Path, suffixes: Sequence[str]) -> dict[str, Dataset]:
    """Columns ``file`` and ``label`` by split; a folder that holds the files themselves has no labels."""
    import datasets

    if not os.path.exists(path):  # a name may be too long for any file, which a look into the folder does not forgive
        raise ConfigError(_missing(str(path), path))
    flat = sorted(str(f) for f in path.glob("*") if f.suffix.lower() in suffixes)
    if flat:
        return {"train": datasets.Dataset.from_dict({"file": flat})}
    found = labelled_files(path, suffixes)
    return {
        split: datasets.Dataset.from_dict({"file": [str(f) for f, _ in rows], "label": [label for _, label in rows]})
        for split, rows in found.items()
    }


def labelled_files(path: Path, suffixes: Sequence[str]) -> dict[str, list[tuple[Path, str]]]:
    """(file, label) pairs by split of ``<label>/*`` or ``<split>/<label>/*``, in sorted order.

    Raises:
        ConfigError: no such files, with the files there are.
    """
    if not os.path.exists(path):
        raise ConfigError(_missing(str(path), path))
    if not path.is_dir():
        raise ConfigError(f"data={str(path)!r} is a file; give a folder with <label>/*{' or *'.join(suffixes)}.")
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    splits = {f: split_name(f.name) for f in folders}
    by_split = [f for f in folders if splits[f] and any(child.is_dir() for child in f.iterdir())]
    roots = {str(splits[f]): f for f in by_split} or {"train": path}
    found = {split: _labelled(root, suffixes) for split, root in roots.items()}
    found = {split: rows for split, rows in found.items() if rows}
    if not found:
        there = Counter(f.suffix or f.name for f in path.rglob("*") if f.is_file()).most_common(4)
        has = ", ".join(f"{count} {suffix}" for suffix, count in there) or "no files"
        raise ConfigError(f"{path} has no files <label>/*{' or *'.join(suffixes)}; it has {has}.")
    return found


def _labelled(root: Path, suffixes: Sequence[str]) -> list[tuple[Path, str]]:
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    return [(f, folder.name) for folder in folders for f in sorted(folder.rglob("*")) if f.suffix.lower() in suffixes]


def _texts(files: Sequence[tuple[Path, str]]) -> Dataset:
    """Columns of text files: ``text`` (all), ``title`` (first line), ``body`` (the rest), ``label``, ``file``."""
    import datasets

    texts, odd = [], []
    for file, _ in files:
        content = file.read_bytes()
        try:
            texts.append(content.decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            texts.append(content.decode("latin-1").strip())
            odd.append(f"{file.parent.name}/{file.name}")
    if odd:
        rank_zero_info(f"{len(odd)} of {len(files):,} files not UTF-8, read as latin-1 ({', '.join(odd[:3])}).")
    parts = [text.partition("\n") for text in texts]
    return datasets.Dataset.from_dict(
        {
            "text": texts,
            "title": [title.strip() for title, _, _ in parts],
            "body": [body.strip() for _, _, body in parts],
            "label": [label for _, label in files],
            "file": [f"{file.parent.name}/{file.name}" for file, _ in files],
        }
    )
