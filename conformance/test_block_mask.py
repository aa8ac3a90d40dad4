"""Block masks: built or listed by hand, odd block sizes, lists that contradict the mask_mod, rows with no block."""

from __future__ import annotations

from hypothesis import given

from flexref.backend import Backend
from flexref.conformance.cases import Blocks, Case
from flexref.conformance.checks import check_case
from flexref.conformance.strategies import BLOCK_SIZES, cases

ALL = ("query", "key", "value", "captured")


@given(case=cases(gradients=True, blocks=True))
def test_any_block_mask(backend: Backend, case: Case):
    check_case(backend, case)


def test_every_block_size(backend: Backend):
    for size in BLOCK_SIZES:
        shape = Case(q_len=65, kv_len=50, mask="q_idx >= kv_idx", wants=ALL)
        check_case(backend, shape.but(blocks=Blocks(size)))
        check_case(backend, shape.but(blocks=Blocks(size, by_hand=True)))


def test_lists_without_a_mask_mod(backend: Backend):
    for seed in (1, 2):
        check_case(
            backend,
            Case(
                q_len=65,
                kv_len=70,
                blocks=Blocks((16, 32), heads=True, by_hand=True),
                kv_heads=2,
                wants=ALL,
                seed=seed,
            ),
        )


def test_full_blocks_do_not_ask_the_mask_mod(backend: Backend):
    # the mask says no everywhere: only what is listed full is left
    check_case(
        backend, Case(q_len=65, kv_len=70, mask="q_idx < 0", blocks=Blocks((16, 16), by_hand=True), wants=ALL)
    )


def test_ragged_tails(backend: Backend):
    for q_len, kv_len in ((127, 129), (129, 127), (1, 130), (130, 1)):
        check_case(
            backend,
            Case(
                q_len=q_len, kv_len=kv_len, mask="q_idx + 5 >= kv_idx", blocks=Blocks((128, 128)), wants=ALL
            ),
        )
