"""Finds out which blocks a mask_mod leaves empty, fills, or cuts through, without ever holding a dense mask.

Interval analysis of the traced mask_mod decides most blocks at once (split.py); what it leaves open is asked exactly:
the user's own function at each position, some blocks at a time. The mod sees single positions (torch.vmap), so
`table[b][q_idx]` means what it says; a mod that only works on Python numbers is asked in a loop.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from flexref.blocks.estimate import Estimate
from flexref.blocks.inputs import as_bool, checked_device, checked_sizes, described, kind_of_mod
from flexref.blocks.lists import PARTIAL, Grid, Lists, broadcast, collect
from flexref.blocks.sound import check_fits
from flexref.blocks.split import lists_of, split
from flexref.errors import TraceError
from flexref.interrupts import of_a_signal
from flexref.one_float import OneFloat
from flexref.program.compiled import nothing_compiled, original
from flexref.program.intervals import Classifier
from flexref.program.mod_objects import name_of
from flexref.tensor_gate import check_memory, check_surroundings
from flexref.uncompiled import uncompiled

# positions asked at once: a few temporaries of int64 still fit into a cache
_POSITIONS = 1 << 20
# below this many positions asking is faster than tracing
_WORTH_TRACING = 1 << 20


def build(mask_mod: Callable, grid: Grid, device: torch.device, acc: torch.dtype = torch.float32) -> Lists:
    """The lists of `mask_mod`: exact, ascending, no block listed that has no allowed position.

    `acc`: the one float within it (R1); that of all problems but float64's, if it is not known for which it is made.
    """
    check_surroundings()
    if device.type == "meta":
        raise ValueError("device is meta, where the lists of a block mask would have no numbers; build it on the CPU or a GPU.")
    check_fits(grid)
    with torch.no_grad():
        program, estimate = None, None
        positions = math.prod(grid.shape)
        if positions > _WORTH_TRACING:
            try:
                program = program_of(mask_mod, device, acc)
            except TraceError as why:
                estimate = Estimate(mask_mod, why, grid.flat_rows * grid.columns, positions)
        asked = grid
        if program is not None:
            # a mask that does not read b or h is the same for all of them
            if not program.graph.uses("b"):
                asked = asked._replace(B=min(grid.B, 1))
            if not program.graph.uses("h"):
                asked = asked._replace(H=min(grid.H, 1))
        decide = Decider(mask_mod, asked, device, acc, estimate)
        if program is None:
            return collect((decide.strip(*ends) for ends in asked.strips()), device)
        classify = Classifier(program.graph, program.captured, program.scalars)
        found = split(classify, asked, lambda blocks: decide.decide(blocks.to(device)).cpu())
        return broadcast(lists_of(found, asked, device), asked, grid)


def program_of(mask_mod: Callable, device: torch.device, acc: torch.dtype):
    """The traced mod, or None for one that reads another device: asking it will say so.

    Raises TraceError, and TypeError or ValueError where it reads a tensor that has no memory of its own.
    """
    from flexref.program.mods import traced_mod

    program = traced_mod(mask_mod, "mask", acc)
    for name, x in zip(program.names, program.captured, strict=True):
        if not x.is_meta:
            check_memory(f"the captured tensor {name}", x)
    return None if any(x.dim() and x.device.type != device.type for x in program.captured) else program


class Decider:
    """Asks a mask_mod about whole blocks, exactly."""

    def __init__(
        self,
        mask_mod: Callable,
        grid: Grid,
        device: torch.device,
        acc: torch.dtype = torch.float32,
        estimate: Estimate | None = None,
    ):
        self.grid, self.device, self.ask, self.estimate = grid, device, Asker(mask_mod, device, acc), estimate
        self.q_size, self.kv_size = min(grid.q_block, grid.q_len), min(grid.kv_block, grid.kv_len)
        # a block of more positions than may be asked at once is asked in tiles
        self.q_tile = max(1, min(self.q_size, 1024))
        self.kv_tile = max(1, min(self.kv_size, _POSITIONS // self.q_tile))

    def __call__(self, kinds: Tensor, first: int, wanted: Tensor) -> Tensor:
        """`kinds` (n, columns) of the flat rows from `first` on, with the wanted blocks decided."""
        flat = wanted.reshape(-1).nonzero()[:, 0]
        if len(flat):
            kinds.view(-1)[flat] = self.decide(flat + first * self.grid.columns)
        return kinds

    def strip(self, first: int, last: int) -> Tensor:
        """The kinds of flat rows first..last, each block asked: int8 (last - first, columns)."""
        open_ = torch.full((last - first, self.grid.columns), PARTIAL, dtype=torch.int8, device=self.device)
        return self(open_, first, open_ == PARTIAL)

    def decide(self, blocks: Tensor) -> Tensor:
        """The kinds (N,) of blocks (N,), numbered flat row * columns + column."""
        kinds = []
        for part in blocks.split(max(1, _POSITIONS // (self.q_tile * self.kv_tile))):
            kinds.append(self._some(part))
            if self.estimate is not None:
                self.estimate.add(len(part))
        return torch.cat(kinds)

    def _some(self, block: Tensor) -> Tensor:
        grid = self.grid
        row, column = block // grid.columns, block % grid.columns
        b, h = row // grid.rows // grid.H, row // grid.rows % grid.H
        q_start, kv_start = row % grid.rows * grid.q_block, column * grid.kv_block
        least = torch.ones(len(block), dtype=torch.uint8, device=self.device)
        most = torch.zeros_like(least)
        for q_tile in range(0, self.q_size, self.q_tile):
            q_idx = self._indices(q_start + q_tile, self.q_tile, grid.q_len)
            for kv_tile in range(0, self.kv_size, self.kv_tile):
                kv_idx = self._indices(kv_start + kv_tile, self.kv_tile, grid.kv_len)
                # a tile may reach into the next block, whose positions must not count
                q, kv = q_idx[:, : self.q_size - q_tile], kv_idx[:, : self.kv_size - kv_tile]
                allowed = self.ask(b, h, q, kv).contiguous().view(torch.uint8).flatten(1)
                least, most = torch.minimum(least, allowed.amin(1)), torch.maximum(most, allowed.amax(1))
                # one position of each sort decides a block
                if bool((least < most).all()):
                    return torch.full_like(least, PARTIAL, dtype=torch.int8)
        return (least + most).to(torch.int8)

    def _indices(self, start: Tensor, count: int, length: int) -> Tensor:
        # behind the end the last position is repeated, which changes neither "any" nor "all"
        index = start[:, None] + torch.arange(count, device=self.device)
        return index.clamp(max=length - 1)


class Asker:
    """Calls a mask_mod at every position of some tiles."""

    def __init__(self, mask_mod: Callable, device: torch.device, acc: torch.dtype = torch.float32):
        self.mod, self.device, self.acc = original(mask_mod), device, acc
        self.number: Callable | None = None
        over_kv = torch.vmap(self._one, (None, None, None, 0))
        self.vmapped = torch.vmap(torch.vmap(over_kv, (None, None, 0, None)), (0, 0, 0, 0))

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """b, h (N,); q_idx (N, R); kv_idx (N, C), int64, not empty, on one device. Returns bool (N, R, C)."""
        if self.number is None:
            try:
                with nothing_compiled():
                    return self.vmapped(b, h, q_idx, kv_idx)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if of_a_signal(error):
                    raise
                self._raise_what_stays_wrong(error)
                # what has no memory may still answer one position at a time, in minutes
                with suppress(TraceError):
                    program_of(self.mod, self.device, self.acc)
                self.number = self._working_number(b, h, q_idx, kv_idx)
        return self._loop(self.number, b, h, q_idx, kv_idx)

    def _one(self, *at) -> Tensor:
        # its numbers are those of the program that an engine runs
        with OneFloat(self.acc):
            answer = self.mod(*at)
        return as_bool(self.mod, answer, self.device)

    def _raise_what_stays_wrong(self, error: Exception) -> None:
        """Explain errors that asking one position at a time would not mend."""
        name, text = described(self.mod), str(error)
        if isinstance(error, IndexError):
            raise IndexError(f"mask_mod {name} reads a captured tensor out of range: {text}") from error
        if "random operation" in text:
            raise ValueError(
                f"mask_mod {name} draws random numbers, so it has no one meaning; "
                "draw them before, and index the tensor in the mod"
            ) from error
        if "same device" in text:
            hint = "move it, or pass device="
            raise ValueError(f"mask_mod {name} captures a tensor that is not on {self.device}; {hint}") from error

    def _working_number(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Callable:
        """int, if the mod works on Python integers, else what makes a 0-d tensor."""
        at = int(b[0]), int(h[0]), int(q_idx[0, 0]), int(kv_idx[0, 0])
        tensor = partial(torch.tensor, device=self.device)
        try:
            self._one(*at)
            return int
        except Exception as error:
            if of_a_signal(error):
                raise
            try:
                self._one(*map(tensor, at))
            except Exception as error:
                error.add_note(f"raised by mask_mod {described(self.mod)} at (b, h, q_idx, kv_idx) = {at}")
                raise
            return tensor

    def _loop(self, number: Callable, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        values = []
        for i, at in enumerate(zip(b.tolist(), h.tolist(), strict=True)):
            columns = [number(kv) for kv in kv_idx[i].tolist()]
            for q in map(number, q_idx[i].tolist()):
                values += [bool(self._one(*map(number, at), q, kv)) for kv in columns]
        return torch.tensor(values, dtype=torch.bool, device=b.device).reshape(*q_idx.shape, kv_idx.shape[1])


@uncompiled
def create_mask(
    mod_fn: Callable,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which positions a mask_mod allows, or a score_mod does not make -inf: bool (B, H, Q_LEN, KV_LEN), dense.

    mod_fn: mask_mod(b, h, q_idx, kv_idx) -> bool, or score_mod(score, b, h, q_idx, kv_idx), which is asked with a score of 0.
    B, H: None is 1. device None: the accelerator, or else the CPU. Raises TypeError or ValueError for wrong arguments and
    for a mod of another arity or result, IndexError for one that reads a captured tensor out of range.
    """
    is_score = kind_of_mod(mod_fn) == "score"
    B, H, q_len, kv_len = checked_sizes(B, H, Q_LEN, KV_LEN)
    place = checked_device(device)
    result = torch.zeros(B, H, q_len, kv_len, dtype=torch.bool, device=place)
    if result.numel():
        ask = Asker(_ScoreMask(mod_fn, place) if is_score else mod_fn, place)
        b, h, q_idx, kv_idx = (torch.arange(n, device=place) for n in (B, H, q_len, kv_len))
        b, h = b.repeat_interleave(H), h.repeat(B)
        with torch.no_grad():
            for rows in q_idx.split(max(1, _POSITIONS // (B * H * kv_len))):
                answer = ask(b, h, rows.expand(B * H, -1), kv_idx.expand(B * H, -1))
                result[:, :, rows] = answer.reshape(B, H, len(rows), kv_len)
    return result


class _ScoreMask:
    """A score_mod as a mask: what it makes -inf of a score of 0 is masked."""

    def __init__(self, score_mod: Callable, device: torch.device):
        self.score_mod, self.zero = score_mod, torch.zeros((), device=device)
        self.__name__ = name_of(score_mod)

    def __call__(self, b, h, q_idx, kv_idx):
        return self.score_mod(self.zero, b, h, q_idx, kv_idx) != -math.inf
