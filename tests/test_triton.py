"""The Triton engine where there is no GPU: its kernels in the interpreter, its options, its plans, and faults planted in it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from triton_faults import FAULTS, PLAIN

from flexref import BlockMask, create_block_mask, explain, flex_attention
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import triton as engine
from flexref.backends.triton import kernels_for, launch, tiles, tune
from flexref.backends.triton.call import Call, _is_wide, block_sides
from flexref.backends.triton.emitter import TritonEmitter, depends, scatter_lines
from flexref.conformance.cases import Blocks, Case
from flexref.conformance.checks import check_case
from flexref.errors import Unsupported
from flexref.problem import Capture
from flexref.program.builder import Builder, Ref
from flexref.program.derive import derive
from flexref.program.interpret import evaluate
from flexref.program.ops import OPS
from flexref.program.trace import trace
from flexref.reference import einsum

emulated = engine.emulated()
ALL = ("query", "key", "value", "captured")


def qkv(q_len=70, kv_len=90, dim=16, heads=2, dtype=torch.float32, **how):
    torch.manual_seed(0)
    query = torch.randn(1, heads, q_len, dim, **how).to(dtype)
    return query, torch.randn(1, heads, kv_len, dim, **how).to(dtype), torch.randn(1, heads, kv_len, dim, **how).to(dtype)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def run(*arguments, options=None, **named):
    """Forward in the interpreter."""
    problem, tensors = prepare(*arguments, options=options, **named)
    assert not emulated.unsupported(problem)
    return emulated.forward(problem, tensors)


def test_it_is_never_chosen_without_a_gpu():
    query, key, value = qkv()
    why = engine.unavailable()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert why and "GPU" in why[0]
    assert explain(query, key, value).choice.name == "numba_cpu"
    with pytest.raises(Unsupported, match="runs on cuda"):
        flex_attention(query, key, value, backend="triton")
    assert emulated.unavailable() == [] and emulated.how == "interpreted"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"q_tile": 24}, "q_tile must be a power of 2"),
        ({"kv_tile": 8}, "kv_tile must be a power of 2"),
        ({"num_warps": 3}, "num_warps must be 1, 2, 4, 8 or 16"),
        ({"num_stages": 0}, "num_stages must be an int from 1 to 8"),
        ({"splits": 0}, "splits must be an int from 1 to 65535"),
        ({"precision": "fast"}, "precision must be one of ieee, tf32x3, tf32"),
        ({"backward": "three"}, "backward must be one of two_passes, five_products"),
        ({"tma": 1}, "tma must be one of True, False"),
    ],
)
def test_wrong_options_are_told(options, says):
    problem, _ = prepare(*qkv(), options=options)
    assert any(says in reason for reason in engine.unsupported(problem))


def test_deterministic_refuses_what_is_added_up_atomically():
    gain, table = torch.tensor(2.0, requires_grad=True), torch.tensor(2.0)
    problem, _ = prepare(*qkv(), lambda s, b, h, q, k: s * gain, deterministic=True)
    assert any("gain" in reason and "atomically" in reason for reason in engine.unsupported(problem))
    problem, _ = prepare(*qkv(), deterministic=True, options={"backward": "five_products"})
    assert any("five_products" in reason for reason in engine.unsupported(problem))
    problem, _ = prepare(*qkv(), lambda s, b, h, q, k: s * table, deterministic=True)
    assert len(engine.unsupported(problem)) == (problem.device != "cuda")


def test_five_products_are_the_same_gradients():
    for case in (
        Case(q_len=70, kv_len=90, kv_heads=2, group=2, mask="q_idx >= kv_idx", score="score + slope[h] * kv_idx"),
        Case(q_len=40, kv_len=40, batch=2, values="holes", mask="q_idx >= kv_idx", dtype="bfloat16", kv_batch=1),
        Case(q_len=65, kv_len=50, blocks=Blocks((16, 32), by_hand=True), mask="kv_idx % 3 != 1"),
    ):
        check_case(_With({"backward": "five_products"}), case.but(wants=ALL))


class _With:
    """The emulated engine with kernel options, for the conformance suite."""

    name, how = "triton", "interpreted"

    def __init__(self, options):
        self.chosen = tuple(sorted(options.items()))

    def _problem(self, problem):
        from dataclasses import replace

        return replace(problem, options=self.chosen)

    def unsupported(self, problem):
        return emulated.unsupported(self._problem(problem))

    def forward(self, problem, tensors):
        return emulated.forward(self._problem(problem), tensors)

    def backward(self, problem, tensors, *rest):
        return emulated.backward(self._problem(problem), tensors, *rest)


@pytest.mark.parametrize(
    "options", [{"tma": True}, {"q_tile": 16, "kv_tile": 32}, {"q_tile": 128, "kv_tile": 128}, {"splits": 3}]
)
def test_options_change_no_result(options):
    for case in (
        Case(q_len=130, kv_len=150, head_dim=24, value_dim=32, mask="q_idx >= kv_idx", max_scores=True),
        Case(q_len=33, kv_len=129, kv_heads=2, group=3, dtype="bfloat16", head_dim=16, value_dim=16, score="score * 0.5"),
        Case(q_len=50, kv_len=70, blocks=Blocks((10, 12), heads=True, by_hand=True), kv_heads=2, group=2, mask="kv_idx % 2 == 0"),
        Case(q_len=20, kv_len=140, values="holes", mask="kv_idx < q_idx * 6", head_dim=16, value_dim=16),
    ):
        check_case(_With(options), case)


def test_descriptors_are_taken_only_for_what_they_can_describe():
    for name, how, wanted in (
        ("plain", lambda x: x, True),
        ("transposed", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
        ("columns", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), False),
        ("offset", lambda x: torch.cat([x, x], 3)[..., 1:17], False),
        ("expanded", lambda x: x[:, :1].expand(x.shape), False),
    ):
        query, key, value = qkv(kv_len=64)
        problem, tensors = prepare(query, how(key), how(value), options={"tma": True})
        found = launch._descriptors(Call(problem, tensors), tiles.Tile(64, 64, 4, 1))
        assert found["TMA"] is wanted, name


def test_decoding_packs_heads_and_splits_the_listed_blocks(monkeypatch):
    seen = []
    original = Call.twice
    monkeypatch.setattr(Call, "twice", lambda self, f, grid, a: (seen.append((grid, a)), original(self, f, grid, a))[1])
    query = torch.randn(1, 8, 1, 16)
    key, value = torch.randn(2, 1, 2, 2048, 16)
    window = create_block_mask(lambda b, h, q, k: k >= 1800, None, None, 1, 2048, device="cpu", BLOCK_SIZE=128)
    for mask in (None, window):
        output = run(query, key, value, block_mask=mask, enable_gqa=True)
        wanted = einsum(query.double(), key.double(), value.double(), mask_mod=mask and mask.mask_mod)
        torch.testing.assert_close(output.out, wanted.out.float(), rtol=1e-5, atol=1e-5)
    (grid, arguments), (masked_grid, _) = seen
    # one tile for the four heads of each key head; the same number of shares, of fewer blocks, for the window
    assert arguments["PACK"] and arguments["SPLIT"] and grid[0] == 2 and grid[1] > 1
    assert masked_grid == grid


@pytest.mark.parametrize(("programs", "tiles_of_keys"), [(8, 64), (1, 1000), (132, 64), (40, 9), (7, 5)])
def test_splits_keep_the_gpu_busy(programs, tiles_of_keys):
    found = launch.split_count(programs, tiles_of_keys, 132)

    def busy(splits):
        return programs * splits / (264 * math.ceil(programs * splits / 264))

    most = min(tiles_of_keys // 2, 128)
    assert 1 <= found <= most and busy(found) >= 0.85 * max(busy(n) for n in range(1, most + 1))
    assert all(busy(n) < busy(found) for n in range(1, found)), "fewer would do"


def test_few_tiles_and_many_programs_are_not_split():
    assert launch.split_count(300, 100, 132) == launch.split_count(8, 4, 132) == 1


def test_tiles_are_halved_until_they_fit(monkeypatch):
    class OutOfResources(Exception):
        pass

    tried = []
    problem, tensors = prepare(*qkv(q_len=256, kv_len=256))
    call = Call(problem, tensors)

    def action(function, tile):
        tried.append(tile)
        if tile.q * tile.kv > 32 * 32:
            raise OutOfResources

    call.run("forward", action)
    assert tried[0] == tiles.EMULATED and tried[-1].q * tried[-1].kv == 32 * 32
    tried.clear()
    Call(problem, tensors).run("forward", action)
    assert len(tried) == 1, "what did not fit is not tried again"
    assert "did not fit" in " ".join(engine.notes(problem))
    tile, steps = tiles.Tile(128, 128, 8, 3), 0
    while tile := tiles.smaller(tile):
        steps += 1
    assert steps < 30

    def broken(function, tile):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        call.run("backward_q", broken)


def test_the_table_has_a_tile_for_everything():
    for kernel, rows in tiles.TABLE.items():
        assert all(row.why for row in rows)
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            for dtype in (torch.float16, torch.float32, torch.float64):
                for dim in (1, 64, 100, 128, 256, 576):
                    problem, _ = prepare(*(torch.empty(1, 1, 4096, dim, dtype=dtype) for _ in range(3)))
                    tile = tiles.tile_for(kernel, problem, capability)
                    assert tile.q >= 16 and tile.kv >= 16
    small, _ = prepare(*qkv(q_len=20, kv_len=40, dtype=torch.bfloat16))
    assert tiles.tile_for("forward", small, (9, 0))[:2] == (32, 64)


def test_tune_keeps_the_fastest_and_its_file_is_read(tmp_path, monkeypatch):
    problem, tensors = tune.plain_problem(torch.float32, 16, 1, 64, 64, "cpu")
    monkeypatch.setattr(tune, "candidates", lambda kernel: iter([tiles.Tile(16, 32, 4, 1), tiles.Tile(32, 32, 8, 2)]))
    seconds = iter([3.0, 2.0] * 3)
    monkeypatch.setattr(tune, "_seconds", lambda *_: next(seconds))
    found = tune.tune(problem, tensors, tune.gpu_seconds, (9, 0))
    assert found["tiles"]["forward/90/4/16"] == {"tile": [32, 32, 8, 2], "seconds": 2.0} and len(found["tiles"]) == 3
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(found))
    monkeypatch.setenv("FLEXREF_TILES", str(path))
    assert tiles.tile_for("forward", problem, (9, 0)) == tiles.Tile(32, 32, 8, 2)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert tune.main(["--json", str(path)]) == 1


def test_tune_runs_each_kernel_alone():
    problem, tensors = tune.plain_problem(torch.float32, 16, 1, 64, 64, "cpu")
    from flexref.backends.triton.interpreter import interpreting

    with interpreting():
        for kernel in ("forward", "backward_kv", "backward_q"):
            assert tune._seconds(kernel, tiles.Tile(32, 32, 4, 1), problem, tensors, lambda call: call() and 1.0) == 1.0


def test_a_read_is_checked_only_where_nothing_proves_it():
    table, pick = torch.arange(5.0), torch.tensor([0, 4] * 45)
    query, key, value = qkv()

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[pick[kv_idx]]

    proved = Call(*prepare(query, key, value, mod))
    assert not proved.checks and proved.errors is None
    pick[7] = 5
    call = Call(*prepare(query, key, value, mod))
    assert call.checks
    with pytest.raises(IndexError, match=r"table of shape \(5,\) is indexed with 5"):
        run(query, key, value, mod)
    # what only the mask keeps in range is checked, and is no error
    edge = torch.arange(90.0)
    run(query, key, value, lambda s, b, h, q, k: s + edge[k + 1], mask_mod=lambda b, h, q, k: k < 89)


def test_a_careful_launch_that_does_not_fit_adds_nothing_twice(monkeypatch):
    class OutOfResources(Exception):
        pass

    original, tries = Call.twice, []

    def twice(self, function, grid, arguments):
        class Once:
            def __getitem__(self, grid):
                def launch(**named):
                    tries.append((named["BLOCK_N"], named["CAREFUL"]))
                    if named["CAREFUL"] and len(tries) == 1:
                        raise OutOfResources
                    function[grid](**named)

                return launch

        original(self, Once(), grid, arguments)

    monkeypatch.setattr(Call, "twice", twice)
    case = Case(q_len=40, kv_len=70, score="score * gain", wants=ALL)
    check_case(_With({"backward": "five_products", "q_tile": 32}), case)
    assert tries[:2] == [(64, True), (32, True)], "the first launch of a tile is one that adds nothing"


def test_strides_that_32_bits_cannot_say(monkeypatch):
    far = torch.empty_strided((1, 1, 80, 16), (0, 0, 2**26, 1), device="meta")
    assert _is_wide(far) and _is_wide(far.transpose(2, 3)) and not _is_wide(qkv()[0])
    monkeypatch.setattr("flexref.backends.triton.call._is_wide", lambda x: True)
    check_case(emulated, Case(q_len=40, kv_len=70, kv_heads=2, mask="q_idx >= kv_idx", values="holes", wants=ALL))


def test_a_score_of_minus_infinity_without_any_mask_is_masked():
    query, key, value = (x.requires_grad_() for x in qkv(q_len=20, kv_len=33, dim=8))
    with torch.no_grad():
        query[..., 0].abs_()
        key[0, 0, 3, 0], value[0, 0, 3] = -math.inf, math.nan
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        out = attend(emulated, *prepare(*leaves)).out
        gradients = torch.autograd.grad(out.float().sum(), leaves)
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_a_gradient_of_lse_with_the_negative_bit():
    query, key, value = qkv(q_len=1, kv_len=5, dim=8, heads=1)
    query.requires_grad_()
    negative = torch.randn(1, 1, 1, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    lse = attend(emulated, *prepare(query, key, value)).lse
    (got,) = torch.autograd.grad(lse, query, negative)
    lse = attend(emulated, *prepare(query, key, value)).lse
    (wanted,) = torch.autograd.grad(lse, query, negative.resolve_neg())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("scale", [1e-46, 1e-38, 0.0, -0.25])
def test_scales_that_do_not_fold(scale):
    query, key, value = qkv(dtype=torch.bfloat16)
    output = run(query, key, value, scale=scale)
    wanted = einsum(query.double(), key.double(), value.double(), scale=scale)
    torch.testing.assert_close(output.lse, wanted.lse.float(), rtol=1e-5, atol=1e-5)


def test_great_products_of_bfloat16_keep_their_rows():
    # the exponents are over 2^30, where a float32 cannot tell 64 from its neighbour
    query, key, value = qkv(dtype=torch.bfloat16)
    query, key = query * 2e5, key * 2e5
    output = run(query, key, value)
    wanted = einsum(query.double(), key.double(), value.double())
    assert output.out.isfinite().all() and output.lse.isfinite().all()
    torch.testing.assert_close(output.lse, wanted.lse.float(), rtol=1e-5, atol=0)


def test_an_empty_captured_tensor_gets_an_empty_gradient():
    table = torch.zeros(0, requires_grad=True)
    nothing = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), BLOCK_SIZE=128,
        mask_mod=lambda b, h, q, k: q < 0, seq_lengths=(70, 90),
    )  # fmt: skip
    out = attend(emulated, *prepare(*qkv(), lambda s, b, h, q, k: s + table[k], nothing)).out
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert gradient.shape == (0,) and not out.any()


def test_a_block_longer_than_the_length_is_not_walked_to_its_end():
    query, key, value = qkv(q_len=32, kv_len=40)
    whole = create_block_mask(causal, None, None, 32, 40, device="cpu", BLOCK_SIZE=1 << 30)
    problem, tensors = prepare(query, key, value, block_mask=whole)
    assert block_sides(problem) == (1024, 1024)
    torch.testing.assert_close(
        emulated.forward(problem, tensors).out,
        einsum(query.double(), key.double(), value.double(), mask_mod=causal).out.float(), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_the_least_captured_int_is_itself():
    least = -(2**63)
    query, key, value = qkv()
    output = run(query, key, value, lambda s, b, h, q, k: torch.where(k > least, s, -math.inf))
    assert torch.equal(output.lse, run(query, key, value, lambda s, b, h, q, k: s * 1.0).lse)


def test_delta_and_splits_fit_a_grid():
    problem, _ = prepare(*qkv(), options={"splits": 65536})
    assert any("65535" in reason for reason in emulated.unsupported(problem))
    case = Case(q_len=2, kv_len=3, batch=3, kv_heads=5, group=2, wants=ALL)
    check_case(emulated, case)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_suite(fault, monkeypatch):
    file, old, new, changes = FAULTS[fault]
    case = PLAIN.but(**changes)
    assert old in kernels_for.source(file), "the fault no longer fits the kernel"
    original = kernels_for.source
    check_case(emulated, case)
    monkeypatch.setattr(kernels_for, "source", lambda name: original(name).replace(old, new) if name == file else original(name))
    kernels_for.text_of.cache_clear()
    try:
        with pytest.raises(AssertionError):
            check_case(emulated, case)
    finally:
        monkeypatch.undo()
        kernels_for.text_of.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_every_operation_means_what_it_says(op):
    """Each operation on awkward numbers, through a score_mod that reads its arguments from captured tensors."""
    values = {
        "f": [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 1e-3, 30.0, -7.25, math.inf, -math.inf, math.nan],
        "i": [0, 1, -1, 2, 5, -7, 9, 100, -100, 3, 31, 7, 2**20, -(2**20)],
        "b": [True, False] * 7,
    }
    *arguments, result = OPS[op].signature
    for number in ("int", "float") if set(OPS[op].signature) & {"n", "t"} else ("float",):
        letters = {"n": number[0], "t": number[0]}
        kinds = [letters.get(letter, letter) for letter in arguments]
        columns = [_argument(op, values[kind], i) for i, kind in enumerate(kinds)]
        builder = Builder()
        types = {"f": "float", "i": "int", "b": "bool"}
        at = Ref(builder.node("input", (), "int", "kv_idx"))
        refs = [Ref(builder.node("load", (at.position,), types[kind], i)) for i, kind in enumerate(kinds)]
        out = builder.op(op, *refs)
        kind = letters.get(result, result)
        score = out if kind == "f" else builder.op("int_to_float", out if kind == "i" else builder.op("bool_to_int", out))
        graph = builder.graph({"out": score.position})
        tensors = [torch.tensor(column) for column in columns]
        got = _scores_of(graph, tensors)
        wanted = evaluate(graph, {"kv_idx": torch.arange(14)}, _reader(tensors), None, torch.float32)
        torch.testing.assert_close(got, wanted[dict(graph.outputs)["out"]].float(), rtol=2e-6, atol=1e-6, equal_nan=True)


def _reader(tensors):
    return lambda position, node, indices: tensors[int(node.attr)][indices[0]]


def _argument(op, values, i):
    if op in ("shift_left", "shift_right"):
        return [abs(x) % 8 for x in values] if i else values
    if i and op in ("floor_div", "trunc_div", "remainder", "fmod", "pow"):
        # no division by 0, which no rule gives a meaning in whole numbers, and no power that is over all numbers
        return [[3, -3, 5, -5, 7, -7, 2, -2, 4, -4, 9, -9, 1, -1][j] for j in range(14)] if isinstance(values[0], int) else [
            2.0, -2.0, 3.0, 0.5, -0.5, 1.5, 2.0, -1.0, 1.0, 2.0, 3.0, 2.0, 1.0, 1.0
        ]  # fmt: skip
    if op == "float_to_int":
        return [x if math.isfinite(x) else 4.75 for x in values]
    if i == 1:
        return values[3:] + values[:3]
    return values[1:] + values[:1] if i == 2 else values


def _scores_of(graph, tensors):
    """What a score_mod of this program makes of one row of 14 keys, asked of the kernel's own function."""
    from dataclasses import replace

    import triton
    import triton.language as tl

    from flexref.backends.triton.interpreter import interpreting

    query = torch.zeros(1, 1, 1, 16)
    key = torch.zeros(1, 1, 14, 16)
    problem, given = prepare(query, key, key)
    captures = tuple(Capture(f"x{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(tensors))
    problem = replace(problem, score=graph, captures=captures)
    call = Call(problem, replace(given, captured=tuple(tensors)))
    text = kernels_for.text_of("forward", problem, call.near, False, False, True)
    names = [line.removesuffix(",") for line in kernels_for.argument_lists(problem, False)["arguments"]]
    probe = f"""

@triton.jit
def probe(result, {", ".join(names)}):
    kv_idx = tl.arange(0, 16)[None, :]
    score = tl.zeros([16, 16], real)
    row = tl.arange(0, 16)[:, None]
    modified, wrong = score_mod(score, 0, 0, row, tl.minimum(kv_idx, 13), score == 0, {", ".join(names)})
    tl.store(result + row * 16 + kv_idx, modified)
"""
    assert triton and tl
    result = torch.empty(16, 16)
    with interpreting():
        kernels_for.module_of(text + probe, True).probe[(1,)](result, **call.mods())
    return result[0, :14]


def test_what_an_index_does_not_depend_on_is_summed_up_first():
    slope = torch.zeros(4)
    bias = torch.zeros(4, 8, 8)
    for mod, reductions in (
        (lambda s, b, h, q, k: s + slope[h], "tl.sum(d{}_part)"),
        (lambda s, b, h, q, k: s + bias[h, q, k], ""),
        (lambda s, b, h, q, k: s + slope[q % 4], "tl.sum(d{}_part, 0, keep_dims=True)"),
        (lambda s, b, h, q, k: s + slope[k % 4], "tl.sum(d{}_part, 1, keep_dims=True)"),
        (lambda s, b, h, q, k: s + slope[(s > 0).to(torch.int64)], ""),
    ):
        traced = trace(mod, "score")
        derivative = derive(traced.graph, tuple(traced.graph.loads))
        name = next(name for name, _ in derivative.outputs if name != "score")
        position = int(name.removeprefix("load"))
        captures = (Capture("x", torch.float32, tuple(traced.captured[0].shape), True),)
        lines = scatter_lines(derivative, position, "x", "d", captures)
        assert lines[-1].startswith("tl.atomic_add(a0 + (") and len(lines) == 2 + bool(reductions)
        assert not reductions or reductions.format(position) in lines[1]
    assert depends(derivative)[position] >= {"score"}


def test_every_operation_is_spelled_in_every_type():
    for op in OPS:
        for number in ("int", "float"):
            assert "{" in TritonEmitter(()).spelling(op, number if "n" in OPS[op].signature else "float")
