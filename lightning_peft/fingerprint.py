"""A fingerprint of the frozen base: an adapter belongs to the weights it was trained beside."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection

import numpy
import torch
from torch import Tensor, nn

from lightning_peft.samples import evenly_spread, is_readable
from lightning_peft.saving.section import Fingerprint

#: values of each parameter in a sketch
SAMPLES = 4
_TOLERANCE = 0.02  # float32 against float16 or bfloat16 differs by less, another base by more


def fingerprint(model: nn.Module, skip: set[int]) -> Fingerprint:
    """Describe the parameters of ``model``.

    Args:
        model: the network before injection.
        skip: ``id`` of parameters that will train; their start values do not matter.

    Returns:
        Its sketch holds ``ffff`` where a value cannot be read: on the meta device, sharded or packed to 4 bits.
    """
    parameters = dict(sorted(model.named_parameters()))
    frozen = {n: p for n, p in parameters.items() if id(p) not in skip}
    names = "\n".join(f"{n}:{tuple(logical_shape(p))}" for n, p in parameters.items())
    config = getattr(model, "config", None)
    without_values = Fingerprint(
        structure=hashlib.sha256(names.encode()).hexdigest()[:16],
        values="",
        sketch="",
        class_name=type(model).__name__,
        source=str(getattr(config, "_name_or_path", "") or ""),
        dtype=str(next((p.dtype for p in frozen.values() if p.is_floating_point()), "")).removeprefix("torch."),
        parameters=sum(logical_shape(p).numel() for p in parameters.values()),
    )
    return with_values(without_values, list(frozen.values()))


def with_values(base: Fingerprint, parameters: list[Tensor]) -> Fingerprint:
    """The fingerprint with the parts that depend on values, of the frozen parameters in the order of their names."""
    sketch = _sketch(parameters)
    values = hashlib.sha256(sketch.encode()).hexdigest()[:16] if sketch.strip("f") else ""
    return dataclasses.replace(base, values=values, sketch=sketch)


def difference(
    ours: Fingerprint, theirs: Fingerprint, *, values: bool = True, but_for: Collection[int] = ()
) -> str | None:
    """Why two fingerprints cannot be of one base, or None if they can.

    Args:
        ours: of the model at hand.
        theirs: of a file.
        values: False to let names and shapes decide.
        but_for: numbers of those parameters whose values do not matter.
    """
    if ours.structure != theirs.structure:
        return (
            f"names or shapes differ (here {ours.class_name} with {ours.parameters:,} parameters, in the file"
            f" {theirs.class_name} with {theirs.parameters:,})"
        )
    if not values:
        return None
    a, b = _values(ours.sketch), _values(theirs.sketch)
    if a.shape != b.shape:
        return "another set of parameters is frozen"
    both = ~(a.isnan() | b.isnan())
    for number in but_for:
        both[number * SAMPLES : (number + 1) * SAMPLES] = False
    loose = ours.dtype != theirs.dtype
    allowed = _TOLERANCE * torch.maximum(a.abs(), b.abs())[both] + 1e-6 if loose else torch.zeros(())
    far = (a - b).abs()[both] > allowed
    if far.any():
        return f"{int(far.sum())} of {int(both.sum())} sampled weights differ"
    return None


def logical_shape(parameter: Tensor) -> torch.Size:
    """The shape a parameter has for the model; a 4-bit one is stored packed."""
    if hasattr(parameter, "ds_shape"):  # DeepSpeed stage 3 keeps nothing in place
        return torch.Size(parameter.ds_shape)
    state = getattr(parameter, "quant_state", None)
    return torch.Size(state.shape) if state is not None and hasattr(state, "shape") else parameter.shape


def _sketch(parameters: list[Tensor]) -> str:
    """Four values of each parameter as bfloat16, in hex; ``ffff``, which is NaN, for each that cannot be read."""
    if not parameters:
        return ""
    rows = [_sample(parameter) for parameter in parameters]
    # one transfer for each device instead of one for each tensor
    for device in {row.device for row in rows} - {torch.device("cpu")}:
        there = [number for number, row in enumerate(rows) if row.device == device]
        on_cpu = torch.stack([rows[number] for number in there]).cpu()
        for number, row in zip(there, on_cpu, strict=True):
            rows[number] = row
    bits = torch.stack(rows).to(torch.bfloat16)
    nan = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    bits = torch.where(bits.isnan(), nan, bits)
    return bits.view(torch.int16).numpy().astype(">i2").tobytes().hex()


def _sample(parameter: Tensor) -> Tensor:
    """A few values in float32; zeros fill the row of a smaller parameter, NaN that of one that cannot be read."""
    if not is_readable(parameter):
        return torch.full((SAMPLES,), float("nan"))
    values = evenly_spread(parameter, SAMPLES).float()
    return torch.nn.functional.pad(values, (0, SAMPLES - values.numel()))


def _values(sketch: str) -> Tensor:
    """The numbers of a sketch."""
    numbers = numpy.frombuffer(bytes.fromhex(sketch), dtype=">i2").astype("int16")
    return torch.from_numpy(numbers).view(torch.bfloat16).float()
