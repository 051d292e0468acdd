"""Tiny tokenizers and files."""

import csv
import json

import pytest

WORDS = [f"w{i}" for i in range(60)]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def build(special, template=None, **names):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*special, *WORDS, "not", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    if template:
        used = [(t, vocab[t]) for t in special if t in template[1]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template[0], pair=template[1], special_tokens=used
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


@pytest.fixture(scope="session")
def encoder_tokenizer():
    """BERT-like: [CLS] text [SEP]."""
    return build(
        ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"),
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def decoder_tokenizer():
    """Llama-like: begin token, no pad token, no chat template."""
    return build(
        ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"),
        ("<s> $A", "<s> $A $B"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture
def chat_tokenizer(decoder_tokenizer):
    decoder_tokenizer.chat_template = CHAT
    return decoder_tokenizer


def rows_of(count, labels=("neg", "pos")):
    """Texts of 1 to 30 words, all different."""
    rows = []
    for i in range(count):
        length = 1 + (i * 7) % 30
        text = " ".join(WORDS[(i + j * (1 + i // 60)) % 60] for j in range(length))
        rows.append({"text": text, "label": labels[i % len(labels)], "n": i})
    return rows


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def table(tmp_path):
    return write_csv(tmp_path / "rows.csv", rows_of(80))
