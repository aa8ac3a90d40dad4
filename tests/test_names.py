"""What torch.nn.attention.flex_attention exports, and what people import from it, exists here or says what to use."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.attention import flex_attention as theirs

import flexref
from flexref.torch_names import INSTEAD

NAMES = [*theirs.__all__, "_DEFAULT_SPARSE_BLOCK_SIZE", "_mask_mod_signature", "_score_mod_signature", "create_nested_block_mask"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_with_torchs_parameters_in_torchs_order(name):
    ours, other = getattr(flexref, name), getattr(theirs, name, None)
    if inspect.isfunction(other) and name != "noop_mask":
        mine, torchs = (list(inspect.signature(f).parameters.values()) for f in (ours, other))
        positional = [p.name for p in torchs if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in mine][: len(positional)] == positional
        assert {p.name for p in torchs} <= {p.name for p in mine}
        defaults = {p.name: p.default for p in mine}
        assert all(defaults[p.name] == p.default for p in torchs)
    if name == "FlexKernelOptions":
        assert set(other.__annotations__) <= set(ours.__annotations__)  # type: ignore[union-attr]
    if name == "_DEFAULT_SPARSE_BLOCK_SIZE":
        assert ours == other


@pytest.mark.parametrize("name", INSTEAD)
def test_a_private_name_of_torchs_says_what_to_use(name):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}', which torch has; "):
        getattr(flexref, name)
    with pytest.raises(ImportError):
        exec(f"from flexref import {name}")


def test_any_other_name():
    with pytest.raises(AttributeError, match="^module 'flexref' has no attribute 'variant'$"):
        flexref.variant  # noqa: B018


@pytest.mark.parametrize("name", ["flex_attention", "create_block_mask", "create_nested_block_mask"])
def test_help_speaks_of_every_parameter(name):
    fn = getattr(flexref, name)
    text = inspect.getdoc(fn) or ""
    of_torchs_kernels = ("compute_dq_write_order", "dq_kv_order")
    missing = [p for p in inspect.signature(fn).parameters if p not in text and p not in of_torchs_kernels]
    assert not missing, f"{name} does not speak of {missing}"


def test_torchs_options_are_taken_with_a_note_and_checked_everywhere():
    x = torch.randn(1, 1, 16, 8)
    text = str(flexref.explain(x, x, x, kernel_options={"num_warps": 4, "fwd_BLOCK_M": 64, "BACKEND": "AUTO", "threads": 1}))
    assert "kernel_options num_warps, fwd_BLOCK_M mean nothing to numba_cpu" in text
    for backend in ("auto", "numba_cpu", "reference"):
        with pytest.raises(ValueError, match="BACKEND='NONSENSE' is not available here; known: AUTO"):
            flexref.flex_attention(x, x, x, kernel_options={"BACKEND": "NONSENSE"}, backend=backend)
        with pytest.raises(ValueError, match="unknown option 'num_warp'; did you mean 'num_warps'"):
            flexref.flex_attention(x, x, x, kernel_options={"num_warp": 4}, backend=backend)
