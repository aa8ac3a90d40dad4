"""A user's score_mod or mask_mod, called once, becomes a Graph.

The function runs on fake 0-d tensors: `if q_idx > kv_idx` raises instead of taking one branch for all. Reading
`captured[h, q_idx]` is intercepted and becomes a load; a captured 0-d tensor is a load without an index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexref.errors import TraceError
from flexref.interrupts import of_a_signal
from flexref.one_float import METADATA
from flexref.program import mistakes, own_backward, places
from flexref.program.builder import Builder, Ref, type_of
from flexref.program.closure import Leaves
from flexref.program.compiled import no_autocast, nothing_compiled
from flexref.program.interpret import dtype_of
from flexref.program.ir import INDICES, Graph
from flexref.program.lift import captured_numbers, lift
from flexref.program.mod_objects import signature_of
from flexref.program.partial import Partial
from flexref.program.recipes import Kitchen, Recipe, pick, roots_of
from flexref.program.tape import NotPointwise, Value, apply, flatten, map_leaves, plain_call, returned
from flexref.program.watch import Watch

SIGNATURES = {"score": ("score", *INDICES), "mask": INDICES}


class Traced(NamedTuple):
    """A program, the captured tensors its loads name by position, and the captured numbers its scalars name.

    `recipes`: how each captured tensor is made of `roots`, the tensors that the mod reaches. `why`: why it must not be kept.
    """

    graph: Graph
    captured: tuple[Tensor, ...]
    names: tuple[str, ...]
    scalars: tuple[int | float, ...]
    recipes: tuple[Recipe, ...] = ()
    roots: tuple[Tensor, ...] = ()
    why: str | None = None


def trace(fn: Callable, kind: str, acc_dtype: torch.dtype = torch.float32, leaves: Leaves | None = None) -> Traced:
    """The program of a mod; `kind` is "score" or "mask".

    Raises TraceError, with the mod's file and line, for what cannot become a pointwise program.
    `leaves`: the Python numbers that the mod captures; constants equal to them become run-time scalars.
    """
    check_arity(fn, kind)
    recorder = _Recorder(fn, kind, acc_dtype, Watch(leaves))
    builder = recorder.builder
    # the mod must not be recorded under the caller's autocast or inference settings
    with no_autocast(), torch.inference_mode(False), torch.enable_grad(), nothing_compiled():
        try:
            result = recorder.call()
            out = returned(builder, result, "float" if kind == "score" else "bool")
        except NotPointwise as mistake:
            raise mistakes.not_pointwise(fn, kind, mistake) from None
        except TraceError:
            raise
        except Exception as error:
            if of_a_signal(error):
                raise
            raise mistakes.failed(fn, kind, error) from error
    graph, scalars = lift(builder.graph({"out": out}), captured_numbers(leaves))
    recipes = tuple(map(recorder.kitchen.recipe, recorder.captured))
    why, roots = recorder.kitchen.why or recorder.watch.why, tuple(recorder.kitchen.roots)
    return Traced(graph, tuple(recorder.captured), tuple(recorder.names), scalars, recipes, roots, why)


def check_arity(fn: Callable, kind: str) -> None:
    """Raise TraceError unless `fn` can be called with the arguments of its kind."""
    if not callable(fn):
        raise TraceError(f"{kind}_mod must be a function, got {type(fn).__name__}")
    try:
        signature_of(fn).bind(*SIGNATURES[kind])
    except TypeError:
        raise mistakes.wrong_arity(fn, kind, SIGNATURES[kind]) from None
    except ValueError:
        return


# integers that no engine reads as they are
_READ_AS_INT64 = (torch.uint16, torch.uint32)


class _Recorder(TorchFunctionMode):
    """Stands between the mod and PyTorch while the mod runs."""

    def __init__(self, fn: Callable, kind: str, acc_dtype: torch.dtype, watch: Watch):
        super().__init__()
        self.fn, self.kind, self.acc_dtype, self.watch = fn, kind, acc_dtype, watch
        self.captured: list[Tensor] = []
        self.names: list[str] = []
        self.builder = Builder()
        self.kitchen = Kitchen(acc_dtype)
        self.widened: dict[int, Tensor] = {}
        self.aliased = False
        self.refusal: Exception | None = None

    def call(self):
        names = SIGNATURES[self.kind]
        dtypes = [self.acc_dtype if name == "score" else torch.int64 for name in names]
        refs = [Ref(self.builder.input(name)) for name in names]
        with self, own_backward.refused(self.applies), self.watch:
            result = self.fn(*(Value(self.builder, r, d) for r, d in zip(refs, dtypes, strict=True)))
        if self.refusal is not None:
            raise self.refusal
        return self.result(result)

    def refuse(self, error: Exception) -> Exception:
        """The error, remembered: a mod that catches it would go on with something else than PyTorch's answer."""
        self.refusal = self.refusal or error
        return error

    def result(self, result):
        """The mod's result, checked: a bool for a mask, a number for a score, one element."""
        if isinstance(result, Tensor) and self.is_captured(result) and result.dim() == 0:
            result = self.load(result, ())
        if isinstance(result, Partial):
            raise mistakes.partial(result)
        numbers = {bool: torch.bool, int: torch.int64, float: self.acc_dtype}
        dtype = result.dtype if isinstance(result, Tensor) else numbers.get(type(result))
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        wanted_bool = self.kind == "mask"
        if dtype is None or shape != () or (dtype == torch.bool) != wanted_bool or dtype.is_complex:
            raise mistakes.wrong_result(self.fn, self.kind, result)
        return result

    def applies(self) -> Exception:
        """What is wrong with a torch.autograd.Function."""
        return mistakes.own_backward(self.fn, self.kind)

    def is_captured(self, x: object) -> bool:
        return isinstance(x, Tensor) and not isinstance(x, Value)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        try:
            result = self.recorded(func, args, kwargs or {})
        except (TraceError, NotPointwise) as error:
            raise self.refuse(error) from None
        # what is computed under torch.no_grad() inside the mod has no derivative
        stopped = not torch.is_grad_enabled() and isinstance(result, Value) and result.dtype.is_floating_point
        return apply("detach", Tensor.detach, (result,), {}) if stopped else result

    def recorded(self, func, args: tuple, kwargs: dict):
        """The result of one call that the mod makes."""
        name = getattr(func, "__name__", "")
        own_backward.refuse_around(self.applies, _Recorder.call.__code__)
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.data:
            return self.recorded(Tensor.detach, args, kwargs)
        if name == "__getitem__" and self.is_captured(args[0]):
            return self.index(args[0], (), args[1])
        if isinstance(args[0] if args else None, Value) and (plain := mistakes.without_in_place(name)):
            return self.in_place(plain, args, kwargs)
        leaves = list(flatten((args, tuple(kwargs.values()))))
        of_tensors = not any(isinstance(x, (Value, Partial)) for x in leaves)
        mistakes.refuse(self.fn, self.kind, name, args, of_tensors)
        mistakes.refuse_state(self.fn, self.kind, func, args, kwargs)
        if of_tensors and (name == "__get__" or name in METADATA):
            self.kitchen.asked(func)
        if name in METADATA or name == "__set__":
            return func(*args, **kwargs)
        if name == "new_tensor":
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype), device="cpu")
        dims = [x.dim() for x in leaves if isinstance(x, Tensor)]
        if of_tensors and (name == "__get__" or 0 not in dims):
            result = self.kitchen.run(func, *args, **kwargs)
            if dims and (result is None or isinstance(result, (bool, int, float, complex))):
                # what a tensor holds, where it lies, what was done to it: a kept program would not see it change
                mistakes.refuse_number(self.fn, self.kind, func, name)
            return result
        if name == "__get__":
            return func(*args, **kwargs)
        args = map_leaves(args, self.element)
        kwargs = {k: map_leaves(v, self.element) for k, v in kwargs.items()}
        value = plain_call(func, args, kwargs)
        value = func(*args, **kwargs) if value is None else value
        first = args[0] if args else None
        if isinstance(first, Value) and isinstance(value, Value) and value is not first:
            # in PyTorch the two are one piece of memory
            self.aliased |= name == "detach" or value.ref.position == first.ref.position
        return value

    def in_place(self, name: str, args: tuple[Any, ...], kwargs: dict) -> Any:
        """`score += x`: the mod's own value becomes another, under every name that it has."""
        value: Any = self.recorded(getattr(Tensor, name), args, kwargs)
        if not torch.can_cast(value.dtype, args[0].dtype) or self.aliased:
            raise mistakes.in_place(self.fn, self.kind, name, value.dtype, args[0].dtype)
        args[0].ref = Ref(self.builder.cast(value.ref, type_of(args[0].dtype)))
        return args[0]

    def element(self, x):
        """A captured tensor used as a number: a load without an index, if it has no dimension."""
        if isinstance(x, Partial):
            raise mistakes.partial(x)
        if not self.is_captured(x):
            return x
        if x.dim() == 0:
            return self.load(x, ())
        raise mistakes.partial(Partial(self, x, ()))

    def index(self, tensor: Tensor, before: tuple, item):
        """`tensor[*before, item]`: a load when every dimension has its index."""
        items = item if isinstance(item, tuple) else (item,)
        if not before and not any(isinstance(x, Value) or isinstance(x, Tensor) and x.dim() == 0 for x in items):
            ints = all(type(x) is int for x in items)
            if not ints or len(items) < tensor.dim():
                return self.kitchen.run(Tensor.__getitem__, tensor, item)
        items = tuple(self.element(x) for x in items)
        mistakes.check_index(self.fn, self.kind, tensor, before, items, self.name(tensor))
        tensor, items = pick(self.kitchen, tensor, before, items)
        return self.load(tensor, items) if len(items) == tensor.dim() else Partial(self, tensor, items)

    def load(self, tensor: Tensor, items: tuple) -> Tensor:
        if tensor.dtype in _READ_AS_INT64:
            if id(tensor) not in self.widened:
                self.widened[id(tensor)] = self.kitchen.run(Tensor.to, tensor, torch.int64)
            tensor = self.widened[id(tensor)]
        place = next((i for i, known in enumerate(self.captured) if known is tensor), len(self.captured))
        if place == len(self.captured):
            mistakes.check_captured(self.fn, self.kind, tensor, self.name(tensor))
            self.captured.append(tensor)
            self.names.append(self.name(tensor))
        type = type_of(tensor.dtype)
        indices = tuple(returned(self.builder, x, "int") for x in items)
        ref = Ref(self.builder.node("load", indices, type, place, places.user_line(self.fn)))
        # an int keeps its dtype, so that arithmetic in one that wraps is refused
        dtype = tensor.dtype if type == "int" else dtype_of(type, self.acc_dtype)
        return Value(self.builder, ref, dtype)

    def name(self, tensor: Tensor) -> str:
        found = places.name_of(tensor, self.fn)
        if found != places.NAMELESS or id(tensor) not in self.kitchen.made:
            return found
        used = [self.kitchen.roots[place] for place in sorted(roots_of(self.kitchen.made[id(tensor)][1]))]
        return f"made of {' and '.join(self.name(x) for x in used)}" if used else "made inside the mod"
