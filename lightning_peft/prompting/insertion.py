"""Where virtual tokens stand in a batch of rows, and the way there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Insertion(NamedTuple):
    """``n`` new places in rows of ``length``, before column ``start``: one for all rows, or one for each (rows, 1).

    With ``speaks`` the last new place answers for the token before it: on a causal model only the end of an appended
    prompt has seen the text and the prompt.
    """

    start: int | Tensor
    n: int
    length: int
    speaks: bool = False

    def insert(self, rows: Tensor, new: Tensor | float) -> Tensor:
        """rows (batch, length, …) with ``new``, which broadcasts to (batch, n, …), in the new places."""
        if not isinstance(new, Tensor):
            new = rows.new_full((1, 1), new)
        if isinstance(self.start, Tensor) and len(rows) != len(self.start):
            rows = rows.expand(len(self.start), *rows.shape[1:])
        new = new.to(rows.dtype).expand(len(rows), self.n, *rows.shape[2:])
        if isinstance(self.start, int):
            return torch.cat([rows[:, : self.start], new, rows[:, self.start :]], dim=1)
        place = torch.arange(self.length + self.n, device=rows.device) - self.start
        index = torch.where(
            place < 0, place + self.start + self.n, torch.where(place < self.n, place, place + self.start)
        )
        return take(torch.cat([new, rows], dim=1), index, 1)

    def remove(self, rows: Tensor, dim: int = 1) -> Tensor:
        """What stands at the old places along ``dim``."""
        if isinstance(self.start, int) and not (self.speaks and self.start):
            if self.start in (0, self.length):
                return rows.narrow(dim, self.n if self.start == 0 else 0, self.length)
            return torch.cat([rows.narrow(dim, 0, self.start), rows.narrow(dim, self.start + self.n, self.rest)], dim)
        place = torch.arange(self.length, device=rows.device)
        index = place + self.n * (place >= self.start)
        if self.speaks:
            index = index + self.n * (place == self.start - 1)
        return take(rows, index.expand(rows.shape[0], -1), dim)

    @property
    def rest(self) -> int:
        """Places behind the new ones."""
        return self.length - int(self.start)

    def positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Position ids (…, batch, length) that count the new places: tokens behind them move on by n."""
        if ids.dim() == 3:  # one plane for each axis of a rotary embedding
            return torch.stack([self.positions(plane, mask) for plane in ids])
        start = (
            torch.as_tensor(self.start, device=ids.device)
            .view(-1, 1)
            .expand(len(self.start) if isinstance(self.start, Tensor) else len(ids), 1)
        )
        ids = ids.expand(len(start), -1)
        before, at = (start - 1).clamp(min=0), start.clamp(max=self.length - 1)
        follows = (start > 0) if mask is None else (start > 0) & (mask.gather(1, before) != 0)
        follows = follows | (start == self.length)
        first = torch.where(follows, ids.gather(1, before) + 1, ids.gather(1, at))
        later = ids + self.n * (torch.arange(self.length, device=ids.device) >= start)
        return self.insert(later, first + torch.arange(self.n, device=ids.device))


def take(rows: Tensor, index: Tensor, dim: int) -> Tensor:
    """rows gathered along ``dim`` by index (batch, length)."""
    shape = [1] * rows.dim()
    shape[0], shape[dim] = index.shape
    full = list(rows.shape)
    full[dim] = index.shape[1]
    return rows.gather(dim, index.view(shape).expand(full))


def trim(value: Any, places: Insertion) -> Any:
    """Outputs of a model, cut back to the old places: states (batch, length, …) and attention maps (…, length, length).

    Everything else (pooled states, caches) stays.
    """
    longer = places.length + places.n
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.shape[-2] == longer:
            value = places.remove(value, 2)
        if value.dim() == 4 and value.shape[-1] == longer:
            return places._replace(speaks=False).remove(value, 3)
        return places.remove(value) if value.dim() == 3 and value.shape[1] == longer else value
    if isinstance(value, Mapping):
        for key in list(value):
            value[key] = trim(value[key], places)
        return value
    return type(value)(trim(v, places) for v in value) if type(value) in (tuple, list) else value


def first_real(mask: Tensor) -> Tensor:
    """Column of the first token of each row: (batch, 1)."""
    return (mask != 0).int().argmax(dim=1, keepdim=True)


def behind_real(mask: Tensor) -> Tensor:
    """Column behind the last token of each row: (batch, 1); 0 in an empty row."""
    return ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1, keepdim=True)
