"""Start values of the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError
from lightning_peft.lowrank.factors import LowRank, Place, kaiming

#: starts whose product is not zero: the base must lose it, so that training starts from the base's output
SUBTRACTED = ("pissa", "olora")
STARTS = ("kaiming", "gaussian", "orthogonal", *SUBTRACTED)


def start(delta: LowRank, place: Place, init: str, generator: torch.Generator, name: str) -> None:
    """Fill the factors of one matrix.

    ``kaiming``: A uniform within 1/√in, B zero. ``gaussian``: A from N(0, 1/r²), B zero. ``orthogonal``: rows of A
    and columns of B from the two halves of one random orthogonal matrix, so that B·A is zero though both are not.
    ``pissa``: the r largest singular directions of the weight. ``olora``: the first r columns and rows of its QR
    decomposition. For the last two the start product is taken off again.
    """
    if delta.lora_A.is_meta:
        return
    dtype = delta.lora_A.dtype
    if init in SUBTRACTED:
        _check_rank(delta, place, init, name)
        split = _singular if init == "pissa" else _triangular
        with torch.no_grad():  # a packed weight forgets by detach() how it is packed
            delta.fill(*split(delta.matrix(place.weight), delta.rank, delta.scaling))
        delta.subtract_start()
    elif init == "orthogonal":
        delta.fill(*_orthogonal(delta, generator, name))
    elif place.table:
        drawn = torch.randn(delta.lora_B.shape, generator=generator, dtype=dtype)
        delta.fill(torch.zeros_like(delta.lora_A), drawn)
    elif init == "gaussian":
        delta.fill(torch.randn(delta.lora_A.shape, generator=generator, dtype=dtype) / delta.rank)
    else:
        fan_in = delta.lora_A[(0,) * (delta.stacked + 1)].numel()
        delta.fill(kaiming(delta.lora_A.shape, fan_in, generator, dtype))


def _check_rank(delta: LowRank, place: Place, init: str, name: str) -> None:
    size_in = delta.lora_A.flatten(delta.stacked + 1).shape[-1]
    if delta.parts is not None:
        raise ConfigError(f"init={init!r} starts from the whole weight of {name!r}; it cannot go with fused_parts.")
    if delta.rank > min(size_in, place.size_out):
        raise ConfigError(
            f"init={init!r}: {name!r} ({place.size_out} × {size_in}) has no {delta.rank} directions to start from."
            " Lower r, or set it in rank_pattern."
        )


def _singular(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[..., :r] / scaling).sqrt()
    return root.unsqueeze(-1) * V[..., :r, :], U[..., :r] * root.unsqueeze(-2)


def _triangular(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(matrix)
    return R[..., :r, :], Q[..., :r]


def _orthogonal(delta: LowRank, generator: torch.Generator, name: str) -> tuple[Tensor, Tensor]:
    r, dtype = delta.rank, delta.lora_A.dtype
    if r % 2:
        raise ConfigError(f"init='orthogonal' halves the rank, so r must be even; it is {r} for {name!r}.")
    A, B = delta.lora_A.flatten(delta.stacked + 1), delta.lora_B.flatten(delta.stacked + 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    basis = torch.linalg.qr(draw(r, r))[0]
    lead, blocks = A.shape[:-2], A.shape[-2] // r
    pieces = [basis[0::2].T @ draw(*lead, r // 2, A.shape[-1]) / 10 for _ in range(blocks)]
    return torch.cat(pieces, -2), draw(*B.shape[:-1], r // 2) @ basis[1::2] / 10
