"""Files as they should not be: every function takes dice and good parts, and writes one bad file."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_peft.files import SECTION, checksum
from lightning_peft.header import shortened

Dice = random.Random
NAMES = [
    "os.system",
    "builtins.eval",
    "Method",
    "LoRA.__init__",
    "torch.nn.Linear",
    "",
    "lora",
    "AdapterFusion",
    "PEFT",
]
NAMES += [
    "../../LoRA",
    "LoRA\0",
    "__import__('os').system('true')",
    "VeRA",
    "AdaLoRA",
    "PrefixTuning",
    "FullFineTuning",
]
#: names that lead upward, turn the direction of writing, move the cursor, or take four bytes a letter
ODD = ["..", "a/../../b", "\u202egpj.exe", "\u2066x\u2069", "\U0001f600\U0001d11e", "\x1b[2J\x07", "a\nb"]
ODD += ["\u00e9" * 200]
NAMES += ODD
NAMES += ["FullFineTuning", "BitFit", "DoRA", "QLoRA", "Houlsby", "PromptTuning", "IA3"]
VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**18,
    -(10**9),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "../../etc/passwd",
]
VALUES += [
    "all-linear",
    "re:(a+)+$",
    [],
    [1, 2],
    ["0"],
    [""],
    {},
    {"a": 1},
    {"": ""},
    [[[]]],
    "\ud83d\ude00",
    "0" * 64,
    b"\0",
    "\ud800",
    "{text.__class__}",
    {"class_path": "evil_module.Loss"},
    {"trust_remote_code": True},
    *ODD,
]


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


# ---- bytes -----------------------------------------------------------------------------------------------------------
def truncated(dice: Dice, data: bytearray) -> bytes:
    """The start of a file."""
    return bytes(data[: dice.randrange(len(data))])


def flipped(dice: Dice, data: bytearray) -> bytes:
    """A few bits the other way round."""
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def flipped_early(dice: Dice, data: bytearray) -> bytes:
    """A bit in what describes the file."""
    data[dice.randrange(min(len(data), 1500))] ^= 1 << dice.randrange(8)
    return bytes(data)


def overwritten(dice: Dice, data: bytearray) -> bytes:
    """A block of zeros or of noise."""
    start = dice.randrange(len(data))
    size = min(dice.choice((1, 8, 512)), len(data) - start)
    data[start : start + size] = bytes(size) if dice.random() < 0.5 else dice.randbytes(size)
    return bytes(data)


def stretched(dice: Dice, data: bytearray) -> bytes:
    """Bytes more, in the midst or at the end."""
    at = dice.choice((len(data), dice.randrange(len(data))))
    return bytes(data[:at] + dice.randbytes(dice.choice((1, 7, 4096))) + data[at:])


def spliced(dice: Dice, data: bytearray) -> bytes:
    """The parts of a file in another order."""
    at = dice.randrange(1, len(data))
    return bytes(data[at:] + data[:at])


def declared(dice: Dice, data: bytearray) -> bytes:
    """Eight bytes at the start that declare another size of what follows; or noise, or nothing."""
    size = dice.choice((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) * 2))
    return dice.choice(
        (struct.pack("<Q", size) + bytes(data[8:]), dice.randbytes(64), b"", b"{}", b"\x80\x02.", b"PK\x03\x04")
    )


BYTES: list[Callable[[Dice, bytearray], bytes]] = [truncated, flipped, flipped, flipped_early, overwritten, stretched]
BYTES += [spliced, declared]


# ---- content ---------------------------------------------------------------------------------------------------------
def section_field(dice: Dice, state: dict, info: dict) -> None:
    """A field of the section gone, or of another value."""
    place: Any = info
    while True:
        key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
        deeper = isinstance(place[key], (dict, list)) and len(place[key]) > 0
        if not deeper or dice.random() < 0.25:
            break
        place = place[key]
    if isinstance(place, dict) and dice.random() < 0.25:
        del place[key]
    else:
        place[key] = copy.deepcopy(dice.choice(VALUES))


def method_name(dice: Dice, state: dict, info: dict) -> None:
    """A class that is no method, or another one."""
    info["methods"][0]["type"] = dice.choice(NAMES)


def method_field(dice: Dice, state: dict, info: dict) -> None:
    """A field of the method, or one it does not have."""
    config = info["methods"][0]["config"]
    config[dice.choice([*config, "r", "evil", "__class__"])] = copy.deepcopy(dice.choice(VALUES))


def targets(dice: Dice, state: dict, info: dict) -> None:
    """Modules that are no targets, are not there, or are named twice."""
    names = info["methods"][0]["targets"]
    odd = ["", ".", "..", "net", "1", "0.weight", "__class__", "../x", "0.base", "training", "a" * 3000, *names, *ODD]
    names[dice.randrange(len(names))] = dice.choice(odd)
    if dice.random() < 0.3:
        info[dice.choice(("modules_to_save", "new_modules"))] = [dice.choice(odd)]
    if dice.random() < 0.2:
        info["methods"] = info["methods"] * 2


def tensor(dice: Dice, state: dict, info: dict) -> None:
    """A tensor of another shape, type, value or name; gone; or one more."""
    name = dice.choice(list(state))
    t = state[name]
    kinds: list[Any] = [
        t.T.contiguous(),
        t[:1].clone(),
        t.reshape(-1),
        t[..., None],
        t.new_zeros(0),
        t.new_zeros(64, 64),
    ]
    kinds += [t.to(torch.int64), t.bool(), t.to(torch.complex64), t.to(torch.int8)]
    kinds += [
        torch.full_like(t, float("nan")),
        torch.full_like(t, float("inf")),
        t.clone().index_fill_(0, torch.tensor([0]), float("nan")),
    ]
    change = dice.randrange(len(kinds) + 4)
    if change < len(kinds):
        state[name] = kinds[change]
    elif change == len(kinds):
        del state[name]
    else:
        other = dice.choice(("../../x", "0.base.weight", "", "\0", "net.0.weight", "__class__", name + ".x", *ODD))
        state[other] = state.pop(name) if change == len(kinds) + 1 else t.clone()
        if change == len(kinds) + 3:
            info["keys"] = [other if k == name else k for k in info["keys"]]
            state.pop(name, None)


CONTENT = [section_field, section_field, method_name, method_field, method_field, targets, tensor, tensor]


def odd_tensors(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """What only a pickle can hold in the place of a tensor."""
    state = checkpoint["state_dict"]
    name = dice.choice(list(state))
    huge = torch.zeros(1).expand(10**6, 10**6)
    odd = [huge, state[name].to_sparse(), torch.empty_like(state[name], device="meta"), 3, "x", None, [state[name]], {}]
    state[name] = dice.choice(odd)


def payload(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """Code somewhere in the pickle."""
    place = dice.choice(
        (checkpoint, checkpoint["state_dict"], checkpoint[SECTION], checkpoint.setdefault("hyper_parameters", {}))
    )
    place[dice.choice(("x", *place))] = Payload(marker)


def greedy(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """A pickle that takes memory by naming a number."""

    class Greedy:
        def __reduce__(self) -> tuple:
            return dice.choice(((bytearray, (10**10,)), (torch.Tensor, (10**11,)), (torch.FloatTensor, (10**11,))))

    checkpoint["x"] = Greedy()


def shape_of_checkpoint(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """Parts of a checkpoint that are no dictionaries, or gone."""
    key = dice.choice((SECTION, "state_dict"))
    if dice.random() < 0.4:
        del checkpoint[key]
    else:
        checkpoint[key] = dice.choice([v for v in VALUES if v != {}])


def resume_part(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """What a resume needs, in another form."""
    checkpoint[SECTION]["resume"] = dice.choice([v for v in VALUES if v] + [{"methods": v} for v in VALUES])


def resume_field(dice: Dice, checkpoint: dict, marker: Path) -> None:
    """What Lightning itself resumes from, of another type; moments of another shape."""
    if dice.random() < 0.5:
        key = dice.choice(("optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step"))
        checkpoint[key] = dice.choice(("x", 2.5, [3], [[]], ["x"], [None]) + (({},) if key[-1] != "s" else ()))
    else:
        entry = dice.choice(list(checkpoint["optimizer_states"][0]["state"].values()))
        other = (torch.zeros(7, 7), torch.full_like(entry["exp_avg"], float("nan")), torch.zeros(()))
        entry[dice.choice(("exp_avg", "exp_avg_sq"))] = dice.choice(other)


PICKLED = [odd_tensors, payload, greedy, shape_of_checkpoint]


# ---- files -----------------------------------------------------------------------------------------------------------
def write_safetensors(path: Path, state: dict, info: Any, dice: Dice) -> None:
    """Any content in the format, as an attacker would: the checksum right, or left out as in older files."""
    from safetensors.torch import save_file

    tensors = {n: t.contiguous().clone() for n, t in state.items()}
    if isinstance(info, dict):
        info.pop("checksum", None)
        with contextlib.suppress(KeyError, TypeError):
            info = shortened(info, tensors) if dice.random() < 0.5 else info
        if dice.random() < 0.5:
            info["checksum"] = checksum(tensors, info)
    text = json.dumps(info)
    form = dice.random()
    if form < 0.04:
        text = "[" * 100_000 + "]" * 100_000
    elif form < 0.08:
        text = text.replace("{", '{"keys": [], "keys": [],', 1)
    elif form < 0.12:
        text = dice.choice(("[]", "3", "null", '"x"', "{", "", "NaN", '{"format_version": ' + "9" * 5000 + "}"))
    save_file(tensors, path, metadata={"format": "pt", SECTION: text})


def write_bomb(path: Path, dice: Dice) -> None:
    """A small archive that unpacks to a gigabyte, or declares to."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("data.pkl", "data/0", "version"):
            with archive.open(f"archive/{name}", "w", force_zip64=True) as file:
                for _ in range(dice.choice((1, 8))):
                    file.write(bytes(2**22))
