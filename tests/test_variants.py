"""The variants against a formula written again, in every engine of meaning: plain integers, torch's vmap, and the tracer."""
from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from flexref import flex_attention
from flexref.blocks.mask import create_block_mask, create_mask
from flexref.program.interpret import interpret
from flexref.program.interval import Interval
from flexref.program.intervals import EMPTY, FULL, PARTIAL, Classifier
from flexref.program.mods import traced_mod
from flexref.program.trace import trace
from flexref.variants import masks, score_mods
from tests.variant_table import IDS, MASKS, SCORE, SCORES, SHAPE

AT = torch.cartesian_prod(*(torch.arange(n) for n in SHAPE)).tolist()
# every block of these is decided without asking the mask, but those that hold a border of it
SHARP = {
    "causal", "window", "sliding_window", "global_tokens", "global or sliding", "chunked", "prefix_lm", "prefix_lm of a batch",
    "document", "document of a batch", "padded", "padded apart", "shared_prefix", "spatial_head", "sliding_tile", "per_head",
}  # fmt: skip


def brute(mod) -> torch.Tensor:
    return torch.tensor([bool(mod(*x)) for x in AT]).reshape(SHAPE)


def traced(mod, kind, *score) -> torch.Tensor:
    program = trace(mod, kind)
    at = [torch.arange(n).reshape([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(SHAPE)]
    names = ("score", "b", "h", "q_idx", "kv_idx")[1 - len(score) :]
    inputs: dict[str, torch.Tensor] = dict(zip(names, (*score, *at), strict=True))
    return interpret(program.graph, inputs, program.captured, program.scalars, torch.float32)["out"].expand(SHAPE)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mod, formula = MASKS[name]
    dense = brute(formula)
    assert torch.equal(brute(mod), dense)
    assert torch.equal(create_mask(mod, *SHAPE, "cpu"), dense)
    assert torch.equal(traced(mod, "mask"), dense)
    assert torch.equal(torch_flex.create_mask(mod, *SHAPE, device="cpu"), dense)
    again = pickle.loads(pickle.dumps(mod))
    assert again == mod and repr(again) == repr(mod) and "object at" not in getattr(mod, "__name__", "")
    mask = create_block_mask(mod, *SHAPE, "cpu", 6)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert traced_mod(mod, "mask", torch.float32).why is None


def ranges(length: int, size: int) -> Interval:
    starts = torch.arange(0, length, size).double()
    return Interval(starts, (starts + size).clamp(max=length) - 1)


def kinds_of(dense: torch.Tensor, rows: Interval, columns: Interval) -> torch.Tensor:
    found = torch.empty(*dense.shape[:2], len(rows.low), len(columns.low), dtype=torch.int8)
    for i, (q0, q1) in enumerate(zip(*(x.int().tolist() for x in rows[:2]), strict=True)):
        for j, (k0, k1) in enumerate(zip(*(x.int().tolist() for x in columns[:2]), strict=True)):
            block = dense[:, :, q0 : q1 + 1, k0 : k1 + 1].flatten(2)
            found[:, :, i, j] = torch.where(block.all(2), FULL, torch.where(block.any(2), PARTIAL, EMPTY))
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 7, 20])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_of_masks(name, size):
    mod, formula = MASKS[name]
    dense = brute(formula)
    at = ranges(20, size)
    wanted = kinds_of(dense, at, at)
    mask = create_block_mask(mod, *SHAPE, "cpu", size)
    assert torch.equal(mask.to_dense().bool(), wanted != EMPTY)
    program = trace(mod, "mask")
    classify = Classifier(program.graph, program.captured, program.scalars)
    b, h, i, j = (x.reshape(-1) for x in torch.meshgrid(*(torch.arange(n) for n in wanted.shape), indexing="ij"))
    decided = classify(*(Interval(x.double(), x.double()) for x in (b, h)), *(Interval(*(e[x] for e in at[:2])) for x in (i, j)))
    wanted = wanted.reshape(-1)
    assert torch.equal(decided[decided != PARTIAL], wanted[decided != PARTIAL])
    if name in SHARP:
        assert torch.equal(decided, wanted), f"{(decided != wanted).sum()} of {len(wanted)} blocks are not decided"


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    mod, formula = SCORES[name]
    wanted = torch.tensor([formula(s.item(), *x) for s, x in zip(SCORE.flatten(), AT, strict=True)]).reshape(SHAPE)
    plain = torch.tensor([float(mod(s, *x)) for s, x in zip(SCORE.flatten(), AT, strict=True)]).reshape(SHAPE)
    torch.testing.assert_close(plain, wanted)
    torch.testing.assert_close(traced(mod, "score", SCORE), wanted)
    again = pickle.loads(pickle.dumps(mod))
    assert again == mod and "object at" not in mod.__name__
    query = torch.randn(2, 3, 20, 8)
    with mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        assert torch_flex.flex_attention(query, query, query, mod).shape == query.shape
    assert traced_mod(mod, "score", torch.float32).why is None


@pytest.mark.parametrize("name", [*MASKS, *SCORES])
def test_the_engine_of_the_cpu_agrees_with_the_reference(name):
    mask_mod = MASKS[name][0] if name in MASKS else None
    score_mod = None if mask_mod else SCORES[name][0]
    seeded = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, 20, 8, generator=seeded) for _ in range(3))
    out = [flex_attention(query, key, value, score_mod, mask_mod=mask_mod, backend=x) for x in ("numba_cpu", "reference")]
    torch.testing.assert_close(*out)


def tensors_of(mod) -> list[torch.Tensor]:
    """Every tensor that a mod holds."""
    held = vars(mod).values() if hasattr(mod, "__dict__") else ()
    flat = [x for value in held for x in (value if isinstance(value, tuple) else (value,))]
    return [y for x in flat for y in ([x] if isinstance(x, torch.Tensor) else tensors_of(x))]


@pytest.mark.parametrize("name", [name for name, (mod, _) in (MASKS | SCORES).items() if hasattr(mod, "to")])
def test_they_move_with_all_that_they_hold(name):
    mod = (MASKS | SCORES)[name][0]
    assert mod.to("cpu") == mod  # type: ignore[attr-defined]
    moved = mod.to("meta")  # type: ignore[attr-defined]
    assert [x.device.type for x in tensors_of(moved)] == ["meta"] * len(tensors_of(mod))


def test_what_they_make_is_where_it_is_wanted():
    made = [
        lambda **at: masks.tree([-1, 0], **at),
        lambda **at: masks.shared_prefix([1, 2], [-1, 0], **at),
        lambda **at: masks.per_document(masks.causal, [1, 2], **at),
        lambda **at: masks.bigbird(8, 2, **at),
        lambda **at: score_mods.sandwich(2, 4, **at),
        lambda **at: score_mods.alibi(3, **({"slopes": score_mods.alibi_slopes(3, **at)} if at else {})),
    ]
    for make in made:
        with torch.device("meta"):
            assert {x.device.type for x in tensors_of(make())} == {"meta"}
            assert {x.device.type for x in tensors_of(make(device="cpu"))} == {"cpu"}
    order = masks.morton_order((2, 2))
    with torch.device("meta"):
        assert order.permutation().is_meta and order.permutation("cpu").tolist() == [0, 1, 2, 3]
    there = torch.tensor([2, 1], device="meta")
    assert score_mods.t5_bias(torch.zeros(8, 2, device="meta")).buckets.is_meta and masks.vision_cross(there[:, None] * there, 1)


def test_they_print_what_made_them():
    assert repr(masks.sliding_window(4)) == "sliding_window(size=4)"
    assert repr(masks.document(IDS)) == "document(ids=<int64 (2, 20)>)"
    assert repr(masks.causal & masks.chunked(6)) == "and_masks(causal, chunked(size=6))"  # type: ignore[operator]
    assert repr(~masks.global_tokens(1)) == "not_mask(global_tokens(count=1))"
    assert masks.not_mask(~masks.chunked(6)) == masks.chunked(6)
    assert repr(score_mods.compose(score_mods.causal, score_mods.soft_cap(2))) == "compose(causal, soft_cap(cap=2.0))"
    assert repr(masks.shift_mask(masks.causal, 3)) == "View(mod=causal, q_idx=Offset(value=3), kv_idx=Offset(value=0))"
    assert repr(masks.natten((4, 6), 3, order=masks.tile_order((4, 6), 2))) == (
        "natten(shape=(4, 6), kernel=(3, 3), dilation=(1, 1), causal=(False, False), "
        "order=tile_order(shape=(4, 6), tile=(2, 2), tiles=(2, 3)))"
    )
    assert repr(masks.per_document(masks.causal, [2, 3])) == "per_document(causal, tokens=5)"
    assert repr(score_mods.soft_cap(2, fast=True)) == "soft_cap(cap=2.0, fast=True)"
    assert repr(score_mods.per_head(score_mods.causal, score_mods.alibi(1))) == (
        "per_head(causal, alibi(slopes=<float32 (1,)>), each=1)"
    )


# what they answer where differences, products and sums of positions come near the greatest integer
EXTREME = [0, 1, 2, 1 << 31, (1 << 53) + 1, 1 << 62, (1 << 63) - 2, (1 << 63) - 1]
OF_NUMBERS = {
    "window": masks.window(1 << 62, (1 << 63) - 1),
    "sliding_window": masks.sliding_window((1 << 63) - 1),
    "dilated_window": masks.dilated_window(1 << 62, 3),
    "dilated": masks.dilated(1 << 62, (1 << 63) - 1, 5),
    "block_diffusion": masks.block_diffusion(1 << 62, 7),
    "natten": masks.natten((1 << 40, 1 << 22), 5, 3),
    "natten in tiles": masks.natten((1 << 40, 1 << 22), 5, order=masks.tile_order((1 << 40, 1 << 22), (2, 4))),
    "natten on a curve": masks.natten((1 << 40, 1 << 22), (1 << 40, 9), order=masks.morton_order((1 << 40, 1 << 22))),
    "sliding_tile": masks.sliding_tile((1 << 40, 1 << 20), 8, 4, text=1 << 61),
    "spatial_head": masks.spatial_head(1 << 62, prompt=2),
    "temporal_head": masks.temporal_head(1 << 61, 5, prompt=1),
    "per_chunk": masks.per_chunk(masks.causal, 1 << 40),
    "after_prefix": masks.after_prefix(masks.causal, 1 << 62),
}


@pytest.mark.parametrize("name", [*OF_NUMBERS, *(name for name in MASKS if not tensors_of(MASKS[name][0]))])
def test_no_position_is_too_great(name):
    # whole numbers of Python have no width
    mod = OF_NUMBERS.get(name) or MASKS[name][0]
    q, k = torch.cartesian_prod(torch.tensor(EXTREME), torch.tensor(EXTREME)).unbind(1)
    if name == "shifted":
        q, k = q.clamp(max=1 << 62), k.clamp(max=1 << 62)
    wanted = [bool(mod(0, 0, *at)) for at in zip(q.tolist(), k.tolist(), strict=True)]
    zero = torch.tensor(0)
    assert [bool(mod(zero, zero, *at)) for at in zip(q, k, strict=True)] == wanted


def test_document_ids():
    assert masks.document_ids([2, 0, 3]).tolist() == [0, 0, 2, 2, 2]
    assert masks.document_offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize("module", [masks, score_mods])
def test_the_page_of_variants_names_each(module):
    page = (Path(__file__).parent.parent / "docs" / "variants.md").read_text()
    assert not [name for name in module.__all__ if f"`{name}`" not in page]
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_every_use_on_the_page_is_right():
    page = (Path(__file__).parent.parent / "docs" / "variants.md").read_text()
    uses = re.findall(r"`(?:mask_mod=)?((?:masks|score_mods)\.[^`]*)` \|$", page, re.MULTILINE)
    assert len(uses) == page.count("\n| `")
    q = torch.zeros(1, 1, 640, 8)
    names = {
        "masks": masks, "score_mods": score_mods, "a": masks.causal, "b": masks.causal, "c": masks.causal, "q": q, "k": q,
        "heads": 8, "length": 64, "frame": 1350, "position": 3, "cached": 5, "lengths": [20, 44], "parents": [-1, 0],
        "prompt_lengths": torch.tensor([3, 4]), "is_question": torch.zeros(64, dtype=torch.bool), "table": torch.zeros(9, 9),
        "intervals": torch.tensor([[0, 3]]), "span": torch.ones(8), "width": torch.ones(8), "grid": torch.zeros(8, 27, 27),
        "embedding": torch.nn.Embedding(32, 8), "adjacency": torch.ones(5, 5, dtype=torch.bool), "bias": torch.zeros(8, 10),
        "biases": torch.zeros(8, 5, 3), "types": torch.zeros(5, 5, dtype=torch.int64), "torch": torch,
        "query_rope": torch.zeros(1, 8, 6, 4), "key_rope": torch.zeros(1, 6, 4), "scale": 0.1,
    }  # fmt: skip
    for use in uses:
        eval(use, names)


def test_layers_take_their_mods_in_turn():
    window = masks.sliding_window(4)
    assert masks.per_layer(window, window, masks.causal, layers=5) == (window, window, masks.causal, window, window)
    assert masks.per_layer(window, layers=0) == ()


def test_a_head_past_the_last_sees_nothing_or_keeps_its_score():
    assert not masks.per_head(masks.noop_mask)(0, 1, 0, 0)
    assert score_mods.per_head(score_mods.soft_cap(1e-3))(torch.tensor(3.0), 0, 1, 0, 0) == 3.0
    assert math.isclose(score_mods.per_head(score_mods.soft_cap(1e-3))(torch.tensor(3.0), 0, 0, 0, 0), 1e-3, rel_tol=1e-6)
