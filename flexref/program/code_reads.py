"""What code looks up outside of itself, read from its bytecode."""

from __future__ import annotations

import dis
import types
from functools import lru_cache
from typing import NamedTuple

# attributes that lead out of what a walk over an object's state sees
_HIDDEN = frozenset(
    """__globals__ __builtins__ __code__ __closure__ __defaults__ __kwdefaults__ __subclasses__ __mro__ __bases__ __base__
    __annotations__ __doc__ __dataclass_fields__ f_globals f_locals f_back gi_frame tb_frame __loader__ __spec__ modules
    __class__ __module__ __qualname__ __name__ __repr__ __str__ __format__""".split()
)
_TEXT = frozenset({"FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "CONVERT_VALUE"})
_ROOTS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_FROM_DICT_OR_GLOBALS": "global",
    "LOAD_DEREF": "free",
    "LOAD_CLASSDEREF": "free",
    "LOAD_FROM_DICT_OR_DEREF": "free",
}


class Reads(NamedTuple):
    """`chains`: ("global" or "free", name, attribute, attribute ...) as far as the attributes are written directly behind.

    `hidden`: a name of the code for something that no walk over state follows, or None. `text`: whether it turns things to text.
    """

    chains: tuple[tuple[str, ...], ...]
    hidden: str | None
    text: bool


@lru_cache(maxsize=4096)
def reads_of(code: types.CodeType) -> Reads:
    """What `code`, and every function written inside it, looks up."""
    chains: dict[tuple[str, ...], None] = {}
    hidden, text = None, False
    chain: list[str] = []
    for step in dis.get_instructions(code):
        name = str(step.argval)
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(name)
        elif chain:
            chains[tuple(chain)] = None
            chain = []
        if step.opname in _ROOTS:
            chain = [_ROOTS[step.opname], name]
        elif step.opname.startswith("IMPORT_"):
            hidden = f"import {name}"
        elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            hidden = f"global {name}"
        elif ("ATTR" in step.opname or "METHOD" in step.opname) and name in _HIDDEN:
            hidden = f".{name}"
        text |= step.opname in _TEXT
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = reads_of(constant)
            chains |= dict.fromkeys(inner.chains)
            hidden, text = hidden or inner.hidden, text or inner.text
        elif isinstance(constant, str) and constant in _HIDDEN and code.co_consts[0] is not constant:
            # getattr(x, "__globals__")
            hidden = hidden or f"{constant!r}"
    return Reads(tuple(chains), hidden, text)


def literals_of(code: types.CodeType) -> frozenset:
    """The numbers that are written in the code, or in a function inside it."""
    found = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= literals_of(constant)
        elif type(constant) in (int, float):
            found.add(constant)
    return frozenset(found)
