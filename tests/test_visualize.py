"""Pictures hold what a dense calculation in float64 says, at any length in the memory of some tiles, and say what they show."""
from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask as torchs
from torch.utils._python_dispatch import TorchDispatchMode

import flexref
from flexref.reference import einsum
from flexref.variants import masks, score_mods
from flexref.visualize import of_scores
from tests.test_architecture import ROOT, loaded_by
from tests.test_block_mask import allowed, causal, heads_differ, kinds_of, problems

visualize = flexref.visualize
FLOAT = torch.float64


class Dense(NamedTuple):
    """scores, probabilities, score_gradients, each (B, Hq, L, S), NaN where nothing is allowed."""

    scores: Tensor
    probabilities: Tensor
    score_gradients: Tensor


def dense(query, key, value, score_mod: Callable | None, block_mask, grad_out: Tensor, scale=None, sink=None) -> Dense:
    """By the reference's own autograd: what it says by a number that is added to each score."""
    shape = *query.shape[:3], key.shape[2]
    more, seen = torch.zeros(shape, dtype=FLOAT, requires_grad=True), torch.full(shape, math.nan, dtype=FLOAT)

    def recording(score, b, h, q_idx, kv_idx):
        return (score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)) + more[b, h, q_idx, kv_idx]

    mask_mod, blocks = (None, None) if block_mask is None else (block_mask.mask_mod, block_mask.listed())
    raised = (x.detach().to(FLOAT) for x in (query, key, value))
    result = einsum(*raised, recording, mask_mod, scale=scale, blocks=blocks, sink=sink)
    (p,) = torch.autograd.grad(result.lse, more, torch.ones_like(result.lse), retain_graph=True)
    (ds,) = torch.autograd.grad(result.out, more, grad_out.to(FLOAT))
    there = (p != 0) & p.isfinite()
    # exp(score) = probability * exp(lse)
    seen = torch.where(there, torch.log(p) + result.lse[..., None], math.nan)
    return Dense(seen.detach(), torch.where(there, p, math.nan), torch.where(there, ds, math.nan))


def shown(figure, place: int = 0) -> Tensor:
    """The cells of one picture, NaN where nothing is allowed."""
    return torch.from_numpy(np.ma.filled(figure.axes[place].images[0].get_array().astype(float), math.nan))


def gathered(kind: str, values: Tensor, rows: range, columns: range, cells: int) -> Tensor:
    """One head's dense values as cells, by a loop."""
    picked = values[rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]
    high, wide = (-(-n // cells) for n in picked.shape)
    result = []
    for row in picked.split(high):
        for cell in row.split(wide, 1):
            some = cell[~cell.isnan()]
            if not len(some):
                result.append(math.nan)
            elif kind == "scores":
                result.append(float(some.max()))
            elif kind == "probabilities":
                result.append(float(some.sum()) / cell.numel())
            else:
                # a row's gradients add up to 0, so that the greatest and the least may be as far from it but for rounding
                result.append(float(some.max() if kind == "most" else some.min() if kind == "least" else some.abs().max()))
    return torch.tensor(result, dtype=FLOAT).reshape(-(-picked.shape[0] // high), -1)


def inputs(B=2, Hq=4, Hkv=2, L=23, S=31, E=5, Ev=3, kv_batch=None, dtype=FLOAT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kv = kv_batch or B
    shapes = (B, Hq, L, E), (kv, Hkv, S, E), (kv, Hkv, S, Ev)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes)


def bias_of(L: int, S: int):
    table = torch.randn(4, L, S, dtype=FLOAT, generator=torch.Generator().manual_seed(1))

    def score_mod(score, b, h, q_idx, kv_idx):
        return 2 * torch.tanh(score) + table[h, q_idx, kv_idx] * (b + 1)

    return score_mod


KINDS = ("scores", "probabilities", "score_gradients")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cells_hold_what_a_dense_calculation_says(kind, data):
    L, S = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from((FLOAT, torch.float32, torch.bfloat16)))
    query, key, value = inputs(L=L, S=S, kv_batch=data.draw(st.sampled_from((1, 2))), dtype=dtype)
    size = data.draw(st.sampled_from((4, (16, 3), 128)))
    mask_mod = data.draw(st.sampled_from((causal, heads_differ, masks.sliding_window(6), flexref.noop_mask, None)))
    block_mask = None if mask_mod is None else flexref.create_block_mask(mask_mod, 2, 4, L, S, device="cpu", BLOCK_SIZE=size)
    score_mod = data.draw(st.sampled_from((None, bias_of(L, S), score_mods.causal)))
    sink = data.draw(st.sampled_from((None, torch.tensor([0.5, -math.inf, 2.0, 1.0]), torch.randn(4, 2))))
    rows, columns = (data.draw(ranges(n)) for n in (L, S))
    b, heads = data.draw(st.integers(0, 1)), data.draw(st.sampled_from(((0,), (3, 1))))
    cells = data.draw(st.sampled_from((1, 2, 3, 7, 50)))
    grad_out = torch.randn(2, 4, L, 3, generator=torch.Generator().manual_seed(2))
    more: dict[str, Any] = {"grad_out": grad_out} if kind == "score_gradients" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_scores, "_ROWS", data.draw(st.sampled_from((3, 256))))
        patch.setattr(of_scores, "_KEYS", data.draw(st.sampled_from((7, 1024))))
        figure = getattr(visualize, kind)(
            query, key, value, score_mod, block_mask, 0.7, True,
            sink=sink, batch=b, heads=heads, queries=rows, keys=columns, max_cells=cells, **more,
        )  # fmt: skip
    expected = getattr(dense(query, key, value, score_mod, block_mask, grad_out, 0.7, sink), kind)
    for place, head in enumerate(heads):
        got, wanted = shown(figure, place), gathered(kind, expected[b, head], rows, columns, cells)
        if kind == "score_gradients":
            most, least = (gathered(x, expected[b, head], rows, columns, cells) for x in ("most", "least"))
            torch.testing.assert_close(got, torch.where((got - most).abs() < (got - least).abs(), most, least), equal_nan=True)
            got = got.abs()
        torch.testing.assert_close(got, wanted, equal_nan=True)
        assert figure.axes[place].get_title() == f"batch {b}, head {head}"


@st.composite
def ranges(draw, n: int) -> range:
    start = draw(st.integers(0, n - 1))
    return range(start, draw(st.integers(start + 1, n)), draw(st.sampled_from((1, 1, 3))))


def test_the_gradient_is_of_ones_unless_given_and_of_the_score_after_score_mod():
    query, key, value = inputs(B=1)
    ones = torch.ones(1, 4, 23, 3)
    figure = visualize.score_gradients(query, key, value, bias_of(23, 31), enable_gqa=True, heads=2)
    wanted = dense(query, key, value, bias_of(23, 31), None, ones).score_gradients[0, 2]
    torch.testing.assert_close(shown(figure), wanted)
    assert figure.axes[-1].get_ylabel() == "gradient of the score after score_mod"
    # the gradients of a row add up to nothing: softmax does not see what is added to all scores
    torch.testing.assert_close(shown(figure).sum(1), torch.zeros(23, dtype=FLOAT))


def test_a_mask_mod_an_engines_arguments_and_arrays_are_taken_as_in_a_call():
    query, key, value = inputs(B=1, dtype=torch.float32)
    call: dict[str, Any] = {"score_mod": score_mods.soft_cap(3.0), "mask_mod": causal, "enable_gqa": True}
    plain = visualize.probabilities(query, key, value, **call)
    call |= {"return_lse": True, "kernel_options": {}, "backend": "numba_cpu", "deterministic": True, "return_aux": None}
    same = visualize.probabilities(query.numpy(), key.numpy(), value.numpy(), **call)
    assert torch.equal(shown(plain).nan_to_num(), shown(same).nan_to_num())
    with pytest.raises(TypeError, match="flexref.visualize.probabilities has no argument 'head'"):
        visualize.probabilities(query, key, value, enable_gqa=True, head=3)
    with pytest.raises(ValueError, match="mask_mod and block_mask are both given"):
        block_mask = flexref.create_block_mask(causal, 1, 1, 23, 31, device="cpu")
        visualize.scores(query, key, value, None, block_mask, enable_gqa=True, mask_mod=causal)


def test_what_is_masked_and_what_is_no_number_can_be_told_apart():
    query, key, value = inputs(B=1, L=20, S=20, Hq=2)
    key[:, :, 15:] = math.nan  # seen by no query but the last five
    query[:, :, 3] = math.inf
    figure = visualize.probabilities(query, key, value, mask_mod=causal)
    grey, red = (figure.axes[0].images[i].get_array() for i in (0, 1))
    wrong = np.tril(np.ones((20, 20), bool)) & np.isin(np.arange(20), [3, *range(15, 20)])[:, None]
    assert (np.ma.filled(red, 0) == wrong).all() and (np.ma.getmaskarray(grey) == wrong | ~np.tril(np.ones((20, 20), bool))).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nothing allowed", "NaN or infinite"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_all_is_allowed(kind):
    query, key, value = inputs(B=1, Hq=2)
    figure = getattr(visualize, kind)(query, key, value, mask_mod=lambda b, h, q, k: q < 0)
    assert shown(figure).isnan().all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nothing allowed"]


def test_a_score_mod_may_write_its_arguments_and_no_input_is_written():
    query, key, value = (x.requires_grad_() for x in inputs(B=1, Hq=2))
    before = [x.detach().clone() for x in (query, key, value)]

    def in_place(score, b, h, q_idx, kv_idx):
        score += q_idx
        return score

    figure = visualize.scores(query, key, value, in_place)
    torch.testing.assert_close(shown(figure), (query[0, 0] @ key[0, 0].T).detach() / 5**0.5 + torch.arange(23)[:, None])
    assert all(torch.equal(x, y) for x, y in zip((query, key, value), before, strict=True)) and query.grad is None


def test_a_mask_found_in_a_score_mod_changes_nothing():
    query, key, value = inputs(B=1, Hq=1, Hkv=1, L=600, S=600)
    assert "by whole blocks" in str(flexref.explain(query, key, value, score_mods.causal))
    figure = visualize.probabilities(query, key, value, score_mods.causal, max_cells=600)
    wanted = (query[0, 0] @ key[0, 0].T / 5**0.5).masked_fill(torch.ones(600, 600).triu(1) > 0, -math.inf).softmax(-1)
    torch.testing.assert_close(shown(figure).nan_to_num(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_the_process_change_nothing(kind):
    query, key, value = inputs(B=1, Hq=2, dtype=torch.float32)
    query[:, :, 5], score_mod = math.nan, score_mods.alibi(2)

    def drawn():
        block_mask = flexref.create_block_mask(causal, 1, 1, 23, 31, device="cpu", BLOCK_SIZE=8)
        figure = getattr(visualize, kind)(query, key, value, score_mod, block_mask, max_cells=9)
        return [np.ma.filled(image.get_array(), math.nan) for image in figure.axes[0].images]

    plain, before = drawn(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            other = drawn()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert len(plain) == len(other) == 2
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(plain, other, strict=True))


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which something inside makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_tiles(kind):
    n = 1 << 14
    query, key, value = inputs(B=1, Hq=1, Hkv=1, L=n, S=n, E=4, Ev=4, dtype=torch.float32)
    block_mask = flexref.create_block_mask(masks.sliding_window(200), 1, 1, n, n, device="cpu")
    with Largest() as largest:
        figure = getattr(visualize, kind)(query, key, value, score_mods.alibi(1), block_mask)
    assert shown(figure).shape == (256, 256) and largest.numel <= of_scores._ROWS * of_scores._KEYS
    assert figure.axes[-1].get_ylabel().endswith("of 64 x 64 positions")


def test_some_rows_of_a_million_keys():
    n = 1 << 20
    query, key, value = inputs(B=1, Hq=1, Hkv=1, L=n, S=n, E=2, Ev=1, dtype=torch.float32)
    with Largest() as largest:
        figure = visualize.probabilities(query, key, value, queries=range(n - 3, n), keys=slice(0, None, n // 8), max_cells=8)
    assert largest.numel <= key.numel()
    assert figure.axes[-1].get_ylabel() == f"probability,\nin steps of 1 x {n // 8:,}"
    scores = query[0, 0, -3:].double() @ key[0, 0].double().T / 2**0.5
    torch.testing.assert_close(shown(figure), scores.softmax(-1)[:, :: n // 8])


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_a_masks_cells_are_those_of_the_dense_mask(problem, data):
    mod, B, H, L, S, size = problem
    if not L or not S:
        return
    mask = flexref.create_block_mask(mod, B, H, L, S, device="cpu", BLOCK_SIZE=size)
    b, h, cells = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, H - 1)), data.draw(st.sampled_from((1, 2, 3, 7, 25)))
    rows, columns = (data.draw(ranges(n).map(lambda x: range(x.start, x.stop))) for n in (L, S))
    figure = visualize.mask(mask, batch=b, heads=h, queries=rows, keys=columns, max_cells=cells)
    ax, whole, kinds = figure.axes[0], allowed(mask)[b, h], kinds_of(allowed(mask), size)[b, h]
    r, c = (range(x.start // n, (x.stop - 1) // n + 1) for x, n in ((rows, size[0]), (columns, size[1])))
    if max(len(rows), len(columns)) <= cells:
        of = kinds.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:L, :S]
        wanted = torch.where((of == 1) & whole, 3, of)[rows.start : rows.stop, columns.start : columns.stop].double()
    elif max(len(r), len(c)) <= cells:
        wanted = kinds[r.start : r.stop, c.start : c.stop].double()
    else:
        high, wide = (-(-len(x) // cells) * n for x, n in ((r, size[0]), (c, size[1])))
        part = whole[r.start * size[0] : r.stop * size[0], c.start * size[1] : c.stop * size[1]].double()
        wanted = torch.stack([torch.stack([y.mean() for y in x.split(wide, 1)]) for x in part.split(high)])
        wanted[wanted == 0] = math.nan
    torch.testing.assert_close(shown(figure), wanted, equal_nan=True)
    assert ax.get_xlim() == (columns.start - 0.5, columns.stop - 0.5) and ax.get_ylim() == (rows.stop - 0.5, rows.start - 0.5)


def test_a_long_mask_from_afar_and_from_near():
    n = 1 << 17
    mask = flexref.create_block_mask(masks.sliding_window(4096), 1, 1, n, n, device="cpu")
    with Largest() as largest:
        far = visualize.mask(mask)
    # kinds of a strip of blocks, and beside them one more for the end of each row
    assert largest.numel <= (1 << 18) + 1024
    assert far.axes[-1].get_ylabel() == "allowed share of a cell, 512 x 512 positions"
    assert float(shown(far).nansum()) * 512 * 512 == pytest.approx(mask.stats().allowed)
    blocks = visualize.mask(mask, queries=range(8192, 8192 + 1024), keys=range(4096, 9216), max_cells=256)
    assert legend(blocks) == ["empty block", "partial block", "full block"]
    lines = [float(np.asarray(line.get_ydata())[0]) for line in blocks.axes[0].lines]
    assert [x for x in lines if x > 1] == [x - 0.5 for x in range(8192, 9216, 128)]
    near = visualize.mask(mask, queries=range(9000, 9100), keys=range(8950, 9100))
    assert legend(near)[2:] == ["allowed, in a full block", "allowed, in a partial block"]
    ax = near.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("kv_idx", "q_idx", "all heads")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [f"{x:,}" for x in range(9008, 9100, 16)]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("cells", [40, 3, 2])
def test_each_head_has_its_picture(heads, cells):
    mask = flexref.create_block_mask(heads_differ, 2, heads, 40, 40, device="cpu", BLOCK_SIZE=16)
    figure = visualize.mask(mask, batch=1, heads=range(heads), max_cells=cells)
    assert [ax.get_title() for ax in figure.axes][:heads] == [f"batch 1, head {h}" for h in range(heads)]
    for head in range(heads):
        alone = visualize.mask(mask[1:, head : head + 1], max_cells=cells)
        torch.testing.assert_close(shown(figure, head), shown(alone), equal_nan=True)
        if cells == 40:
            assert torch.equal(shown(figure, head) == 3, allowed(mask)[1, head])


def test_torchs_own_block_mask_is_taken():
    theirs = torchs(causal, None, None, 300, 300, device="cpu")
    assert torch.equal(shown(visualize.mask(theirs)), shown(visualize.mask(flexref.BlockMask.from_torch(theirs))))


def test_files_are_png_or_svg_small_and_the_same_each_time(tmp_path):
    mask = flexref.create_block_mask(masks.sliding_window(300), 1, 1, 4096, 4096, device="cpu")
    for name in ("a.png", "b.png", "a.SVG", "b.SVG"):
        visualize.mask(mask, path=str(tmp_path / name))
    png, svg = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.SVG").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) < 60_000 and png == (tmp_path / "b.png").read_bytes()
    assert b"<svg" in svg[:400] and len(svg) < 100_000 and svg == (tmp_path / "b.SVG").read_bytes()


BAD = [
    ({"batch": 2}, IndexError, "batch 2 is out of range: there are 2, counted from 0."),
    ({"batch": "0"}, TypeError, "batch must be an int, got str"),
    ({"heads": 4}, IndexError, "heads 4 is out of range: there are 4, counted from 0."),
    ({"heads": (0, -1)}, IndexError, "heads -1 is out of range: there are 4, counted from 0."),
    ({"heads": ()}, ValueError, "heads is empty; name one head or more."),
    ({"queries": slice(9, 9)}, ValueError, r"queries slice\(9, 9, None\) is empty; there are 23 positions."),
    ({"keys": slice(40, None)}, ValueError, r"keys slice\(40, None, None\) is empty; there are 31 positions."),
    ({"keys": range(20, 32)}, IndexError, r"keys range\(20, 32\) is out of range: there are 31 positions, counted from 0."),
    ({"queries": range(-1, 5)}, IndexError, r"queries range\(-1, 5\) is out of range: there are 23 positions, counted from 0."),
    ({"queries": range(9, 0, -1)}, ValueError, r"queries range\(9, 0, -1\) goes backwards; its step must be 1 or more."),
    ({"queries": 5}, TypeError, "queries must be a slice, a range or None for all, got int."),
    ({"max_cells": 0}, ValueError, "max_cells must be at least 1, got 0"),
    ({"max_cells": 5000}, ValueError, "max_cells must be 1 to 2048, got 5000."),
    ({"path": "x.jpg"}, ValueError, "path must end in .png or .svg, got 'x.jpg'; savefig of the Figure writes other kinds."),
    ({"path": "x"}, ValueError, "path must end in .png or .svg, got 'x'"),
]


@pytest.mark.parametrize("wrong, error, text", BAD)
def test_wrong_arguments(wrong, error, text):
    query, key, value = inputs()
    with pytest.raises(error, match=text):
        visualize.scores(query, key, value, enable_gqa=True, **wrong)
    mask = flexref.create_block_mask(heads_differ, 2, 4, 23, 31, device="cpu")
    with pytest.raises(error, match=text):
        visualize.mask(mask, **wrong)


def test_wrong_arguments_of_one():
    query, key, value = inputs()
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got function; make one with flexref.create_block_mask"):
        visualize.mask(causal)
    one = flexref.create_block_mask(causal, 1, 1, 23, 31, device="cpu")
    with pytest.raises(IndexError, match="heads 1 is out of range: there is 1, counted from 0."):
        visualize.mask(one, heads=1)
    with pytest.raises(ValueError, match=r"queries of a mask must have a step of 1, got range\(0, 23, 2\)"):
        visualize.mask(one, queries=slice(0, 23, 2))
    with pytest.raises(TypeError, match="grad_out must be a tensor of floats, got float."):
        visualize.score_gradients(query, key, value, enable_gqa=True, grad_out=1.0)
    with pytest.raises(ValueError, match=r"grad_out must have the output's shape \(2, 4, 23, 3\) on cpu, got \(2, 4, 23, 5\)"):
        visualize.score_gradients(query, key, value, enable_gqa=True, grad_out=query)
    with pytest.raises(ValueError, match="enable_gqa"):
        visualize.scores(query, key, value)
    rows = [x.transpose(0, 1) for x in (query[0, :, :5], query[1, :, :9])]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with pytest.raises(TypeError, match=r"nested; pictures are of dense tensors: draw one sequence, x.unbind\(\)\[i\]\[None\]"):
        visualize.scores(jagged, jagged, jagged)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    mask = flexref.create_block_mask(causal, 1, 1, 23, 31, device="cpu")
    with pytest.raises(ImportError, match=r"missing here; pip install 'flexref\[visualize\]'") as caught:
        visualize.mask(mask)
    assert caught.value.name == "matplotlib"


def test_it_is_there_without_its_import_and_costs_none():
    loaded = loaded_by("import flexref; assert 'flexref.visualize' not in sys.modules; flexref.visualize.mask")
    assert "flexref.visualize" in loaded and not any(name.startswith("matplotlib") for name in loaded)


def loaded(name):
    """An example, as a module."""
    place = importlib.util.spec_from_file_location("example", ROOT / "examples" / f"{name}.py")
    assert place is not None and place.loader is not None
    example = importlib.util.module_from_spec(place)
    place.loader.exec_module(example)
    return example


def test_the_gallery_of_variants_shows_what_there_is():
    gallery, page = loaded("variants_gallery"), (ROOT / "docs" / "variants.md").read_text()
    figure = gallery.draw()
    assert len(figure.axes) == len(gallery.MASKS) and "images/variants.png" in page
    assert all(f"`{name.split('(')[0].split(' ')[0]}`" in page for name in gallery.MASKS)
    assert 10_000 < gallery.PICTURE.stat().st_size < 60_000


def test_the_docs_show_what_their_example_makes(tmp_path):
    example = loaded("visualize")
    example.draw_mask(tmp_path)
    example.draw_call(tmp_path)
    page, images = (ROOT / "docs" / "visualize.md").read_text(), ROOT / "docs" / "images"
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in images.glob("*.svg")) and all(f"images/{name}" in page for name in made)
    assert all(path.stat().st_size < 100_000 for folder in (images, tmp_path) for path in folder.iterdir())
    assert all(f"    {line}\n" in page for line in str(example.long_mask().stats()).splitlines())
