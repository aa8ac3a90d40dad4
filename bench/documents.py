"""Calls around a call: sinks beside none, packed documents beside one BlockMask and beside padding, jagged beside packed."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import flexref
from bench.clock import Timing, interleaved, ratio
from flexref.cli import text
from flexref.variants import masks

if TYPE_CHECKING:
    from bench.run import Bench

SINKS = "forward with a sink / without, causal"
SINKS_BACK = "forward + backward with a sink / without, causal"
PACKED = "varlen / one BlockMask of the same documents in the same memory, forward"
LAYOUT = "tokens before heads in memory / heads before tokens, forward"
PADDED = "padded SDPA / varlen, forward"
JAGGED = "jagged / varlen, forward"
ASKED = {SINKS: 1.03, SINKS_BACK: 1.03, PACKED: 1.05, LAYOUT: 1.05, PADDED: 3.0, JAGGED: 1.05}
AT_LEAST = (PADDED,)


def documents(bench: Bench) -> None:
    """Every row of ASKED, on the demo's documents and at the usual size."""
    _sinks(bench)
    _documents(bench)


def _timed(bench: Bench, name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """The time of `ours` over that of `theirs`, or of theirs over ours where it is asked to be at least something."""
    samples = interleaved({"ours": ours, "theirs": theirs}, bench.rounds, bench.seconds)
    over = ratio(samples["ours"], samples["theirs"]) if name in AT_LEAST else ratio(samples["theirs"], samples["ours"])
    seconds = {side: Timing.of(taken)._asdict() for side, taken in samples.items()}
    bench.cases.append({"what": name, "ratio": over._asdict(), "seconds": seconds})
    bench.target(name, over.median, spread=over)


def _sinks(bench: Bench) -> None:
    inputs = bench.inputs()
    sink = torch.linspace(-1, 1, bench.heads)
    mask = flexref.create_block_mask(masks.causal, None, None, bench.length, bench.length, device="cpu")

    def call(sink: torch.Tensor | None) -> torch.Tensor:
        query, key, value = inputs
        return flexref.flex_attention(query, key, value, block_mask=mask, sink=sink, backend=bench.backend)

    # one more key, of score `sink` and value 0, is the same
    key, value = (F.pad(x, (0, 0, 0, 1)) for x in inputs[1:])
    scores = torch.where(torch.arange(bench.length + 1) == bench.length, sink[:, None, None], 0.0)
    below = torch.arange(bench.length)[:, None] >= torch.arange(bench.length + 1)
    bias = torch.where(below | (torch.arange(bench.length + 1) == bench.length), scores, -float("inf"))
    wanted = F.scaled_dot_product_attention(inputs[0], key, value, attn_mask=bias)
    torch.testing.assert_close(call(sink), wanted, rtol=1e-4, atol=1e-5)
    _timed(bench, SINKS, lambda: call(sink), lambda: call(None))

    def backward(sink: torch.Tensor | None) -> None:
        leaves = [x for x in (*inputs, sink) if x is not None]
        torch.autograd.grad(call(sink).sum(), leaves)

    learned = sink.clone().requires_grad_()
    for x in inputs:
        x.requires_grad_()
    _timed(bench, SINKS_BACK, lambda: backward(learned), lambda: backward(None))


def _documents(bench: Bench) -> None:
    # the demo's ragged batch
    texts = text.documents(16384)[:8]
    query, key, value, lengths = text.packed(texts, bench.heads, bench.head_dim)
    tokens = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    alike = masks.document(masks.document_ids(list(lengths)))
    mask = flexref.create_block_mask(alike, None, None, sum(lengths), sum(lengths), device="cpu")

    def varlen() -> torch.Tensor:
        return flexref.varlen_attention(tokens[0], tokens[1], tokens[2], offsets, backend=bench.backend)

    by_head = [x.transpose(0, 1)[None] for x in tokens]

    def one_mask() -> torch.Tensor:
        return flexref.flex_attention(by_head[0], by_head[1], by_head[2], block_mask=mask, backend=bench.backend)

    def heads_first() -> torch.Tensor:
        return flexref.flex_attention(query, key, value, block_mask=mask, backend=bench.backend)

    longest = max(lengths)
    padded = [torch.stack([F.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in x.split(lengths)]) for x in tokens]
    padded = [x.transpose(1, 2).contiguous() for x in padded]
    real = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(*padded, attn_mask=real)

    rows = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in tokens]

    def jagged() -> torch.Tensor:
        return flexref.flex_attention(rows[0], rows[1], rows[2], backend=bench.backend)

    out = varlen()
    torch.testing.assert_close(out, one_mask()[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, jagged().transpose(1, 2).values(), rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    for i, part in enumerate(out.split(lengths)):
        torch.testing.assert_close(part, sdpa()[i, :, : len(part)].transpose(0, 1), rtol=1e-4, atol=1e-5)
        if i == 2:
            break
    _timed(bench, PACKED, varlen, one_mask)
    _timed(bench, LAYOUT, one_mask, heads_first)
    _timed(bench, PADDED, varlen, sdpa)
    _timed(bench, JAGGED, jagged, varlen)
