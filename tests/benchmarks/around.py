"""What is around a step: the loss where labels count, start-up, injection, files, swapping, merging."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_peft import LoRA, adapter_state_dict, inject, load_adapter, merge, save_adapter, unmerge
from lightning_peft.task.losses import TokenLoss
from tests.benchmarks.contestants import base, batch, contestants, floor, ours
from tests.benchmarks.measure import counts, ratio, times

_LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def headline(args: Any, length: int = 256, masked: float = 0.92) -> Iterator[dict[str, Any]]:
    """LoRA on SmolLM2 with most labels masked: our loss against transformers' own."""
    net = ours(base("smollm2", args.layers, device=args.device), LoRA(r=8)).train()
    inputs, loss = batch(net, args.batch, length, masked), TokenLoss("causal-lm")
    labels = inputs.pop("labels")

    def theirs(n: Any) -> torch.Tensor:
        return n(**inputs, labels=labels).loss

    def mine(n: Any) -> torch.Tensor:
        return loss(n, inputs, labels)[0]

    def step(value: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            value(net).backward()

        return run

    name = f"loss, {masked:.0%} of {length} labels masked:"
    a, b = counts(net, mine), counts(net, theirs)
    for key in ("peak", "kept"):
        yield _line(f"{name} {key} / transformers' own", a[key] / b[key], "×")
    if args.rounds:
        seconds = times({"ours": step(mine), "theirs": step(theirs)}, args.rounds, args.device, args.clock)
        yield _line(f"{name} step / transformers' own", ratio(seconds, "ours", "theirs"), "×")


def small_tensors(args: Any) -> Iterator[dict[str, Any]]:
    """LoRA where calls dominate: 16 tiny layers, one row of 8 tokens, one thread; a step, and inference."""
    net = base("tiny", device=args.device)
    rows = contestants(net)["LoRA all-linear"]
    nets = {"floor": floor(net)} | {who: build() for who, build in rows.items()}
    inputs = batch(net, 1, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for what in ("step", "inference"):
        runs = {}
        for who, each in nets.items():
            each.train(what == "step")
            runs[who] = _step(each, inputs) if what == "step" else _forward(each, inputs)
        seconds = times(runs, max(args.rounds * 4, 1), args.device, args.clock)
        for who in rows:
            yield _line(
                f"tiny Llama, 16 layers, 1 × 8 tokens: {what}, {who} / floor", ratio(seconds, who, "floor"), "×"
            )
    torch.set_num_threads(threads)


def _step(net: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad(set_to_none=True)
        net(**inputs).loss.backward()

    return run


def _forward(net: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            net(**inputs)

    return run


def operations(args: Any) -> Iterator[dict[str, Any]]:
    """Start-up, injection, save, load, swap, merge, merged inference, on this machine as it is now."""
    yield from _imports()
    with torch.device("meta"):
        config = transformers.LlamaConfig(**_LLAMA_70B)
        big = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    for clock in (time.process_time, time.perf_counter):
        unit = "s" if clock is time.perf_counter else "s of CPU"
        yield _line(
            "injection, all-linear, 560 layers of a 70B topology",
            _seconds(inject, big.pop(), LoRA(), clock=clock),
            unit,
        )
    net = base("smollm2", args.layers, device=args.device)
    model = ours(net, LoRA(r=8)).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        yield _line("save_adapter, SmolLM2 r=8", _seconds(save_adapter, model, path), "s")
        tensors = sum(t.numel() * t.element_size() for t in adapter_state_dict(model).values())
        yield _line("adapter file beyond its tensors", path.stat().st_size - tensors, "bytes")
        yield _line("lightning-peft inspect, interpreter included", _command("inspect", str(path)), "s")
        yield _line("load_adapter over the same method (swap)", _seconds(load_adapter, model, path), "s")
        yield _line("load_adapter into a bare base", _seconds(load_adapter, ours_base(net), path), "s")
    yield _line("merge", _seconds(merge, model), "s")
    inputs = {k: v for k, v in batch(net, args.batch, args.length).items() if k != "labels"}
    yield from _inference(net, model, inputs, args)
    yield _line("unmerge", _seconds(unmerge, model), "s")


def ours_base(net: Any) -> Any:
    """A bare copy that shares parameters."""
    from tests.benchmarks.contestants import twin

    return twin(net).eval()


def _inference(net: Any, merged: Any, inputs: dict[str, torch.Tensor], args: Any) -> Iterator[dict[str, Any]]:
    rows = contestants(net)["LoRA all-linear"]
    models = {"base": ours_base(net), "merged": merged} | {who: rows[who]().eval() for who in ("ours", "peft")}
    seconds = times({k: _forward(m, inputs) for k, m in models.items()}, args.rounds or 1, args.device, args.clock)
    for who in ("merged", "ours", "peft"):
        yield _line(f"inference, {who} / base", ratio(seconds, who, "base"), "×")


def _imports() -> Iterator[dict[str, Any]]:
    lines = {"torch": "import torch", "ours": "import torch, lightning_peft", "peft": "import peft"}
    found: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(5):
        for name, code in lines.items():
            found[name].append(_seconds(subprocess.run, [sys.executable, "-c", code], stderr=subprocess.DEVNULL))
    for name in ("ours", "peft"):
        beyond = statistics.median(a - b for a, b in zip(found[name], found["torch"], strict=True))
        yield _line(f"import {'lightning_peft' if name == 'ours' else name}, beyond torch's", beyond, "s")
    for command in ("--version", "methods"):
        yield _line(f"lightning-peft {command}, interpreter included", _command(command), "s")


def _command(*words: str) -> float:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    return _seconds(subprocess.run, [sys.executable, "-m", "lightning_peft", *words], **quiet)


def _seconds(
    function: Callable[..., Any], *args: Any, clock: Callable[[], float] = time.perf_counter, **kwargs: Any
) -> float:
    start = clock()
    function(*args, **kwargs)
    return clock() - start


def _line(what: str, value: float, unit: str) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit}
