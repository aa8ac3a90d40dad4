"""A kernel that does not compile, with the lines that the compiler speaks of and the mod that they came from."""
from __future__ import annotations

import re

from flexref.errors import FlexrefError

_AT = re.compile(r"\((\d+)\): (?:catastrophic )?error|:(\d+):\d+: error", re.MULTILINE)
_MODS = {"mask_mod": "mask_mod", "score_mod": "score_mod", "score_grad": "the derivative of score_mod"}


class CompileError(FlexrefError, RuntimeError):
    """Its message holds the compiler's log and the emitted source around each error, numbered."""

    @classmethod
    def of(cls, text: str, log: str) -> CompileError:
        lines = text.splitlines()
        found = sorted({int(a or b) for a, b in _AT.findall(log)})
        parts = [f"a generated kernel does not compile.\n{log.strip()}"]
        for at in found[:3]:
            mod = _mod_at(lines, at)
            came = f", in what came from {mod}" if mod else ""
            near = range(max(1, at - 4), min(len(lines), at + 4) + 1)
            shown = "\n".join(f"{'>' if i == at else ' '}{i:5} {lines[i - 1]}" for i in near)
            parts.append(f"line {at}{came}:\n{shown}")
        return cls("\n".join(parts))


def _mod_at(lines: list[str], at: int) -> str:
    """Which mod's function a line stands in, or nothing."""
    for i in range(min(at, len(lines)) - 1, -1, -1):
        if lines[i] == "}" and i != at - 1:
            return ""
        match = re.match(r"DEVICE \w+ (\w+)\(", lines[i])
        if match:
            return _MODS.get(match[1], "")
    return ""
