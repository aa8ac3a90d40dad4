"""A program is kept only where everything that its mod can reach was understood: no way of holding a number makes it stale."""

from __future__ import annotations

import cProfile
import functools
import logging
import operator
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexref
from flexref import explain, flex_attention
from flexref.errors import TraceError
from flexref.program.compiled import original
from flexref.program.interpret import interpret
from flexref.program.mods import Mod, traced_mod
from flexref.program.trace import trace
from flexref.variants import masks, score_mods
from tests.hidden_ways import WAYS
from tests.ordinary_mods import MODS
from tests.ways_of_holding import KEPT

VALUES = (0.125, 0.75)


def score_mod_of(get):
    return lambda score, b, h, q_idx, kv_idx: score + get() * (kv_idx + 1)


def mask_mod_of(get):
    return lambda b, h, q_idx, kv_idx: kv_idx < 8 * get()


def result(mod) -> float:
    """What a traced mod gives at one position."""
    number = functools.partial(torch.tensor, dtype=torch.float64)
    inputs = {"score": number(0.5)} | {name: torch.tensor(3) for name in ("b", "h", "q_idx", "kv_idx")}
    return float(interpret(mod.graph, inputs, mod.captured, mod.scalars, torch.float64)["out"])


def agrees_with_a_fresh_trace(fn, kind: str) -> Mod:
    now = traced_mod(fn, kind, torch.float64)
    assert result(now) == result(trace(fn, kind, torch.float64))
    return now


@pytest.mark.parametrize("name", WAYS)
def test_a_number_that_changes_is_seen(name):
    get, change = WAYS[name](VALUES[0])
    for kind, make in (("score", score_mod_of), ("mask", mask_mod_of)):
        fn = make(get)
        change(VALUES[0])
        agrees_with_a_fresh_trace(fn, kind)
        first = agrees_with_a_fresh_trace(fn, kind)
        change(VALUES[1])
        second = agrees_with_a_fresh_trace(fn, kind)
        assert (first.why is None) == (first.key is not None)
        matters = result(first) != result(second) or name in ("length", "a_registered_class")
        assert matters, "the number does not matter, so this tests nothing"


@pytest.mark.parametrize("name", WAYS)
def test_another_object_of_one_kind_is_another(name):
    """As two modules of one class with other numbers, called in turn."""
    for value in (*VALUES, *VALUES):
        get, _ = WAYS[name](value)
        agrees_with_a_fresh_trace(score_mod_of(get), "score")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ways_within_ways(data):
    """What gives the number is itself held in another way."""
    inner_name, outer_name = (data.draw(st.sampled_from(sorted(WAYS))) for _ in range(2))
    get, change = WAYS[inner_name](VALUES[0])
    factor, change_factor = WAYS[outer_name](1.0)
    held = {"get": get}
    fn = score_mod_of(lambda: held["get"]() * factor())
    for value in data.draw(st.lists(st.sampled_from((0.125, 0.5, 0.75, 1.0)), min_size=2, max_size=4)):
        data.draw(st.sampled_from((change, change_factor)))(value)
        agrees_with_a_fresh_trace(fn, "score")


@pytest.mark.parametrize("name", KEPT)
def test_what_is_used_every_day_stays_kept(name):
    get, _ = WAYS[name](VALUES[0])
    assert traced_mod(score_mod_of(get), "score", torch.float32).why is None


@pytest.mark.parametrize("name", MODS)
def test_mods_as_they_are_written_every_day_stay_kept(name):
    assert traced_mod(MODS[name], "score", torch.float32).why is None


def library_mods():
    def mask(mod):
        return flexref.create_block_mask(mod, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)

    window = masks.sliding_window(7)
    made = [masks.causal, window, flexref.and_masks(masks.causal, window), mask(window)[:, :, 1:].mask_mod]
    made += [mask(masks.document(torch.zeros(64, dtype=torch.int64))).rows(3, 9).mask_mod]
    return [*(("mask", mod) for mod in made), ("score", score_mods.relative_position), ("score", score_mods.soft_cap(8.0))]


@pytest.mark.parametrize(("kind", "fn"), library_mods())
def test_the_librarys_own_mods_stay_kept(kind, fn):
    assert traced_mod(fn, kind, torch.float32).why is None


def test_a_number_that_is_not_understood_makes_no_other_program():
    class Config:
        def __getattr__(self, name):
            return eval("value")  # noqa: S307

    graphs = set()
    for value in (0.1, 0.2, 0.3, 0.7, 5.5):
        fn = score_mod_of(lambda value=[value]: eval("value")[0])
        mod = traced_mod(fn, "score", torch.float32)
        assert mod.why and result(mod) == result(trace(fn, "score", torch.float64))
        graphs.add(mod.graph)
    assert len(graphs) == 1


def test_numbers_are_told_apart_by_type_and_bits():
    outcomes = set()
    for value in (1, 1.0, True, 0.0, -0.0, "a", b"a"):
        outcomes.add(traced_mod(lambda s, b, h, q, k, value=value: s * 1.0, "score", torch.float32).key)
    assert len(outcomes) == 7


# what PyTorch is set to: how it is asked in a mod, and how it is set; each is set back by its first value
SETTINGS: dict[str, tuple] = {
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, False, True),
    "debug_mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0, 1),
    "precision": (lambda: len(torch.get_float32_matmul_precision()), torch.set_float32_matmul_precision, "highest", "high"),
    "tf32": (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda x: setattr(torch.backends.cuda.matmul, "allow_tf32", x),
        False,
        True,
    ),
    "cudnn": (lambda: torch.backends.cudnn.benchmark, lambda x: setattr(torch.backends.cudnn, "benchmark", x), False, True),
    "math_sdp": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True, False),
    "sparse_checks": (
        torch.sparse.check_sparse_tensor_invariants.is_enabled,
        lambda x: (torch._C._set_check_sparse_tensor_invariants(x)),
        False,
        True,
    ),
    "fast_dtype": (
        lambda: torch.get_autocast_dtype("cpu").itemsize + float(torch.get_autocast_dtype("cpu") == torch.float16),
        lambda x: torch.set_autocast_dtype("cpu", x),
        torch.bfloat16,
        torch.float16,
    ),
    "default_dtype": (lambda: torch.get_default_dtype().itemsize, torch.set_default_dtype, torch.float32, torch.float64),
    "default_device": (lambda: len(torch.get_default_device().type), torch.set_default_device, None, "meta"),
    "a_device_taken": (lambda: len(torch.ones(3).device.type), torch.set_default_device, None, "meta"),
    "threads": (torch.get_num_threads, torch.set_num_threads, 1, 2),
    "mkldnn": (lambda: torch.backends.mkldnn.enabled, lambda x: setattr(torch.backends.mkldnn, "enabled", x), True, False),
    "seed": (torch.initial_seed, torch.manual_seed, 1, 2),
    "seed_of_a_generator": (lambda: torch.default_generator.initial_seed(), torch.manual_seed, 1, 2),
    "kernels": (
        lambda: len(torch.nn.attention._cur_sdpa_kernel_backends()),
        torch.backends.cuda.enable_math_sdp,
        True,
        False,
    ),
    "warnings": (torch.is_warn_always_enabled, torch.set_warn_always, False, True),
    "fast_path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, True, False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_pytorch_is_set_to_is_seen(name):
    ask, set_to, first, second = SETTINGS[name]
    for get in (ask, functools.partial(ask), lambda: ask(), lambda: next(map(operator.call, [ask]))):
        fn = score_mod_of(lambda get=get: float(get()))
        outcomes = set()
        for value in (first, first, second):
            set_to(value)
            made = []
            for tracer in (traced_mod, trace):
                try:
                    made.append(tracer(fn, "score", torch.float64))
                except TraceError:
                    made.append(None)
            set_to(first)
            now, fresh = (None if mod is None else result(mod) for mod in made)
            assert now == fresh
            outcomes.add(now)
        assert len(outcomes) == 2, "the setting does not matter, so this tests nothing"


def test_autocast_is_none_of_the_mods():
    table, weight = torch.rand(4, 8), torch.rand(8, 8)
    fn = lambda s, b, h, q_idx, kv_idx: s + (table @ weight)[h, kv_idx]  # noqa: E731
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            mod = traced_mod(fn, "score", torch.float32)
            assert mod.why is None and mod.captured[0].dtype == torch.float32


def test_a_mod_that_toggles_is_called_each_time():
    state = {"on": True}

    def toggles(score, b, h, q_idx, kv_idx):
        state["on"] = not state["on"]
        return score + (1.0 if state["on"] else 2.0)

    assert [result(traced_mod(toggles, "score", torch.float64)) for _ in range(4)] == [2.5, 1.5, 2.5, 1.5]


@pytest.mark.parametrize("profile", [lambda frame, event, arg: None, cProfile.Profile()])
def test_a_profiler_goes_on_after_a_trace(profile):
    is_function = callable(profile)
    sys.setprofile(profile) if is_function else profile.enable()
    try:
        before = sys.getprofile()
        why = traced_mod(score_mod_of(lambda: 0.125), "score", torch.float64).why
        assert why is None and sys.getprofile() is before
    finally:
        sys.setprofile(None) if is_function else profile.disable()


LIMIT = 0.02


@pytest.mark.parametrize("what", ["a logger", "a chain of 600", "a long list", "a compiled mod"])
def test_the_walk_is_bounded(what):
    logger = logging.getLogger("flexref.test")
    chain: list = [0.5]
    for _ in range(600):
        chain = [0.5, chain]
    numbers = list(range(200_000))

    def told(score, b, h, q_idx, kv_idx):
        logger.debug("traced")
        return score + 0.5

    mods = {
        "a logger": told,
        "a chain of 600": lambda s, b, h, q, k: s + chain[0],
        "a long list": lambda s, b, h, q, k: s + numbers[7],
        "a compiled mod": torch.compile(lambda s, b, h, q, k: s + 0.5, backend="eager"),
    }
    agrees_with_a_fresh_trace(original(mods[what]), "score")
    traced_mod(mods[what], "score", torch.float32)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        traced_mod(mods[what], "score", torch.float32)
        took.append(time.perf_counter() - start)
    assert min(took) < LIMIT


class SoftCap(torch.nn.Module):
    def __init__(self, cap):
        super().__init__()
        self.cap = cap

    def forward(self, score, b, h, q_idx, kv_idx):
        return self.cap * torch.tanh(score / self.cap)


def test_calls_in_turn_and_what_explain_says():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    for cap in (0.3, 20.0, 0.3):
        want = flex_attention(q, k, v, lambda s, b, h, i, j, cap=cap: cap * torch.tanh(s / cap))
        assert torch.equal(flex_attention(q, k, v, SoftCap(cap)), want)
    assert "score_mod  kept" in str(explain(q, k, v, SoftCap(2.0)))
    text = str(explain(q, k, v, lambda s, b, h, i, j: s + eval("1.0"), mask_mod=masks.causal))
    assert "score_mod  traced at each call, because" in text and "eval" in text and "mask_mod   kept" in text


def test_the_block_mask_of_a_bare_mask_mod_follows():
    q, k, v = (torch.randn(1, 1, 300, 8) for _ in range(3))
    for name in ("get_item", "an_nn_module", "function_attribute", "the_environment", "an_attribute_map"):
        get, change = WAYS[name](30.0)
        mod = lambda b, h, q_idx, kv_idx, get=get: kv_idx < get()  # noqa: E731
        flex_attention(q, k, v, mask_mod=mod)
        change(200.0)
        want = flex_attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 200)
        assert torch.equal(flex_attention(q, k, v, mask_mod=mod), want), name


def test_a_compiled_mod_is_taken_as_its_original():
    def mod(score, b, h, q_idx, kv_idx):
        return score * 2

    compiled = torch.compile(mod, backend="eager")
    assert original(compiled) is mod and original(mod) is mod
    module = SoftCap(2.0)
    assert original(torch.compile(module, backend="eager")) is module
    bound = functools.partial(compiled)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    assert torch.equal(flex_attention(q, k, v, compiled), flex_attention(q, k, v, mod))
    assert torch.equal(flex_attention(q, k, v, bound), flex_attention(q, k, v, mod))
    mods = masks.causal, torch.compile(masks.causal, backend="eager")
    assert operator.eq(*(flexref.create_block_mask(mod, 1, 1, 64, 64, device="cpu") for mod in mods))
