"""A BlockMask cannot be changed, and no list that engines read can be written, or come from outside unchecked."""
from __future__ import annotations

import copy
import io
import operator
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.utils import _pytree as pytree

from flexref import flex_attention
from flexref.blocks.lists import Lists
from flexref.blocks.mask import (
    BlockMask,
    and_masks,
    create_block_mask,
    noop_mask,
    not_mask,
    or_masks,
    shift_mask,
    xor_masks,
)
from flexref.blocks.state import loaded
from flexref.variants import masks, score_mods

LISTS = r"BlockMask\.from_kv_blocks"
SET = {
    "seq_lengths": ((512, 512), r"mask\.resize\(q_len, kv_len\).*mask\.rows\(start, stop\)"),
    "mask_mod": (noop_mask, rf"create_block_mask\(mask_mod, \.\.\.\).*{LISTS}"),
    "B": (4, r"create_block_mask.*B or H of 1 serves any"),
    "H": (4, r"create_block_mask.*B or H of 1 serves any"),
    "BLOCK_SIZE": ((8, 8), r"create_block_mask\(.*BLOCK_SIZE\)"),
    "grid": (None, "create_block_mask"),
    "shape": ((1, 1, 9, 9), "create_block_mask"),
    "device": ("cuda", r"mask\.to\(device\)"),
    "separate_full_blocks": (False, LISTS),
    "note": ("mine", "keep what belongs to it beside it"),
    **dict.fromkeys(("runs", "csr", "csc", "walk", "kv_indices", "kv_num_blocks", "full_kv_indices", "q_indices"), (None, LISTS)),
}


def causal_mask() -> BlockMask:
    return create_block_mask(masks.causal, None, None, 64, 64, "cpu", 16)


def inputs(length: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("name", SET)
def test_nothing_of_a_block_mask_can_be_set(name):
    mask, (value, text) = causal_mask(), SET[name]
    before = vars(mask).copy()
    with pytest.raises(AttributeError, match=f"cannot set '{name}' of a BlockMask, which is immutable; .*{text}"):
        setattr(mask, name, value)
    with pytest.raises(AttributeError, match=f"cannot delete '{name}'"):
        delattr(mask, name)
    if name != "note":
        with pytest.raises(AttributeError):
            object.__setattr__(mask, name, value)
    assert vars(mask) == before and mask == causal_mask()


def test_what_is_written_into_a_copy_is_refused_at_the_next_call():
    query, key, value = inputs()
    want = flex_attention(query, key, value, block_mask=causal_mask())
    lists = "csr.indices", "csr.full_offsets", "csc.indices", "runs.full_starts"
    for name in ("kv_indices", "full_kv_num_blocks", "q_indices", *lists):
        mask = causal_mask()
        copied = operator.attrgetter(name)(mask)
        assert torch.equal(flex_attention(query, key, value, block_mask=mask), want)
        copied.fill_(9999)
        for use in (lambda m: flex_attention(query, key, value, block_mask=m), lambda m: m.validate()):
            with pytest.raises(ValueError, match=rf"BlockMask\.{name} was written in place, but it is a copy.*{LISTS}"):
                use(mask)


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda x: x.data.fill_(9999),
    "numpy": lambda x: x.numpy().fill(9999),
    "dlpack": lambda x: torch.from_dlpack(x).fill_(9999),
    "smaller storage": lambda x: x.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("how", UNSEEN)
def test_no_engine_reads_what_a_version_counter_does_not_see(how):
    query, key, value = (x.requires_grad_() for x in inputs())
    want = flex_attention(query, key, value, block_mask=causal_mask())
    made, leaves = causal_mask(), pytree.tree_leaves(causal_mask())
    theirs = made.to_torch()
    lists = [theirs.kv_num_blocks, theirs.kv_indices, theirs.full_kv_num_blocks, theirs.full_kv_indices]
    taken = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=masks.causal)
    state = made.__reduce__()
    again = loaded(*state[1])
    spec = pytree.tree_structure(made)
    rebuilt = pytree.tree_unflatten([x.clone() for x in leaves], spec)
    rebuilt.check_lists()
    for x in (*made.runs, *made.csr, *made.csc, *lists, *state[1][2], *made.as_tuple()[2:10], *pytree.tree_leaves(rebuilt)):
        if isinstance(x, Tensor):
            UNSEEN[how](x)
    for mask in (made, taken, again, rebuilt):
        out = flex_attention(query, key, value, block_mask=mask)
        assert torch.equal(out, want)
        out.sum().backward()


def damaged(**changes: Any) -> list:
    """The leaves of causal_mask() with other lists."""
    return list(causal_mask().runs._replace(**changes))


def runs(ends: list[int], starts: list[int], counts: list[int]) -> dict[str, Tensor]:
    """Other full lists, of rows 1 to 3: how many runs there are up to the end of each row, and the runs."""
    starts_and_counts = (torch.tensor(x, dtype=torch.int32) for x in (starts, counts))
    return dict(zip(Lists._fields[2:], (torch.tensor([0, 0, *ends]), *starts_and_counts), strict=True))


ZEROS = torch._efficientzerotensor(4, dtype=torch.int32)  # type: ignore[attr-defined]
HUGE = torch.tensor([0, 3 << 61, -(3 << 61), 0, 4])
OUTSIDE = {
    "a column too far": (damaged(indices=torch.tensor([0, 1, 2, 9999], dtype=torch.int32)), "names column 9999"),
    "a negative column": (damaged(indices=torch.tensor([-1, 1, 2, 3], dtype=torch.int32)), "names column -1"),
    "a column twice": (damaged(**runs([0, 2, 3], [0, 1, 0], [2, 1, 3])), "has column 1 after 1; columns must ascend"),
    "runs that descend": (damaged(**runs([0, 1, 3], [0, 2, 0], [1, 1, 1])), "has column 0 after 2; columns must ascend"),
    "runs that touch": (damaged(**runs([0, 2, 3], [0, 1, 0], [1, 1, 3])), "has two runs that touch in column 0; make them one"),
    "a run too long": (damaged(**runs([1, 2, 3], [0, 0, 0], [1, 2, 9999])), "names column 9998; columns are 0 to 3"),
    "a run beyond 32 bits": (damaged(**runs([1, 2, 3], [0, 0, 3], [1, 2, 2**31 - 1])), "names column 2147483649"),
    "a run before the first": (damaged(**runs([1, 2, 3], [-1, 0, 0], [1, 2, 3])), "names column -1"),
    "a run of nothing": (damaged(**runs([1, 2, 3], [0, 0, 0], [1, 2, 0])), "row 3 has a run of 0 columns"),
    "a run of less": (damaged(**runs([1, 2, 3], [0, 0, 2], [1, 2, -2])), "row 3 has a run of -2 columns"),
    "counts too few": (damaged(**runs([1, 2, 3], [0, 0, 0], [1, 2])), "do not fit 4 rows and 3 and 2 listed runs"),
    "partial in a run": (damaged(**runs([1, 2, 3], [0, 0, 0], [1, 2, 4])), "row 3, column 3 is listed both partial and full"),
    "int64 counts": (damaged(full_counts=torch.ones(3, dtype=torch.int64)), "must be int64 offsets and int32 starts and counts"),
    "rows too few": (damaged(offsets=torch.tensor([0, 4])), "do not fit 4 rows and 4 listed blocks"),
    "an end too far": (damaged(offsets=torch.tensor([0, 1, 2, 3, 9999])), "do not fit 4 rows"),
    "a start": (damaged(offsets=torch.tensor([-1, 1, 2, 3, 4])), "do not fit 4 rows"),
    "descending": (damaged(offsets=torch.tensor([0, 3, 2, 3, 4])), "offsets descend"),
    "differences that wrap": (damaged(offsets=HUGE), "offsets descend"),
    "two dimensions": (damaged(indices=torch.zeros(4, 1, dtype=torch.int32)), "do not fit 4 rows"),
    "no dimension": (damaged(indices=torch.zeros((), dtype=torch.int32)), "do not fit 4 rows"),
    "int64 columns": (damaged(indices=torch.arange(4)), "must be int64 offsets and int32 indices"),
    "int32 offsets": (damaged(offsets=torch.arange(5, dtype=torch.int32)), "must be int64 offsets and int32 indices"),
    "floats": (damaged(indices=torch.zeros(4)), "indices must be a tensor of integers, got torch.float32"),
    "sparse": (damaged(indices=torch.zeros(4, dtype=torch.int32).to_sparse()), "must be a dense tensor"),
    "zeros without memory": (damaged(indices=ZEROS), "a tensor of zeros that PyTorch has not written"),
    "two devices": (damaged(indices=torch.zeros(4, dtype=torch.int32, device="meta")), "are on cpu, meta"),
    "nothing": ([None] * 5, "offsets must be a tensor of integers, got NoneType"),
    "objects": ([object()] * 5, "offsets must be a tensor of integers, got object"),
    "three": (damaged()[:3], "has the leaves .* got 3"),
}


def freed() -> list:
    indices = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    indices.untyped_storage().resize_(4)
    return damaged(indices=indices)


@pytest.mark.parametrize("what", (*OUTSIDE, "freed"))
def test_lists_from_outside_are_checked_before_a_kernel_reads_them(what):
    leaves, text = (freed(), "indices has no memory for its shape") if what == "freed" else OUTSIDE[what]
    mask = causal_mask()
    spec = pytree.tree_structure(mask)
    # a tree takes anything; the mask says so when it is used, and prints before
    foreign = pytree.tree_unflatten(leaves, spec) if len(leaves) == 5 else None
    if foreign is not None:
        for use in (lambda: flex_attention(*inputs(), block_mask=foreign), foreign.to_dense, lambda: foreign.resize(9, 9)):
            with pytest.raises((TypeError, ValueError), match=text):
                use()
        assert re.search(text, repr(foreign)) and re.search(text, str(foreign)) and foreign == foreign
        assert pytree.tree_leaves(foreign) == leaves
    state = mask.__reduce__()[1]
    with pytest.raises((TypeError, ValueError), match=text):
        loaded(*state[:2], tuple(leaves), *state[3:])


def test_a_damaged_pickle_is_refused():
    kind, grid, lists, *rest = causal_mask().__reduce__()[1]
    for changed, error, text in (
        ((dict, grid, lists), TypeError, "no pickled BlockMask"),
        ((kind, grid[:5], lists), TypeError, "no pickled BlockMask"),
        ((kind, (1, 1, 512, 512, 16, 16), lists), ValueError, "do not fit 32 rows"),
        ((kind, (1, 1, 64, 32, 16, 16), lists), ValueError, "names column 2; columns are 0 to 1"),
        ((kind, (4, 1, 64, 64, 16, 16), lists), ValueError, "do not fit 16 rows"),
        ((kind, (1, 1, 64, 64, 0, 16), lists), ValueError, "BLOCK_SIZE must be at least 1"),
        ((kind, (1, 1, 64, -64, 16, 16), lists), ValueError, "KV_LEN must be at least 0"),
        ((kind, (1, 1, 64, 6.4, 16, 16), lists), TypeError, "KV_LEN must be an int, got float"),
    ):
        with pytest.raises(error, match=text):
            loaded(*changed, *rest)
    with pytest.raises(TypeError, match="mask_mod must be a function"):
        loaded(kind, grid, lists, 3, *rest[1:])  # type: ignore[arg-type]


def test_torch_s_masks_are_followed_where_their_lists_are_written():
    query, key, value = inputs()
    for write in (lambda x: x.fill_(0), lambda x: x.data.fill_(0), lambda x: x.numpy().fill(0)):
        theirs = torch_flex.create_block_mask(masks.causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
        before = flex_attention(query, key, value, block_mask=theirs)  # type: ignore[arg-type]
        write(theirs.full_kv_num_blocks)
        after = flex_attention(query, key, value, block_mask=theirs)  # type: ignore[arg-type]
        assert torch.equal(after, flex_attention(query, key, value, block_mask=BlockMask.from_torch(theirs)))
        assert not torch.equal(before, after)
        theirs.kv_indices.data.fill_(9999)
        with pytest.raises(ValueError, match="names column 9999"):
            flex_attention(query, key, value, block_mask=theirs)  # type: ignore[arg-type]
    with torch.inference_mode():
        theirs = torch_flex.create_block_mask(masks.causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(flex_attention(query, key, value, block_mask=theirs), before)  # type: ignore[arg-type]


def test_a_bare_mask_mod_follows_what_it_captures_however_that_is_written():
    query, key, value = inputs()
    for write in (lambda x: x.fill_(0), lambda x: x.data.fill_(0), lambda x: x.numpy().fill(0)):
        ids = torch.arange(64) // 20
        document = masks.document(ids)
        flex_attention(query, key, value, mask_mod=document)
        write(ids)
        after = flex_attention(query, key, value, mask_mod=document)
        assert torch.equal(after, flex_attention(query, key, value, mask_mod=noop_mask))


def test_a_block_mask_is_a_pytree_node():
    ids = torch.arange(64) // 20
    mask = create_block_mask(and_masks(masks.document(ids), masks.causal), None, 2, 64, 64, "cpu", 16)
    leaves, spec = pytree.tree_flatten({"mask": mask})
    assert len(leaves) == 5 and all(isinstance(x, Tensor) for x in leaves)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(mask)[0]]
    assert names == [f".{name}" for name in Lists._fields]
    assert pytree.tree_unflatten(leaves, spec)["mask"] is mask
    for same in (pytree.tree_map(torch.clone, mask), pytree.tree_map(lambda x: x.to("cpu"), mask), copy.copy(mask)):
        assert same == mask
        assert torch.equal(flex_attention(*inputs(), block_mask=same), flex_attention(*inputs(), block_mask=mask))
    moved = pytree.tree_map(lambda x: x.to("meta"), mask)
    assert moved.device.type == "meta" and moved.mask_mod.mods[0].ids.is_meta and not mask.mask_mod.mods[0].ids.is_meta
    shapes = pytree.tree_map(lambda x: tuple(x.shape), mask)
    assert pytree.tree_leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)) == [tuple(x.shape) for x in leaves]
    nothing = pytree.tree_map(lambda x: None, mask)
    assert (nothing.B, nothing.seq_lengths, nothing.mask_mod) == (1, (64, 64), mask.mask_mod) and nothing != mask
    assert pytree.tree_structure(causal_mask()) == pytree.tree_structure(causal_mask()) != spec
    assert str(spec) and hash(pytree.tree_structure(mask)) == hash(pytree.tree_structure(copy.deepcopy(mask)))
    added = pytree.tree_map(lambda a, b: torch.equal(a, b), causal_mask(), causal_mask())
    assert pytree.tree_leaves(added) == [True] * 5


def test_a_subclass_is_a_mask_of_its_own_kind():
    class Mine(BlockMask):
        pass

    made = Mine._make(causal_mask().grid, causal_mask().walk.runs, masks.causal, True, True)
    made_of_it = made[:, :, 0:1], made.resize(9, 9), made.rows(1, 5), ~made, made & causal_mask(), made.to("cpu"), copy.copy(made)
    for other in made_of_it:
        assert type(other) is Mine
    assert type(pytree.tree_map(torch.clone, made)) is Mine
    assert torch.equal(flex_attention(*inputs(), block_mask=made), flex_attention(*inputs(), block_mask=causal_mask()))
    with pytest.raises(AttributeError, match="immutable"):
        made.seq_lengths = 3, 3  # type: ignore[misc]


def weights(mask: BlockMask) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    return file


SAFE = {
    "all kinds": lambda: or_masks(
        not_mask(masks.sliding_window(5)), xor_masks(masks.document(torch.arange(64) // 9), shift_mask(masks.causal, 3))
    ),
    "function": lambda: masks.causal,
    "nothing masked": lambda: noop_mask,
}


@pytest.mark.parametrize("what", SAFE)
def test_masks_load_as_weights_in_a_new_process(what, tmp_path):
    mask = create_block_mask(SAFE[what](), None, None, 64, 64, "cpu", 16)
    cut = mask[:, :, torch.tensor([2, 0])]
    torch.save([mask, cut], tmp_path / "mask.pt")
    assert torch.load(tmp_path / "mask.pt", weights_only=True) == [mask, cut]
    code = "import sys, torch, flexref; both = torch.load(sys.argv[1], weights_only=True); torch.save(both, sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "mask.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "mask.pt", weights_only=True) == [mask, cut]


def own_mod(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def test_what_is_not_known_to_be_safe_is_not_loaded_as_weights():
    file = weights(create_block_mask(own_mod, None, None, 64, 64, "cpu", 16))
    with pytest.raises(pickle.UnpicklingError, match=r"add_safe_globals\(\[.*own_mod\]\)"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([own_mod]):
        assert torch.load(file, weights_only=True)["mask"] == create_block_mask(own_mod, None, None, 64, 64, "cpu", 16)


NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from((None, True, 1.5, "x", 1 << 40, -(1 << 70), torch.tensor(3), (2, 2), [])))
COUNTS = st.one_of(
    NUMBERS,
    st.builds(
        lambda shape, dtype, seed: torch.randint(-2, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
        st.lists(st.integers(0, 3), max_size=5).map(tuple),
        st.sampled_from([getattr(torch, name) for name in "int64 int32 int8 uint8 uint16 uint64 float32 bool".split()]),
        st.integers(0, 99),
    ),
)
FINE = {"kv_num_blocks": torch.tensor([[[1, 1]]]), "kv_indices": torch.tensor([[[[0, 1], [1, 0]]]]), "BLOCK_SIZE": 4}
REFUSALS = (TypeError, ValueError, IndexError)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_wrong_arguments_are_refused_or_right(data):
    tensors = dict.fromkeys(("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"), COUNTS)
    values = st.fixed_dictionaries({}, optional=tensors | dict.fromkeys(("BLOCK_SIZE", "seq_lengths"), NUMBERS))
    given_ = FINE | data.draw(values) | {"mask_mod": data.draw(st.sampled_from((masks.causal, None, 3, own_mod)))}
    try:
        mask = BlockMask.from_kv_blocks(**given_)
    except REFUSALS as error:
        assert str(error)
        mask = causal_mask()
    mask.validate()
    index = data.draw(st.one_of(COUNTS, st.slices(4), st.tuples(COUNTS, st.one_of(st.slices(3), COUNTS), COUNTS)))
    numbers = data.draw(st.tuples(NUMBERS, NUMBERS))
    for use in (lambda: mask[index], lambda: mask.resize(*numbers), lambda: mask.rows(*numbers)):  # type: ignore[arg-type]
        if max((x for x in numbers if isinstance(x, int)), default=0) < 1 << 20:
            try:
                use().validate()
            except REFUSALS as error:
                assert str(error)


def test_score_mods_load_as_weights():
    mods = [score_mods.soft_cap(3.0), score_mods.relative_position, score_mods.compose(score_mods.alibi(4), score_mods.causal)]
    file = io.BytesIO()
    torch.save(mods, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == mods
