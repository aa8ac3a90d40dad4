"""Every kind of tensor that has no memory of its own, in every place where one can be handed in."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import timeit
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexref import BlockMask, create_block_mask, explain, flex_attention
from flexref.errors import TraceError
from flexref.tensor_gate import check_memory, check_surroundings

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (1, 2, 16, 8)


def random(*shape: int, **how) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **how)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


class Dispatching(Tensor):
    """A subclass with memory, whose operations may mean anything."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Harmless(Tensor):
    """As torchvision's tv_tensors: operations come by, memory is memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def zero(x: Tensor) -> Tensor:
    return vars(torch)["_efficientzerotensor"](x.shape, dtype=x.dtype)


def fake(x: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


def functional(x: Tensor) -> Tensor:
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(x)


def masked(x: Tensor) -> Tensor:
    from torch.masked import MaskedTensor

    return MaskedTensor(x.clone(), torch.ones_like(x, dtype=torch.bool))


def two(x: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(x, x)


def asynchronous(x: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(x)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shortened(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


def nested(x: Tensor, **how) -> Tensor:
    return torch.nested.nested_tensor(list(x), **how)


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


# how to make it of an ordinary tensor, and what the refusal says; for floats alone where torch has no integers of it
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zero": (zero, "a tensor of zeros that PyTorch has not written anywhere; pass x.clone()"),
    "meta": (lambda x: x.to("meta"), "is on meta: it has a shape and no numbers"),
    "fake": (fake, "is a FakeTensor, which has no memory of its own: it has a shape and no numbers"),
    "functional": (functional, "is a FunctionalTensor, .*call outside"),
    "masked": (masked, r"is a MaskedTensor, .*x.get_data\(\), and say with a mask_mod what x.get_mask\(\) says"),
    "two": (two, "is a TwoTensor, a tensor subclass with a __torch_dispatch__ of its own.*pass the plain tensor"),
    "dispatching": (lambda x: Tensor._make_subclass(Dispatching, x), "is a Dispatching, a tensor subclass"),
    "async": (asynchronous, r"is a AsyncCollectiveTensor, .*pass x.wait\(\)"),
    "freed": (freed, r"has no memory for its shape \(.*\): its storage was freed"),
    "shortened": (shortened, "has no memory for its shape"),
    "coo": (lambda x: x.to_sparse(), r"must be a dense tensor, got layout torch.sparse_coo; pass x.to_dense\(\)"),
    "csr": (lambda x: x[0, 0].to_sparse_csr(), "must be a dense tensor, got layout torch.sparse_csr"),
    "csc": (lambda x: x[0, 0].to_sparse_csc(), "must be a dense tensor, got layout torch.sparse_csc"),
    "bsr": (lambda x: x[0, 0].to_sparse_bsr((2, 2)), "must be a dense tensor, got layout torch.sparse_bsr"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "must be a dense tensor, got layout torch._mkldnn"),
    "nested": (nested, "is a nested tensor, but must be a dense tensor: pad it with torch.nested.to_padded_tensor"),
    "jagged": (
        lambda x: nested(x, layout=torch.jagged),
        "is a NestedTensor, .*: pad it with torch.nested|is a jagged nested tensor but .* is not; all three",
    ),
    "quantised": (quantised, r"is quantised \(torch.qint8\); pass x.dequantize\(\)"),
    "uninitialised": (lambda x: torch.nn.UninitializedParameter(), "is a UninitializedParameter, .*run it once"),
}
# what a mod cannot even index is refused while it is traced
UNREADABLE = {"quantised": "reads the captured tensor .* capture a dense tensor", "uninitialised": "uninitialized parameter"}
PLACES = ("query", "key", "value", "score_mod", "mask_mod")


def call_with(place: str, make: Callable[[Tensor], Tensor], run: Callable = flex_attention):
    """flex_attention with one tensor replaced by what `make` makes of it."""
    parts = {name: random(*SHAPE) for name in ("query", "key", "value")}
    if place in parts:
        return run(**parts | {place: make(parts[place])})
    if place == "score_mod":
        table = make(random(*SHAPE))
        return run(**parts, score_mod=lambda s, b, h, q_idx, kv_idx: s + table[(b, h, q_idx, kv_idx % 8)[-table.dim() :]])
    ids = make(random(*SHAPE))
    return run(**parts, mask_mod=lambda b, h, q_idx, kv_idx: ids[(b, h, q_idx, kv_idx % 8)[-ids.dim() :]] < 1)


@pytest.mark.parametrize("run", [flex_attention, explain])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_memory_is_refused_by_what_it_is(kind, place, run):
    make, says = KINDS[kind]
    captured = place.endswith("mod")
    if captured and kind in UNREADABLE:
        says = UNREADABLE[kind]
    with pytest.raises((TypeError, ValueError, TraceError, RuntimeError), match="(?s)" + says) as caught:
        call_with(place, make, run)
    assert captured or str(caught.value).startswith(place)
    if captured and kind not in UNREADABLE:
        assert f"it is read at {__file__}:" in str(caught.value)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("coo", "csr", "csc", "bsr", "nested", "jagged", "uninitialised")])
def test_block_lists_have_memory(kind):
    made = create_block_mask(causal, 1, 2, 16, 16, device="cpu", BLOCK_SIZE=8)
    make, says = KINDS[kind]
    counts = make(made.kv_num_blocks.clone())
    says = "is on meta but kv_indices on cpu" if kind == "meta" else says if counts.dtype == torch.int32 else ""
    with pytest.raises((TypeError, ValueError), match="(?s)kv_num_blocks.*" + says):
        BlockMask.from_kv_blocks(counts, made.kv_indices, BLOCK_SIZE=8, mask_mod=causal)


def test_lists_that_a_mask_hands_out_are_copies_that_may_lose_their_memory():
    mask = create_block_mask(causal, 1, 2, 16, 16, device="cpu", BLOCK_SIZE=8)
    query = random(*SHAPE)
    before = flex_attention(query, query, query, block_mask=mask)
    mask.csr.indices.untyped_storage().resize_(0)
    assert torch.equal(flex_attention(query, query, query, block_mask=mask), before)
    with pytest.raises(ValueError, match="block_mask is on meta but query is on cpu"):
        flex_attention(query, query, query, block_mask=create_block_mask(causal, 1, 2, 16, 16, device="cpu").to("meta"))


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "parameter": torch.nn.Parameter,
    "buffer": torch.nn.Buffer,
    "subclass": lambda x: x.as_subclass(Harmless),
    "made subclass": lambda x: Tensor._make_subclass(Harmless, x),
    "custom parameter": lambda x: type("Mine", (torch.nn.Parameter,), {})(x),
    "negative bit": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "imaginary part": lambda x: torch.complex(torch.zeros_like(x), x).imag,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda x: torch.cat([x, x])[1:],
    "expanded": lambda x: x[:, :, :1].contiguous().expand(x.shape) * 0 + x,
    "inference": lambda x: torch.inference_mode()(lambda: x.clone())(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_has_memory_is_taken(kind, place):
    make = HARMLESS[kind]
    with torch.no_grad():
        expected, got = call_with(place, lambda x: x), call_with(place, make)
    assert type(got) is Tensor and torch.equal(got, expected)


def test_a_harmless_subclass_gets_its_gradient():
    other, leaf = random(1, 2, 20, 8), random(*SHAPE).requires_grad_()
    twin = leaf.detach().clone().requires_grad_()
    table = random(2).as_subclass(Harmless).requires_grad_()
    plain_table = table.detach().as_subclass(Tensor).clone().requires_grad_()
    for x, t in ((leaf.as_subclass(Harmless), table), (twin, plain_table)):
        flex_attention(x, other, other, lambda s, b, h, i, j, t=t: s * t[h]).sum().backward()
    assert leaf.grad is not None and table.grad is not None and twin.grad is not None and plain_table.grad is not None
    assert torch.equal(leaf.grad, twin.grad) and torch.equal(table.grad.as_subclass(Tensor), plain_table.grad)


def transformed(name: str) -> Callable[[], object]:
    x, other = random(*SHAPE), random(*SHAPE)
    stack = torch.stack([x, x])
    return {
        "vmap": lambda: torch.vmap(lambda x: flex_attention(x, other, other))(stack),
        "vmap captured": lambda: torch.vmap(lambda t: flex_attention(x, x, x, lambda s, *_: s * t))(torch.ones(2)),
        "vmap beside": lambda: torch.vmap(lambda t: flex_attention(x, x, x).sum() * t)(torch.ones(2)),
        "grad": lambda: torch.func.grad(lambda x: flex_attention(x, other, other).sum())(x),
        "grad beside": lambda: torch.func.grad(lambda t: flex_attention(x, x, x).sum() * t)(torch.ones(())),
        "jvp": lambda: torch.func.jvp(lambda x: flex_attention(x, other, other), (x,), (x,)),
        "functionalize": lambda: torch.func.functionalize(lambda x: flex_attention(x, other, other))(x),
    }[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vmap", "inside torch.vmap; fold the dimension that is mapped over into the batch"),
        ("vmap captured", "inside torch.vmap"),
        ("vmap beside", "inside torch.vmap"),
        ("grad", r"inside torch.func.grad or vjp; use torch.autograd.grad or backward\(\) instead"),
        ("grad beside", "inside torch.func.grad"),
        ("jvp", "inside torch.func.jvp; it has no forward-mode derivative"),
        ("functionalize", "inside torch.func.functionalize; call it outside"),
    ],
)
def test_transforms_of_functions_are_refused(name, says):
    with pytest.raises(TypeError, match=says):
        transformed(name)()


def test_a_tensor_that_escaped_from_a_transform_is_refused():
    escaped: list[Tensor] = []
    torch.vmap(lambda x: escaped.append(x) or x)(torch.stack([random(*SHAPE)] * 2))
    with pytest.raises(TypeError, match="key is a tensor of torch.vmap; fold the dimension"):
        flex_attention(random(*SHAPE), escaped[0], random(*SHAPE))


def test_modes_that_make_tensors_without_memory_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x = random(*SHAPE)
    with FakeTensorMode(), pytest.raises(TypeError, match="cannot run inside FakeTensorMode: tensors made there have no memory"):
        flex_attention(x, x, x)
    with FlopCounterMode(display=False):
        assert torch.equal(flex_attention(x, x, x), flex_attention(x, x, x))
    for mode in (type("MyFakeTensorMode", (FakeTensorMode,), {}), MakesMeta):
        for call in (lambda: flex_attention(x, x, x), lambda: create_block_mask(causal, 1, 1, 16, 16, "cpu", 8)):
            with mode(), pytest.raises(TypeError, match=f"cannot run inside {mode.__name__}: tensors made there have no memory"):
                call()


class MakesMeta(TorchDispatchMode):
    """Somebody's mode that makes every new tensor one without memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.to("meta") if func is torch.ops.aten.empty.memory_format else result


def test_a_mask_on_meta_or_of_a_tensor_without_memory_is_refused_at_once():
    with pytest.raises(ValueError, match="device is meta, where the lists of a block mask would have no numbers"):
        create_block_mask(causal, 1, 1, 16, 16, device="meta")
    make, says = KINDS["masked"]
    table = make(torch.arange(4000.0))
    for length in (8, 4000):
        with pytest.raises(TypeError, match=f"the captured tensor table {says}"):
            create_block_mask(lambda b, h, q_idx, kv_idx: table[q_idx] >= kv_idx, 1, 1, length, length, device="cpu")


DISTRIBUTED = """
import torch, torch.distributed as dist, flexref
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
q = torch.randn(1, 2, 16, 8)
spread = distribute_tensor(q, mesh, [Shard(1)])
table = distribute_tensor(torch.randn(2), mesh, [Replicate()])
linear = fully_shard(torch.nn.Linear(2, 2), mesh=mesh)
weight = linear.weight

def refused(call):
    try:
        call()
    except TypeError as error:
        print(str(error).partition(":")[0])
        assert "x.full_tensor(), or x.to_local()" in str(error), error
    else:
        raise SystemExit("it ran")

refused(lambda: flexref.flex_attention(spread, spread, spread))
refused(lambda: flexref.flex_attention(q, spread, spread))
refused(lambda: flexref.flex_attention(q, q, q, lambda s, b, h, i, j: s + table[h]))
refused(lambda: flexref.flex_attention(q, q, q, lambda s, b, h, i, j: s + weight[h, h]))
refused(lambda: flexref.flex_attention(q, q, q, mask_mod=lambda b, h, i, j: table[h] < i))
local = flexref.flex_attention(*(spread.to_local() for _ in range(3)))
assert torch.equal(local, flexref.flex_attention(q, q, q))
dist.destroy_process_group()
"""


def test_distributed_tensors_and_sharded_parameters():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(DISTRIBUTED)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "query is a DTensor, which has no memory of its own",
        "key is a DTensor, which has no memory of its own",
        "the captured tensor table is a DTensor, which has no memory of its own",
        "the captured tensor weight is a DTensor, which has no memory of its own",
        "the captured tensor table is a DTensor, which has no memory of its own",
    ]


def test_the_gate_is_cheap():
    query, key, value = (random(*SHAPE) for _ in range(3))

    def gate():
        check_surroundings()
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_memory(name, x)

    # about 2 us; the bound is for a busy machine
    assert min(timeit.repeat(gate, number=500, repeat=9)) / 500 < 20e-6
