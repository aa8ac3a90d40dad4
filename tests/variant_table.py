"""Every variant as a table: the mod, and its formula in plain Python; 2 batches, 3 heads, 20 queries, 20 keys."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flexref.variants import masks, score_mods

SHAPE = (2, 3, 20, 20)
generator = torch.Generator().manual_seed(0)
IDS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 11, [0] * 12 + [3] * 8])
TABLE = torch.rand(*SHAPE, generator=generator) < 0.5
TILES = torch.rand(2, 3, 4, 4, generator=generator) < 0.5
ANCESTORS: list[tuple] = [(), (0,), (0,), (0, 1), (0, 1, 3)]
LENGTHS = torch.tensor([7, 15])
MARKED = torch.zeros(2, 20, dtype=torch.bool)
MARKED[0, [0, 9]] = MARKED[1, [3, 19]] = True
STEPS = torch.tensor([1, 2, 3])
INTERVALS = torch.tensor([[[0, 5], [3, 20], [8, 8]], [[2, 7], [0, 1], [7, 21]]])
BIRD = masks.bigbird(20, 3, window=3, edge=1, random=2, heads=3, seed=5)


def starts(lengths: list[int]) -> list[tuple[int, int]]:
    """Of each packed token its document and its place there."""
    return [(d, i) for d, n in enumerate(lengths) for i in range(n)]


def near(i: int, j: int, size: int, kernel: int, dilation: int = 1) -> bool:
    """The `kernel` positions around i of those that agree with it modulo the dilation, moved inwards at the borders."""
    group = [x for x in range(size) if x % dilation == i % dilation]
    place = group.index(i)
    first = min(max(place - kernel // 2, 0), max(len(group) - kernel, 0))
    return j in group[first : first + kernel]


def natten2(shape, kernel, q, k, dilation=1, at=None) -> bool:
    at = at or (lambda x: divmod(x, shape[1]))
    inside = max(q, k) < shape[0] * shape[1]
    return inside and all(near(i, j, n, kernel, dilation) for i, j, n in zip(at(q), at(k), shape, strict=True))


def in_tiles(x: int) -> tuple[int, int]:
    """Of a canvas (4, 4) in tiles (2, 2)."""
    tile, within = divmod(x, 4)
    return tile // 2 * 2 + within // 2, tile % 2 * 2 + within % 2


def on_curve(x: int) -> tuple[int, int]:
    """Of the Z-order curve through (4, 4)."""
    bits = [x >> n & 1 for n in range(4)]
    return bits[1] + 2 * bits[3], bits[0] + 2 * bits[2]


def sliding(q: int, k: int) -> bool:
    """Tiles (1, 2) of a canvas (2, 8), kernel (1, 4), two tokens of text."""
    if max(q, k) >= 18:
        return False
    return max(q, k) >= 16 or near(q // 8, k // 8, 2, 1) and near(q % 8 // 2, k % 8 // 2, 4, 2)


def diffusion(q: int, k: int) -> bool:
    """Of nine tokens in blocks of four, noised and clean."""
    if max(q, k) >= 18:
        return False
    (q_clean, i), (k_clean, j) = divmod(q, 9), divmod(k, 9)
    if q_clean:
        return bool(k_clean) and j // 4 <= i // 4
    return j // 4 < i // 4 if k_clean else j // 4 == i // 4


DOCS = starts([6, 3, 0, 11])
FAMILY: list[tuple] = [(), (0,), (0, 1), (0,)]
MASKS: dict[str, tuple[Callable, Callable]] = {
    "causal": (masks.causal, lambda b, h, q, k: k <= q),
    "window": (masks.window(3, 1), lambda b, h, q, k: -1 <= q - k <= 3),
    "sliding_window": (masks.sliding_window(4), lambda b, h, q, k: 0 <= q - k < 4),
    "dilated_window": (masks.dilated_window(3, 4), lambda b, h, q, k: q - k in (0, 4, 8)),
    "dilated": (masks.dilated(2, 1, 3), lambda b, h, q, k: q - k in (-3, 0, 3, 6)),
    "dilated by head": (masks.dilated(1, 2, STEPS), lambda b, h, q, k: q - k in (-2 * h - 2, -h - 1, 0, h + 1)),
    "global_tokens": (masks.global_tokens(2), lambda b, h, q, k: min(q, k) < 2),
    "marked tokens": (masks.global_tokens(MARKED[0]), lambda b, h, q, k: {q, k} & {0, 9}),
    "marked tokens of a batch": (masks.global_tokens(MARKED), lambda b, h, q, k: {q, k} & ({0, 9}, {3, 19})[b]),
    "global or sliding": (masks.global_tokens(2) | masks.sliding_window(3), lambda b, h, q, k: min(q, k) < 2 or 0 <= q - k < 3),
    "longformer": (masks.longformer(2, MARKED, 2), lambda b, h, q, k: abs(q - k) in (0, 2, 4) or {q, k} & ({0, 9}, {3, 19})[b]),
    "bigbird": (
        BIRD,
        lambda b, h, q, k: (
            abs(q // 3 - k // 3) < 2 or min(q, k) < 3 or k // 3 in BIRD.chosen[h, q // 3].tolist()  # type: ignore[attr-defined]
        ),
    ),
    "selected_tiles": (masks.selected_tiles(TILES, (5, 6)), lambda b, h, q, k: TILES[b, h, q // 5, k // 6]),
    "selected_tiles, not full": (
        masks.selected_tiles(TILES[0, 0], 5, torch.tensor([5, 2, 0, 4])),
        lambda b, h, q, k: TILES[0, 0, q // 5, k // 5] and k % 5 < (5, 2, 0, 4)[k // 5],
    ),
    "chunked": (masks.chunked(6), lambda b, h, q, k: q // 6 == k // 6),
    "prefix_lm": (masks.prefix_lm(6), lambda b, h, q, k: k < 6 or k <= q),
    "prefix_lm of a batch": (masks.prefix_lm(LENGTHS), lambda b, h, q, k: k < (7, 15)[b] or k <= q),
    "document": (masks.document(IDS[0]), lambda b, h, q, k: IDS[0].tolist()[q] == IDS[0].tolist()[k]),
    "document of a batch": (masks.document(IDS), lambda b, h, q, k: IDS[b].tolist()[q] == IDS[b].tolist()[k]),
    "per_document": (
        masks.per_document(masks.sliding_window(2) | masks.global_tokens(1), [6, 3, 0, 11]),
        lambda b, h, q, k: DOCS[q][0] == DOCS[k][0] and (0 <= q - k < 2 or min(DOCS[q][1], DOCS[k][1]) == 0),
    ),
    "per_chunk": (
        masks.per_chunk(masks.prefix_lm(2), 6),
        lambda b, h, q, k: q // 6 == k // 6 and (k % 6 < 2 or k <= q),
    ),
    "after_prefix": (
        masks.after_prefix(masks.causal & masks.chunked(3), 7),  # type: ignore[operator]
        lambda b, h, q, k: k < 7 or k - 7 <= q and q // 3 == (k - 7) // 3,
    ),
    "after_prefix of a batch": (
        masks.after_prefix(masks.tree([-1, 0, 0, 1] + [3] * 16), LENGTHS),
        lambda b, h, q, k: k < (7, 15)[b] or k - (7, 15)[b] in (q, *ANCESTORS[min(q, 4)]),
    ),
    "shared_prefix": (
        masks.shared_prefix([6, 3, 0, 11], [-1, 0, 1, 0]),
        lambda b, h, q, k: k <= q and DOCS[k][0] in (DOCS[q][0], *FAMILY[DOCS[q][0]]),
    ),
    "vision_cross": (
        masks.vision_cross(INTERVALS[0], 6),
        lambda b, h, q, k: k < 18 and q in range(*INTERVALS[0, k // 6].tolist()),
    ),
    "vision_cross of a batch": (
        masks.vision_cross(INTERVALS, 7),
        lambda b, h, q, k: q in range(*INTERVALS[b, k // 7].tolist()),
    ),
    "block_diffusion": (masks.block_diffusion(9, 4), lambda b, h, q, k: diffusion(q, k)),
    "padded": (masks.padded(LENGTHS), lambda b, h, q, k: max(q, k) < (7, 15)[b]),
    "padded apart": (masks.padded(LENGTHS, LENGTHS + 2), lambda b, h, q, k: q < (7, 15)[b] and k < (9, 17)[b]),
    "neighborhood": (masks.neighborhood(5, 1), lambda b, h, q, k: abs(q // 5 - k // 5) < 2 and abs(q % 5 - k % 5) < 2),
    "natten": (masks.natten((4, 5), 3), lambda b, h, q, k: natten2((4, 5), 3, q, k)),
    "natten, dilated": (masks.natten((4, 5), 2, 2), lambda b, h, q, k: natten2((4, 5), 2, q, k, 2)),
    "natten, causal": (
        masks.natten((20,), 3, 2, True),
        lambda b, h, q, k: q - k in (0, 2, 4),
    ),
    "natten in tiles": (
        masks.natten((4, 4), 3, order=masks.tile_order((4, 4), 2)),
        lambda b, h, q, k: natten2((4, 4), 3, q, k, at=in_tiles),
    ),
    "natten on a curve": (
        masks.natten((4, 4), 3, order=masks.morton_order((4, 4))),
        lambda b, h, q, k: natten2((4, 4), 3, q, k, at=on_curve),
    ),
    "sliding_tile": (masks.sliding_tile((2, 8), (1, 4), (1, 2), text=2), lambda b, h, q, k: sliding(q, k)),
    "spatial_head": (
        masks.spatial_head(4, prompt=2, sink=3),
        lambda b, h, q, k: abs(q - k) < 4 or q < 2 or k < 5,
    ),
    "temporal_head": (
        masks.temporal_head(6, 2, prompt=2),
        lambda b, h, q, k: min(q, k) < 2 or abs((q - 2) % 6 - (k - 2) % 6) < 2,
    ),
    "table": (masks.from_table(TABLE), lambda b, h, q, k: TABLE[b, h, q, k]),
    "table of heads": (masks.from_table(TABLE[0]), lambda b, h, q, k: TABLE[0, h, q, k]),
    "table of all": (masks.from_table(TABLE[0, 0]), lambda b, h, q, k: TABLE[0, 0, q, k]),
    "tree": (masks.tree([-1, 0, 0, 1] + [3] * 16), lambda b, h, q, k: k == q or k in ANCESTORS[min(q, 4)]),
    "and": (masks.causal & masks.chunked(6), lambda b, h, q, k: k <= q and q // 6 == k // 6),  # type: ignore[operator]
    "xor": (masks.causal ^ masks.chunked(6), lambda b, h, q, k: (k <= q) != (q // 6 == k // 6)),  # type: ignore[operator]
    "not": (~masks.chunked(6), lambda b, h, q, k: q // 6 != k // 6),
    "shifted": (masks.shift_mask(masks.causal, 3, 1), lambda b, h, q, k: k + 1 <= q + 3),
    "per_head": (
        masks.per_head(masks.causal, masks.per_head(masks.chunked(6), masks.from_table(TABLE[0, 1:2])), each=2),
        lambda b, h, q, k: k <= q if h < 2 else q // 6 == k // 6,
    ),
}

SCORE = torch.linspace(-40, 40, math.prod(SHAPE)).reshape(SHAPE)
BIAS = torch.linspace(-1, 1, math.prod(SHAPE[1:])).reshape(SHAPE[1:])
ROWS = torch.randn(3, 9, generator=generator)
GRID = torch.randn(3, 5, 3, generator=generator)
FAR = torch.randint(0, 4, (2, 20, 20), generator=generator)
EDGES = torch.randint(0, 5, (20, 20, 2), generator=generator, dtype=torch.int32)
WAYS = torch.randint(0, 3, (20, 20), generator=generator, dtype=torch.int32)
PATHS = torch.randn(3, 2, 5, generator=generator)
TURNED, KEYS = torch.randn(2, 3, 20, 2, generator=generator), torch.randn(2, 1, 20, 2, generator=generator)
SPANS = torch.tensor([2.5, 0.0, 30.0])
SLOPES = (2**-4, 2**-8, 2**-2)


def bucket(d: int) -> int:
    """T5's of 32 buckets, for keys before and behind the query, by its formula."""
    n = abs(d)
    far = 8 + int(math.log(n / 8) / math.log(16) * 8) if n >= 8 else n
    return 16 * (d > 0) + min(far, 15)


def grid(h: int, q: int, k: int) -> float:
    """Of a canvas (4, 5)."""
    down, across = k // 5 - q // 5, k % 5 - q % 5
    return GRID[h, min(max(down, -2), 2) + 2, min(max(across, -1), 1) + 1].item()


def path(h: int, q: int, k: int) -> float:
    edges = EDGES[q, k, : WAYS[q, k]].tolist()
    return sum(PATHS[h, n, kind].item() for n, kind in enumerate(edges)) / max(len(edges), 1)


def waves(h: int, d: int) -> float:
    return sum(math.cos(d / 10000 ** (2 * i / 16)) for i in range(8)) / (8 * (h + 1) / 3)


def span(h: int, d: int) -> float:
    factor = min(1, (4 + SPANS[h].item() - d) / 4)
    return math.log(factor) if factor > 0 else -math.inf


def turned(query: torch.Tensor, key: torch.Tensor) -> float:
    return 0.5 * sum(x * y for x, y in zip(query.tolist(), key.tolist(), strict=True))


def gelu(s: float) -> float:
    return s * (0.5 + 0.5 * math.erf(s / math.sqrt(2))) if s > -8 else 0.0


SCORES: dict[str, tuple[Callable, Callable]] = {
    "relative_position": (score_mods.relative_position, lambda s, b, h, q, k: s + q - k),
    "causal": (score_mods.causal, lambda s, b, h, q, k: s if k <= q else -math.inf),
    "alibi": (score_mods.alibi(3), lambda s, b, h, q, k: s + SLOPES[h] * (k - q)),
    "soft_cap": (score_mods.soft_cap(20), lambda s, b, h, q, k: 20 * math.tanh(s / 20)),
    "table_bias": (score_mods.table_bias(BIAS), lambda s, b, h, q, k: s + BIAS[h, q, k].item()),
    "t5_bias": (score_mods.t5_bias(ROWS.T.repeat(4, 1)[:32]), lambda s, b, h, q, k: s + ROWS[h, bucket(k - q) % 9].item()),
    "relative_table": (score_mods.relative_table(ROWS), lambda s, b, h, q, k: s + ROWS[h, min(max(k - q, -4), 4) + 4].item()),
    "relative_table of all": (
        score_mods.relative_table(ROWS[1]), lambda s, b, h, q, k: s + ROWS[1, min(max(k - q, -4), 4) + 4].item(),
    ),
    "relative_grid": (score_mods.relative_grid(GRID, (4, 5)), lambda s, b, h, q, k: s + grid(h, q, k)),
    "relative_grid of all": (score_mods.relative_grid(GRID[0], (4, 5)), lambda s, b, h, q, k: s + grid(0, q, k)),
    "sandwich": (score_mods.sandwich(3, 20, 16), lambda s, b, h, q, k: s + waves(h, q - k)),
    "adaptive_span": (score_mods.adaptive_span(SPANS, 4), lambda s, b, h, q, k: s + span(h, abs(q - k))),
    "gaussian_span": (
        score_mods.gaussian_span(SPANS + 1), lambda s, b, h, q, k: s - ((q - k) / (SPANS[h].item() + 1)) ** 2 / 2,
    ),
    "graph_distance": (score_mods.graph_distance(ROWS, FAR), lambda s, b, h, q, k: s + ROWS[h, FAR[b, q, k]].item()),
    "graph_path": (score_mods.graph_path(PATHS, EDGES, WAYS), lambda s, b, h, q, k: s + path(h, q, k)),
    "mla_rope": (score_mods.mla_rope(TURNED, KEYS, 0.5), lambda s, b, h, q, k: s + turned(TURNED[b, h, q], KEYS[b, 0, k])),
    "mla_rope of all": (
        score_mods.mla_rope(TURNED, KEYS[:, 0], 0.5), lambda s, b, h, q, k: s + turned(TURNED[b, h, q], KEYS[b, 0, k]),
    ),
    "activation": (score_mods.activation(), lambda s, b, h, q, k: math.log(gelu(s) + 1)),
    "by_mask": (score_mods.by_mask(masks.chunked(6)), lambda s, b, h, q, k: s if q // 6 == k // 6 else -math.inf),
    "compose": (
        score_mods.compose(score_mods.soft_cap(20.0), score_mods.alibi(3)),
        lambda s, b, h, q, k: 20 * math.tanh(s / 20) + SLOPES[h] * (k - q),
    ),
    "compose nothing": (score_mods.compose(), lambda s, b, h, q, k: s),
    "per_head": (
        score_mods.per_head(score_mods.relative_table(ROWS[:2]), score_mods.soft_cap(20), each=2),
        lambda s, b, h, q, k: s + ROWS[h, min(max(k - q, -4), 4) + 4].item() if h < 2 else 20 * math.tanh(s / 20),
    ),
}  # fmt: skip
