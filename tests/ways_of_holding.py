"""Ways in which Python code reaches a number: each makes a function without arguments that gives it, and one that changes it."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Way = tuple[Callable[[], float], Callable[[float], Any]]
WAYS: dict[str, Callable[[float], Way]] = {}


def way(make: Callable[[float], Way]) -> Callable[[float], Way]:
    WAYS[make.__name__] = make
    return make


class Held:
    def __init__(self, value):
        self.value = value


@way
def closure(value):
    def get():
        return value

    def change(v):
        nonlocal value
        value = v

    return get, change


@way
def function_attribute(value):
    def get():
        return get.value

    get.value = value
    return get, lambda v: setattr(get, "value", v)


@way
def attribute_of_a_helper(value):
    def helper():
        return helper.value

    helper.value = value
    return (lambda: helper()), lambda v: setattr(helper, "value", v)


@way
def default_argument(value):
    def get(x=None, y=[value]):  # noqa: B006
        return y[0]

    return get, lambda v: get.__defaults__[1].__setitem__(0, v)  # type: ignore[index]


@way
def keyword_default(value):
    def get(*, y=value):
        return y

    return get, lambda v: get.__kwdefaults__.update(y=v)  # type: ignore[union-attr]


GLOBAL = 0.0


@way
def a_global(value):
    globals()["GLOBAL"] = value
    return (lambda: GLOBAL), lambda v: globals().update(GLOBAL=v)


@way
def a_module_of_ones_own(value):
    module = types.ModuleType("settings_of_a_user")
    module.value = value  # type: ignore[attr-defined]
    return (lambda: module.value), lambda v: setattr(module, "value", v)


@way
def getattr_of_a_module(value):
    module = types.ModuleType("settings_of_a_user")
    module.value = value  # type: ignore[attr-defined]
    return (lambda: getattr(module, "value")), lambda v: setattr(module, "value", v)  # noqa: B009


@way
def a_lazy_module(value):
    module, state = types.ModuleType("lazy"), [value]
    module.__getattr__ = lambda name: state[0]  # type: ignore[method-assign]
    return (lambda: module.value), lambda v: state.__setitem__(0, v)


@way
def a_monkeypatched_torch(value):
    torch.a_number_of_ours = value  # type: ignore[attr-defined]
    return (lambda: torch.a_number_of_ours), lambda v: setattr(torch, "a_number_of_ours", v)  # type: ignore[attr-defined]


@way
def a_dict(value):
    d = {"value": value}
    return (lambda: d["value"]), lambda v: d.update(value=v)


@way
def a_bound_builtin(value):
    d = {"value": value}
    get = d.get
    return (lambda: get("value")), lambda v: d.update(value=v)


@way
def a_partial_of_a_bound_builtin(value):
    d = {"value": value}
    return functools.partial(d.get, "value"), lambda v: d.update(value=v)


@way
def a_list_pop(value):
    d = [value]
    get = d.__getitem__
    return (lambda: get(0)), lambda v: d.__setitem__(0, v)


@way
def a_deep_list(value):
    d: Any = [value]
    inner = d
    for _ in range(100):
        d = [d]

    def get():
        x = d
        while isinstance(x, list):
            x = x[0]
        return x

    return get, lambda v: inner.__setitem__(0, v)


@way
def a_long_list(value):
    d = [0.0] * 5000 + [value]
    return (lambda: d[-1]), lambda v: d.__setitem__(-1, v)


@way
def a_set(value):
    d = {value}
    return (lambda: next(iter(d))), lambda v: (d.clear(), d.add(v))


@way
def a_deque(value):
    d = collections.deque([value])
    return (lambda: d[0]), lambda v: d.__setitem__(0, v)


@way
def an_ordered_dict(value):
    d = collections.OrderedDict(value=value)
    return (lambda: d["value"]), lambda v: d.update(value=v)


@way
def a_default_dict(value):
    state = [value]
    d: Any = collections.defaultdict(lambda: state[0])
    return (lambda: d.default_factory()), lambda v: state.__setitem__(0, v)


@way
def a_user_dict(value):
    d = collections.UserDict(value=value)
    return (lambda: d["value"]), lambda v: d.update(value=v)


@way
def a_chain_map(value):
    under = {"value": value}
    d = collections.ChainMap({}, under)
    return (lambda: d["value"]), lambda v: under.update(value=v)


@way
def a_simple_namespace(value):
    d = types.SimpleNamespace(value=value)
    return (lambda: d.value), lambda v: setattr(d, "value", v)


@way
def a_mapping_proxy(value):
    under = {"value": value}
    d = types.MappingProxyType(under)
    return (lambda: d["value"]), lambda v: under.update(value=v)


@way
def the_environment(value):
    os.environ["A_NUMBER_OF_OURS"] = repr(value)
    return (lambda: float(os.environ["A_NUMBER_OF_OURS"])), lambda v: os.environ.update(A_NUMBER_OF_OURS=repr(v))


@way
def getenv(value):
    os.environ["A_NUMBER_OF_OURS"] = repr(value)
    return (lambda: float(os.getenv("A_NUMBER_OF_OURS", "0"))), lambda v: os.environ.update(A_NUMBER_OF_OURS=repr(v))


@way
def an_attrgetter(value):
    x, get = Held(value), operator.attrgetter("value")
    return (lambda: get(x)), lambda v: setattr(x, "value", v)


@way
def an_itemgetter(value):
    x, get = {"value": value}, operator.itemgetter("value")
    return (lambda: get(x)), lambda v: x.update(value=v)


@way
def another_getter(value):
    x, get = {"a": value, "b": value + 1}, [operator.itemgetter("a")]
    return (lambda: get[0](x)), lambda v: (x.update(b=v), get.__setitem__(0, operator.itemgetter("b")))


@way
def getattr_of_an_object(value):
    x, name = Held(value), "value"
    return (lambda: getattr(x, name)), lambda v: setattr(x, "value", v)


@way
def globals_by_name(value):
    globals()["GLOBAL"] = value
    return (lambda: globals()["GLOBAL"]), lambda v: globals().update(GLOBAL=v)


@way
def an_eval(value):
    globals()["GLOBAL"] = value
    return (lambda: eval("GLOBAL")), lambda v: globals().update(GLOBAL=v)


@way
def an_import(value):
    module = types.ModuleType("a_module_of_ours")
    module.value = value  # type: ignore[attr-defined]
    sys.modules["a_module_of_ours"] = module

    def get():
        import a_module_of_ours  # type: ignore[import-not-found]

        return a_module_of_ours.value

    return get, lambda v: setattr(module, "value", v)


@way
def globals_of_a_function(value):
    globals()["GLOBAL"] = value

    def helper():
        return 0

    return (lambda: helper.__globals__["GLOBAL"]), lambda v: globals().update(GLOBAL=v)


@way
def a_bound_method(value):
    class Has:
        def __init__(self):
            self.value = value

        def get(self):
            return self.value

    x = Has()
    return x.get, lambda v: setattr(x, "value", v)


@way
def a_class_attribute(value):
    class Has:
        kept = value

    return (lambda: Has.kept), lambda v: setattr(Has, "kept", v)


@way
def an_inherited_class_attribute(value):
    class Base:
        kept = value

    class Has(Base):
        pass

    x = Has()
    return (lambda: x.kept), lambda v: setattr(Base, "kept", v)


@way
def a_new_object_each_time(value):
    class Has:
        def __init__(self):
            self.kept = state[0]

    state = [value]
    return (lambda: Has().kept), lambda v: state.__setitem__(0, v)


@way
def type_of_an_object_called(value):
    class Has:
        def __init__(self):
            self.kept = state[0]

    state = [value]
    x = Has()
    return (lambda: type(x)().kept), lambda v: state.__setitem__(0, v)


@way
def class_of_an_object_called(value):
    class Has:
        def __init__(self):
            self.kept = state[0]

    state = [value]
    x = Has()
    return (lambda: x.__class__().kept), lambda v: state.__setitem__(0, v)


@way
def a_slot(value):
    class Has:
        __slots__ = ("value",)

    x = Has()
    x.value = value
    return (lambda: x.value), lambda v: setattr(x, "value", v)


@way
def a_descriptor(value):
    class Field:
        def __get__(self, instance, owner=None):
            return vars(self)["value"]

    class Has:
        kept = Field()

    field = vars(Has)["kept"]
    field.value = value
    x = Has()
    return (lambda: x.kept), lambda v: setattr(field, "value", v)


@way
def a_metaclass_property(value):
    class Meta(type):
        @property
        def kept(cls):
            return state[0]

    class Has(metaclass=Meta):
        pass

    state = [value]
    return (lambda: Has.kept), lambda v: state.__setitem__(0, v)


@way
def a_cached_property(value):
    class Has:
        @functools.cached_property
        def kept(self):
            return value

    x = Has()
    return (lambda: x.kept), lambda v: vars(x).update(kept=v)


@way
def a_lru_cache(value):
    state = [value]

    @functools.lru_cache
    def get():
        return state[0]

    return (lambda: get()), lambda v: (state.__setitem__(0, v), get.cache_clear())


@way
def a_named_tuple(value):
    class Pair(NamedTuple):
        first: float
        second: float

    state = [Pair(value, 0.0)]
    return (lambda: state[0].first), lambda v: state.__setitem__(0, Pair(v, 0.0))


@way
def a_dataclass(value):
    @dataclasses.dataclass
    class Config:
        value: float
        other: int = 3

    x = Config(value)
    return (lambda: x.value), lambda v: setattr(x, "value", v)


@way
def an_enum(value):
    class Choice(enum.Enum):
        FIRST = value
        SECOND = value + 1

    state = [Choice.FIRST]

    def change(v):
        object.__setattr__(Choice.SECOND, "_value_", v)
        state[0] = Choice.SECOND

    return (lambda: state[0].value), change


@way
def a_numpy_number(value):
    state = [np.float64(value)]
    return (lambda: float(state[0])), lambda v: state.__setitem__(0, np.float64(v))


@way
def a_numpy_array(value):
    x = np.array([value])
    return (lambda: float(x[0])), lambda v: x.__setitem__(0, v)


@way
def an_attribute_of_a_tensor(value):
    x = torch.zeros(3)
    x.value = value  # type: ignore[attr-defined]
    return (lambda: vars(x)["value"]), lambda v: setattr(x, "value", v)


@way
def an_nn_module(value):
    class Has(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = value

        def forward(self):
            return self.value

    x = Has()
    return (lambda: x()), lambda v: setattr(x, "value", v)


@way
def a_module_hook(value):
    class Has(torch.nn.Module):
        def forward(self):
            return 0.0

    x, state = Has(), [value]
    x.register_forward_hook(lambda module, args, out: state[0])
    return (lambda: x()), lambda v: state.__setitem__(0, v)


@way
def a_global_module_hook(value):
    class Has(torch.nn.Module):
        def forward(self):
            return 0.0

    x, state = Has(), [value]

    def get():
        hook = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: state[0])
        try:
            return x()
        finally:
            hook.remove()

    return get, lambda v: state.__setitem__(0, v)


@way
def a_module_list(value):
    class Has(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = value

    modules = torch.nn.ModuleList([Has()])
    return (lambda: modules[0].value), lambda v: setattr(modules[0], "value", v)


@way
def a_sequential(value):
    class Has(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = value

        def forward(self, x):
            return x + self.value

    modules = torch.nn.Sequential(Has())
    return (lambda: modules(0.0)), lambda v: setattr(modules[0], "value", v)


@way
def a_class_that_says_it_is_of_torchtitan(value):
    Config = type("Config", (Held,), {"__module__": "torchtitan.config"})
    x = Config(value)
    return (lambda: x.value), lambda v: setattr(x, "value", v)


@way
def a_class_that_says_it_is_of_torch(value):
    Config = type("Config", (Held,), {"__module__": "torch.nn"})
    x = Config(value)
    return (lambda: x.value), lambda v: setattr(x, "value", v)


@way
def a_function_wrapped_as_one_of_torch(value):
    state = [value]

    @functools.wraps(torch.nn.functional.softmax)
    def get():
        return state[0]

    return (lambda: get()), lambda v: state.__setitem__(0, v)


@way
def another_method_on_the_class(value):
    class Has:
        def get(self):
            return value

    x = Has()
    return (lambda: x.get()), lambda v: setattr(Has, "get", lambda self: v)


@way
def other_code(value):
    def get():
        return value

    def change(v):
        state = v

        def other():
            return state

        holder[0] = other

    holder = [get]
    return (lambda: holder[0]()), change


@way
def a_generator(value):
    state = [value]

    def numbers():
        while True:
            yield state[0]

    made = numbers()
    return (lambda: next(made)), lambda v: state.__setitem__(0, v)


SPECIAL: dict[str, tuple[dict, Callable[[Any], float]]] = {
    "get_item": ({"__getitem__": lambda self, i: self.value}, lambda x: x["any"]),
    "call": ({"__call__": lambda self: self.value}, lambda x: x()),
    "to_float": ({"__float__": lambda self: float(self.value)}, lambda x: float(x)),
    "index": ({"__index__": lambda self: int(self.value * 1000)}, lambda x: operator.index(x) / 1000),
    "length": ({"__len__": lambda self: int(abs(self.value * 1000))}, lambda x: len(x) / 1000),
    "iterate": ({"__iter__": lambda self: iter([self.value])}, lambda x: next(iter(x))),
    "truth": ({"__bool__": lambda self: self.value > 0.3}, lambda x: 0.7 if x else 0.2),
    "contains": ({"__contains__": lambda self, y: self.value > 0.3}, lambda x: 0.7 if 3 in x else 0.2),
    "equal": ({"__eq__": lambda self, y: self.value > 0.3, "__hash__": None}, lambda x: 0.7 if x == 3 else 0.2),
    "reflected": ({"__radd__": lambda self, y: y + self.value}, lambda x: 0.0 + x),
    "get_attr": ({"__getattr__": lambda self, name: self.value}, lambda x: x.anything),
    "get_attribute": ({"__getattribute__": lambda self, n: object.__getattribute__(self, "value")}, lambda x: x.anything),
    "a_property": ({"kept": property(lambda self: self.value)}, lambda x: x.kept),
    "a_static_method": ({"get": staticmethod(lambda x: x.value)}, lambda x: x.get(x)),
}


def special_way(methods: dict, read: Callable[[Any], float]) -> Callable[[float], Way]:
    """An object with an attribute and methods of its own."""

    def make(value: float) -> Way:
        x = type("Has", (Held,), dict(methods))(value)
        return (lambda: read(x)), (lambda v: object.__setattr__(x, "value", v))

    return make


WAYS |= {name: special_way(*how) for name, how in SPECIAL.items()}


@way
def a_dict_subclass(value):
    D = type("D", (dict,), {"__getitem__": lambda self, name: dict.__getitem__(self, name)})
    d = D(value=value)
    return (lambda: d["value"]), lambda v: d.update(value=v)


@way
def a_float_subclass(value):
    F = type("F", (float,), {})
    state = [F(value)]
    return (lambda: state[0] + 0.0), lambda v: state.__setitem__(0, F(v))


@way
def a_list_subclass(value):
    F = type("F", (list,), {})
    x = F([value])
    return (lambda: x[0]), lambda v: x.__setitem__(0, v)


@way
def an_attribute_map(value):
    class Config:
        def __init__(self, **values):
            object.__setattr__(self, "_values", values)

        def __getattr__(self, name):
            return object.__getattribute__(self, "_values")[name]

    x = Config(value=value)
    return (lambda: x.value), lambda v: x._values.update(value=v)


# what flexref is used with every day has to stay kept
KEPT = """closure function_attribute a_global a_module_of_ones_own a_dict a_bound_builtin a_partial_of_a_bound_builtin
a_bound_method a_class_attribute an_inherited_class_attribute a_slot a_named_tuple a_dataclass an_nn_module a_module_list
get_item call a_property a_simple_namespace a_user_dict an_attrgetter an_itemgetter default_argument keyword_default an_enum
a_set a_deque""".split()
