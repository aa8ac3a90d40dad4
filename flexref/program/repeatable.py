"""Which calls on captured tensors a recipe may repeat in a kept program: those of which everything but the numbers is in the key.

A size that depends on what a tensor holds (`t[t > 0]`, `t.unique()`) would become a constant of the program, so a function is
named here only if the shapes of its results follow from shapes and plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# what a tensor says of itself that is in a kept program's key, or follows from what is
_KEYED = frozenset(
    """size dim numel stride ndimension nelement __len__ is_floating_point is_complex is_contiguous element_size get_device
    shape dtype device ndim layout itemsize nbytes requires_grad is_leaf is_cpu is_cuda is_meta is_sparse is_nested
    is_quantized is_signed is_same_size is_tensor T mT H mH data real imag""".split()
)
_VIEWS = """view view_as reshape reshape_as flatten unflatten ravel permute transpose t adjoint swapaxes swapdims movedim moveaxis
squeeze unsqueeze expand expand_as broadcast_to broadcast_tensors narrow select unfold diagonal unbind chunk split
split_with_sizes hsplit vsplit dsplit detach contiguous clone view_as_real view_as_complex atleast_1d atleast_2d atleast_3d
to cpu cuda float double half bfloat16 long int short char byte bool type type_as"""
_POINTWISE = """abs absolute acos acosh add addcdiv addcmul and asin asinh atan atan2 arctan2 atanh bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad
digamma div divide elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide floordiv fmax fmin fmod frac frexp
gcd ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 invert isclose isfinite isinf
isnan isneginf isposinf lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2
logical_and logical_not logical_or logical_xor logit logsigmoid lshift lt masked_fill maximum minimum mish mod mul multiply
nan_to_num ne neg negative nextafter not_equal or pos positive pow rad2deg reciprocal relu relu6 remainder round rshift rsqrt
selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink
threshold true_divide truediv trunc xlogy xor"""
_REFLECTED = "radd rsub rmul rtruediv rdiv rfloordiv rmod rpow rand ror rxor rlshift rrshift rmatmul"
_OVER_DIMENSIONS = """sum mean prod amax amin aminmax argmax argmin max min softmax log_softmax softmin logsumexp cumsum cumprod
cummax cummin logcumsumexp norm vector_norm matrix_norm var std var_mean std_mean median nanmedian mode nansum nanmean all any
sort argsort msort topk kthvalue quantile nanquantile count_nonzero diff normalize layer_norm rms_norm group_norm
cosine_similarity matmul mm bmm mv dot inner outer ger vdot addmm addmv addbmm baddbmm linear bilinear einsum tensordot kron
cross linalg_norm linalg_vector_norm linalg_matrix_norm linalg_matmul glu"""
_BY_INDEX = """index_select gather take take_along_dim embedding scatter scatter_add scatter_reduce index_add index_copy
index_fill masked_scatter searchsorted bucketize"""
_OTHERS = """select_scatter slice_scatter diagonal_scatter cat concat concatenate stack hstack vstack dstack column_stack
row_stack repeat tile roll flip fliplr flipud rot90 tril triu diag diag_embed diagflat pad meshgrid block_diag cartesian_prod
ones_like zeros_like full_like new_zeros new_ones new_full new_tensor tensor as_tensor conv1d conv2d conv3d avg_pool1d
avg_pool2d max_pool1d max_pool2d interpolate pixel_shuffle pixel_unshuffle"""
STATIC = frozenset(f"{_VIEWS} {_POINTWISE} {_REFLECTED} {_OVER_DIMENSIONS} {_BY_INDEX} {_OTHERS}".split())
# these take no size and no dimension in which PyTorch would read a tensor of one integer as that integer
_OF_TENSORS_ALONE = frozenset(f"{_POINTWISE} {_REFLECTED} {_BY_INDEX} view_as reshape_as expand_as type_as to".split())
_PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout)
_PLAIN += (torch.memory_format, torch.Size, Tensor)


def why_not_asked(func: Callable) -> str | None:
    """Why what a tensor is asked for, by a method or an attribute that gives no tensor, may be another next time."""
    name = getattr(func, "__name__", "something")
    name = func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]
    return None if name in _KEYED else f"it asks a tensor for {name}"


def why_not_repeated(func: Callable, args: tuple, kwargs: dict, results: tuple | list) -> str | None:
    """Why a recipe must not repeat a call that gave `results`; None if it may."""
    name = getattr(func, "__name__", "a function")
    leaves = list(_leaves((args, tuple(kwargs.values()))))
    odd = [x for x in leaves if not isinstance(x, _PLAIN)]
    if odd:
        return f"it calls {name} with a {type(odd[0]).__name__}"
    if name == "__get__" or not any(isinstance(x, Tensor) for x in leaves):
        # an attribute is asked about by itself; without tensors nothing but the arguments matters
        return None
    if not all(isinstance(x, Tensor) for x in results):
        return why_not_asked(func)
    return None if _is_static(name, args, kwargs) else f"the shape of what {name} gives may depend on what its tensors hold"


def _is_static(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "__getitem__":
        return all(_is_static_index(x) for x in (args[1] if isinstance(args[1], tuple) else (args[1],)))
    if name == "where":
        return len(args) + len(kwargs) == 3
    if name in ("repeat_interleave", "tensor_split"):
        given = [*args[1:], *kwargs.values()]
        return bool(given) and type(given[0]) is int and not any(isinstance(x, Tensor) for x in _leaves(given))
    name = name.strip("_") if name.startswith("__") else name
    return name in STATIC and (name in _OF_TENSORS_ALONE or not any(map(_one_integer, _leaves((args[1:], *kwargs.values())))))


def _one_integer(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and not x.is_floating_point()


def _is_static_index(x: Any) -> bool:
    if isinstance(x, Tensor):
        # a mask picks as many as it holds
        return x.dtype not in (torch.bool, torch.uint8)
    if isinstance(x, slice):
        return not any(isinstance(part, Tensor) for part in (x.start, x.stop, x.step))
    if isinstance(x, list):
        return all(_is_static_index(item) for item in x)
    return isinstance(x, (int, type(None), type(Ellipsis)))


def _leaves(x: Any) -> Iterator[Any]:
    if type(x) in (tuple, list):
        for item in x:
            yield from _leaves(item)
    elif type(x) is slice:
        yield from (x.start, x.stop, x.step)
    else:
        yield x
