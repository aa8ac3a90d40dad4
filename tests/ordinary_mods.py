"""Score mods as they are written every day, which have to stay kept: by name, each a function of its own making."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import math
import types
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

table, slopes, ids = torch.rand(4, 8), torch.rand(4), torch.tensor([1, 0, 3, 2])
weight = torch.rand(8, 8, requires_grad=True)
one_row = torch.rand(1, 8)


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.zeros(4))
        self.inner = nn.Linear(2, 2)
        self.cap, self.kind = 3.0, "tanh"

    def forward(self, s, b, h, i, j):
        return self.cap * torch.tanh(s + self.weight[h] + self.shift[h]) if self.kind == "tanh" else s


@dataclasses.dataclass
class Config:
    cap: float = 2.0
    window: int = 3
    names: list = dataclasses.field(default_factory=list)

    def __call__(self, s, b, h, i, j):
        return s * self.cap + self.window


@dataclasses.dataclass(frozen=True)
class Frozen:
    cap: float = 2.0

    def __call__(self, s, b, h, i, j):
        return s * self.cap


class Plain:
    def __init__(self):
        self._cap, self.__shift = 2.0, 3.0

    def __repr__(self):
        return "Plain"

    def __call__(self, s, b, h, i, j):
        return s * self._cap + self.__shift

    @property
    def doubled(self):
        return self._cap * 2

    @staticmethod
    def same(x):
        return x

    @classmethod
    def of_class(cls, x):
        return x


class Child(Plain):
    def __init__(self):
        super().__init__()
        self.more = 2

    def __call__(self, s, b, h, i, j):
        return super().__call__(s, b, h, i, j) * self.same(self.more) * self.of_class(1) * self.doubled


class Abstract(abc.ABC):
    @abc.abstractmethod
    def scaled(self, x): ...


class Concrete(Abstract):
    def scaled(self, x):
        return x * 2


class OfType(Generic[TypeVar("T")]):
    value = 2.0


class Pair(NamedTuple):
    first: float = 1.0
    second: int = 2


class Choice(enum.Enum):
    FIRST = 1.5
    SECOND = 2


def scaled(x, *, by=2.0):
    return x * by


@functools.wraps(scaled)
def wrapped(*args, **kwargs):
    return scaled(*args, **kwargs)


def without_gradient(s, b, h, i, j):
    with torch.no_grad():
        doubled = slopes * 2
    assert doubled.shape[0] == 4, "one for each head"
    for k in range(3):
        s = s + doubled[h] * k
    return s


concrete, of_type, pair, choice, frozen, module = Concrete(), OfType(), Pair(), Choice.FIRST, Frozen(), Bias()
config: dict[str, Any] = {"cap": 2.0, "inner": {"weights": [1, 2.0]}, "name": "abc"}
space, several, rows, steps = types.SimpleNamespace(cap=2.0), (1, 2.0, "s", None), slice(0, 2), range(0, 3)
ordered, default, counted = collections.OrderedDict(a=1.0), collections.defaultdict(int, a=1), collections.Counter("aab")
user_dict, shown, number = collections.UserDict(a=2.0), types.MappingProxyType({"a": 2.0}), np.float32(2.0)
layers = nn.Sequential(nn.Tanh(), nn.Softplus())

MODS: dict[str, Callable] = {
    "module": module,
    "dataclass": Config(),
    "frozen dataclass": frozen,
    "object": Plain(),
    "object of a subclass": Child(),
    "bound method": Plain().__call__,
    "partial": functools.partial(lambda s, b, h, i, j, by: s * by, by=2.0),
    "without gradient": without_gradient,
}
READS: dict[str, Callable[[Any], Any]] = {
    "abstract class": lambda s: concrete.scaled(s),
    "generic class": lambda s: s * of_type.value,
    "named tuple": lambda s: s * pair.first + pair.second,
    "new named tuple": lambda s: s * Pair(2.0, 3).first,
    "enum": lambda s: s * choice.value if choice is Choice.FIRST else s,
    "dict": lambda s: s * config["cap"] + config["inner"]["weights"][1],
    "helper": lambda s: scaled(s, by=3.0),
    "wrapped helper": lambda s: wrapped(s),
    "namespace": lambda s: s * space.cap,
    "tuple": lambda s: s * several[1],
    "captured slice": lambda s: s + table[rows][0, 0],
    "range": lambda s: s + sum(x for x in steps),
    "ordered dict": lambda s: s + ordered["a"],
    "default dict": lambda s: s + default["a"],
    "counter": lambda s: s + counted["a"],
    "user dict": lambda s: s + user_dict["a"],
    "shown dict": lambda s: s + shown["a"],
    "number of numpy": lambda s: s * float(number),
    "modules of torch": lambda s: layers(s),
    "new dataclass": lambda s: Config(cap=3.0)(s, 0, 0, 0, 0),
    "new frozen dataclass": lambda s: Frozen(cap=3.0)(s, 0, 0, 0, 0),
    "new object": lambda s: Plain()(s, 0, 0, 0, 0),
    "functional": lambda s: F.softplus(s) + F.gelu(s) + F.relu(s) + torch.tanh(s) + s.sigmoid() + torch.clamp(s, min=0.0),
    "math": lambda s: s * math.sqrt(2) * math.pi,
    "finfo": lambda s: s * torch.finfo(torch.float32).eps,
    "infinity": lambda s: torch.where(s > 0, s, -torch.inf),
    "comprehension": lambda s: s + sum([x * 2 for x in (1, 2)]),
    "is it a tensor": lambda s: s if isinstance(s, torch.Tensor) and torch.is_tensor(s) else 0,
    "f string": lambda s: s * len(f"{config['cap']}"),
    "getattr": lambda s: s * getattr(frozen, "cap", 1.0),
    "likes": lambda s: torch.zeros_like(s) + torch.ones_like(s) * s,
}
MADE: dict[str, Callable[[], Any]] = {
    "transposed": lambda: table.T[0, 0],
    "viewed": lambda: table.view(-1)[0],
    "converted": lambda: table.half().float()[0, 0] + table.to(torch.float64)[0, 0],
    "to a device": lambda: table.to("cpu")[0, 0] + table.to(slopes.device)[0, 0],
    "summed": lambda: table.sum(1)[0] + table.amax(1)[0] + table.max(1).values[0] + table.std(1)[0],
    "indexed by a tensor": lambda: table[:, ids][0, 0] + table.index_select(0, ids)[0, 0],
    "sliced": lambda: table[1:3, ::2][0, 0] + table[..., 0][0] + table[None, :, 1][0, 0],
    "softmax": lambda: F.softmax(table, -1)[0, 0] + table.log_softmax(-1)[0, 0],
    "product": lambda: (table @ weight)[0, 0] + F.linear(table, weight)[0, 0] + torch.einsum("ij->ji", table)[0, 0],
    "joined": lambda: torch.cat([slopes, slopes])[0] + torch.stack((slopes, slopes))[0, 0] + table.repeat(2, 1)[0, 0],
    "split": lambda: table.chunk(2)[0][0, 0] + table.split(2)[0][0, 0] + table.unbind(0)[0][0],
    "moved": lambda: table.permute(1, 0)[0, 0] + table.roll(1, 0)[0, 0] + table.flip(0)[0, 0] + one_row.squeeze(0)[0],
    "padded": lambda: F.pad(table, (1, 1))[0, 0] + slopes.expand(3, 4)[0, 0] + table.flatten()[0],
    "elementwise": lambda: table.exp()[0, 0] + torch.where(table > 0, table, 0.0)[0, 0] + table.clamp(min=0)[0, 0],
    "normed": lambda: F.layer_norm(table, (8,))[0, 0] + F.normalize(table, dim=-1)[0, 0] + table.norm(dim=1)[0],
    "embedding": lambda: F.embedding(ids, weight)[0, 0] + torch.gather(table, 1, ids[None])[0, 0],
    "sorted": lambda: slopes.sort()[0][0] + slopes.cumsum(0)[0] + slopes.topk(2)[0][0],
    "detached": lambda: weight.detach()[0, 0] + weight.data[0, 0] + slopes.clone()[0] + table.tril()[0, 0],
    "sizes": lambda: table.shape[0] + table.size(1) + table.numel() + len(table) + table.dim() + table.stride(0),
    "constants": lambda: torch.arange(6)[0] + torch.ones(3)[0] + torch.tensor([1.0, 2.0])[1] + slopes.new_zeros(3)[0],
}


def reading(read: Callable[[Any], Any]) -> Callable:
    return lambda s, b, h, i, j: read(s)


def adding(make: Callable[[], Any]) -> Callable:
    return lambda s, b, h, i, j: s + make()


MODS |= {name: reading(read) for name, read in READS.items()} | {name: adding(make) for name, make in MADE.items()}
