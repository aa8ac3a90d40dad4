"""The demo: every variant on a real text, timed beside torch's SDPA with the same dense mask, judged, and drawn."""
from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flexref
from flexref.cli import pictures, text
from flexref.cli.cases import Case, make_cases, sdpa_bytes, sdpa_mask
from flexref.cli.judge import Verdict, judge


class Row(NamedTuple):
    """One line of the table; seconds, and the reason where SDPA has no time."""

    case: Case
    backend: str
    sparsity: float
    seconds: float
    sdpa: float | str
    verdict: Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flexref demo`."""
    parser.add_argument("--length", type=int, default=16384, help="byte tokens at least (default 16384)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--no-sdpa", action="store_true", help="do not time torch's SDPA")
    parser.add_argument("--output", type=Path, default=Path("flexref-demo"), help="folder for the pictures")


def run(options: argparse.Namespace) -> int:
    """0, or 1 if any error is over its budget."""
    if options.length < 1024 or options.heads < 1 or options.head_dim < 2 or options.head_dim % 2:
        print("demo: --length must be at least 1024, --heads at least 1, --head-dim even")
        return 2
    console = Console()
    documents = text.documents(options.length)
    packed = text.packed(documents, options.heads, options.head_dim)
    batch = text.batched(documents[:8], options.heads, options.head_dim)
    console.print(
        f"{len(documents)} documents of Python's language reference, {packed.query.shape[2]} byte tokens packed into "
        f"one sequence; {options.heads} heads of {options.head_dim}, float32, {torch.get_num_threads()} threads"
    )
    cases = make_cases(packed, batch)
    with _progress(console) as progress:
        task = progress.add_task("", total=3 * len(cases) + 1)

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        rows = [_measure(case, options, step) for case in cases]
        step("pictures")
        picture = pictures.draw(cases, options.output)
    console.print(_table(rows))
    console.print(picture)
    wrong = [row for row in rows if row.verdict.complaint]
    for row in wrong:
        console.print(f"[red]over budget[/red]: {row.case.name}: {escape(row.verdict.complaint)}")
    return 1 if wrong else 0


def _measure(case: Case, options: argparse.Namespace, step: Callable[[str], None]) -> Row:
    query, key, value, _ = case.inputs
    block_mask = None
    if case.mask_mod is not None:
        sizes = query.shape[0], None, query.shape[2], key.shape[2]
        block_mask = flexref.create_block_mask(case.mask_mod, *sizes, device="cpu")
    arguments: dict[str, Any] = {"score_mod": case.score_mod, "block_mask": block_mask, "backend": options.backend}

    step(f"{case.name}: flexref")
    flexref.flex_attention(query, key, value, **arguments)  # compiles
    seconds, out = _best(lambda: flexref.flex_attention(query, key, value, **arguments))
    step(f"{case.name}: SDPA")
    sdpa = "skipped" if options.no_sdpa else _time_sdpa(case)
    step(f"{case.name}: float64")
    name = flexref.explain(query, key, value, **arguments).choice.name or "none"
    return Row(case, name, _sparsity(block_mask), seconds, sdpa, judge(case, out))


def _best(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The faster of two calls, or the time of one where it takes seconds; the last result."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        out = call()
        took = time.perf_counter() - start
        best = min(best, took)
        if took > 1.5:
            break
    return best, out


def _time_sdpa(case: Case) -> float | str:
    if not case.additive:
        return "-"
    if sdpa_bytes(case) > 0.6 * _free_memory():
        return "no memory"
    query, key, value, _ = case.inputs
    mask = sdpa_mask(case)
    F.scaled_dot_product_attention(query[:, :, :64], key[:, :, :64], value[:, :, :64])
    return _best(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask))[0]


def _free_memory() -> float:
    """Bytes that may be taken; a cautious guess where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**31


def _sparsity(block_mask: flexref.BlockMask | None) -> float:
    """The share of blocks that are skipped, in percent."""
    return 0.0 if block_mask is None else float(block_mask.sparsity())


def _progress(console: Console) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True)


def _table(rows: list[Row]) -> Table:
    caption = (
        "ratio: SDPA's time over flexref's, a call or two of each; -: SDPA cannot express it. "
        "error: the worst on sampled rows, beside float64; budget: its share of what is allowed"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("variant")
    table.add_column("backend", no_wrap=True)
    for name in ("sparsity", "time", "SDPA", "ratio", "error", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sdpa = row.sdpa if isinstance(row.sdpa, str) else f"{row.sdpa * 1e3:.0f} ms"
        ratio = "" if isinstance(row.sdpa, str) else f"{row.sdpa / row.seconds:.2f}"
        table.add_row(
            row.case.name,
            row.backend,
            f"{row.sparsity:.1f} %",
            f"{row.seconds * 1e3:.0f} ms",
            sdpa,
            ratio,
            f"{row.verdict.error:.1e}",
            "[red]OVER[/red]" if row.verdict.complaint else f"{row.verdict.ratio:.0%}",
        )
    return table
