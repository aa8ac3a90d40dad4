"""Tracing: what a mod becomes, which mods are refused and in what words, when a trace is used again."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from flexref import create_mask, explain, flex_attention
from flexref.errors import TraceError
from flexref.program import mods
from flexref.program.closure import leaves_of
from flexref.program.interpret import interpret
from flexref.program.ir import check
from flexref.program.mods import shifted, traced_mod
from flexref.program.trace import trace

table = torch.linspace(-1, 1, 24).reshape(4, 6)
per_head = torch.tensor([0.5, -0.25, 2.0, 1.0])
temperature = torch.tensor(1.5)
steps = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
flags = torch.tensor([True, False, True, True])
half = torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
WINDOW = 3


def inputs() -> dict[str, torch.Tensor]:
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 6, 6)), indexing="ij")
    score = torch.linspace(-3, 3, b.numel()).reshape(b.shape)
    return {"score": score, "b": b, "h": h, "q_idx": q, "kv_idx": k}


SCORE_MODS = {
    "identity": lambda s, b, h, q, k: s,
    "constant": lambda s, b, h, q, k: 1.5,
    "int_constant": lambda s, b, h, q, k: 2,
    "relative": lambda s, b, h, q, k: s + (q - k),
    "alibi": lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / 4)) * (k - q),
    "soft_cap": lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0),
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "captured": lambda s, b, h, q, k: s * per_head[h] + table[h, q],
    "nested_index": lambda s, b, h, q, k: s + table[h][k],
    "captured_scalar": lambda s, b, h, q, k: s / temperature,
    "captured_of_captured": lambda s, b, h, q, k: s + per_head[steps[h]],
    "negative_index": lambda s, b, h, q, k: s + table[h, -1] + table[-1, q],
    "number_index": lambda s, b, h, q, k: s + table[1, 2],
    "bool_capture": lambda s, b, h, q, k: torch.where(flags[h], s, 0.0),
    "bfloat16_capture": lambda s, b, h, q, k: s + half[b],
    "softplus": lambda s, b, h, q, k: F.softplus(s),
    "gelu": lambda s, b, h, q, k: F.gelu(s) + F.gelu(s, approximate="tanh"),
    "silu_relu": lambda s, b, h, q, k: F.silu(s) + F.relu(s) + F.leaky_relu(s, 0.2) + F.elu(s),
    "clamp": lambda s, b, h, q, k: s.clamp(-1, 1) + torch.clamp(s, min=-0.5) + s.clip(max=2),
    "integers": lambda s, b, h, q, k: s + (q // 2) % 3 + ((q << 1) & k) - (k ^ 1) + abs(q - k) - (~q),
    "powers": lambda s, b, h, q, k: s**2 - s**3 + 2.0 ** (s / 4) + (q + 1.0) ** 0.5,
    "reflected": lambda s, b, h, q, k: 1 - s + 2 / (1 + s * s) - 7 % (q + 1) + 9 // (k + 1),
    "bools": lambda s, b, h, q, k: s * ((q > k) | ~(k > 2)) + (q == k).float() + ((q > 1) ^ (k > 1)),
    "conversions": lambda s, b, h, q, k: s.to(torch.float64) + q.float() + s.long() + k.to(torch.int32) + (q > k).int(),
    "constants_made_inside": lambda s, b, h, q, k: (
        torch.where(q > k, s, torch.tensor(-2.0)) + s.new_tensor(1.0) + torch.ones(())
    ),
    "like": lambda s, b, h, q, k: s + torch.ones_like(s) + torch.full_like(s, 0.5) + torch.zeros_like(q),
    "minimum": lambda s, b, h, q, k: (
        torch.minimum(s, q) + torch.maximum(s, torch.tensor(0.25)) + torch.fmod(s, 2) + torch.sign(s)
    ),
    "tests": lambda s, b, h, q, k: (
        torch.where(torch.isnan(s) | torch.isinf(s), 0.0, s) + torch.floor(s) + torch.round(s)
    ),
    "elementary": lambda s, b, h, q, k: (
        torch.sin(s) * torch.exp(-s) + torch.log1p(s * s) + torch.sigmoid(s) + torch.erf(s)
    ),
    "division_modes": lambda s, b, h, q, k: (
        s + torch.div(q - 3, 2, rounding_mode="trunc") + torch.div(s, 0.7, rounding_mode="floor")
    ),
}


# read one element at a time, a nested index is what a mod means by it; on whole tensors PyTorch reads rows
ON_WHOLE_TENSORS = {**SCORE_MODS, "nested_index": lambda s, b, h, q, k: s + table[h, k]}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_a_program_means_what_its_function_computes(name):
    mod = SCORE_MODS[name]
    traced = trace(mod, "score")
    check(traced.graph)
    x = inputs()
    with torch.no_grad():
        want = torch.as_tensor(ON_WHOLE_TENSORS[name](*x.values())).to(torch.float32)
        got = interpret(traced.graph, x, traced.captured, traced.scalars)["out"]
    torch.testing.assert_close(got.expand_as(x["score"]), want.expand_as(x["score"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("result", [True, False])
def test_a_mask_may_be_a_python_bool(result):
    graph = trace(lambda b, h, q, k: result, "mask").graph
    assert str(graph) == f"%0 = const {result} : bool\nreturn out=%0"


def test_printing_names_every_node():
    text = str(trace(lambda s, b, h, q, k: torch.where(q >= k, s + per_head[h], -float("inf")), "score").graph)
    assert text.splitlines()[0] == "%0 = input score : float"
    assert "load 0 %1 : float    # " in text and "test_trace.py" in text
    assert "const -inf : float" in text


def branch(s, b, h, q, k):
    if q > k:
        return s
    return s * 2


def writes(s, b, h, q, k):
    per_head[h] = s
    return s


REFUSED = {
    "branch": (branch, "score", "`if`", "torch.where"),
    "and": (lambda b, h, q, k: (q > k) and (k > 3), "mask", "`and`", "`&`"),
    "python_max": (lambda s, b, h, q, k: max(s, 0), "score", "max", "torch.maximum"),
    "item": (lambda s, b, h, q, k: s.item(), "score", "item()", "torch.where"),
    "int": (lambda s, b, h, q, k: s + int(q), "score", "int()", "Instead"),
    "reduction": (lambda s, b, h, q, k: s - s.max(), "score", "max()", "capture the result"),
    "sum": (lambda s, b, h, q, k: torch.sum(s), "score", "sum()", "capture the result"),
    "softmax": (lambda s, b, h, q, k: torch.softmax(s, 0), "score", "softmax()", "capture the result"),
    "random": (lambda s, b, h, q, k: s + torch.rand(()), "score", "rand()", "draw the numbers before"),
    "dropout": (lambda s, b, h, q, k: F.dropout(s, 0.5), "score", "dropout()", "draw the numbers before"),
    "in_place": (lambda s, b, h, q, k: s + per_head.mul_(2)[h], "score", "mul_()", "x = x + y"),
    "write": (writes, "score", "__setitem__", "return a new value"),
    "few_arguments": (
        lambda s, b, h, q: s,
        "score",
        "(score, b, h, q_idx, kv_idx)",
        "got `<lambda>`(s, b, h, q)",
    ),
    "score_mod_for_mask": (lambda s, b, h, q, k: s, "mask", "(b, h, q_idx, kv_idx)", "score_mod="),
    "mask_for_score_mod": (lambda b, h, q, k: q > k, "score", "(score, b, h, q_idx, kv_idx)", "mask_mod="),
    "bool_score": (lambda s, b, h, q, k: q > k, "score", "torch.bool", "return the changed score"),
    "float_mask": (lambda b, h, q, k: q * 1.0, "mask", "torch.float32", "return a comparison"),
    "int_mask": (lambda b, h, q, k: 1, "mask", "got 1", "return a comparison"),
    "none": (lambda s, b, h, q, k: None, "score", "got None", "return the changed score"),
    "whole_capture": (lambda s, b, h, q, k: s + per_head, "score", "per_head", "index every dimension"),
    "half_indexed": (lambda s, b, h, q, k: s + table[h], "score", "1 of its 2", "table[h, q_idx]"),
    "half_indexed_left": (lambda s, b, h, q, k: table[h] + s, "score", "1 of its 2", "table[h, q_idx]"),
    "slice": (lambda s, b, h, q, k: s + table[h, :], "score", "1 of its 2", "index every dimension"),
    "float_index": (lambda s, b, h, q, k: s + table[h, q / 2], "score", "float32", "`//`, not `/`"),
    "too_many": (lambda s, b, h, q, k: s + per_head[h, q], "score", "2 indices", "1 dimensions"),
    "small_int": (lambda s, b, h, q, k: s + q.to(torch.int8), "score", "torch.int8", "int64"),
    "unknown_operator": (lambda s, b, h, q, k: torch.special.bessel_j0(s), "score", "bessel_j0", "pointwise"),
    "name_error": (lambda s, b, h, q, k: s + undefined, "score", "NameError", "undefined"),  # noqa: F821  # type: ignore
    "no_function": (3, "score", "must be a function", "int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mod_that_is_no_program_is_refused_with_its_place_and_a_remedy(name):
    fn, kind, says, remedy = REFUSED[name]
    with pytest.raises(TraceError) as error:
        trace(fn, kind)
    text = str(error.value)
    assert says in text and remedy in text, text
    assert text.startswith(f"{kind}_mod")
    assert name == "no_function" or "test_trace.py:" in text, text


def test_numbers_that_a_mod_captures_become_scalars():
    def window(size):
        return lambda b, h, q, k: (q - k < size) & (q >= k)

    graphs = {traced_mod(window(size), "mask", torch.float32).graph for size in (5, 17, 256)}
    assert len(graphs) == 1
    assert traced_mod(window(17), "mask", torch.float32).scalars == (17,)


def test_a_captured_divisor_stays_a_constant():
    def block(size):
        return lambda b, h, q, k: q // size == k // size

    assert traced_mod(block(8), "mask", torch.float32).scalars == ()


def test_a_factory_called_with_another_tensor_is_not_traced_again(monkeypatch):
    traces = []
    monkeypatch.setattr(mods, "trace", lambda *args: traces.append(1) or trace(*args))

    def make(bias):
        return lambda s, b, h, q, k: s + bias[h] * 0.125

    first, second = torch.randn(4), torch.randn(4)
    one = traced_mod(make(first), "score", torch.float32)
    two = traced_mod(make(second), "score", torch.float32)
    assert len(traces) == 1 and one.graph is two.graph
    assert one.captured[0] is first and two.captured[0] is second
    traced_mod(make(torch.randn(5)), "score", torch.float32)
    assert len(traces) == 2


def test_a_changed_global_number_is_seen():
    global WINDOW
    mod = lambda b, h, q, k: q - k < WINDOW  # noqa: E731
    assert traced_mod(mod, "mask", torch.float32).scalars == (3,)
    WINDOW = 5
    try:
        assert traced_mod(mod, "mask", torch.float32).scalars == (5,)
    finally:
        WINDOW = 3


class Config:
    def __init__(self, size):
        self.size = size


def test_a_changed_attribute_is_seen():
    config = Config(4)
    mod = lambda b, h, q, k: q - k < config.size  # noqa: E731
    assert traced_mod(mod, "mask", torch.float32).scalars == (4,)
    config.size = 9
    assert traced_mod(mod, "mask", torch.float32).scalars == (9,)


class Slope:
    size = 4

    def __init__(self):
        self._hidden = 5

    @property
    def hidden(self):
        return self._hidden

    def helper(self, distance):
        return distance < self.size

    def __call__(self, b, h, q_idx, kv_idx):
        return self.helper(q_idx - kv_idx)


class Inherits(Slope):
    pass


def reads_size(config):
    return config.size


CHANGES = {
    "a helper method": (lambda x: x, "size"),
    "a property": (lambda x: lambda b, h, q, k: q - k < x.hidden, "_hidden"),
    "a helper function": (lambda x: lambda b, h, q, k: q - k < reads_size(x), "size"),
    "getattr": (lambda x: lambda b, h, q, k: q - k < getattr(x, "si" + "ze"), "size"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_helper_reads_is_watched_too(name):
    make, attribute = CHANGES[name]
    config = Slope()
    mod = make(config)
    before = trace_scalars(mod)
    setattr(config, attribute, 9)
    assert before != [9] and trace_scalars(mod) == [9]


def test_an_inherited_class_attribute_is_watched(monkeypatch):
    mod = lambda b, h, q, k: q - k < Inherits.size  # noqa: E731
    assert trace_scalars(mod) == [4]
    monkeypatch.setattr(Slope, "size", 9)
    assert trace_scalars(mod) == [9]


def trace_scalars(mod) -> list:
    """The numbers in the program, as scalars or constants."""
    traced = traced_mod(mod, "mask", torch.float32)
    return [*traced.scalars, *(n.attr for n in traced.graph.nodes if n.op == "const")]


def test_int8_arithmetic_which_would_wrap_is_refused():
    small = torch.tensor([100, 100], dtype=torch.int8)
    with pytest.raises(TraceError, match="int8.*int64"):
        trace(lambda s, b, h, q, k: s + (small[q] + small[k]), "score")
    trace(lambda s, b, h, q, k: s + small[q].long() + small[k], "score")


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4))

    def score_mod(self, s, b, h, q, k):
        return s + self.weight[h]


def test_a_method_reads_its_modules_parameter():
    module = Bias()
    mod = traced_mod(module.score_mod, "score", torch.float32)
    assert mod.captured[0] is module.weight and mod.names == ("self.weight",)
    module.weight = torch.nn.Parameter(torch.randn(4))
    assert traced_mod(module.score_mod, "score", torch.float32).captured[0] is module.weight


def test_partial_functions_and_objects_are_mods():
    def bounded(size, b, h, q, k):
        return q - k < size

    class Callable:
        size = 6

        def __call__(self, b, h, q_idx, kv_idx):
            return q_idx - kv_idx < self.size

    assert traced_mod(functools.partial(bounded, 7), "mask", torch.float32).scalars == (7,)
    mod = Callable()
    assert traced_mod(mod, "mask", torch.float32).scalars == (6,)
    mod.size = 8
    assert traced_mod(mod, "mask", torch.float32).scalars == (8,)


def test_what_cannot_be_watched_is_not_cached():
    assert "list_iterator" in str(leaves_of(functools.partial(lambda x, b, h, q, k: True, iter([1]))).why)


def test_shifted_moves_loads_and_scalars():
    mod = traced_mod(lambda b, h, q, k: (steps[h] > q) & (q - k < WINDOW), "mask", torch.float32)
    moved = shifted(mod.graph, 2, 1)
    assert [n.attr for n in moved.nodes if n.op == "load"] == [2]
    assert [n.attr for n in moved.nodes if n.op == "scalar"] == [1]


def test_tracing_is_not_changed_by_autocast_or_inference_mode():
    plain = trace(SCORE_MODS["captured"], "score").graph
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert trace(SCORE_MODS["captured"], "score").graph == plain


class AttrDict(dict):
    """A dict by attributes, as many config libraries have it: what it lacks is a KeyError."""

    __getattr__ = dict.__getitem__


class Rude:
    def __init__(self, error):
        self.error, self.scale = error, 2.0

    def __getattr__(self, name):
        raise vars(self).get("error", RuntimeError)(name)


class CalledAttrDict(AttrDict):
    def __call__(self, score, b, h, q_idx, kv_idx):
        return score * self.scale


class CalledRude(Rude):
    def __call__(self, score, b, h, q_idx, kv_idx):
        return score * self.scale


def reads(held):
    return lambda score, b, h, q_idx, kv_idx: score * held.scale


RUDE = {
    "captured AttrDict": lambda: reads(AttrDict(scale=2.0)),
    "captured KeyError": lambda: reads(Rude(KeyError)),
    "captured ValueError": lambda: reads(Rude(ValueError)),
    "called AttrDict": lambda: CalledAttrDict(scale=2.0),
    "called KeyError": lambda: CalledRude(KeyError),
    "called OSError": lambda: CalledRude(OSError),
    "partial": lambda: functools.partial(lambda held, s, b, h, i, j: s * held.scale, AttrDict(scale=2.0)),
}


@pytest.mark.parametrize("backend", ["numba_cpu", "reference"])
@pytest.mark.parametrize("make", RUDE.values(), ids=RUDE)
def test_an_objects_own_getattr_may_raise_whatever_it_likes(make, backend):
    x = torch.randn(1, 2, 6, 4)
    want = flex_attention(x, x, x, lambda s, b, h, i, j: s * 2.0, backend=backend)
    assert torch.equal(flex_attention(x, x, x, make(), backend=backend), want)
    explain(x, x, x, make())
    with pytest.raises((TraceError, TypeError), match="must take|must return|argument"):
        flex_attention(x, x, x, mask_mod=make())


def test_a_score_mod_behind_a_wrapper_of_any_arguments_is_known_as_one():
    @functools.wraps(near := lambda s, b, h, i, j: torch.where(abs(i - j) < 2, s, -float("inf")))
    def wrapper(*arguments):
        return near(*arguments)

    assert torch.equal(create_mask(wrapper, 1, 1, 6, 6, "cpu"), create_mask(near, 1, 1, 6, 6, "cpu"))
