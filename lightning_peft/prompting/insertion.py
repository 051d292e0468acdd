"""Where virtual tokens stand in a batch of rows, and the way there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Insertion(NamedTuple):
    """``count`` new places in rows of ``length`` tokens."""

    #: the column before which they stand: one number for all rows, or one for each row (batch, 1)
    start: int | Tensor
    #: how many they are
    count: int
    #: tokens of a row without them
    length: int
    #: whether the output at the last new place stands for that of the token before the new places: on a causal model
    #: only the end of an appended prompt has seen both text and prompt
    last_answers: bool = False

    @property
    def longer_length(self) -> int:
        """Tokens of a row with the new places."""
        return self.length + self.count

    def insert(self, rows: Tensor, new: Tensor | float) -> Tensor:
        """Put something into the new places.

        Args:
            rows: (batch, length, …), or (1, length, …) for all rows.
            new: a number, or a tensor that broadcasts to (batch, count, …).

        Returns:
            (batch, length + count, …).
        """
        start = self.start
        if not isinstance(new, Tensor):
            new = rows.new_full((1, 1), new)
        # Position ids may come as one row for all.
        if isinstance(start, Tensor) and len(rows) != len(start):
            rows = rows.expand(len(start), *rows.shape[1:])
        new = new.to(rows.dtype).expand(len(rows), self.count, *rows.shape[2:])
        if isinstance(start, int):
            return torch.cat([rows[:, :start], new, rows[:, start:]], dim=1)
        # Every row has its own order. Gather it from [new, rows], where the old column c stands at count + c.
        column = torch.arange(self.longer_length, device=rows.device)
        from_start = column - start
        behind = torch.where(from_start < self.count, from_start, column)
        source = torch.where(from_start < 0, column + self.count, behind)
        return gather_columns(torch.cat([new, rows], dim=1), source, dim=1)

    def remove(self, rows: Tensor, dim: int = 1) -> Tensor:
        """What stands at the old places along ``dim``: rows (batch, …, length + count, …) -> (batch, …, length, …)."""
        start = self.start
        # Where no output moves, slices do: they copy nothing at either end.
        if isinstance(start, int) and not (self.last_answers and start > 0):
            if start == 0:
                return rows.narrow(dim, self.count, self.length)
            if start == self.length:
                return rows.narrow(dim, 0, self.length)
            before = rows.narrow(dim, 0, start)
            behind = rows.narrow(dim, start + self.count, self.length - start)
            return torch.cat([before, behind], dim)
        column = torch.arange(self.length, device=rows.device)
        # Tokens behind the new places stand further on, and the one before them may be answered for by the last.
        source = column + self.count * (column >= start)
        if self.last_answers:
            source = source + self.count * (column == start - 1)
        return gather_columns(rows, source.expand(rows.shape[0], -1), dim)

    def positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Position ids that count the new places: those of the tokens behind them move on by ``count``.

        Args:
            ids: (batch or 1, length), or such a plane for each axis of a rotary embedding (axes, batch, length).
            mask: (batch, length), zero at padding, whose positions say nothing.

        Returns:
            (batch, length + count), or (axes, batch, length + count).
        """
        if ids.dim() == 3:
            return torch.stack([self.positions(plane, mask) for plane in ids])
        if isinstance(self.start, Tensor):
            start = self.start
            ids = ids.expand(len(start), -1)
        else:
            start = torch.full((len(ids), 1), self.start, device=ids.device)
        column_before = (start - 1).clamp(min=0)
        column_at = start.clamp(max=self.length - 1)
        # The new places count on from a real token before them; in front of a row they take over its first position.
        counts_on = start > 0
        if mask is not None:
            counts_on = counts_on & (mask.gather(1, column_before) != 0)
        counts_on = counts_on | (start == self.length)
        first = torch.where(counts_on, ids.gather(1, column_before) + 1, ids.gather(1, column_at))
        moved = ids + self.count * (torch.arange(self.length, device=ids.device) >= start)
        return self.insert(moved, first + torch.arange(self.count, device=ids.device))


def gather_columns(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Columns of each row along ``dim``: rows (batch, …, length, …), columns (batch, m) -> (batch, …, m, …)."""
    shape = [1] * rows.dim()
    shape[0], shape[dim] = columns.shape
    wanted = list(rows.shape)
    wanted[dim] = columns.shape[1]
    return rows.gather(dim, columns.view(shape).expand(wanted))


def trim(output: Any, insertion: Insertion) -> Any:
    """A model's output without the new places.

    Cut are states (batch, length + count, width), and attention maps (batch, heads, queries, keys) along each axis that
    has length + count places. Everything else stays: pooled states, losses, caches. Mappings are changed in place.
    """
    longer = insertion.longer_length
    if isinstance(output, Tensor):
        if output.dim() == 3 and output.shape[1] == longer:
            return insertion.remove(output)
        if output.dim() == 4 and output.shape[-2] == longer:
            output = insertion.remove(output, 2)
        # The last virtual token answers for another token as a query; as a key it is itself.
        if output.dim() == 4 and output.shape[-1] == longer:
            output = insertion._replace(last_answers=False).remove(output, 3)
        return output
    if isinstance(output, Mapping):
        for key in list(output):
            output[key] = trim(output[key], insertion)
        return output
    if type(output) in (tuple, list):
        return type(output)([trim(part, insertion) for part in output])
    return output


def row_starts(mask: Tensor) -> Tensor:
    """Column of the first real token of each row: mask (batch, tokens) -> (batch, 1)."""
    return (mask != 0).int().argmax(dim=1, keepdim=True)


def row_ends(mask: Tensor) -> Tensor:
    """Column behind the last real token of each row: mask (batch, tokens) -> (batch, 1); 0 in an empty row."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask != 0) * columns).amax(dim=1, keepdim=True)
