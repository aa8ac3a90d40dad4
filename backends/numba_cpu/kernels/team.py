"""How a call runs on several threads and still hears of Ctrl-C, in LLVM instructions.

run(params) is called with Python's lock held and releases it. It starts OpenMP's team, each thread of which takes worker
numbers until there are none left and runs the driver for each. The thread that called, and only that one, looks every
1/20 second for signals that wait for Python: drivers call poll once a tile for that. Where a signal's handler raises, `stop` is
set, drivers leave, and the exception stays set, so that ctypes raises it once all threads have come back.
No Python runs between start and end but signal handlers, so there is no moment at which an exception could be lost.
"""
from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir

from flexref.backends.numba_cpu.kernels.layout import T_SIZE, P, T

_I64, _I32, _VOID = ir.IntType(64), ir.IntType(32), ir.VoidType()
_PLACE = _I64.as_pointer()
_TILE_FUNCTION = ir.FunctionType(_I32, [_PLACE, _PLACE, _I64, _I64])
# a clock is read every so many tiles, and signals are looked for every so many nanoseconds
_TICKS, _INTERVAL = 16, 50_000_000


def team_source() -> str:
    """The LLVM module of `run`; `poll`, for drivers, has the arguments of a tile function: places, params and tile."""
    module = ir.Module("team")
    module.triple = llvm.get_process_triple()
    poll = _poll(module)
    _run(module, poll, _team(module))
    return str(module)


class _Writer:
    """A function under construction that knows the table of the call."""

    def __init__(self, module: ir.Module, name: str, kind: ir.FunctionType, params: int):
        self.function = ir.Function(module, kind, name)
        self.ir = ir.IRBuilder(self.function.append_basic_block())
        self.params = self.function.args[params]

    def slot(self, field: int, table=None):
        table = self.params if table is None else table
        return self.ir.inttoptr(self.ir.add(table, _I64(8 * field)), _PLACE)

    def get(self, field: int, table=None):
        return self.ir.load(self.slot(field, table))

    def put(self, value, field: int, table=None):
        self.ir.store(value, self.slot(field, table))

    def call(self, field: int, result, *args):
        """Call the C function whose address stands in the table."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.ir.call(self.ir.inttoptr(self.get(field), kind.as_pointer()), args)

    def leave_unless(self, condition, result=None):
        """Return where `condition` does not hold; what is written next goes on where it does."""
        on, off = self.ir.append_basic_block(), self.ir.append_basic_block()
        self.ir.cbranch(condition, on, off)
        self.ir.position_at_end(off)
        self.ir.ret_void() if result is None else self.ir.ret(result)
        self.ir.position_at_end(on)


def _poll(module: ir.Module) -> ir.Function:
    w = _Writer(module, "poll", _TILE_FUNCTION, 2)
    tile = w.function.args[3]
    ticks = w.ir.add(w.get(T.ticks, tile), _I64(1))
    w.put(ticks, T.ticks, tile)
    w.leave_unless(w.ir.icmp_unsigned("==", w.ir.and_(ticks, _I64(_TICKS - 1)), _I64(0)), _I32(0))
    w.call(P.clock, _I32, w.ir.trunc(w.get(P.clock_kind), _I32), w.slot(T.seconds, tile))
    now = w.ir.add(w.ir.mul(w.get(T.seconds, tile), _I64(1_000_000_000)), w.get(T.nanoseconds, tile))
    last = w.get(T.last, tile)
    with w.ir.if_then(w.ir.icmp_signed("==", last, _I64(0))):
        w.put(now, T.last, tile)
    long = w.ir.icmp_signed(">=", w.ir.sub(now, w.get(T.last, tile)), _I64(_INTERVAL))
    w.leave_unless(long, _I32(0))
    w.put(now, T.last, tile)
    w.call(P.restore_thread, _VOID, w.get(P.thread_state))
    raised = w.call(P.check_signals, _I32)
    with w.ir.if_then(w.ir.icmp_signed("!=", raised, _I32(0))):
        w.put(_I64(1), P.stop)
    w.put(w.call(P.save_thread, _I64), P.thread_state)
    w.ir.ret(_I32(0))
    return w.function


def _team(module: ir.Module) -> ir.Function:
    """What each thread of the team runs: OpenMP gives it the address of the table."""
    w = _Writer(module, "team", ir.FunctionType(_VOID, [_I64]), 0)
    unused = w.ir.alloca(_I64)
    calls = w.ir.icmp_signed("==", w.call(P.thread_number, _I32), _I32(0))
    head, body, rest = (w.ir.append_basic_block() for _ in range(3))
    w.ir.branch(head)
    w.ir.position_at_end(head)
    worker = w.ir.atomic_rmw("add", w.slot(P.next_worker), _I64(1), "monotonic")
    w.ir.cbranch(w.ir.icmp_signed("<", worker, w.get(P.workers)), body, rest)
    w.ir.position_at_end(body)
    with w.ir.if_then(calls):
        w.put(worker, P.poller)
    driver = w.ir.inttoptr(w.get(P.driver), _TILE_FUNCTION.as_pointer())
    w.ir.call(driver, [unused, unused, w.params, worker])
    w.ir.branch(head)
    w.ir.position_at_end(rest)
    w.ir.atomic_rmw("add", w.slot(P.finished), _I64(1), "release")
    w.leave_unless(calls)
    _wait(w)
    return w.function


def _wait(w: _Writer) -> None:
    """The thread that called waits here, and not in OpenMP, for the others, who may be in the middle of a long task."""
    poll = w.function.module.get_global("poll")
    unused, tile = w.ir.alloca(_I64), w.ir.ptrtoint(w.ir.alloca(_I64, T_SIZE), _I64)
    for field in (T.ticks, T.last):
        w.put(_I64(0), field, tile)
    count = w.ir.sext(w.call(P.thread_count, _I32), _I64)
    head, body, done = (w.ir.append_basic_block() for _ in range(3))
    w.ir.branch(head)
    w.ir.position_at_end(head)
    finished = w.ir.load_atomic(w.slot(P.finished), "acquire", 8)
    w.ir.cbranch(w.ir.icmp_signed("<", finished, count), body, done)
    w.ir.position_at_end(body)
    w.call(P.pause, _I32)
    w.ir.call(poll, [unused, unused, w.params, tile])
    w.ir.branch(head)
    w.ir.position_at_end(done)
    w.ir.ret_void()


def _run(module: ir.Module, poll: ir.Function, team: ir.Function) -> None:
    w = _Writer(module, "run", ir.FunctionType(_VOID, [_I64]), 0)
    unused = w.ir.alloca(_I64)
    w.put(w.ir.ptrtoint(poll, _I64), P.poll)
    w.put(w.call(P.save_thread, _I64), P.thread_state)
    alone = w.ir.or_(
        w.ir.icmp_signed("==", w.get(P.workers), _I64(1)), w.ir.icmp_signed("==", w.get(P.parallel), _I64(0))
    )
    with w.ir.if_else(alone) as (one, several):
        with one:
            w.put(_I64(0), P.poller)
            driver = w.ir.inttoptr(w.get(P.driver), _TILE_FUNCTION.as_pointer())
            w.ir.call(driver, [unused, unused, w.params, _I64(0)])
        with several:
            count = w.ir.trunc(w.get(P.workers), _I32)
            w.call(P.parallel, _VOID, w.ir.ptrtoint(team, _I64), w.params, count, _I32(0))
    w.call(P.restore_thread, _VOID, w.get(P.thread_state))
    w.ir.ret_void()
