"""What code looks up outside of itself, read from its bytecode."""

from __future__ import annotations

import dis
import re
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

# what operators, containers, calls and the making of objects are named: the only names with two underscores that are followed
_FOLLOWED = frozenset(
    f"__{name}__"
    for name in """init new post_init call get set getattr getattribute setattr delattr getitem setitem delitem contains missing
    len length_hint iter next reversed bool int float complex index enter exit hash dict wrapped torch_function match_args eq ne
    lt le gt ge add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor radd rsub rmul rmatmul rtruediv
    rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift
    irshift iand ior ixor neg pos abs invert round trunc floor ceil""".split()
)
# attributes without them that lead out of what a walk over an object's state sees
_HIDDEN = frozenset(
    """f_globals f_locals f_builtins f_back f_code gi_frame gi_code gi_yieldfrom cr_frame cr_code ag_frame ag_code tb_frame
    tb_next modules _abc_impl""".split()
)
_OUTWARD = re.compile(r"(?<![A-Za-z0-9_])__\w*|^_+$")
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

    `hidden`: a name of the code for something that no walk over state follows, or None.
    """

    chains: tuple[tuple[str, ...], ...]
    hidden: str | None


def leads_out(text: str) -> bool:
    """Whether a text names, or is a part of, an attribute that no walk over state follows: "__globals__", "{0.__class__}"."""
    return text in _HIDDEN or "_" in text and any(name not in _FOLLOWED for name in _OUTWARD.findall(text))


@lru_cache(maxsize=4096)
def reads_of(code: types.CodeType) -> Reads:
    """What `code`, and every function written inside it, looks up."""
    chains: dict[tuple[str, ...], None] = {}
    hidden = None
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
        elif ("ATTR" in step.opname or "METHOD" in step.opname) and leads_out(name):
            hidden = f".{name}"
    docstring = _docstring(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = reads_of(constant)
            chains |= dict.fromkeys(inner.chains)
            hidden = hidden or inner.hidden
        elif constant is not docstring:
            # getattr(x, "__globals__")
            hidden = hidden or next((f"{text!r}" for text in _texts(constant) if leads_out(text)), None)
    return Reads(tuple(chains), hidden)


def _docstring(code: types.CodeType) -> object:
    # from Python 3.14 on a flag says whether there is one, before it None stood in its place
    has_one = sys.version_info < (3, 14) or code.co_flags & 0x4000000
    return code.co_consts[0] if has_one and code.co_consts and not code.co_name.startswith("<") else None


def _texts(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _texts(item)


def within(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and that of every function written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from within(constant)


def literals_of(code: types.CodeType) -> frozenset:
    """The numbers that are written in the code, or in a function inside it."""
    found = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= literals_of(constant)
        elif type(constant) in (int, float):
            found.add(constant)
    return frozenset(found)
