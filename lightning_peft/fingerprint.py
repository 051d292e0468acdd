"""A fingerprint of the frozen base: an adapter belongs to the weights it was trained beside."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_peft.saving.section import Fingerprint

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


def _readable(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, nn.Parameter)
    return plain and parameter.is_floating_point() and not parameter.is_meta and parameter.numel() > 0


def _sketch(parameters: list[Tensor]) -> str:
    if not parameters:
        return ""
    missing = torch.full((SAMPLES,), float("nan"))
    rows = [_sample(p) if _readable(p) else missing for p in parameters]
    devices = {r.device for r in rows} - {torch.device("cpu")}
    for device in devices:  # one transfer a device instead of one a tensor
        here = [i for i, r in enumerate(rows) if r.device == device]
        for i, row in zip(here, torch.stack([rows[i] for i in here]).cpu(), strict=True):
            rows[i] = row
    bits = torch.stack(rows).to(torch.bfloat16)
    bits = torch.where(bits.isnan(), torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16), bits)
    return bits.view(torch.int16).numpy().astype(">i2").tobytes().hex()


def _sample(parameter: Tensor) -> Tensor:
    with torch.no_grad():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        picked = flat[step // 2 :: step][:SAMPLES].float()
    return torch.nn.functional.pad(picked, (0, SAMPLES - picked.numel()))


def _values(sketch: str) -> Tensor:
    numbers = [int(sketch[i : i + 4], 16) for i in range(0, len(sketch), 4)]
    signed = [n - 65536 if n > 32767 else n for n in numbers]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
