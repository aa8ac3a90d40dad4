"""Views, conversions and other work on captured tensors inside a mod: as PyTorch, forward and backward, kept or not."""

from __future__ import annotations

import math

import pytest
import torch

from flexref import TraceError, flex_attention
from flexref.program.mods import traced_mod

L = 12
BACKENDS = ("numba_cpu", "reference")


def inputs():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, L, 4, generator=random).requires_grad_() for _ in range(3)]


def table(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


# a mod of (table, score, h, i, j) over a table (2, L): in the way of the name, and with one plain read
VIEWS = {
    "T": (lambda t, s, h, i, j: s + t.T[j, h], lambda t, s, h, i, j: s + t[h, j]),
    "mT": (lambda t, s, h, i, j: s * t.mT[j, h], lambda t, s, h, i, j: s * t[h, j]),
    "H": (lambda t, s, h, i, j: s * t.H[j, h], lambda t, s, h, i, j: s * t[h, j]),
    "mH": (lambda t, s, h, i, j: s * t.mH[j, h], lambda t, s, h, i, j: s * t[h, j]),
    "T and itself": (lambda t, s, h, i, j: s * t.T[j, h] + t[h, i], lambda t, s, h, i, j: s * t[h, j] + t[h, i]),
    "column": (lambda t, s, h, i, j: s + t[:, 3][h], lambda t, s, h, i, j: s + t[h, 3]),
    "row": (lambda t, s, h, i, j: s + t[1][j], lambda t, s, h, i, j: s + t[1, j]),
    "slice": (lambda t, s, h, i, j: s + t[:, 2:9][h, j % 7], lambda t, s, h, i, j: s + t[h, 2 + j % 7]),
    "step": (lambda t, s, h, i, j: s + t[:, ::2][h, j // 2], lambda t, s, h, i, j: s + t[h, j // 2 * 2]),
    "none": (lambda t, s, h, i, j: s + t[None][0, h, j], lambda t, s, h, i, j: s + t[h, j]),
    "ellipsis": (lambda t, s, h, i, j: s + t[..., 0][h], lambda t, s, h, i, j: s + t[h, 0]),
    "traced last": (lambda t, s, h, i, j: s + t[:, j][h], lambda t, s, h, i, j: s + t[h, j]),
    "traced last, ellipsis": (lambda t, s, h, i, j: s + t[..., j][h], lambda t, s, h, i, j: s + t[h, j]),
    "traced first": (lambda t, s, h, i, j: s + t[h, :][j], lambda t, s, h, i, j: s + t[h, j]),
    "traced, sliced": (lambda t, s, h, i, j: s + t[h, 3:][j % 5], lambda t, s, h, i, j: s + t[h, 3 + j % 5]),
    "nested": (lambda t, s, h, i, j: s + t[h][j], lambda t, s, h, i, j: s + t[h, j]),
    "nested with none": (lambda t, s, h, i, j: s + t[h][None][0, j], lambda t, s, h, i, j: s + t[h, j]),
    "view": (lambda t, s, h, i, j: s + t.view(-1)[h * L + j], lambda t, s, h, i, j: s + t[h, j]),
    "row viewed": (lambda t, s, h, i, j: s + t[h].view(3, 4)[j // 4, j % 4], lambda t, s, h, i, j: s + t[h, j]),
    "row transposed": (lambda t, s, h, i, j: s + t[h].view(3, 4).T[j % 4, j // 4], lambda t, s, h, i, j: s + t[h, j]),
    "reshape": (lambda t, s, h, i, j: s + t.reshape(2, 3, 4)[h, j // 4, j % 4], lambda t, s, h, i, j: s + t[h, j]),
    "transpose": (lambda t, s, h, i, j: s + t.transpose(0, 1)[j, h], lambda t, s, h, i, j: s + t[h, j]),
    "permute": (lambda t, s, h, i, j: s + torch.permute(t, (1, 0))[j, h], lambda t, s, h, i, j: s + t[h, j]),
    "flatten": (lambda t, s, h, i, j: s + t.flatten()[j], lambda t, s, h, i, j: s + t[0, j]),
    "squeeze": (lambda t, s, h, i, j: s + t[:, :1].squeeze(1)[h], lambda t, s, h, i, j: s + t[h, 0]),
    "unsqueeze": (lambda t, s, h, i, j: s + t.unsqueeze(0)[0, h, j], lambda t, s, h, i, j: s + t[h, j]),
    "expand": (lambda t, s, h, i, j: s + t[:, :1].expand(2, L)[h, j], lambda t, s, h, i, j: s + t[h, 0]),
    "double": (lambda t, s, h, i, j: s + t.double()[h, j], lambda t, s, h, i, j: s + t[h, j]),
    "to": (lambda t, s, h, i, j: s + t.to(torch.float64)[h, j], lambda t, s, h, i, j: s + t[h, j]),
    "contiguous": (lambda t, s, h, i, j: s + t.T.contiguous()[j, h], lambda t, s, h, i, j: s + t[h, j]),
    "unbind": (lambda t, s, h, i, j: s + t.unbind(0)[1][j], lambda t, s, h, i, j: s + t[1, j]),
    "stack": (lambda t, s, h, i, j: s + torch.stack([t[0], t[1]])[h, j], lambda t, s, h, i, j: s + t[h, j]),
    "function": (lambda t, s, h, i, j: s + t.exp()[h, j], lambda t, s, h, i, j: s + t[h, j].exp()),
    "row sum": (lambda t, s, h, i, j: s + t.sum(1)[h], lambda t, s, h, i, j: s + sum(t[h, n] for n in range(L))),
    "one element, no dimension": (lambda t, s, h, i, j: s * t[:1, :1].squeeze(), lambda t, s, h, i, j: s * t[0, 0]),
    "score in place": (lambda t, s, h, i, j: _added(s, t[h, j]), lambda t, s, h, i, j: s + t[h, j]),
    "score in place, twice": (lambda t, s, h, i, j: _under_two_names(s, t[h, j]), lambda t, s, h, i, j: 2 * s + 2 * t[h, j]),
    "metadata": (lambda t, s, h, i, j: s * (s.numel() + s.dim() + len(s.shape)) + t[h, j], lambda t, s, h, i, j: s + t[h, j]),
}  # fmt: skip


def _added(score, x):
    score += x
    return score


def _under_two_names(score, x):
    other = score
    score += x
    return other + score


def results(mod, t, backend="numba_cpu"):
    q, k, v = inputs()
    out, lse = flex_attention(q, k, v, lambda s, b, h, i, j: mod(t, s, h, i, j), return_lse=True, backend=backend)
    (out.square().sum() + lse.sum()).backward()
    return out.detach(), q.grad, t.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_read_through_a_view_is_what_is_read(name, backend):
    viewed, plain = VIEWS[name]
    # twice: traced, and from the kept trace with another table
    for seed in (1, 2):
        got = results(viewed, table(2, L, seed=seed), backend)
        want = results(plain, table(2, L, seed=seed), "numba_cpu")
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", VIEWS)
def test_such_a_program_is_kept(name):
    t = table(2, L)
    mod = VIEWS[name][0]
    fn = lambda s, b, h, i, j: mod(t, s, h, i, j)  # noqa: E731
    traced = [traced_mod(fn, "score", torch.float32) for _ in range(2)]
    assert all(x.why is None and x.roots == (t,) for x in traced) and traced[0].graph is traced[1].graph


def test_captured_halves_are_converted_with_gradients():
    t = table(2, L, dtype=torch.bfloat16)
    got = results(lambda t, s, h, i, j: s + t.float()[h, j], t)[2]
    t2 = table(2, L, dtype=torch.bfloat16)
    want = results(lambda t, s, h, i, j: s + t[h, j], t2)[2]
    assert got is not None and got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_what_a_mod_stops_gets_no_gradient():
    for backend in BACKENDS:
        for mod in (
            lambda t, s, h, i, j: s + t.detach()[h, j],
            lambda t, s, h, i, j: s + t[h, j].detach(),
            lambda t, s, h, i, j: torch.where(t[h, j] > 0, s, 0.5),
            lambda t, s, h, i, j: s + _without_grad(t)[j, h],
        ):
            assert results(mod, table(2, L), backend)[2] is None


def _without_grad(t):
    with torch.no_grad():
        return t.T


def test_a_bare_mask_mod_that_reads_a_view_follows_what_is_written():
    q, k, v = inputs()
    limits = torch.full((3, 2), 5)
    mod = lambda b, h, i, j: j < limits.T[h, 0]  # noqa: E731
    for limit in (5, 9, 9, 2):
        limits.fill_(limit)
        want = flex_attention(q, k, v, mask_mod=lambda b, h, i, j: j < limit)  # noqa: B023
        assert torch.equal(flex_attention(q, k, v, mask_mod=mod), want)


def test_under_no_grad_and_with_grad_in_turn():
    t = table(2, L)
    mod = lambda s, b, h, i, j: s + t.T[j, h]  # noqa: E731
    q, k, v = inputs()
    with torch.no_grad():
        first = flex_attention(q, k, v, mod)
    assert not first.requires_grad
    out = flex_attention(q, k, v, mod)
    out.sum().backward()
    assert torch.equal(out.detach(), first) and t.grad is not None and math.isfinite(float(t.grad.sum()))


REFUSED = {
    "never picked": (lambda s, b, h, i, j: s + TABLE[h, :], "uses the captured tensor TABLE .* with 1 of its 2 indices"),
    "in place on a table": (lambda s, b, h, i, j: s + TABLE.add_(1)[h, j], "cannot change a tensor in place"),
    "random": (lambda s, b, h, i, j: s + torch.rand_like(TABLE)[h, j], "cannot draw random numbers"),
    "a number of a table": (lambda s, b, h, i, j: s * float(TABLE.sum()), "on a captured tensor.*read the number before"),
    "whether it has a gradient": (lambda s, b, h, i, j: s if TABLE.grad is None else s * 2, "asks a captured tensor for grad"),
    "its version": (lambda s, b, h, i, j: s * TABLE._version, "asks a captured tensor for _version"),
    "where it lies": (lambda s, b, h, i, j: s * TABLE.data_ptr(), r"asks a captured tensor for data_ptr\(\)"),
    "whether it equals": (lambda s, b, h, i, j: s if TABLE.equal(TABLE) else s * 2, r"asks a captured tensor for equal\(\)"),
    "too many": (lambda s, b, h, i, j: s + TABLE[h, j, 0], "3 indices"),
    "an int to float in place": (lambda s, b, h, i, j: _added(j, 0.5) + s, "in place on a value, which makes torch.float"),
    "in place beside a view": (lambda s, b, h, i, j: _viewed(s), "a view or a detached alias"),
}  # fmt: skip
TABLE = torch.zeros(2, L)


def _viewed(score):
    other = score.view(())
    score += 1
    return other


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_at_one_position_is_refused(name):
    mod, says = REFUSED[name]
    with pytest.raises(TraceError, match=f"(?s){says}"):
        flex_attention(*inputs(), mod)
