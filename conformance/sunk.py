"""Sinks as the reference without any would have them: keys behind the others, whose score is the sink and whose value is 0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexref.conformance.call import Call


def with_sinks(call: Call, sink: Tensor) -> Call:
    """The same problem with `sink` (Hq, n), captured under that name, as n more keys that every query may attend to."""
    kv_len, n = call.key.shape[2], sink.shape[1]
    key, value = (pad(x, (0, 0, 0, n)) for x in (call.key, call.value))
    last = max(0, kv_len - 1)

    def make_score(captured: dict[str, Tensor]):
        score_mod = call.make_score(captured) if call.make_score else lambda score, b, h, q_idx, kv_idx: score

        def sunk(score, b, h, q_idx, kv_idx):
            logit = captured["sink"][h, (kv_idx - kv_len).clamp(min=0)]
            return torch.where(kv_idx >= kv_len, logit, score_mod(score, b, h, q_idx, kv_idx.clamp(max=last)))

        return sunk

    def mask_mod(b, h, q_idx, kv_idx):
        assert call.mask_mod is not None
        return (kv_idx >= kv_len) | call.mask_mod(b, h, q_idx, kv_idx.clamp(max=last))

    return replace(
        call,
        key=key,
        value=value,
        make_score=make_score,
        mask_mod=call.mask_mod and mask_mod,
        captured=call.captured | {"sink": sink},
        blocks=call.blocks and tuple(pad(x, (0, n), value=True) for x in call.blocks),
        sinks=n,
    )
