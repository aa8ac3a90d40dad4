"""Masks to import at the edges of their arguments, against NumPy and plain loops; and what they leave to be asked."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from flexref import create_block_mask, create_mask, flex_attention
from flexref.program.interval import Interval
from flexref.program.intervals import EMPTY, FULL, PARTIAL, Classifier
from flexref.program.trace import trace
from flexref.variants import masks

IDS = torch.tensor([[0, 0, 1], [0, 1, 1]])


def dense(mod, q_len: int, kv_len: int | None = None, B: int = 1, H: int = 1) -> np.ndarray:
    return create_mask(mod, B, H, q_len, q_len if kv_len is None else kv_len, "cpu").numpy()


def check(mod, wanted: np.ndarray) -> None:
    """The mask, and its blocks of two sizes."""
    B, H, q_len, kv_len = (1,) * (4 - wanted.ndim) + wanted.shape
    got = dense(mod, q_len, kv_len, B, H)
    assert np.array_equal(got, wanted.reshape(got.shape)), f"{mod}"
    for size in (3, 8):
        blocks = create_block_mask(mod, B, H, q_len, kv_len, "cpu", size).to_dense().numpy()
        rows, columns = -(-q_len // size), -(-kv_len // size)
        padded = np.zeros((B, H, rows * size, columns * size), bool)
        padded[:, :, :q_len, :kv_len] = got
        any_there = padded.reshape(B, H, rows, size, columns, size).any((3, 5))
        assert np.array_equal(blocks.astype(bool), any_there), f"{mod} in blocks of {size}"


def near_along(size: int, kernel: int, dilation: int, causal: bool) -> np.ndarray:
    """(size, size) bool: each position's neighbours along one axis."""
    found = np.zeros((size, size), bool)
    for rest in range(min(dilation, size)):
        group = np.arange(rest, size, dilation)
        for place, i in enumerate(group):
            if causal:
                found[i, group[max(place - kernel + 1, 0) : place + 1]] = True
            else:
                first = min(max(place - kernel // 2, 0), max(len(group) - kernel, 0))
                found[i, group[first : first + kernel]] = True
    return found


def neighbors(shape, kernel, dilation, causal, places: np.ndarray, total: int) -> np.ndarray:
    """(total, total) bool of tokens whose raster index is `places`; none past the canvas."""
    at = np.unravel_index(places, shape)
    found = np.zeros((total, total), bool)
    inside = np.ones((len(places), len(places)), bool)
    for x, *axis in zip(at, shape, kernel, dilation, causal, strict=True):
        inside &= near_along(*axis)[np.ix_(x, x)]
    found[: len(places), : len(places)] = inside
    return found


@pytest.mark.parametrize("shape", [(1,), (13,), (1, 1), (3, 7), (6, 4), (2, 3, 4), (4, 1, 5)])
def test_neighborhoods(shape):
    tokens, axes = math.prod(shape), len(shape)
    for kernel, dilation, causal in itertools.product((1, 2, 3, 4, 9), (1, 2, 3, 8), (False, True)):
        total = tokens + kernel % 2 * 3
        mod = masks.natten(shape, kernel, dilation, causal)
        wanted = neighbors(shape, [kernel] * axes, [dilation] * axes, [causal] * axes, np.arange(tokens), total)
        assert np.array_equal(dense(mod, total)[0, 0], wanted), f"{mod}"


def test_neighborhoods_of_unlike_axes():
    wanted = neighbors((5, 6), (3, 2), (1, 2), (True, False), np.arange(30), 33)
    check(masks.natten((5, 6), (3, 2), (1, 2), (True, False)), wanted)
    wanted = neighbors((3, 4, 3), (2, 7, 1), (1, 1, 2), (True, False, False), np.arange(36), 36)
    check(masks.natten((3, 4, 3), (2, 7, 1), (1, 1, 2), (True, False, False)), wanted)


def in_tiles(shape, tile) -> np.ndarray:
    """The raster indices of a canvas, tile by tile."""
    split = [n for size, t in zip(shape, tile, strict=True) for n in (size // t, t)]
    axes = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return np.arange(math.prod(shape)).reshape(split).transpose(axes).reshape(-1)


def on_curve(shape) -> np.ndarray:
    """The raster indices of a canvas, in the order of their interleaved bits."""
    keys = []
    for at in np.ndindex(*shape):
        bits = [x >> bit & 1 for bit in range(12) for x, size in zip(at[::-1], shape[::-1], strict=True) if size >> bit > 1]
        keys.append(sum(bit << n for n, bit in enumerate(bits)))
    return np.argsort(keys)


ORDERS = [
    (masks.raster_order((3, 5)), np.arange(15)),
    (masks.tile_order((4, 6), (2, 3)), in_tiles((4, 6), (2, 3))),
    (masks.tile_order((4, 6), (4, 1)), in_tiles((4, 6), (4, 1))),
    (masks.tile_order((2, 4, 6), (1, 2, 3)), in_tiles((2, 4, 6), (1, 2, 3))),
    (masks.tile_order((12,), 4), np.arange(12)),
    (masks.morton_order((8, 8)), on_curve((8, 8))),
    (masks.morton_order((2, 16)), on_curve((2, 16))),
    (masks.morton_order((4, 1, 2)), on_curve((4, 1, 2))),
    (masks.morton_order((1,)), np.arange(1)),
]


@pytest.mark.parametrize("order, places", ORDERS, ids=lambda x: repr(x) if isinstance(x, masks.raster_order.__base__) else "")
def test_orders(order, places):
    assert order.permutation("cpu").tolist() == places.tolist()
    axes = len(order.shape)
    wanted = neighbors(order.shape, [3] * axes, [1] * axes, [False] * axes, places, len(places) + 2)
    check(masks.natten(order.shape, 3, order=order), wanted)


def test_an_order_is_a_permutation_of_the_same_attention():
    order = masks.tile_order((4, 6), (2, 3))
    query, key, value = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    plain = flex_attention(query, key, value, mask_mod=masks.natten((4, 6), 3))
    put = order.permutation("cpu")
    parts = (x[..., put, :] for x in (query, key, value))
    tiled = flex_attention(*parts, mask_mod=masks.natten((4, 6), 3, order=order))
    torch.testing.assert_close(tiled[..., put.argsort(), :], plain)


@pytest.mark.parametrize("text", [0, 1, 5])
@pytest.mark.parametrize(
    "shape, kernel, tile",
    [
        ((4, 6), (2, 6), (2, 2)), ((4, 6), (6, 9), (2, 3)), ((4, 4), (4, 4), (4, 4)), ((2, 4, 6), (2, 4, 4), (1, 2, 2)),
        ((8,), 4, 2),
    ],
)
def test_sliding_tiles(shape, kernel, tile, text):
    tokens, axes = math.prod(shape), len(shape)
    kernel_of, tile_of = ((x,) * axes if isinstance(x, int) else x for x in (kernel, tile))
    grid, reach = ([n // t for n, t in zip(x, tile_of, strict=True)] for x in (shape, kernel_of))
    of_tiles = neighbors(grid, reach, [1] * axes, [False] * axes, np.arange(math.prod(grid)), math.prod(grid))
    size = math.prod(tile_of)
    wanted = np.zeros((tokens + text + 3,) * 2, bool)
    wanted[: tokens + text, : tokens + text] = True
    wanted[:tokens, :tokens] = of_tiles.repeat(size, 0).repeat(size, 1)
    check(masks.sliding_tile(shape, kernel, tile, text), wanted)


@pytest.mark.parametrize("before, after, dilation", [*itertools.product((0, 1, 5, 40), (0, 2, 40), (1, 3, 30))])
def test_dilated_windows(before, after, dilation):
    d = np.arange(19)[:, None] - np.arange(23)
    check(masks.dilated(before, after, dilation), (d % dilation == 0) & (d <= before * dilation) & (d >= -after * dilation))
    if before == after:
        check(masks.longformer(before, 3, dilation), (
            (d % dilation == 0) & (abs(d) <= before * dilation) | (np.arange(19) < 3)[:, None] | (np.arange(23) < 3)
        ))  # fmt: skip


def test_windows_of_heads_that_are_dilated():
    d = np.arange(19)[:, None] - np.arange(19)
    wanted = np.stack([(d % n == 0) & (abs(d) <= 2 * n) for n in (1, 2, 5)])
    check(masks.dilated(2, 2, torch.tensor([1, 2, 5], dtype=torch.int32)), wanted)


@pytest.mark.parametrize("length, size", [(0, 1), (0, 4), (1, 1), (1, 4), (5, 2), (6, 3), (7, 7), (7, 30)])
def test_block_diffusion(length, size):
    block = np.arange(length) // size
    later, same = block[:, None] > block, block[:, None] == block
    wanted = np.zeros((2 * length + 3,) * 2, bool)
    wanted[: 2 * length, : 2 * length] = np.block([[same, later], [np.zeros_like(same), same | later]])
    check(masks.block_diffusion(length, size), wanted)


def ancestors(parents) -> np.ndarray:
    found = np.zeros((len(parents),) * 2, bool)
    for node in range(len(parents)):
        at = node
        while at >= 0:
            found[node, at] = True
            at = parents[at]
    return found


TREES = {
    "one": [-1], "forest": [-1, -1, 0, -1, 1, 2, 2, 4], "star": [-1] + [0] * 12, "chain": list(range(-1, 20)),
    "random": [-1, *(int(n) for n in np.random.default_rng(0).integers(-1, np.arange(1, 40)))],
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_trees(name):
    parents = TREES[name]
    wanted = ancestors(parents)
    check(masks.tree(parents), wanted)
    assert masks.tree(torch.tensor(parents, dtype=torch.int16)) == masks.tree(parents)
    for prefix in (0, 5):
        behind = np.concatenate([np.ones((len(parents), prefix), bool), wanted], 1)
        check(masks.after_prefix(masks.tree(parents), prefix), behind)


def test_a_tree_of_nothing_and_a_deep_one():
    assert masks.tree([]).entry.tolist() == []
    deep = masks.tree(list(range(-1, 20_000)))
    assert deep.entry.tolist() == list(range(20_001)) and set(deep.end.tolist()) == {20_001}


@pytest.mark.parametrize(
    "lengths, parents",
    [([3, 2, 2, 3, 2], [-1, 0, 0, -1, 3]), ([0, 4, 0, 3], [-1, 0, 1, 2]), ([5], [-1]), ([1] * 9, TREES["forest"] + [7])],
)
def test_shared_prefixes(lengths, parents):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    wanted = np.tril(ancestors(parents)[np.ix_(owner, owner)])
    check(masks.shared_prefix(lengths, parents), wanted)
    assert masks.shared_prefix(torch.tensor(lengths), torch.tensor(parents)) == masks.shared_prefix(lengths, parents)


@pytest.mark.parametrize("lengths", [[7], [0, 3, 0, 0, 5, 1, 0], [1] * 6])
def test_masks_within_documents(lengths):
    parts = [np.tril(np.ones((n, n), bool)) & ~np.tri(n, n, -2, dtype=bool) for n in lengths]
    total, longest = sum(lengths), max(lengths)
    wanted, at = np.zeros((total, total), bool), 0
    for part in parts:
        wanted[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    # a table as long as the longest document is read nowhere else, or it would be an error
    table = torch.from_numpy(np.tri(longest, dtype=bool) & ~np.tri(longest, k=-2, dtype=bool))
    check(masks.per_document(masks.sliding_window(2), lengths), wanted)
    check(masks.per_document(masks.from_table(table), torch.tensor(lengths)), wanted)
    owner = np.repeat(range(len(lengths)), lengths)
    check(masks.per_document(masks.causal, lengths), np.tril(owner[:, None] == owner))


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_masks_within_chunks(size):
    q, k = np.arange(17)[:, None], np.arange(19)
    check(masks.per_chunk(masks.global_tokens(1), size), (q // size == k // size) & ((q % size == 0) | (k % size == 0)))


@pytest.mark.parametrize("prefix, size", [(0, 1), (0, 4), (5, 4), (40, 3), (5, 50)])
def test_blocks_of_a_draft(prefix, size):
    q, k = np.arange(12)[:, None], np.arange(17) - prefix
    wanted = (k < 0) | (k <= q) & (k // size == q // size)
    check(masks.after_prefix(masks.causal & masks.chunked(size), prefix), wanted)  # type: ignore[operator]


@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_text_that_sees_images(tokens):
    intervals = np.array([[0, 7], [3, 3], [1, 7], [7, 12]])
    wanted = np.zeros((12, 4 * tokens + 3), bool)
    for image, (first, last) in enumerate(intervals):
        wanted[first:last, image * tokens : (image + 1) * tokens] = True
    check(masks.vision_cross(torch.from_numpy(intervals), tokens), wanted)


@pytest.mark.parametrize("length, size", [(0, 4), (1, 4), (17, 4), (24, 1), (24, 30), (64, 4)])
def test_bigbird(length, size):
    bird = masks.bigbird(length, size, window=3, edge=2, random=3, heads=2, seed=3)
    blocks = -(-length // size)
    assert bird.chosen.shape == (2, blocks, 3) and bird == masks.bigbird(length, size, heads=2, seed=3)
    wanted = np.zeros((2, blocks, blocks), bool)
    for h, i in np.ndindex(2, blocks):
        seen = {j for j in range(blocks) if abs(i - j) < 2 or i < 2 or j < 2}
        drawn = [j for j in bird.chosen[h, i].tolist() if j != i]
        # each once, none that is seen anyway, and as many as there are
        assert len(drawn) == len(set(drawn)) == min(3, blocks - len(seen)) and not seen & set(drawn)
        wanted[h, i, [*seen, *drawn]] = True
    check(bird, wanted.repeat(size, 1).repeat(size, 2)[:, :length, :length])
    assert blocks < 10 or bird != masks.bigbird(length, size, heads=2, seed=4)


def test_one_draw_of_bigbird_serves_every_head():
    bird = masks.bigbird(24, 4)
    assert np.array_equal(dense(bird, 24, H=3), dense(bird, 24).repeat(3, 1))


@pytest.mark.parametrize("size, q_len, kv_len", [(1, 5, 6), (4, 17, 9), (30, 7, 9)])
def test_chosen_tiles(size, q_len, kv_len):
    query, key = torch.randn(2, 3, q_len, 4), torch.randn(2, 3, kv_len, 4)
    chosen = masks.top_tiles(query, key, size, 2)
    q_tiles, kv_tiles = -(-q_len // size), -(-kv_len // size)
    means = [
        np.stack([x[:, :, t * size : (t + 1) * size].numpy().astype(np.float64).mean(2) for t in range(n)], 2)
        for x, n in ((query, q_tiles), (key, kv_tiles))
    ]
    best = np.argsort(-np.einsum("bhqe,bhke->bhqk", *means), 3)[..., :2]
    wanted = np.zeros((2, 3, q_tiles, kv_tiles), bool)
    np.put_along_axis(wanted, best, True, 3)
    assert np.array_equal(chosen.numpy(), wanted)
    assert torch.equal(masks.tiles_of_indices(torch.from_numpy(best), kv_tiles), chosen)
    check(masks.selected_tiles(chosen, size), wanted.repeat(size, 2).repeat(size, 3)[:, :, :q_len, :kv_len])


def test_heads_of_videos():
    frames, frame, prompt, width = 5, 4, 3, 2
    q, k = np.arange(prompt + frames * frame)[:, None], np.arange(prompt + frames * frame)
    text = (q < prompt) | (k < prompt)
    check(masks.spatial_head(width * frame, prompt, frame), text | (k < prompt + frame) | (abs(q - k) < width * frame))
    check(masks.temporal_head(frame, width, prompt), text | (abs((q - prompt) % frame - (k - prompt) % frame) < width))
    check(masks.spatial_head(0), np.zeros((9, 9), bool))


LENGTH = 768
MARKED = torch.zeros(LENGTH, dtype=torch.bool)
MARKED[[0, 300]] = True
PARENTS = [-1, *(int(n) for n in np.random.default_rng(1).integers(0, np.arange(1, LENGTH)))]
DOCUMENTS = [100, 50, 200, 18, 300, 100]
# each with a size of blocks, and how many may be asked beside those that hold a border of the mask
FEW = {
    "natten": (masks.natten((24, 32), 7), 32, 0),
    "natten, dilated": (masks.natten((24, 32), 5, 2), 32, 0),
    "natten in tiles": (masks.natten((24, 32), 7, order=masks.tile_order((24, 32), (4, 8))), 32, 0),
    "natten in tiles of three axes": (masks.natten((8, 8, 12), 3, order=masks.tile_order((8, 8, 12), (2, 4, 4))), 32, 0),
    "natten on a curve": (masks.natten((16, 32), 7, order=masks.morton_order((16, 32))), 32, 0),
    "sliding_tile": (masks.sliding_tile((24, 28), (12, 12), (4, 4), 96), 32, 36),
    "sliding_tile, blocks of a tile": (masks.sliding_tile((24, 28), (12, 12), (4, 4), 96), 16, 0),
    "block_diffusion": (masks.block_diffusion(384, 32), 32, 0),
    "tree": (masks.tree(PARENTS), 32, 23),
    "shared_prefix": (masks.shared_prefix(DOCUMENTS, [-1, 0, 0, -1, 3, 3]), 32, 0),
    "per_document": (masks.per_document(masks.causal, DOCUMENTS), 32, 36),
    "after_prefix": (masks.after_prefix(masks.causal & masks.chunked(100), 100), 32, 2),  # type: ignore[operator]
    "vision_cross": (masks.vision_cross(torch.tensor([[n * 90, n * 90 + 200] for n in range(8)]), 96), 32, 0),
    "longformer": (masks.longformer(50, MARKED), 32, 0),
    "dilated": (masks.dilated(20, 20, 4), 32, 0),
    "bigbird": (masks.bigbird(LENGTH, 32), 32, 0),
    "selected_tiles": (masks.selected_tiles(torch.rand(24, 24) < 0.3, 32), 32, 0),
    "spatial_head": (masks.spatial_head(200, 40, 60), 32, 2),
    "temporal_head": (masks.temporal_head(96, 32, 32), 32, 48),
}


@pytest.mark.parametrize("name", FEW)
def test_few_blocks_are_asked(name):
    mod, size, more = FEW[name]
    tiles = dense(mod, LENGTH)[0, 0].reshape(LENGTH // size, size, LENGTH // size, size)
    wanted = np.where(tiles.all((1, 3)), FULL, np.where(tiles.any((1, 3)), PARTIAL, EMPTY)).reshape(-1)
    program = trace(mod, "mask")
    at = torch.arange(LENGTH // size).double() * size
    i, j = torch.meshgrid(at, at, indexing="ij")
    q, k = (Interval(x.reshape(-1), x.reshape(-1) + size - 1) for x in (i, j))
    zero = Interval(torch.zeros(1), torch.zeros(1))
    got = Classifier(program.graph, program.captured, program.scalars)(zero, zero, q, k).numpy()
    assert np.array_equal(got[got != PARTIAL], wanted[got != PARTIAL])
    asked = int(((got == PARTIAL) & (wanted != PARTIAL)).sum())
    assert asked <= more, f"{asked} of {len(got)} blocks are asked beside {(wanted == PARTIAL).sum()}"


def _order(n):
    return masks.natten((4, 6), 3, order=n)


WRONG = {
    "window": (lambda: masks.sliding_window(0), ValueError, "size must be at least 1, got 0"),
    "window of a float": (
        lambda: masks.window(1.5, 0),  # type: ignore[arg-type]
        TypeError,
        "before must be an int, got float",
    ),
    "ids of floats": (
        lambda: masks.document(torch.zeros(3)),
        TypeError,
        "ids must be an integer tensor of 1 or 2 dimensions, got torch.float32",
    ),
    "ids of 3 dimensions": (lambda: masks.document(IDS[None]), TypeError, r"got torch.int64 of shape \(1, 2, 3\)"),
    "prefix": (lambda: masks.prefix_lm(IDS), TypeError, "length must be an integer tensor of 1 dimension"),
    "table": (lambda: masks.from_table(IDS), TypeError, "table must be a bool tensor"),
    "tree": (lambda: masks.tree([-1, 1]), ValueError, r"parents\[1\] is 1; a parent comes before its node"),
    "shape": (lambda: masks.natten((4, 0), 3), ValueError, r"shape\[1\] must be at least 1, got 0"),
    "shape of no axis": (lambda: masks.natten((), 3), TypeError, r"shape must be a tuple of ints, .*, got \(\)"),
    "shape of an int": (lambda: masks.natten(4, 3), TypeError, "shape must be a tuple of ints, one for each axis, got 4"),
    "kernel": (lambda: masks.natten((4, 6), (3, 3, 3)), ValueError, r"kernel must have one int for each of 2 axes, got \(3, 3"),
    "kernel of a float": (lambda: masks.natten((4, 6), (3, 1.5)), TypeError, r"kernel\[1\] must be an int, got float"),
    "dilation of axes": (lambda: masks.natten((4, 6), 3, 0), ValueError, r"dilation\[0\] must be at least 1, got 0"),
    "causal axes": (lambda: masks.natten((4, 6), 3, causal=(True,)), TypeError, "causal must be a bool, or one for"),
    "order": (lambda: _order(masks.tile_order((4, 4), 2)), ValueError, r"order must be one of the shape \(4, 6\)"),
    "order of what else": (lambda: _order("tiles"), ValueError, "such as tile_order.*got 'tiles'"),
    "tile": (lambda: masks.tile_order((4, 6), (2, 4)), ValueError, r"shape\[1\] must be a multiple of the tile's 4, got 6; pad"),
    "curve": (lambda: masks.morton_order((4, 6)), ValueError, r"shape\[1\] must be a power of two, got 6"),
    "sliding kernel": (lambda: masks.sliding_tile((4, 6), 3, 2), ValueError, r"kernel\[0\] must be a multiple of .* 2, got 3"),
    "text": (lambda: masks.sliding_tile((4, 6), 2, 2, -1), ValueError, "text must be at least 0, got -1"),
    "width": (lambda: masks.spatial_head(-1), ValueError, "width must be at least 0, got -1"),
    "frame": (lambda: masks.temporal_head(0, 1), ValueError, "frame must be at least 1, got 0"),
    "too far": (lambda: masks.window(1 << 63, 0), ValueError, r"before must be at most 2\*\*63 - 1, got 9223372036854775808"),
    "dilation": (lambda: masks.dilated(1, 1, torch.tensor([1, 0])), ValueError, r"dilation must be at least 1, got \[1, 0\]"),
    "dilation of floats": (lambda: masks.dilated(1, 1, torch.ones(2)), TypeError, "dilation must be an integer tensor of 1 dim"),
    "marked": (lambda: masks.global_tokens(IDS), TypeError, "count must be a bool tensor of 1 or 2 dimensions, got torch.int64"),
    "bird's window": (lambda: masks.bigbird(8, 2, window=2), ValueError, "window must be odd, got 2"),
    "bird's random": (lambda: masks.bigbird(8, 2, random=-1), ValueError, "random must be at least 0, got -1"),
    "chosen": (lambda: masks.selected_tiles(IDS, 2), TypeError, "chosen must be a bool tensor of 2 or 3 or 4 dimensions"),
    "tile size": (lambda: masks.selected_tiles(IDS > 0, (2, 0)), ValueError, "size must be at least 1, got 0"),
    "filled": (lambda: masks.selected_tiles(IDS > 0, 2, IDS[0, :2]), ValueError, "filled must have one for each of 3 tiles"),
    "indices": (lambda: masks.tiles_of_indices(IDS.float(), 3), TypeError, "indices must be an int64 tensor of at least 2"),
    "query": (lambda: masks.top_tiles(IDS, IDS, 2, 1), TypeError, r"query must be a float tensor \(B, H, length, E\)"),
    "per_head": (lambda: masks.per_head(masks.causal, 3), TypeError, "per_head: argument 1 must be a mask_mod.*, got int"),
    "each": (lambda: masks.per_head(masks.causal, each=0), ValueError, "each must be at least 1, got 0"),
    "per_layer": (lambda: masks.per_layer(3, layers=2), TypeError, "per_layer: argument 0 must be a mod, got int"),
    "layers of nothing": (lambda: masks.per_layer(layers=2), ValueError, "per_layer: got no mod"),
    "parents": (lambda: masks.tree([-1, 1.0]), TypeError, r"parents\[1\] must be an int, got float"),
    "parents of floats": (lambda: masks.tree(torch.zeros(2)), TypeError, "parents must be an integer tensor of 1 dim"),
    "parents of others": (lambda: masks.shared_prefix([2, 3], [-1]), ValueError, "parents must have one for each of 2 documents"),
    "lengths": (lambda: masks.shared_prefix([2, -3], [-1, 0]), ValueError, r"lengths must be at least 0, got \[2, -3\]"),
    "lengths of floats": (lambda: masks.shared_prefix(torch.ones(2), [-1]), TypeError, "lengths must be an integer tensor"),
    "mask_mod": (lambda: masks.per_document(3, [2]), TypeError, r"mask_mod must be a mask_mod\(b, h, q_idx, kv_idx\), got int"),
    "chunks": (lambda: masks.per_chunk(masks.causal, 0), ValueError, "size must be at least 1, got 0"),
    "after a prefix": (lambda: masks.after_prefix(masks.causal, IDS), TypeError, "length must be an integer tensor of 1"),
    "intervals": (lambda: masks.vision_cross(IDS, 2), ValueError, r"intervals must be of shape \(images, 2\) .*, got \(2, 3\)"),
    "images": (lambda: masks.vision_cross(IDS[:0, :2], 2), ValueError, r"at least one image, got \(0, 2\)"),
    "diffusion": (lambda: masks.block_diffusion(4, 0), ValueError, "size must be at least 1, got 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what):
    make, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        make()
