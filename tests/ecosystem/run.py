"""Adapt the real networks of real packages, and print what holds. Run by hand; the environment is its own:

    python -m venv ecosystem && . ecosystem/bin/activate
    pip install -c .ci/constraints.txt -e . timm torch_geometric open_clip_torch x-transformers
    pip install -c .ci/constraints.txt monai speechbrain scvi-tools transformers
    python -m tests.ecosystem [part of a name …]

For every network of `models` LoRA, DoRA and IA3 are put on everything that holds a weight and matters to the output,
and one bottleneck or prefix where its places are. A cell says ``works``, ``refused`` (a clear error, given below the
table) or ``wrong``. The wheels of torchvision and torchaudio expect CUDA: `standins` replaces their compiled parts, so
that networks which need the operators themselves (detection, alignment) are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    DoRA,
    Houlsby,
    LoRA,
    Method,
    PEFTError,
    PrefixTuning,
    disabled,
    inject,
    merge,
    trainable_names,
    unload,
    unmerge,
)
from tests.contract.battery import same
from tests.ecosystem.models import EXAMPLES, Example
from tests.models import frozen_copy

COLUMNS = ("LoRA", "DoRA", "IA3", "bottleneck or prefix")


class Wrong(Exception):
    """Something that was promised does not hold."""


def targets(example: Example) -> list[str]:
    """Modules with a weight that a low-rank product can correct and that has a say in the output."""
    model = example.make().train()
    example.output(model).square().sum().backward()
    found = []
    inside = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (inside and name.startswith(inside)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found.append(name)
            inside = (*inside, name + ".")
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and 2 <= weight.ndim <= 5 and weight.grad is not None and weight.grad.any():
            found.append(name)
    return found


def methods(example: Example) -> Iterator[Method]:
    """One for each column."""
    names = targets(example)
    yield LoRA(r=2, target_modules=names)
    yield DoRA(r=2, target_modules=names)
    yield IA3(target_modules=names, feedforward_modules=[])
    if example.last == "PrefixTuning":
        yield PrefixTuning(num_virtual_tokens=2)
    else:
        yield Houlsby(reduction_factor=4, target_modules=example.bottleneck)


def close(a: Tensor, b: Tensor, atol: float) -> bool:
    """Equal to a tolerance that grows with the numbers themselves."""
    return bool((a - b).abs().max() <= atol * max(1.0, float(b.abs().max())))


def shake(model: nn.Module) -> None:
    """Move every trained tensor, not so far that deep networks blow rounding up."""
    generator = torch.Generator().manual_seed(7)
    names = set(trainable_names(model))
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def idle_after_training(example: Example, model: nn.Module, method: Method, steps: int = 3) -> list[str]:
    """Train for a few steps; the trained tensors that never got a gradient."""
    model.train()
    optimizer = torch.optim.AdamW(method.param_groups(model, 1e-3, 0.0))
    idle = dict.fromkeys(trainable_names(model))
    for _ in range(steps):
        optimizer.zero_grad()
        out = example.output(model)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        for name, parameter in model.named_parameters():
            if name in idle and parameter.grad is not None and parameter.grad.any():
                del idle[name]
        optimizer.step()
    model.eval()
    return list(idle)


def check(example: Example, method: Method) -> str:
    """Go through the life of an adapter; a remark, or "" where there is none."""
    plain, model = example.make(), example.make()
    classes, state = [(n, type(m)) for n, m in model.named_modules()], frozen_copy(model)
    with torch.no_grad():
        original = example.output(plain)
        base = example.output(plain.requires_grad_(False))  # torch computes some layers in another way then
        inject(model, method)
        if method.identity_at_init and not close(example.output(model), base, 1e-4):
            raise Wrong("the output changes at injection")
    idle = idle_after_training(example, model, method)
    if idle and len(idle) == len(trainable_names(model)):
        raise Wrong("no adapter gets a gradient")
    with torch.no_grad():
        shake(model)
        adapted = example.output(model)
        if torch.equal(adapted, base):
            raise Wrong("the adapters do not act")
        with disabled(model):
            if not torch.equal(example.output(model), base):
                raise Wrong("disabled is not the base")
        remark = merging(example, model, method, adapted)
        unload(model)
        if [(n, type(m)) for n, m in model.named_modules()] != classes or not same(frozen_copy(model), state):
            raise Wrong("unload leaves something behind")
        if not torch.equal(example.output(model), original):
            raise Wrong("unload is not the base")
    remarks = [remark] if remark else []
    if idle:
        remarks.append(f"{len(idle)} tensors without a gradient, such as {idle[0]}")
    return "; ".join(remarks)


def merging(example: Example, model: nn.Module, method: Method, adapted: Tensor) -> str:
    """Merge and unmerge; a remark where that is refused."""
    if not method.mergeable:
        return ""
    before = frozen_copy(model)
    try:
        merge(model)
    except PEFTError as error:
        if not torch.equal(example.output(model), adapted):
            raise Wrong("a refused merge changes the output") from error
        return f"not merged: {error}"
    if not close(example.output(model), adapted, 1e-4):
        raise Wrong("merged it computes something else")
    unmerge(model)
    if not same(frozen_copy(model), before) or not torch.equal(example.output(model), adapted):
        raise Wrong("unmerging does not restore")
    return ""


def cell(example: Example, method: Method) -> tuple[str, str]:
    """A word for the table, and what there is to say about it."""
    try:
        remark = check(example, method)
    except PEFTError as error:
        return "refused", str(error)
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:  # any other error is a crash in code that knows nothing of adapters
        return "wrong", f"{type(error).__name__}: {error}"
    return "works" + ("*" if remark else ""), remark


def main(asked: list[str], replaced: list[str]) -> None:
    """Print the table, and below it the reasons."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = {n: e for n, e in EXAMPLES.items() if not asked or any(a.lower() in n.lower() for a in asked)}
    print(f"torch {torch.__version__}; stand-ins for the compiled parts of: {', '.join(replaced) or 'nothing'}\n")
    print(f"| network | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    notes, counts = [], dict.fromkeys(("works", "works*", "refused", "wrong"), 0)
    for name, example in chosen.items():
        words = []
        for column, method in zip(COLUMNS, methods(example), strict=True):
            word, note = cell(example, method)
            counts[word] += 1
            words.append(word if column != COLUMNS[-1] else f"{word} ({type(method).__name__})")
            if note:
                notes.append(f"- {name}, {type(method).__name__}: {word}: {' '.join(note.split())[:300]}")
        print(f"| {name} | {' | '.join(words)} |", flush=True)
    print("\n" + ", ".join(f"{count} {word}" for word, count in counts.items()))
    print("\n".join(["", *notes]))
