"""Which heads, queries and keys a picture shows, checked, and how many positions share one of its cells."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from flexref.blocks.inputs import checked_index, checked_size

Positions: TypeAlias = slice | range | None
# what a screen can show of one picture
MOST_CELLS = 2048
ENDINGS = ".png", ".svg"


class Window(NamedTuple):
    """One batch, some query heads, and the positions that are drawn, each a range with a step of 1 or more."""

    batch: int
    heads: tuple[int, ...]
    queries: range
    keys: range
    max_cells: int


class Side(NamedTuple):
    """One side of a picture: `cells` cells from position `first` on, each `cell` positions wide; start to stop is shown of them.

    Of these positions only every `step`-th is drawn.
    """

    first: int
    cell: int
    cells: int
    start: int
    stop: int
    step: int = 1


def checked_window(
    shape: tuple[int, int, int, int], batch: int, heads: int | Iterable[int], queries: Positions, keys: Positions, max_cells: int
) -> Window:
    """Of a (batch, heads, q_len, kv_len). Raises TypeError, ValueError or IndexError that says what there is."""
    if not 1 <= checked_size("max_cells", max_cells, 1) <= MOST_CELLS:
        raise ValueError(f"max_cells must be 1 to {MOST_CELLS}, got {max_cells}.")
    some = tuple(heads) if isinstance(heads, Iterable) else (heads,)
    if not some:
        raise ValueError("heads is empty; name one head or more.")
    B, H, q_len, kv_len = shape
    return Window(
        _within("batch", batch, B),
        tuple(_within("heads", head, H) for head in some),
        _range("queries", queries, q_len),
        _range("keys", keys, kv_len),
        int(max_cells),
    )


def checked_path(path: str | Path | None) -> Path | None:
    """Raises ValueError for an ending that is neither .png nor .svg."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"path must end in {' or '.join(ENDINGS)}, got {str(path)!r}; savefig of the Figure writes other kinds.")
    return path


def side_of(positions: range, max_cells: int) -> Side:
    """Of at most max_cells cells, each as many of the positions as are needed for that."""
    count = -(-len(positions) // max_cells)
    cells = -(-len(positions) // count)
    return Side(positions.start, count * positions.step, cells, positions.start, positions.stop, positions.step)


def _within(name: str, index, size: int) -> int:
    index = checked_index(name, index)
    if not 0 <= index < size:
        raise IndexError(f"{name} {index} is out of range: there {'is' if size == 1 else 'are'} {size}, counted from 0.")
    return index


def _range(name: str, given: Positions, length: int) -> range:
    if isinstance(given, slice):
        found = range(length)[given]
    elif isinstance(given, range):
        found = given
    elif given is None:
        found = range(length)
    else:
        raise TypeError(f"{name} must be a slice, a range or None for all, got {type(given).__name__}.")
    if found.step < 1:
        raise ValueError(f"{name} {given!r} goes backwards; its step must be 1 or more.")
    if not found:
        raise ValueError(f"{name} {given!r} is empty; there are {length} positions.")
    if found[0] < 0 or found[-1] >= length:
        raise IndexError(f"{name} {given!r} is out of range: there are {length} positions, counted from 0.")
    return found
