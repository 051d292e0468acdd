"""Templates with places: virtual tokens around the text, and a word to be found."""

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_peft import PEFT, PTuning, TaskModule, load_from_checkpoint
from lightning_peft.data import TextDataModule
from lightning_peft.data.template import Places, word_ids
from lightning_peft.errors import ConfigError
from tests.data.conftest import WORDS, write_csv

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ROWS = [{"a": " ".join(WORDS[i : i + 3 + i % 4]), "b": WORDS[40 + i % 3], "label": "xyz"[i % 3]} for i in range(12)]
VERBALIZER = {"x": "w50", "y": ["w51", "w52"], "z": "w53"}
TEMPLATE = "{prompt:2} {a} w30 {prompt:1} {mask} w31"


@pytest.fixture
def table(tmp_path):
    return write_csv(tmp_path / "rows.csv", ROWS)


def ready(table, tokenizer, **options):
    given = {"val_size": 0, "test_size": 0, "batch_size": 4, "placeholder_id": 99, "template": TEMPLATE} | options
    data = TextDataModule(str(table), tokenizer=tokenizer, **given)
    data.setup("fit")
    return data


def test_masked_and_causal_rows(table, encoder_tokenizer, decoder_tokenizer):
    encode, decode = encoder_tokenizer.convert_tokens_to_ids, decoder_tokenizer.convert_tokens_to_ids
    for tokenizer, ids, task in (
        (encoder_tokenizer, encode, "masked-cloze"),
        (decoder_tokenizer, decode, "causal-cloze"),
    ):
        data = ready(table, tokenizer, task=task, verbalizer=VERBALIZER)
        assert data.label_words == [[ids("w50")], [ids("w51"), ids("w52")], [ids("w53")]]
        batch = next(iter(data.train_dataloader()))
        rows = {}
        for row, mask, at in zip(batch["input_ids"], batch["attention_mask"], batch["answer_at"], strict=True):
            rows[tuple(row[mask == 1].tolist())] = int(at)
        expected = {}
        for row in ROWS:
            text = [99, 99, *ids(row["a"].split()), ids("w30"), 99]
            if task == "masked-cloze":
                whole = (ids("[CLS]"), *text, ids("[MASK]"), ids("w31"), ids("[SEP]"))
                expected[whole] = whole.index(ids("[MASK]"))
            else:  # the answer stands behind the last token
                expected[(ids("<s>"), *text)] = len(text)
        assert len(rows) == 4 and rows.items() <= expected.items()


def test_the_last_column_is_cut_and_the_rest_stays(encoder_tokenizer):
    places = Places.of("w1 {b} {prompt:2} w2 {a} w3 {mask} w4", cloze=True)
    ids, at, cut = places.encode(encoder_tokenizer, {"a": "w10 w11 w12 w13", "b": "w20"}, 12)
    words = ["[CLS]", "w1", "w20", None, None, "w2", "w10", "w11", "w3", "[MASK]", "w4", "[SEP]"]
    expected = [-1 if w is None else encoder_tokenizer.convert_tokens_to_ids(w) for w in words]
    assert (ids, at, cut) == (expected, 9, True)
    assert not places.encode(encoder_tokenizer, {"a": "w10", "b": "w20"}, 12)[2]
    with pytest.raises(ConfigError, match=r"max_length=6 is too small: the template alone takes 7"):
        places.encode(encoder_tokenizer, {"a": "w10", "b": "w20"}, 6)


@pytest.mark.parametrize(("task", "kind"), [("masked-cloze", "bert"), ("causal-cloze", "llama")])
def test_trains_resumes_and_predicts(task, kind, table, encoder_tokenizer, decoder_tokenizer, tmp_path):
    """The loss is the cross entropy of the mean logits of each class's words; a checkpoint needs no data module."""
    tokenizer = encoder_tokenizer if kind == "bert" else decoder_tokenizer
    network = {"model_type": kind, "vocab_size": len(tokenizer), **SIZES}
    data = TextDataModule(
        str(table), task, template=TEMPLATE, verbalizer=VERBALIZER, tokenizer=tokenizer, val_size=3, test_size=3
    )
    module = TaskModule(network, task)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, callbacks=[PEFT(PTuning(3))], default_root_dir=tmp_path, **options)
    trainer.fit(module, data)
    assert module.label_names == ["x", "y", "z"]
    batch = next(iter(data.val_dataloader()))
    assert (batch["input_ids"] == len(tokenizer)).sum() == 9  # three placeholders in each row, by the model's own id
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = module.eval().model(**inputs).logits[torch.arange(3), batch["answer_at"]]
        scores = torch.stack([logits[:, ids].mean(1) for ids in data.label_words], 1)
        loss = torch.nn.functional.cross_entropy(scores, batch["labels"])
    assert trainer.validate(module, data, verbose=False)[0]["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    again = load_from_checkpoint(TaskModule, path)
    rows = again.eval().predict_step(batch | {"meta": {"id": ["1", "2", "3"]}}, 0)
    assert [r["label"] for r in rows] == ["xyz"[int(i)] for i in scores.argmax(1)]


def test_an_ordinary_head_takes_virtual_tokens_too(table, encoder_tokenizer, tmp_path):
    network = {"model_type": "bert", "vocab_size": len(encoder_tokenizer), **SIZES}
    data = TextDataModule(
        str(table), template="{a} {prompt:2} {b}", tokenizer=encoder_tokenizer, val_size=3, test_size=3
    )
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for method, why in ((PTuning(3), "places for 2 virtual tokens, the model has 3"), (None, "has no PTuning")):
        callbacks = [] if method is None else [PEFT(method)]
        trainer = Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **options)
        with pytest.raises(ConfigError, match=why):
            trainer.fit(TaskModule(network, "sequence-classification"), data)
    trainer = Trainer(max_epochs=1, callbacks=[PEFT(PTuning(2))], default_root_dir=tmp_path, **options)
    trainer.fit(TaskModule(network, "sequence-classification"), data)
    assert "answer_at" not in next(iter(data.train_dataloader()))


def test_errors(table, encoder_tokenizer, decoder_tokenizer):
    cloze = {"task": "masked-cloze", "verbalizer": VERBALIZER}
    for options, why in (
        ({"task": "masked-cloze", "template": "{a}"}, "needs one {mask}"),
        ({"verbalizer": VERBALIZER}, "verbalizer belongs to"),
        ({"task": "causal-lm"}, "belongs to causal-cloze"),
        ({"text_pair_column": "b"}, "name both columns"),
    ):
        with pytest.raises(ConfigError, match=why):
            ready(table, encoder_tokenizer, **options)
    for verbalizer, why in (
        ({"x": "w1", "y": "w2"}, r"names the labels \['x', 'y'\], the data has \['x', 'y', 'z'\]"),
        (VERBALIZER | {"z": "w1 w2"}, "'w1 w2' is not one token"),
        (VERBALIZER | {"z": "nowhere"}, "'nowhere' is not one token"),
        (VERBALIZER | {"z": "w50"}, "'w50' stands for 'x' and for 'z'"),
    ):
        with pytest.raises(ConfigError, match=why):
            word_ids(encoder_tokenizer, ["x", "y", "z"], verbalizer, spaced=True)
    with pytest.raises(ConfigError, match="reads nothing behind"):
        ready(table, decoder_tokenizer, **cloze | {"task": "causal-cloze", "template": "{a} {mask} {prompt:2}"})


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{text.__class__}", "no column 'text.__class__'"),
        ("{text[0]}", r"no column 'text\[0\]'"),
        ("{text.__class__.__mro__[1].__subclasses__}", "no column"),
        ("{text!r}", r"{text!r} is no column name. A column stands in braces by its name alone"),
        ("{text:>99999999}", r"{text:>99999999} is no column name"),
        ("{text:{text}}", r"is no column name"),
        ("{text} {}", r"{} is no column name"),
        ("{prompt:999999999999} {text}", "asks for more than 100,000 virtual tokens"),
    ],
)
def test_fields_are_names_of_columns_and_nothing_else(tmp_path, encoder_tokenizer, template, why):
    """A template may come from a file: it reads columns, and no attribute of what is in them."""
    rows = [{"text": row["a"], "label": row["label"]} for row in ROWS]
    with pytest.raises(ConfigError, match=why):
        data = TextDataModule(
            str(write_csv(tmp_path / "rows.csv", rows)), template=template, tokenizer=encoder_tokenizer
        )
        data.setup("fit")
