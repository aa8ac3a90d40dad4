"""Kernels are real files in their own language; a line `# hole: name` (or `// hole: name`) takes emitted source."""

from __future__ import annotations

import re

_HOLE = re.compile(r"^(?P<indent>[ \t]*)(?:#|//) hole: (?P<name>\w+)[ \t]*$", re.MULTILINE)


def fill(text: str, holes: dict[str, list[str]]) -> str:
    """`text` with each hole replaced by its lines, at the hole's own indentation.

    Raises ValueError if a hole is given no lines, or if lines are given for a hole that the file does not have.
    """
    present = {match["name"] for match in _HOLE.finditer(text)}
    if present != holes.keys():
        missing, unknown = sorted(present - holes.keys()), sorted(holes.keys() - present)
        raise ValueError(f"template: no lines for the holes {missing}, no holes for the lines {unknown}")

    def lines(match: re.Match) -> str:
        return "\n".join(match["indent"] + line if line else "" for line in holes[match["name"]])

    return _HOLE.sub(lines, text)
