"""More ways in which a mod reaches a number, by kind: what a tensor holds or says of itself, methods that Python calls, keys."""

from __future__ import annotations

import abc
import builtins
import collections
import copy
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.ways_of_holding import WAYS, Way, way

COUNT = 8


def first_ones(value: float) -> torch.Tensor:
    """As many ones as `value` says of COUNT."""
    return (torch.arange(COUNT) < int(value * COUNT)).long()


# sizes and texts that say how many ones there are, of a tensor of COUNT numbers
SIZES: dict[str, Callable[[torch.Tensor], Any]] = {
    "unique": lambda t: (t * torch.arange(COUNT)).unique().numel(),
    "unique_consecutive": lambda t: torch.unique_consecutive(t * torch.arange(COUNT)).shape[0],
    "counts": lambda t: torch.unique(t * torch.arange(COUNT), return_counts=True)[1].size(0),
    "mask": lambda t: len(t[t > 0]),
    "mask_in_a_tuple": lambda t: t[None][:, t > 0].shape[1],
    "mask_after_work": lambda t: (t[t > 0] * 2 + 1).view(1, -1).T.size(0),
    "masked_select": lambda t: t.masked_select(t > 0).shape[0],
    "argwhere": lambda t: torch.argwhere(t).shape[0],
    "where": lambda t: torch.where(t)[0].shape[0],
    "bincount": lambda t: torch.bincount(t * torch.arange(COUNT)).shape[0],
    "one_hot": lambda t: torch.nn.functional.one_hot(t * torch.arange(COUNT)).shape[1],
    "repeat_interleave": lambda t: t.repeat_interleave(t).shape[0],
    "iterate": lambda t: sum(1 for _ in t[t > 0]),
    "squeeze": lambda t: t[t > 0].squeeze().dim() * COUNT,
    "tensor_split": lambda t: torch.tensor_split(t, t.sum(0, keepdim=True))[0].shape[0],
    "combinations": lambda t: torch.combinations(t[t > 0]).shape[0],
    "text": lambda t: sum(c == "1" for c in str(t)),
    "repr": lambda t: repr(t).count("1"),
    "f_string": lambda t: f"{t}".count("1"),
    "percent": lambda t: ("%s" % t).count("1"),  # noqa: UP031
    "format": lambda t: "{}".format(t).count("1"),  # noqa: UP032
}


def size_way(read: Callable[[torch.Tensor], Any]) -> Callable[[float], Way]:
    def make(value: float) -> Way:
        t = first_ones(value)
        return (lambda: read(t) / COUNT), lambda v: t.copy_(first_ones(v))

    return make


WAYS |= {f"size_by_{name}": size_way(read) for name, read in SIZES.items()}


@way
def a_start_in_a_slice(value):
    table, start = torch.arange(COUNT + 1) / COUNT, torch.tensor(int(value * COUNT))
    return (lambda: table[start:][0]), lambda v: start.fill_(int(v * COUNT))


@way
def a_stop_in_a_slice_of_a_slice(value):
    table, stop = torch.ones(2, COUNT), torch.tensor(int(value * COUNT))
    return (lambda: table[1, :stop].shape[0] / COUNT), lambda v: stop.fill_(int(v * COUNT))


@way
def tensors_in_a_named_tuple(value):
    Pair = collections.namedtuple("Pair", "first second")
    held = [torch.full((2,), value), torch.full((2,), value)]
    return (lambda: torch.stack(Pair(*held))[0, 0]), lambda v: held.__setitem__(slice(None), [torch.full((2,), v)] * 2)


@way
def a_storage_offset(value):
    table = torch.zeros(COUNT + 1)
    state = [table[int(value * COUNT) :][:1]]
    return (lambda: state[0].storage_offset() / COUNT), lambda v: state.__setitem__(0, table[int(v * COUNT) :][:1])


@way
def what_autograd_says(value):
    leaf = torch.ones(2, requires_grad=True)
    state = [leaf * value]

    def change(v):
        state[0] = leaf * v if v < 0.5 else leaf + v

    return (lambda: float("Add" in str(state[0].grad_fn))), change


# methods that Python calls by itself, in an object that is reached as an object: each closes over the number
@way
def super_class_called(value):
    state = [value]

    class Has:
        def __init__(self):
            self.kept = state[0]

        def make(self):
            return __class__().kept  # type: ignore[name-defined]  # noqa: F821

    x = Has()
    return (lambda: x.make()), lambda v: state.__setitem__(0, v)


@way
def a_class_made_new(value):
    state = [value]

    class Has:
        def __new__(cls):
            made: Any = object.__new__(cls)
            made.kept = state[0]
            return made

    x: Any = Has()
    return (lambda: type(x)().kept), lambda v: state.__setitem__(0, v)


@way
def a_default_factory(value):
    state = [value]

    @dataclasses.dataclass
    class Config:
        kept: float = dataclasses.field(default_factory=lambda: state[0])

    x = Config()
    return (lambda: type(x)().kept), lambda v: state.__setitem__(0, v)


@way
def a_default_factory_of_a_class(value):
    state = [value]

    @dataclasses.dataclass
    class Config:
        kept: float = dataclasses.field(default_factory=lambda: state[0])

    return (lambda: Config().kept), lambda v: state.__setitem__(0, v)


@way
def after_init(value):
    state = [value]

    @dataclasses.dataclass
    class Config:
        kept: float = 0.0

        def __post_init__(self):
            self.kept = state[0]

    x = Config()
    return (lambda: dataclasses.replace(x).kept), lambda v: state.__setitem__(0, v)


@way
def field_metadata(value):
    @dataclasses.dataclass
    class Config:
        kept: float = dataclasses.field(default=0.0, metadata={"of": [value]})

    x, of = Config(), dataclasses.fields(Config)[0].metadata["of"]
    return (lambda: dataclasses.fields(x)[0].metadata["of"][0]), lambda v: of.__setitem__(0, v)


@way
def a_method_from_a_string(value):
    scope: dict[str, Any] = {"state": [value]}
    exec("def get(self):\n    return state[0]", scope)

    @dataclasses.dataclass
    class Config:
        get = scope["get"]

    x = Config()
    return (lambda: x.get()), lambda v: scope["state"].__setitem__(0, v)


@way
def equality_of_a_dataclass(value):
    @dataclasses.dataclass
    class Config:
        kept: Any

    class Compared:
        def __eq__(self, other):
            return state[0] > 0.5

    state = [value]
    x, y = Config(Compared()), Config(Compared())
    return (lambda: float(x == y)), lambda v: state.__setitem__(0, v)


TEXTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "str": ("__str__", lambda x: str(x)),
    "repr": ("__repr__", lambda x: repr(x)),
    "f_string": ("__format__", lambda x: f"{x}"),
    "percent": ("__str__", lambda x: "%s" % x),  # noqa: UP031
    "format": ("__format__", lambda x: "{}".format(x)),  # noqa: UP032
    "inside_a_list": ("__repr__", lambda x: str([x])[1:-1]),
}


def text_way(method: str, read: Callable[[Any], str]) -> Callable[[float], Way]:
    def make(value: float) -> Way:
        state = [value]
        x = type("Has", (), {method: lambda self, spec="": str(state[0])})()
        return (lambda: float(read(x))), lambda v: state.__setitem__(0, v)

    return make


WAYS |= {f"text_by_{name}": text_way(*how) for name, how in TEXTS.items()}


@way
def a_text_set_on_the_class_later(value):
    class Has:
        pass

    def change(v):
        Has.__str__ = lambda self: "x" * int(v * COUNT)  # type: ignore[method-assign]

    x = Has()
    change(value)
    return (lambda: len(str(x)) / COUNT), change


@way
def a_method_caller_with_keywords(value):
    class Has:
        def get(self, kept=0.0):
            return kept

    x, state = Has(), [operator.methodcaller("get", kept=value)]
    return (lambda: state[0](x)), lambda v: state.__setitem__(0, operator.methodcaller("get", kept=v))


@way
def a_class_item(value):
    state = [value]

    class Has:
        def __class_getitem__(cls, item):
            return state[0]

    x = Has()
    return (lambda: type(x)[0]), lambda v: state.__setitem__(0, v)


@way
def a_class_item_of_a_class(value):
    state = [value]

    class Has:
        def __class_getitem__(cls, item):
            return state[0]

    return (lambda: Has[0]), lambda v: state.__setitem__(0, v)


@way
def a_registered_class(value):
    Sized: Any = abc.ABCMeta("Sized", (), {})

    class Has:
        pass

    def change(v):
        # for good: a mask that is asked afterwards is True both times
        if v > 0.5:
            Sized.register(Has)

    x = Has()
    change(value)
    return (lambda: 0.75 if isinstance(x, Sized) else 0.25), change


@way
def match_arguments(value):
    class Has:
        __match_args__ = ("first",)
        first, second = 0.25, 0.75

    def get():
        match x:
            case Has(y):
                return y

    x = Has()

    def change(v):
        setattr(Has, "__match_args__", ("first",) if v < 0.5 else ("second",))  # noqa: B010

    change(value)
    return get, change


@way
def a_state_to_copy(value):
    state = [value]

    class Has:
        def __getstate__(self):
            return {"kept": state[0]}

    x: Any = Has()
    return (lambda: copy.copy(x).kept), lambda v: state.__setitem__(0, v)


# keys that compare equal though what they stand for differs
CHANGING: dict[str, tuple[Callable[[float], Any], Callable[[Any], float]]] = {
    "range": (lambda v: range(0, 3 if v < 0.5 else 4, 2), lambda x: x.stop / COUNT),
    "slice": (lambda v: slice(0, v), lambda x: x.stop),
    "deque_length": (lambda v: collections.deque([1], maxlen=int(v * COUNT)), lambda x: x.maxlen / COUNT),
    "time": (lambda v: np.timedelta64(1, "s" if v < 0.5 else "m"), lambda x: x / np.timedelta64(80, "s")),
    "zero": (lambda v: -0.0 if v < 0.5 else 0.0, lambda x: float(str(x) == "0.0")),
    "bool": (lambda v: 1 if v < 0.5 else True, lambda x: float(isinstance(x, bool))),
    "integer": (lambda v: 1 if v < 0.5 else 1.0, lambda x: float(isinstance(x, int))),
    "complex": (lambda v: complex(0.0, -0.0) if v < 0.5 else 0j, lambda x: float(str(x) == "0j")),
    "nan": (lambda v: float("nan") if v < 0.5 else 1.0, lambda x: float(x == x)),
    "frozen_set": (lambda v: frozenset([0, 8] if v < 0.5 else [8, 0]), lambda x: next(iter(x))),
    "ordered": (
        lambda v: collections.OrderedDict([("a", 0.25), ("b", 0.75)] if v < 0.5 else [("b", 0.75), ("a", 0.25)]),
        lambda x: next(iter(x.values())),
    ),
    "ufunc": (lambda v: np.frompyfunc(lambda y: v, 1, 1), lambda x: float(x(0))),
    "string_of_ones_own": (lambda v: type("S", (str,), {"kept": v})("a"), lambda x: x.kept),
    "tuple_in_a_partial": (lambda v: functools.partial(max, (0, v)), lambda x: x(default=0)),
}


def changing_way(make_one: Callable[[float], Any], read: Callable[[Any], float]) -> Callable[[float], Way]:
    def make(value: float) -> Way:
        state = [make_one(value)]
        return (lambda: read(state[0])), lambda v: state.__setitem__(0, make_one(v))

    return make


WAYS |= {f"key_of_{name}": changing_way(*how) for name, how in CHANGING.items()}


@way
def an_attribute_of_an_ordered_dict(value):
    d: Any = collections.OrderedDict()
    d.kept = value
    return (lambda: d.kept), lambda v: setattr(d, "kept", v)


@way
def a_moved_item(value):
    class D(collections.OrderedDict):
        pass

    d = D(a=0.25, b=0.75)
    return (lambda: next(iter(d.values()))), lambda v: d.move_to_end("a" if v < 0.5 else "b", last=False)


@way
def a_deque_of_ones_own(value):
    class D(collections.deque):
        pass

    d = D([value])
    return (lambda: d[0]), lambda v: d.__setitem__(0, v)


@way
def a_default_dict_of_ones_own(value):
    class D(collections.defaultdict):
        pass

    state = [value]
    d = D(lambda: state[0])
    return (lambda: d.default_factory()), lambda v: state.__setitem__(0, v)  # type: ignore[misc]


@way
def what_a_shown_dict_lacks(value):
    class D(dict):
        def __missing__(self, name):
            return state[0]

    state = [value]
    shown = types.MappingProxyType(D())
    return (lambda: shown["any"]), lambda v: state.__setitem__(0, v)


GLOBAL = 0.0
LEADS = {
    "getattr": lambda f, name: getattr(f, name)["GLOBAL"],
    "attrgetter": lambda f, name: operator.attrgetter(name)(f)["GLOBAL"],
    "methodcaller": lambda f, name: operator.methodcaller("__getattribute__", name)(f)["GLOBAL"],
    "format": lambda f, name: float(("{0." + name + "[GLOBAL]}").format(f)),
    "in_pieces": lambda f, name: getattr(f, "_" * 2 + "globals" + "_" * 2)["GLOBAL"],
}


def lead_way(read: Callable[[Any, str], float]) -> Callable[[float], Way]:
    def make(value: float) -> Way:
        globals()["GLOBAL"] = value
        name = "__globals__"

        def helper():
            return 0

        return (lambda: read(helper, name)), lambda v: globals().update(GLOBAL=v)

    return make


WAYS |= {f"globals_by_{name}": lead_way(read) for name, read in LEADS.items()}


@way
def builtins_of_ones_own(value):
    own = {**vars(builtins), "kept": value}
    scope: dict[str, Any] = {"__builtins__": own}
    exec("def get():\n    return kept", scope)
    get = scope["get"]
    return (lambda: get()), lambda v: own.update(kept=v)


@way
def globals_with_a_default(value):
    class Scope(dict):
        def __missing__(self, name):
            return state[0] if name == "kept" else vars(builtins)[name]

    state, scope = [value], Scope()
    exec("def get():\n    return kept", scope)
    get = dict.__getitem__(scope, "get")
    return (lambda: get()), lambda v: state.__setitem__(0, v)


@way
def globals_that_say_they_are_of_torch(value):
    scope: dict[str, Any] = {"__name__": "torch.nn.functional", "state": [value]}
    exec("def get():\n    return state[0]", scope)
    get = scope["get"]
    return (lambda: get()), lambda v: scope["state"].__setitem__(0, v)


@way
def a_dict_property(value):
    class Has:
        __slots__ = ("values",)
        __dict__ = property(lambda self: {"kept": state[0]})  # type: ignore[assignment]

    state, x = [value], Has()
    return (lambda: x.__dict__["kept"]), lambda v: state.__setitem__(0, v)


def named(value: float) -> str:
    return "Z" * int(value * COUNT)


@way
def the_name_of_a_function(value):
    def helper():
        return 0

    helper.__qualname__ = named(value)
    return (lambda: str(helper).count("Z") / COUNT), lambda v: setattr(helper, "__qualname__", named(v))


@way
def the_name_of_a_class(value):
    Has = type(named(value), (), {})
    x = Has()
    return (lambda: torch.typename(x).count("Z") / COUNT), lambda v: setattr(Has, "__name__", named(v)) or setattr(
        Has, "__qualname__", named(v)
    )


@way
def an_attribute_of_a_static_method(value):
    class Has:
        @staticmethod
        def get():
            return 0

    held = vars(Has)["get"]
    held.kept = value
    return (lambda: Has.__dict__["get"].kept), lambda v: setattr(held, "kept", v)


@way
def a_setter(value):
    class Has:
        @property
        def kept(self):
            return vars(self).get("set", 0.0)

        @kept.setter
        def kept(self, y):
            vars(self)["set"] = state[0]

    state, x = [value], Has()

    def get():
        x.kept = 3
        return x.kept

    return get, lambda v: state.__setitem__(0, v)


@way
def one_that_counts(value):
    class Has:
        calls = 0

        def get(self):
            self.calls = 1 - self.calls
            return kept[0] * self.calls

    kept, x = [value], Has()

    def get():
        now = x.get()
        x.calls = 0
        return now

    return get, lambda v: kept.__setitem__(0, v)


@way
def a_generic_class(value):
    state = [value]

    class Has(typing.Generic[typing.TypeVar("T")]):  # noqa: UP046
        @property
        def kept(self):
            return state[0]

    x = Has()
    return (lambda: x.kept), lambda v: state.__setitem__(0, v)
