"""Hypothesis strategies for Cases: shapes, strides, dtypes, grouped heads, composed mods, block masks.

Everything drawn is text and numbers (see cases.py), so that hypothesis can shrink it and a person can read it.
"""

from __future__ import annotations

import re

from hypothesis import strategies as st

from flexref.conformance.cases import Blocks, Case
from flexref.conformance.layouts import LAYOUTS

LENGTHS = (1, 2, 3, 5, 7, 13, 15, 16, 17, 23, 31, 32, 33, 48, 64, 65, 97, 113, 128, 129, 150)
HEAD_DIMS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 32, 33, 48, 64, 65, 80, 96, 128, 130)
DTYPES = ("float32", "float32", "float64", "bfloat16", "float16")
BLOCK_SIZES = ((16, 16), (16, 32), (32, 16), (10, 12), (7, 5), (64, 64), (128, 128), (1, 1))
VALUES = ("normal", "normal", "normal", "integers", "large", "equal", "positive", "holes")
POSITIONS = 40_000

MASKS = (
    "q_idx >= kv_idx",
    "q_idx + shift >= kv_idx",
    "kv_idx < length[b]",
    "doc[q_idx] == doc[kv_idx]",
    "torch.abs(q_idx - kv_idx) < 9",
    "q_idx - kv_idx < window",
    "q_idx - kv_idx <= 20",
    "flag[kv_idx]",
    "keep[h, q_idx, kv_idx]",
    "keep[h][q_idx][kv_idx]",
    "kv_idx % 3 != 1",
    "(q_idx // 4) == (kv_idx // 4)",
    "(q_idx - kv_idx) % 5 == 0",
    "(kv_idx - q_idx) // 3 < 2",
    "pick[kv_idx] > q_idx",
    "(h > 0)",
    "b < 1",
    "kv_idx < 6",
    "q_idx < 0",
    "kv_idx >= 0",
)
COMBINED = ("({x}) & ({y})", "({x}) | ({y})", "~({x})", "({x}) ^ ({y})", "torch.where({x}, {y}, kv_idx < 11)")

SCORES = (
    "score",
    "score",
    "score * 0.5",
    "-score",
    "slope[h] * 2.0",
    "gain * kv_idx * 0.01",
    "bias[h, q_idx, kv_idx]",
)
STEPS = (
    "({s}) + slope[h] * (kv_idx - q_idx)",
    "({s}) - 0.1 * torch.abs(q_idx - kv_idx)",
    "cap * torch.tanh(({s}) / cap)",
    "({s}) + bias[h, q_idx, kv_idx]",
    "({s}) + bias[h][q_idx][kv_idx]",
    "({s}) + gain",
    "({s}) * gain",
    "({s}) + row[q_idx] * col[b, kv_idx]",
    "({s}) + col[b, kv_idx] - col[b, pick[kv_idx]]",
    "({s}) + col[b, wrap[kv_idx]]",
    "({s}) * grid[b, h, q_idx, kv_idx]",
    "({s}) + rel[torch.abs(q_idx - kv_idx)]",
    "({s}) + rel[q_idx - kv_idx]",
    "({s}) + rel[doc[kv_idx]] * rel[doc[q_idx]]",
    "torch.where({m}, {s}, {t})",
    "torch.where({m}, {s}, -inf)",
    "torch.where(({s}) > 0.5, {s}, 0.25 * ({t}))",
    "F.softplus({s})",
    "F.gelu({s})",
    "F.silu({s})",
    "torch.sigmoid({s}) * 3",
    "torch.clamp({s}, -3, 3)",
    "torch.relu({s}) + 0.1 * ({t})",
    "torch.exp(-({s}) * ({s}))",
    "torch.sin({s}) + torch.cos({t})",
    "torch.log1p(torch.abs({s}))",
    "torch.maximum({s}, {t})",
    "torch.sqrt(({s}) * ({s}) + 1)",
    "({s}) / (1.0 + torch.abs(q_idx - kv_idx))",
)


@st.composite
def masks(draw, depth: int = 2) -> str:
    """The text of a mask_mod."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(MASKS))
    return draw(st.sampled_from(COMBINED)).format(x=draw(masks(depth - 1)), y=draw(masks(depth - 1)))


@st.composite
def scores(draw, depth: int = 3) -> str:
    """The text of a score_mod."""
    if depth == 0:
        return draw(st.sampled_from(SCORES))
    step = draw(st.sampled_from(STEPS))
    holes = {"s": scores(depth - 1 - draw(st.integers(0, depth - 1))), "t": scores(0), "m": masks(1)}
    return step.format(**{name: draw(text) if f"{{{name}}}" in step else "" for name, text in holes.items()})


@st.composite
def block_masks(draw, batch: int, heads: int, mask: str | None, by_hand: bool | None = None) -> Blocks:
    """Blocks that broadcast only over what the mask does not look at; lists drawn by hand may contradict the mask."""
    by_hand = draw(st.booleans()) if by_hand is None else by_hand
    size = draw(st.sampled_from(BLOCK_SIZES))
    free = by_hand or mask is None
    reads_batch = not free and any(word in mask for word in ("b <", "[b"))  # type: ignore[operator]
    reads_heads = not free and any(word in mask for word in ("h >", "[h"))  # type: ignore[operator]
    return Blocks(size, reads_batch or draw(st.booleans()), reads_heads or draw(st.booleans()), by_hand)


@st.composite
def shapes(draw) -> dict:
    """Lengths, heads and batches, few enough positions for the reference to be quick."""
    batch, kv_heads, group = (
        draw(st.sampled_from((1, 1, 2, 3))),
        draw(st.integers(1, 2)),
        draw(st.sampled_from((1, 1, 2, 3))),
    )
    room = POSITIONS // (batch * kv_heads * group)
    q_len = draw(st.sampled_from(LENGTHS))
    kv_len = draw(st.sampled_from([n for n in LENGTHS if n * q_len <= room] or [1]))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    value_dim = head_dim if draw(st.booleans()) else draw(st.sampled_from(HEAD_DIMS))
    kv_batch = 1 if draw(st.integers(0, 4)) == 0 else None
    return dict(
        q_len=q_len, kv_len=kv_len, head_dim=head_dim, value_dim=value_dim,
        batch=batch, kv_batch=kv_batch, kv_heads=kv_heads, group=group,
    )  # fmt: skip


@st.composite
def cases(draw, gradients: bool = False, blocks: bool | None = None) -> Case:
    """Any problem; `gradients`: something wants a gradient; `blocks`: with a block mask, without, or either (None)."""
    shape = draw(shapes())
    dtype = draw(st.sampled_from(DTYPES))
    mask = draw(st.none() | masks())
    with_blocks = draw(st.integers(0, 2)) == 0 if blocks is None else blocks
    drawn = None
    if with_blocks:
        mask = mask or draw(masks(0))
        drawn = draw(block_masks(shape["batch"], shape["kv_heads"] * shape["group"], mask))
    wants: tuple[str, ...] = ()
    if gradients:
        every = ("query", "key", "value", "captured")
        wants = draw(st.sampled_from((every, every, every[:3], every[:1], every[1:2], every[2:3], every[3:])))
    score = draw(st.none() | scores() if not gradients else st.one_of(st.none(), scores(), scores()))
    values = draw(st.sampled_from(VALUES))
    if values == "holes" and score and not re.search(r"\bscore\b", score):
        # the slope of such a mod is 0, and what 0 times NaN is in a gradient no rule says
        values = "normal"
    return Case(
        **shape,
        dtype=dtype,
        mask=mask,
        blocks=drawn,
        score=score,
        scale=draw(st.sampled_from((None, None, 1.0, 0.3, -0.5))),
        sinks=draw(st.sampled_from((0, 0, 0, 1, 3))),
        captured_dtype=draw(st.sampled_from(("float32", "float32", dtype, "float64"))),
        layouts=tuple(draw(st.sampled_from(("plain", *LAYOUTS))) for _ in range(3)),
        values=values,
        wants=wants,
        loss=draw(st.sampled_from(("both", "out"))),
        max_scores=draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 99)),
    )
