"""What only a GPU shows of an engine: no waiting for the device, CUDA graphs, streams, long rows. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from flexref import create_block_mask, flex_attention
from flexref.backend import find_backends
from flexref.cli.cases import Case, alibi, before
from flexref.cli.judge import judge
from flexref.cli.text import Inputs
from flexref.variants import masks

ENGINES = ("triton", "cupy", "numba_cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
table = torch.linspace(-1, 1, 3)


@pytest.fixture(params=ENGINES)
def engine(request):
    backend = find_backends().get(request.param)
    if backend is None or backend.unavailable():
        pytest.skip("; ".join(backend.unavailable()) if backend else "no such engine")
    return request.param


def qkv(length=512, dim=64, heads=4, grad=False):
    torch.manual_seed(0)
    shape = 1, heads, length, dim
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad) for _ in range(3)]


def call(engine, query, key, value, index=None):
    """Causal, with a read that only the values of a tensor prove."""
    reads = table.cuda()
    pick = torch.arange(512, device="cuda") % 3 if index is None else index

    def mod(score, b, h, q_idx, kv_idx):
        return score + reads[pick[kv_idx]]

    mask = create_block_mask(masks.causal, None, None, query.shape[2], key.shape[2], device="cuda")
    return lambda: flex_attention(query, key, value, mod, mask, backend=engine)


def test_a_steady_call_does_not_wait_for_the_device(engine):
    inputs = qkv(grad=True)
    attend = call(engine, *inputs)
    grad_out = torch.randn_like(inputs[0])
    torch.autograd.grad(attend(), inputs, grad_out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attend(), inputs, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_on_new_numbers(engine):
    query, key, value = qkv()
    attend = call(engine, query, key, value)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    query.copy_(torch.randn_like(query))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attend())


def test_the_current_stream_is_used(engine):
    query, key, value = qkv(length=512)
    wanted = call(engine, query, key, value)()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # what the side stream computes first must be there when the kernel reads it
        torch.cuda._sleep(50_000_000)
        late = query * 1.0
        out = call(engine, late, key, value)()
    side.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("length", [4096, 16384, 65536])
def test_long_rows_on_sampled_rows(engine, length):
    query, key, value = qkv(length=length, heads=2)
    slopes = torch.exp2(-4.0 * (torch.arange(2, device="cuda") + 1))

    def mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    mask = create_block_mask(masks.causal, None, None, length, length, device="cuda")
    out = flex_attention(query, key, value, mod, mask, backend=engine)
    inputs = Inputs(query.cpu(), key.cpu(), value.cpu(), lengths=())
    verdict = judge(Case("long", inputs, score=alibi(2), allowed=before), out.cpu())
    assert not verdict.complaint, verdict.complaint


def test_every_device_of_the_machine(engine):
    for device in range(torch.cuda.device_count()):
        query, key, value = (x.to(f"cuda:{device}") for x in qkv())
        out = flex_attention(query, key, value, backend=engine)
        assert out.device.index == device and bool(out.isfinite().all())
