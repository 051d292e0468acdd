"""One table of what a training step costs, against the frozen model, and of everything around training; and a CSV.

    python -m tests.benchmarks.run                    # SmolLM2 and MiniLM, float32 and bfloat16
    python -m tests.benchmarks.run --quick            # six layers, few rounds, float32
    python -m tests.benchmarks.run --models smollm2 --dtypes float32 --rows LoRA --rounds 15
    python -m tests.benchmarks.run --device cuda --models llama-1b --dtypes bfloat16

The floor is forward and backward to the inputs of the frozen model. Per row and contestant: time as the median of the
ratios to the floor in the same round (all take turns), FLOPs with in-place products, bytes alive between forward and
backward whoever holds them, operators dispatched beyond the floor's, and peak bytes beside the parameters.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.benchmarks import around
from tests.benchmarks.contestants import base, batch, contestants, floor
from tests.benchmarks.measure import counts, ratio, times

FIELDS = ("model", "dtype", "row", "who", "time", "flops", "kept", "dispatches", "peak")


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    table: list[dict[str, Any]] = []
    print(f"{args.device}, {args.threads} threads, {args.rounds} rounds, {args.batch} rows of {args.length} tokens")
    print(("{:<9}{:<10}{:<20}{:<7}" + "{:>11}" * 5).format(*FIELDS))
    for name in args.models:
        for dtype in args.dtypes:
            net = base(name, args.layers, getattr(torch, dtype), args.device)
            for line in _lines(net, args):
                table.append({"model": name, "dtype": dtype} | line)
                print(_text(table[-1]), flush=True)
    others = [] if args.only_table else [*around.small_tensors(args), *around.headline(args), *around.operations(args)]
    for line in others:
        print(f"{line['what']:<58}{line['value']:>12.4g} {line['unit']}", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*FIELDS, "what", "value", "unit"])
            writer.writeheader()
            writer.writerows([*table, *others])


def _lines(net: nn.Module, args: Any) -> Iterator[dict[str, Any]]:
    inputs = batch(net, args.batch, args.length)
    ground, rows = _ready(floor(net), args), contestants(net)
    least = _counts(ground, inputs, args)
    for row, parties in rows.items():
        if args.rows and not any(row.startswith(r) for r in args.rows):
            continue
        nets, found = {"floor": ground}, {}
        for who, build in parties.items():
            try:
                net = _ready(build(), args)
                found[who], nets[who] = _counts(net, inputs, args), net
            except ValueError as error:  # peft has no prefixes for encoders
                if who == "ours":
                    raise
                print(f"{row}: {who} refuses ({error})")
        steps = {who: (lambda n=n: _train(n, inputs)) for who, n in nets.items()}
        seconds = times(steps, args.rounds, args.device, args.clock) if args.rounds else {}
        for who, count in found.items():
            line: dict[str, Any] = {k: count[k] / least[k] if least[k] else None for k in ("flops", "kept", "peak")}
            line["dispatches"] = count["dispatches"] - least["dispatches"]
            line["time"] = ratio(seconds, who, "floor") if seconds else None
            yield {"row": row, "who": who} | line
        del nets, steps
        gc.collect()


def _ready(net: nn.Module, args: Any) -> nn.Module:
    net.train()
    if args.checkpointing:
        inner = net.get_base_model() if hasattr(net, "get_base_model") else net
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    return torch.compile(net) if args.compile else net


def _train(net: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    net.zero_grad(set_to_none=True)
    net(**inputs).loss.backward()


def _counts(net: nn.Module, inputs: dict[str, torch.Tensor], args: Any) -> dict[str, float]:
    if args.compile:  # a compiled graph shows the counter nothing
        return dict.fromkeys(("flops", "kept", "peak", "dispatches"), 0)
    return counts(net, lambda n: n(**inputs).loss)


def _text(line: dict[str, Any]) -> str:
    cells = [f"{'-' if line[k] is None else format(line[k], '.3f')!s:>11}" for k in ("time", "flops", "kept")]
    cells += [f"{line['dispatches']:>+11.0f}", f"{'-' if line['peak'] is None else format(line['peak'], '.3f')!s:>11}"]
    return f"{line['model']:<9}{line['dtype']:<10}{line['row']:<20}{line['who']:<7}" + "".join(cells)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "minilm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="*", help="only rows whose name starts so")
    parser.add_argument("--layers", type=int)
    for name, value in (("rounds", 9), ("threads", 2), ("batch", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: seconds of this process")
    for name in ("checkpointing", "compile", "quick", "only-table"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--csv")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds, args.dtypes = args.layers or 6, min(args.rounds, 3), ["float32"]
    return args


if __name__ == "__main__":
    main()
