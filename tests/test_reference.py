"""The reference against itself, torch's eager flex_attention, and numbers worked out by hand."""
from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexref import one_float, reference, taken
from flexref.reference import einsum, loops

functorch = vars(torch._C)["_functorch"]
F64 = torch.float64
INF, NAN = math.inf, math.nan


def everywhere(x) -> list:
    """The numbers, at all positions that are asked about together, of what a mod sees as one number."""
    if isinstance(x, Tensor) and functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return torch.as_tensor(x).reshape(-1).tolist()


def tensors(
    B=1, H=2, L=3, S=4, E=5, Ev=None, kv_heads=None, kv_batch=None, dtype=F64, seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value leaves that require a gradient."""
    made = torch.Generator().manual_seed(seed)
    kv = kv_batch or B, kv_heads or H, S
    shapes = (B, H, L, E), (*kv, E), (*kv, E if Ev is None else Ev)
    q, k, v = (torch.randn(s, generator=made, dtype=F64).to(dtype).requires_grad_() for s in shapes)
    return q, k, v


def gradients(result, wanted, seed=1):
    """d of a fixed random functional of out and lse, by each tensor; empty rows' lse of -inf is left out."""
    made = torch.Generator().manual_seed(seed)
    lse = torch.where(result.lse > -INF, result.lse, 0.0)
    loss = (result.out * torch.randn(result.out.shape, generator=made, dtype=F64)).sum()
    loss = loss + (lse * torch.randn(lse.shape, generator=made, dtype=F64)).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def same(left, right, **tolerance):
    torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


# the loops are the einsum

BIAS = torch.linspace(-1, 1, 8 * 9, dtype=F64).reshape(8, 9).requires_grad_()
SCORE_MODS = {
    "none": None,
    "bias": lambda score, b, h, q_idx, kv_idx: score + BIAS[h, kv_idx],
    "soft cap": lambda score, b, h, q_idx, kv_idx: 2.0 * torch.tanh(score / 2.0),
    "distance": lambda score, b, h, q_idx, kv_idx: score - 0.5 * (q_idx - kv_idx) ** 2,
    "position": lambda score, b, h, q_idx, kv_idx: BIAS[q_idx][kv_idx] * BIAS[b, h],
    "constant": lambda score, b, h, q_idx, kv_idx: 1,
    "log": lambda score, b, h, q_idx, kv_idx: torch.log(torch.relu(score)),
}
MASK_MODS = {
    "none": None,
    "causal": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    "window": lambda b, h, q_idx, kv_idx: abs(q_idx - kv_idx) < 2,
    "head": lambda b, h, q_idx, kv_idx: (kv_idx + h) % 2 == 0,
    "always": lambda b, h, q_idx, kv_idx: True,
    "never": lambda b, h, q_idx, kv_idx: False,
}


@st.composite
def problems(draw) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[str, str], tuple[Tensor, Tensor] | None]:
    group, kv_heads, B = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    L, S = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    q, k, v = tensors(
        B, group * kv_heads, L, S, draw(st.integers(1, 3)), draw(st.integers(1, 3)), kv_heads,
        draw(st.sampled_from((1, B))), seed=draw(st.integers(0, 99)),
    )
    blocks = None
    if draw(st.booleans()):
        listed = torch.tensor(draw(st.lists(st.booleans(), min_size=L * S, max_size=L * S)), dtype=torch.bool)
        listed = listed.reshape(1, 1, L, S)
        full = torch.arange(S).expand(1, 1, L, S) % 2 == 0
        blocks = listed, full
    poison = draw(st.sampled_from((None, None, NAN, INF)))
    if poison is not None and S:
        with torch.no_grad():
            draw(st.sampled_from((k, v)))[-1, -1, draw(st.integers(0, S - 1))] = poison
    names = draw(st.sampled_from(sorted(SCORE_MODS))), draw(st.sampled_from(sorted(MASK_MODS)))
    return (q, k, v), names, blocks


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_the_einsum_means_what_the_loops_mean(problem):
    qkv, (score, mask), blocks = problem
    (q, k, v), score_mod, mask_mod = qkv, SCORE_MODS[score], MASK_MODS[mask]
    slow = loops(q, k, v, score_mod, mask_mod, blocks=blocks)
    fast = einsum(q, k, v, score_mod, mask_mod, blocks=blocks)
    for left, right in zip(slow, fast, strict=True):
        same(left, right)
    wanted = (*qkv, BIAS)
    for left, right in zip(gradients(slow, wanted), gradients(fast, wanted), strict=True):
        same(left, right)


@pytest.mark.parametrize("name", ["bias", "soft cap", "position"])
def test_gradients_are_those_of_finite_differences(name):
    qkv = tensors(B=2, H=4, L=3, S=4, E=2, Ev=3, kv_heads=2, kv_batch=1)
    bias = BIAS.detach().clone().requires_grad_()
    mods = {
        "bias": lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx],
        "soft cap": lambda score, b, h, q_idx, kv_idx: 2.0 * torch.tanh(score * bias[q_idx, 1]),
        "position": lambda score, b, h, q_idx, kv_idx: bias[q_idx][kv_idx] * bias[b, h],
    }

    def attend(q, k, v, _):
        return einsum(q, k, v, mods[name], MASK_MODS["window"])[:2]

    assert torch.autograd.gradcheck(attend, (*qkv, bias))


# torch's own, where it follows the rules

def torch_eager(monkeypatch):
    import torch.nn.attention.flex_attention as flex

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return flex


@pytest.mark.parametrize("score", ["none", "bias", "soft cap", "distance"])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "head"])
def test_agrees_with_torch(monkeypatch, score, mask):
    flex = torch_eager(monkeypatch)
    q, k, v = (x.detach() for x in tensors(B=2, H=4, L=5, S=7, E=6, kv_heads=2))
    bias = BIAS.detach()
    score_mod = (lambda s, b, h, i, j: s + bias[h, j]) if score == "bias" else SCORE_MODS[score]
    block_mask = None
    if MASK_MODS[mask]:
        block_mask = flex.create_block_mask(MASK_MODS[mask], 2, 4, 5, 7, device="cpu", BLOCK_SIZE=4)
    out, aux = flex.flex_attention(
        q, k, v, score_mod, block_mask, enable_gqa=True, return_aux=flex.AuxRequest(lse=True)
    )
    ours = einsum(q, k, v, score_mod, MASK_MODS[mask])
    same(ours.out, out)
    assert isinstance(aux, flex.AuxOutput) and aux.lse is not None
    same(ours.lse, aux.lse.to(F64))


# by hand

def test_one_query_two_keys():
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3.0)]]]])
    v = torch.tensor([[[[0.0, 4.0], [8.0, 0.0]]]])
    for attend in (loops, einsum):
        result = attend(q, k, v)
        same(result.out, torch.tensor([[[[6.0, 1.0]]]]))
        same(result.lse, torch.tensor([[[math.log(4.0)]]]))
        same(result.max_scores, torch.tensor([[[math.log(3.0)]]]))


def test_equal_scores_give_the_mean_of_what_is_allowed():
    q, k, v = tensors(L=4, S=4)
    result = einsum(q * 0, k, v, None, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    count = torch.arange(1, 5, dtype=F64)
    same(result.out, v.cumsum(2) / count[:, None])
    same(result.lse, torch.log(count).expand(1, 2, 4))


def test_loops_give_a_mod_plain_integers():
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.append((type(score), score.shape, type(b), type(h), type(q_idx), type(kv_idx)))
        if q_idx > kv_idx:
            return 0.5
        return score

    loops(*tensors(), score_mod)
    assert set(seen) == {(torch.Tensor, torch.Size([]), int, int, int, int)} and len(seen) == 2 * 3 * 4


def test_loops_give_a_mod_tensors_on_request():
    def causal(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, -INF)

    qkv = tensors()
    same(loops(*qkv, causal, index=torch.tensor).out, einsum(*qkv, causal).out)


def test_nested_reads_of_many_positions():
    table = torch.arange(2 * 3 * 4, dtype=F64).reshape(2, 3, 4)
    vector = torch.tensor([0, 2, 1, 0])

    def nested(score, b, h, q_idx, kv_idx):
        return score + table[h][q_idx][kv_idx] + table[0][vector[kv_idx]][1] + table[h, q_idx][vector[kv_idx]]

    def flat(score, b, h, q_idx, kv_idx):
        return score + table[h, q_idx, kv_idx] + table[0, vector[kv_idx], 1] + table[h, q_idx, vector[kv_idx]]

    qkv = tensors()
    same(einsum(*qkv, nested), einsum(*qkv, flat))
    same(einsum(*qkv, nested), loops(*qkv, nested))


# the rules

@pytest.mark.parametrize("attend", [loops, einsum])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_r1_and_r9_types(attend, dtype):
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.append(score.dtype)
        return score

    acc = F64 if dtype == F64 else torch.float32
    result = attend(*tensors(L=2, dtype=dtype, Ev=3), score_mod)
    assert set(seen) == {acc}
    assert (result.out.dtype, result.lse.dtype, result.max_scores.dtype) == (dtype, acc, acc)
    assert result.out.shape == (1, 2, 2, 3)


def test_r1_other_types_are_refused():
    q, k, v = tensors()
    with pytest.raises(TypeError, match="key is torch.int32; use float16"):
        einsum(q, k.int(), v)


def test_r1_key_and_value_of_lower_precision_are_raised():
    q, k, v = tensors(dtype=torch.float32)
    k, v = k.bfloat16(), v.half()
    same(einsum(q, k, v).out, einsum(q, k.float(), v.float()).out)


def test_r2_indices_are_64_bit_and_h_is_the_querys():
    seen = {}

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.update(b=b, h=h, q_idx=q_idx, kv_idx=kv_idx)
        return score

    einsum(*tensors(B=2, H=6, kv_heads=2), score_mod)
    assert {x.dtype for x in seen.values()} == {torch.int64}
    assert [max(everywhere(x)) for x in seen.values()] == [1, 5, 2, 3]


@pytest.mark.parametrize("attend", [loops, einsum])
def test_r3_listed_and_full_or_masked(attend):
    listed = torch.tensor([[True, True, True, False]])
    full = torch.tensor([[True, False, False, True]])
    asked = []

    def mask_mod(b, h, q_idx, kv_idx):
        asked.extend(everywhere(kv_idx))
        return kv_idx == 1

    q, k, v = tensors(H=1, L=1)
    result = attend(q, k, v, None, mask_mod, blocks=(listed, full))
    same(result.out, einsum(q, k[:, :, :2], v[:, :, :2]).out)
    assert asked == [1, 2]


@pytest.mark.parametrize("attend", [loops, einsum])
def test_r3_a_mask_that_is_not_bool_is_refused(attend):
    with pytest.raises(TypeError, match="mask_mod returned .*, not a bool. Return a comparison"):
        attend(*tensors(), None, lambda b, h, q_idx, kv_idx: q_idx - kv_idx)


@pytest.mark.parametrize("attend", [loops, einsum])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["key", "value", "captured"])
def test_r4_what_is_masked_does_not_leak(attend, poison, where):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score * torch.exp(bias[kv_idx])

    def run():
        result = attend(q, k, v, score_mod, MASK_MODS["causal"])
        return result, gradients(result, (q, k, v, bias))

    q, k, v = tensors(L=4, S=5)
    bias = torch.zeros(5, dtype=F64, requires_grad=True)
    tensor = {"key": k, "value": v, "captured": bias}[where]
    clean, clean_grads = run()

    # no row reads position 4
    with torch.no_grad():
        (tensor if where == "captured" else tensor.mT)[..., 4] = poison
    for left, right in zip((*clean, *clean_grads), (*run()[0], *run()[1]), strict=True):
        same(left, right)

    # the last row alone reads position 3
    with torch.no_grad():
        (tensor if where == "captured" else tensor.mT)[..., 3] = poison
    result, grads = run()
    for left, right in zip((*clean, clean_grads[0]), (*result, grads[0]), strict=True):
        same(left[:, :, :3], right[:, :, :3])
    assert torch.isfinite(grads[1][:, :, 4]).all() and torch.isfinite(grads[2][:, :, 4]).all()


@pytest.mark.parametrize("attend", [loops, einsum])
def test_r5_minus_infinity_is_a_mask(attend):
    q, k, v = tensors(L=4)
    with torch.no_grad():
        k[..., 3, :] = NAN
        v[..., 3, :] = NAN

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx < 3, score, -INF)

    by_score = attend(q, k, v, score_mod, **({"index": torch.tensor} if attend is loops else {}))
    by_mask = einsum(q, k, v, None, lambda b, h, q_idx, kv_idx: kv_idx < 3)
    for left, right in zip(by_score, by_mask, strict=True):
        same(left, right)
    for left, right in zip(gradients(by_score, (q, k, v)), gradients(by_mask, (q, k, v)), strict=True):
        assert torch.isfinite(left).all()
        same(left, right)


@pytest.mark.parametrize("attend", [loops, einsum])
def test_r6_an_empty_row(attend):
    q, k, v = tensors()
    result = attend(q, k, v, None, lambda b, h, q_idx, kv_idx: q_idx != 1)
    assert (result.out[:, :, 1] == 0).all()
    assert (result.lse[:, :, 1] == -INF).all() and (result.max_scores[:, :, 1] == -INF).all()
    grads = torch.autograd.grad([result.out, result.lse], (q, k, v), [torch.ones_like(x) for x in result[:2]])
    assert all(torch.isfinite(grad).all() for grad in grads) and (grads[0][:, :, 1] == 0).all()


@pytest.mark.parametrize("attend", [loops, einsum])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_r7_a_bad_score_spoils_its_row_and_what_that_row_reads(attend, bad):
    q, k, v = tensors(L=4)
    bump = torch.zeros(4, 4, dtype=F64)
    bump[2, 1] = bad

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bump[q_idx, kv_idx]

    result = attend(q, k, v, score_mod, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    for tensor in (result.out.sum(-1), result.lse, result.max_scores):
        assert tensor.isnan().any((0, 1)).tolist() == [False, False, True, False]
    dq, dk, dv = torch.autograd.grad((result.out**2).sum(), (q, k, v))
    assert dq.isnan().all(-1).all((0, 1)).tolist() == [False, False, True, False]
    for grad in (dk, dv):
        # row 2 reads keys 0 to 2
        assert grad.isnan().all(-1).all((0, 1)).tolist() == [True, True, True, False]
        assert torch.isfinite(grad[:, :, 3]).all()


def test_r8_lse_is_natural_and_differentiable_and_max_scores_is_not():
    q, k, v = tensors(E=4)
    result = einsum(q, k, v)
    score = q @ k.mT / 2
    same(result.lse, torch.logsumexp(score, -1))
    same(result.max_scores, score.amax(-1))
    assert result.lse.requires_grad and not result.max_scores.requires_grad
    (dq,) = torch.autograd.grad(result.lse.sum(), q)
    same(dq, torch.softmax(score, -1) @ k / 2)


@pytest.mark.parametrize("attend", [loops, einsum])
@pytest.mark.parametrize(("B", "L", "S"), [(1, 0, 3), (1, 3, 0), (1, 0, 0), (0, 3, 3)])
def test_r9_zero_lengths(attend, B, L, S):
    q, k, v = tensors(B=B, L=L, S=S, kv_batch=1)
    result = attend(q, k, v, SCORE_MODS["bias"], MASK_MODS["causal"])
    assert result.out.shape == (B, 2, L, 5) and (result.out == 0).all()
    assert result.lse.shape == (B, 2, L) and (result.lse == -INF).all()


def test_r10_heads_in_groups():
    q, k, v = tensors(H=6, kv_heads=2)
    out = einsum(q, k, v).out
    for h in range(6):
        one, shared = slice(h, h + 1), slice(h // 3, h // 3 + 1)
        same(out[:, one], einsum(q[:, one], k[:, shared], v[:, shared]).out)


@pytest.mark.parametrize(
    ("kv_heads", "kv_batch"), [(4, None), (None, 3)], ids=["heads that do not divide", "another batch"]
)
def test_r10_r11_shapes_that_do_not_fit_are_refused(kv_heads, kv_batch):
    with pytest.raises(ValueError, match="its batch is 1 or equal, its heads divide query's"):
        einsum(*tensors(B=2, H=6, kv_heads=kv_heads, kv_batch=kv_batch))


def test_r10_key_and_value_that_disagree_are_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="do not agree"):
        einsum(q, k, v[:, :1])


def test_r11_one_key_and_value_for_all_batches():
    q, k, v = tensors(B=3, kv_batch=1)
    repeated = einsum(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    same(einsum(q, k, v).out, repeated.out)


@pytest.mark.parametrize("attend", [loops, einsum])
def test_r13_an_index_out_of_range(attend):
    short = torch.zeros(2, dtype=F64)
    with pytest.raises(IndexError):
        attend(*tensors(), lambda score, b, h, q_idx, kv_idx: score + short[kv_idx])
    # never read where masked; negative indices count from the end
    attend(
        *tensors(), lambda score, b, h, q_idx, kv_idx: score + short[-1 - kv_idx],
        lambda b, h, q_idx, kv_idx: kv_idx < 2,
    )


def test_r14_any_strides_and_nothing_is_written():
    q, k, v = tensors(B=2)
    before = [x.detach().clone() for x in (q, k, v)]
    sq, sk, sv = (x.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v))
    same(einsum(sq, sk, sv).out, einsum(q, k, v).out)
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, v), strict=True))


def test_the_reference_imports_nothing_of_flexref_but_what_numbers_and_branches_are():
    imported = [
        line
        for module in (reference, one_float, taken)
        for line in inspect.getsource(module).splitlines()
        if line.startswith(("import", "from")) and "flexref" in line
    ]
    assert imported == ["from flexref.one_float import OneFloat", "from flexref.taken import OneShape, follow"]


# the reference as a backend

def as_problem(qkv, captured=(), wanted=None, score_mod=None, mask_mod=None, blocks=None):
    from flexref.problem import Capture, Problem, Tensors

    q, k, v = qkv
    (B, H, L, E), (kv_batch, kv_heads, S, _) = q.shape, k.shape
    wanted = [True] * (3 + len(captured)) if wanted is None else wanted
    problem = Problem(
        B, kv_batch, H, kv_heads, L, S, E, v.shape[3], q.dtype, k.dtype, v.dtype,
        captures=tuple(
            Capture(f"t{i}", t.dtype, tuple(t.shape), need)
            for i, (t, need) in enumerate(zip(captured, wanted[3:], strict=True))
        ),
        needs_grad=(wanted[0], wanted[1], wanted[2]),
    )
    block_mask = None if blocks is None else SimpleNamespace(listed=lambda: blocks)
    return problem, Tensors(
        q, k, v, 1 / math.sqrt(E), block_mask, tuple(captured), (), score_mod, mask_mod
    )


def run_backend(problem, given):
    from flexref.backends import reference as backend

    output = backend.forward(problem, given)
    grads = backend.backward(problem, given, output, torch.ones_like(output.out), torch.ones_like(output.lse))
    return output, [grads.query, grads.key, grads.value, *grads.captured]


def test_backend_satisfies_the_contract():
    from flexref.backend import Backend
    from flexref.backends import reference as backend

    assert isinstance(backend, Backend) and backend.rank == 0
    assert backend.unavailable() == [] and backend.unsupported(as_problem(tensors())[0]) == []


def test_backend_gives_autograds_gradients():
    qkv = tensors(H=4, kv_heads=2, kv_batch=1, B=2)
    bias, temperature = torch.randn(4, dtype=F64, requires_grad=True), torch.tensor(0.7, requires_grad=True)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * temperature + bias[h]

    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool), torch.arange(4).expand(1, 1, 3, 4) < 2
    problem, given = as_problem(qkv, (bias, temperature), None, score_mod, MASK_MODS["causal"], blocks)
    output, grads = run_backend(problem, given)
    direct = einsum(*qkv, score_mod, MASK_MODS["causal"], blocks=blocks)
    for left, right in zip((output.out, output.lse, output.max_scores), direct, strict=True):
        assert left is not None and not left.requires_grad
        same(left, right.detach())
    expected = torch.autograd.grad(direct.out.sum() + direct.lse.sum(), (*qkv, bias, temperature))
    for left, right in zip(grads, expected, strict=True):
        same(left, right)


def test_backend_stops_at_the_captured_tensor_itself():
    weight = torch.randn(4, dtype=F64, requires_grad=True)
    derived = torch.exp(weight)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + derived[kv_idx] * weight[q_idx]

    problem, given = as_problem(tensors(), (derived, weight), None, score_mod)
    _, grads = run_backend(problem, given)
    apart = derived.detach().clone().requires_grad_()

    def same_mod(score, b, h, q_idx, kv_idx):
        return score + apart[kv_idx] * weight[q_idx]

    problem, given = as_problem(tensors(), (apart, weight), None, same_mod)
    for left, right in zip(grads, run_backend(problem, given)[1], strict=True):
        same(left, right)
    derived.sum().backward()


def test_backend_returns_only_the_gradients_that_are_wanted():
    table = torch.randn(4, dtype=F64, requires_grad=True)
    wanted = [False, True, False, False]
    problem, given = as_problem(
        tensors(), (table,), wanted, lambda score, b, h, q_idx, kv_idx: score + table[kv_idx]
    )
    _, grads = run_backend(problem, given)
    assert [grad is not None for grad in grads] == wanted


def test_backend_gives_zeros_where_a_mod_reads_nothing():
    unread = torch.randn(4, dtype=F64, requires_grad=True)
    problem, given = as_problem(
        tensors(), (unread,), [True, True, False, True], lambda score, b, h, q_idx, kv_idx: 1.0
    )
    _, grads = run_backend(problem, given)
    assert grads[2] is None and all((grads[i] == 0).all() for i in (0, 1, 3))


def test_backend_r15_gives_the_same_bits_and_leaves_the_flag_alone():
    table = torch.randn(3, requires_grad=True)
    problem, given = as_problem(
        tensors(H=4, L=128, S=128, dtype=torch.float32), (table,), None,
        lambda score, b, h, q_idx, kv_idx: score + table[(q_idx + kv_idx) % 3],
    )
    first, again = (run_backend(problem, given)[1] for _ in range(2))
    same(first, again, rtol=0, atol=0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_backend_keeps_its_precision_under_autocast():
    problem, given = as_problem(tensors(dtype=torch.float32))
    plain, grads = run_backend(problem, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grads = run_backend(problem, given)
    assert torch.equal(plain.out, cast.out)
    same(grads, cast_grads, rtol=0, atol=0)
