"""The choice of an engine, with engines that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flexref.dispatch.choose import choose, describe, nearest, refusal
from flexref.dispatch.hardware import Hardware
from flexref.dispatch.options import checked_options, wanted_backend
from flexref.errors import Unsupported
from flexref.problem import Problem

PROBLEM = Problem(2, 2, 8, 2, 1024, 512, 160, 64, torch.bfloat16, torch.bfloat16, torch.bfloat16)


def engine(name, rank, unavailable=(), unsupported=(), options=()):
    return SimpleNamespace(
        name=name,
        rank=rank,
        options=dict.fromkeys(options, "an option"),
        unavailable=lambda: list(unavailable),
        unsupported=lambda problem: list(unsupported),
    )


def engines(*all_of_them):
    return {e.name: e for e in sorted(all_of_them, key=lambda e: -e.rank)}


FAST = engine("fast", 30, unavailable=["no GPU was found; use a machine with one"])
MIDDLE = engine("middle", 20, unsupported=["head_dim 160 is more than 128"], options=["threads"])
SLOW = engine("slow", 10, options=["q_tile"])
REFERENCE = engine("reference", 0)


def test_auto_takes_the_highest_rank_that_can():
    choice = choose(PROBLEM, engines(FAST, MIDDLE, SLOW, REFERENCE))
    assert choice.name == "slow"
    assert choice.reasons == {
        "fast": ["no GPU was found; use a machine with one"],
        "middle": ["head_dim 160 is more than 128"],
        "slow": [],
        "reference": [],
    }


def test_auto_never_takes_the_reference():
    choice = choose(PROBLEM, engines(FAST, MIDDLE, REFERENCE))
    assert choice.name is None
    error = refusal(PROBLEM, choice)
    assert isinstance(error, Unsupported) and error.reasons["fast"]
    text = str(error)
    assert text.startswith("no backend can run this problem.")
    for part in (
        "query (2, 8, 1024, 160)",
        "bfloat16 on cpu",
        "no GPU was found",
        "head_dim 160",
        "pass backend='reference'",
    ):
        assert part in text, part


def test_an_explicit_request_never_falls_back():
    choice = choose(PROBLEM, engines(FAST, MIDDLE, SLOW, REFERENCE), "middle")
    assert choice.name is None
    assert "backend 'middle' cannot run this problem" in str(refusal(PROBLEM, choice))
    assert "these can: slow, reference" in str(refusal(PROBLEM, choice))
    assert choose(PROBLEM, engines(SLOW, REFERENCE), "reference").name == "reference"


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="backend 'slwo' is unknown; did you mean 'slow'"):
        choose(PROBLEM, engines(SLOW, REFERENCE), "slwo")


def test_availability_is_asked_through_the_argument():
    choice = choose(PROBLEM, engines(FAST, SLOW), unavailable=lambda e: [])
    assert choice.name == "fast"


def test_a_choice_prints_every_engine():
    text = str(choose(PROBLEM, engines(FAST, MIDDLE, SLOW, REFERENCE)))
    assert [line.split()[0] for line in text.splitlines()] == ["fast", "middle", "slow", "reference"]
    assert "chosen" in text and "never chosen by itself" in text
    assert "asked for" in str(choose(PROBLEM, engines(SLOW, REFERENCE), "reference"))


def test_where_the_wanted_backend_comes_from():
    assert wanted_backend("auto", None, {}) == "auto"
    assert wanted_backend("auto", None, {"FLEXREF_BACKEND": "slow"}) == "slow"
    assert wanted_backend("fast", None, {"FLEXREF_BACKEND": "slow"}) == "fast"
    assert wanted_backend("auto", {"BACKEND": "TRITON"}, {}) == "triton"
    with pytest.raises(ValueError, match="BACKEND='FLASH' is not available"):
        wanted_backend("auto", {"BACKEND": "FLASH"}, {})
    with pytest.raises(TypeError, match="backend must be a string, got int"):
        wanted_backend(3, None, {})  # type: ignore[arg-type]


def test_options():
    both = engines(MIDDLE, SLOW)
    assert checked_options({"threads": 2, "BLOCK_M": 64, "fwd_num_warps": 4, "BACKEND": "AUTO"}, both) == {"threads": 2}
    with pytest.raises(ValueError, match="unknown option 'thread'; did you mean 'threads'"):
        checked_options({"thread": 2}, both)
    with pytest.raises(TypeError, match="kernel_options must be a dict or None, got list"):
        checked_options(["threads"], both)  # type: ignore[arg-type]


def test_words():
    assert nearest("zzz", ["a"]) == ""
    assert "gradients no" in describe(PROBLEM)
    assert str(Hardware("x86_64", 2, (("H200", (9, 0)),))) == "x86_64, 2 threads, H200 (cc 9.0)"
    assert "no CUDA GPU" in str(Hardware("x86_64", 2))
