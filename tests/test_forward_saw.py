"""Forward and backward of one call use what forward saw, whatever the caller changes in between (R18)."""

from __future__ import annotations

import types

import pytest
import torch

from flexref import create_block_mask, flex_attention
from flexref.variants import masks

BACKENDS = ("numba_cpu", "reference")


def inputs():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 20, 4, generator=random).requires_grad_() for _ in range(3)]


class Changes:
    """Everything that a mod can read a number from, and what a caller may set, changed by `change`."""

    def __init__(self):
        self.number, self.holder, self.names = 0.5, types.SimpleNamespace(x=0.25), {"w": 0.125}
        self.table = torch.linspace(-1, 1, 20)
        self.learned = torch.full((2,), 0.5, requires_grad=True)
        self.module = torch.nn.Linear(1, 1)

    def score_mod(self, score, b, h, q_idx, kv_idx):
        return score * self.number + self.holder.x * kv_idx + self.names["w"] * q_idx + self.table[kv_idx] * self.learned[h]

    def mask_mod(self, b, h, q_idx, kv_idx):
        return kv_idx <= q_idx + self.holder.x * 8

    def run(self, backend, change):
        q, k, v = inputs()
        learned = self.learned
        out, lse = flex_attention(q, k, v, self.score_mod, mask_mod=self.mask_mod, return_lse=True, backend=backend)
        with torch.no_grad():
            change(self)
        (out.square().sum() + lse.sum()).backward()
        return [x.grad for x in (q, k, v, learned)]


CHANGES = {
    "a number": lambda c: setattr(c, "number", 9.0),
    "a number of both mods": lambda c: setattr(c.holder, "x", -2.0),
    "a dict": lambda c: c.names.update(w=7.0),
    "another table": lambda c: setattr(c, "table", torch.zeros(20)),
    "another learned table": lambda c: setattr(c, "learned", torch.zeros(2, requires_grad=True)),
    "another mod": lambda c: setattr(Changes, "unused", 3),
    "threads": lambda c: torch.set_num_threads(1),
    "default dtype": lambda c: torch.set_default_dtype(torch.float64),
    "deterministic": lambda c: torch.use_deterministic_algorithms(True),
}


@pytest.fixture(autouse=True)
def as_it_was():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_before_backward_changes_nothing(backend, what):
    wanted = Changes().run(backend, lambda c: None)
    got = Changes().run(backend, CHANGES[what])
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["table", "learned", "query"])
def test_a_tensor_that_is_written_before_backward_is_an_error(backend, what):
    changes = Changes()
    q, k, v = inputs()
    out = flex_attention(q * 1.0 if what != "query" else (x := q * 1.0), k, v, changes.score_mod, backend=backend)
    with torch.no_grad():
        (x if what == "query" else getattr(changes, what)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_mask_and_autocast_in_between(backend):
    q, k, v = inputs()
    mask = create_block_mask(masks.causal, 1, 1, 20, 20, device="cpu", BLOCK_SIZE=4)
    grads = []
    for spoil in (False, True):
        out = flex_attention(q, k, v, block_mask=mask, backend=backend)
        if spoil:
            mask.csr.indices.zero_()
        with torch.autocast("cpu", enabled=spoil):
            grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_of_captured_tensors_add_up_in_the_accumulation_type(dtype):
    """Read at 2 x 512 x 512 positions, where adding up in bfloat16 shows."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 8, generator=random).to(dtype) for _ in range(3))
    grads = []
    for captured, backend in ((dtype, "reference"), (torch.float64, "numba_cpu")):
        t = torch.ones(2, dtype=captured, requires_grad=True)
        flex_attention(q, k, v, lambda s, b, h, i, j, t=t: s * t[h], backend=backend).double().square().sum().backward()
        assert t.grad is not None
        grads.append(t.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=0)
