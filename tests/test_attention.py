"""The public function: torch's signature and meaning, wrong input in words, autocast, checkpoint, threads."""

from __future__ import annotations

import inspect
import pickle
import threading

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

import flexref
from flexref import AuxRequest, create_block_mask, explain, flex_attention
from flexref.errors import TraceError, Unsupported
from flexref.variants import score_mods


def qkv(batch=2, heads=4, length=40, kv_len=56, dim=16, kv_heads=None, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, length, dim, dtype=dtype, requires_grad=grad)
    key, value = (torch.randn(batch, kv_heads or heads, kv_len, dim, dtype=dtype, requires_grad=grad) for _ in range(2))
    return query, key, value


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def soft_cap(score, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh(score / 20.0)


@pytest.fixture
def torch_eager(monkeypatch):
    """torch's own flex_attention, run as plain operators."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return torch_flex.flex_attention


def test_the_signature_begins_with_torchs():
    theirs = list(inspect.signature(torch_flex.flex_attention).parameters.values())
    ours = list(inspect.signature(flex_attention).parameters.values())
    shared = {p.name: p for p in ours}
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert all(shared[p.name].default == p.default and shared[p.name].kind == p.kind for p in theirs)
    assert {p.name for p in ours} - {p.name for p in theirs} == {"mask_mod", "sink", "backend", "deterministic"}
    assert list(inspect.signature(explain).parameters) == [p.name for p in ours]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_changing_the_import_is_enough(torch_eager, kv_heads):
    query, key, value = qkv(kv_heads=kv_heads, dtype=torch.float64)
    their_mask = torch_flex.create_block_mask(causal, None, None, 40, 56, device="cpu")
    our_mask = create_block_mask(causal, None, None, 40, 56, device="cpu")
    arguments = {"score_mod": soft_cap, "scale": 0.3, "enable_gqa": True}
    aux = torch_flex.AuxRequest(lse=True)
    theirs, their_aux = torch_eager(query, key, value, block_mask=their_mask, return_aux=aux, **arguments)
    for mask in (their_mask, our_mask):
        ours, our_aux = flex_attention(query, key, value, block_mask=mask, return_aux=aux, **arguments)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_aux.lse, their_aux.lse)


def test_a_changed_block_mask_of_torchs_is_seen():
    query, key, value = qkv(length=40, kv_len=40)
    mask = torch_flex.create_block_mask(causal, None, None, 40, 40, device="cpu")
    first = flex_attention(query, key, value, block_mask=mask)
    assert torch.equal(first, flex_attention(query, key, value, block_mask=mask))
    mask.mask_mod = lambda b, h, q_idx, kv_idx: q_idx > kv_idx
    assert not torch.equal(first, flex_attention(query, key, value, block_mask=mask))


def test_max_scores_is_the_largest_score_of_each_row():
    query, key, value = qkv(dtype=torch.float64)
    _, aux = flex_attention(query, key, value, soft_cap, return_aux=AuxRequest(max_scores=True))
    scores = soft_cap(query @ key.mT / 4, 0, 0, 0, 0)
    torch.testing.assert_close(aux.max_scores, scores.amax(-1))
    assert aux.lse is None


def test_what_is_returned():
    query, key, value = qkv()
    out = flex_attention(query, key, value)
    both = flex_attention(query, key, value, return_lse=True)
    with_aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))
    assert isinstance(out, torch.Tensor) and torch.equal(both[0], out) and both[1].shape == (2, 4, 40)
    assert torch.equal(with_aux[1].lse, both[1]) and with_aux[1].max_scores is None
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_a_bare_mask_mod_is_its_block_mask():
    query, key, value = qkv()
    mask = create_block_mask(causal, None, None, 40, 56, device="cpu")
    assert torch.equal(
        flex_attention(query, key, value, mask_mod=causal), flex_attention(query, key, value, block_mask=mask)
    )


def test_a_bare_mask_mods_block_mask_is_built_once_and_again_when_what_it_reads_changes(monkeypatch):
    from flexref import arguments

    builds = []
    make = arguments.mask_of_call
    monkeypatch.setattr(arguments, "mask_of_call", lambda *a: builds.append(1) or make(*a))
    documents = torch.zeros(40, dtype=torch.long)
    query, key, value = qkv(length=40, kv_len=40)
    same_document = lambda b, h, q_idx, kv_idx: documents[q_idx] == documents[kv_idx]  # noqa: E731
    first = flex_attention(query, key, value, mask_mod=same_document)
    flex_attention(query, key, value, mask_mod=same_document)
    assert len(builds) == 1
    documents[20:] = 1
    second = flex_attention(query, key, value, mask_mod=same_document)
    assert len(builds) == 2 and not torch.equal(first, second)
    torch.testing.assert_close(second[:, :, 20:], flex_attention(query[:, :, 20:], key[:, :, 20:], value[:, :, 20:]))


def test_keys_of_lower_precision_than_the_query():
    query, key, value = qkv()
    low = flex_attention(query, key.bfloat16(), value.bfloat16())
    torch.testing.assert_close(low, flex_attention(query, key.bfloat16().float(), value.bfloat16().float()))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_stride_orders_follow_the_inputs(order):
    def laid_out(x):
        back = [order.index(i) for i in range(4)]
        return x.detach().permute(order).contiguous().permute(back).requires_grad_()

    query, key, value = (laid_out(x) for x in qkv())
    out = flex_attention(query, key, value)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    for x, like in ((out, query), *zip(gradients, (query, key, value), strict=True)):
        assert sorted(range(4), key=lambda i: -x.stride(i)) == sorted(range(4), key=lambda i: -like.stride(i))


def test_gradients_of_captured_tensors():
    query, key, value = qkv(grad=True)
    bias = torch.randn(4, 56, requires_grad=True)
    gain = torch.tensor(0.5, requires_grad=True)
    mod = lambda score, b, h, q_idx, kv_idx: score * gain + bias[h][kv_idx]  # noqa: E731
    ours = torch.autograd.grad(flex_attention(query, key, value, mod).square().sum(), (query, key, value, bias, gain))
    scores = (query @ key.mT) / 4 * gain + bias[None, :, None]
    theirs = torch.autograd.grad((scores.softmax(-1) @ value).square().sum(), (query, key, value, bias, gain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast():
    query, key, value = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flex_attention(query, key, value, score_mod=soft_cap, mask_mod=causal)
    assert out.dtype == torch.bfloat16
    again = flex_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), score_mod=soft_cap, mask_mod=causal)
    assert torch.equal(out, again)


def test_no_grad_and_checkpoint():
    query, key, value = qkv(grad=True)
    gain = torch.tensor(1.5, requires_grad=True)
    mod = lambda score, b, h, q_idx, kv_idx: score * gain  # noqa: E731

    def layer(q, k, v):
        return flex_attention(q, k, v, mod, mask_mod=causal)

    with torch.no_grad():
        assert not layer(query, key, value).requires_grad
    plain = torch.autograd.grad(layer(query, key, value).square().sum(), (query, key, value, gain))
    out = checkpoint(layer, query, key, value, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (query, key, value, gain)), plain, strict=True):
        assert torch.equal(a, b)


def test_several_threads_get_the_same_bits():
    query, key, value = qkv(length=130, kv_len=130)
    want = flex_attention(query, key, value, soft_cap, mask_mod=causal)
    got: list = [None] * 6

    def run(i):
        got[i] = flex_attention(query, key, value, soft_cap, mask_mod=causal)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(x, want) for x in got)


def test_double_backward_is_refused_in_words():
    query, key, value = qkv(grad=True)
    (gradient,) = torch.autograd.grad(flex_attention(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiated twice, and it has first derivatives only"):
        gradient.sum().backward()


def test_explain_names_every_backend_and_the_choice():
    query, key, value = qkv()
    explanation = explain(query, key, value, soft_cap, mask_mod=causal)
    text = str(explanation)
    for name in ("numba_cpu", "reference"):
        assert name in text
    assert explanation.choice.name == "numba_cpu" and "chosen" in text and "never chosen by itself" in text


def test_the_environment_names_a_backend(monkeypatch):
    query, key, value = qkv()
    monkeypatch.setenv("FLEXREF_BACKEND", "reference")
    assert explain(query, key, value).choice.name == "reference"
    assert explain(query, key, value, backend="numba_cpu").choice.name == "numba_cpu"
    monkeypatch.setenv("FLEXREF_BACKEND", "numba_cppu")
    with pytest.raises(ValueError, match="'numba_cppu' is unknown; did you mean 'numba_cpu'"):
        flex_attention(query, key, value)


q, k, v = qkv(1, 2, 8, 8, 4)
mask8 = create_block_mask(causal, None, None, 8, 8, device="cpu", BLOCK_SIZE=4)
two_numbers = torch.arange(2.0)
freed = torch.randn(1, 2, 8, 4)
freed.untyped_storage().resize_(0)
elsewhere = torch.tensor(1.0, device="meta")

WRONG = {
    "no_tensor": (lambda: flex_attention([1], k, v), TypeError, "query must be a torch.Tensor, got list"),
    "three_dimensions": (lambda: flex_attention(q[0], k, v), ValueError, "query must have 4 dimensions"),
    "integers": (
        lambda: flex_attention(q.long(), k.long(), v.long()),
        TypeError,
        "query must be float16.*got torch.int64",
    ),
    "complex": (lambda: flex_attention(q.to(torch.complex64), k, v), TypeError, "got torch.complex64"),
    "float8": (lambda: flex_attention(q.to(torch.float8_e4m3fn), k, v), TypeError, "got torch.float8_e4m3fn"),
    "sparse": (lambda: flex_attention(q.to_sparse(), k, v), TypeError, "query must be a dense tensor"),
    "higher_precision_key": (
        lambda: flex_attention(q, k.double(), v),
        TypeError,
        "key is torch.float64 but query is torch.float32",
    ),
    "other_half": (
        lambda: flex_attention(q.half(), k.bfloat16(), v.half()),
        TypeError,
        "key is torch.bfloat16 but query is torch.float16",
    ),
    "device": (lambda: flex_attention(q, k.to("meta"), v), ValueError, "key is on meta: it has a shape and no numbers"),
    "head_dim": (
        lambda: flex_attention(q, k[..., :3], v),
        ValueError,
        "same head_dim, got query 4 and key 3",
    ),
    "no_head_dim": (
        lambda: flex_attention(q[..., :0], k[..., :0], v),
        ValueError,
        "head_dim must be at least 1",
    ),
    "lengths": (
        lambda: flex_attention(q, k, v[:, :, :5]),
        ValueError,
        "key and value must agree in batch, heads and length",
    ),
    "key_value_heads": (
        lambda: flex_attention(q, k, v[:, :1], enable_gqa=True),
        ValueError,
        "key and value must agree",
    ),
    "batch": (
        lambda: flex_attention(q.expand(3, 2, 8, 4), k.expand(2, 2, 8, 4), v.expand(2, 2, 8, 4)),
        ValueError,
        "query's batch 3, or 1, got 2",
    ),
    "gqa_not_enabled": (lambda: flex_attention(q, k[:, :1], v[:, :1]), ValueError, "pass enable_gqa=True"),
    "gqa_no_multiple": (
        lambda: flex_attention(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1), enable_gqa=True),
        ValueError,
        "must be a multiple",
    ),
    "scale_nan": (
        lambda: flex_attention(q, k, v, scale=float("nan")),
        ValueError,
        "scale must be finite, got nan",
    ),
    "scale_tensor": (
        lambda: flex_attention(q, k, v, scale=torch.tensor(1.0)),
        TypeError,
        "scale must be a number or None, got Tensor",
    ),
    "short_mask": (
        lambda: flex_attention(torch.cat([q, q], 2), k, v, block_mask=mask8),
        ValueError,
        r"block_mask is for lengths \(query, key\) \(8, 8\), but query and key have \(16, 8\)",
    ),
    "long_mask": (
        lambda: flex_attention(q[:, :, :4], k, v, block_mask=mask8),
        ValueError,
        "Q_LEN=4, KV_LEN=8",
    ),
    "mask_heads": (
        lambda: flex_attention(q, k, v, block_mask=create_block_mask(causal, None, 3, 8, 8, device="cpu")),
        ValueError,
        "block_mask has H=3; it must be 1 or query's number of query heads 2",
    ),
    "mask_batch": (
        lambda: flex_attention(q, k, v, block_mask=create_block_mask(causal, 2, None, 8, 8, device="cpu")),
        ValueError,
        "block_mask has B=2",
    ),
    "function_as_mask": (
        lambda: flex_attention(q, k, v, block_mask=causal),
        TypeError,
        "got function; pass a function as mask_mod=",
    ),
    "both_masks": (
        lambda: flex_attention(q, k, v, block_mask=mask8, mask_mod=causal),
        ValueError,
        "pass one of the two",
    ),
    "arity": (
        lambda: flex_attention(q, k, v, score_mod=causal),
        TraceError,
        "score_mod must take 5 arguments",
    ),
    "mask_result": (
        lambda: flex_attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: q_idx * 1.0),
        TraceError,
        "must return a bool",
    ),
    "index": (
        lambda: flex_attention(q, k, v, lambda s, b, h, qi, ki: s + two_numbers[qi]),
        IndexError,
        "two_numbers.*[2-7].*test_attention.py",
    ),
    "freed_query": (lambda: flex_attention(freed, k, v), ValueError, "query has no memory for its shape"),
    "freed_capture": (
        lambda: flex_attention(q, k, v, lambda s, b, h, qi, ki: s + freed[b, h, qi, 0]),
        ValueError,
        "freed has no memory",
    ),
    "capture_elsewhere": (
        lambda: flex_attention(q, k, v, lambda s, b, h, qi, ki: s + elsewhere),
        ValueError,
        "elsewhere is on meta: it has a shape and no numbers",
    ),
    "scale_huge": (lambda: flex_attention(q, k, v, scale=10**400), ValueError, "scale must be finite"),
    "unknown_backend": (
        lambda: flex_attention(q, k, v, backend="tritn"),
        ValueError,
        "backend 'tritn' is unknown",
    ),
    "unknown_option": (
        lambda: flex_attention(q, k, v, kernel_options={"BLOKC_M": 64}),
        ValueError,
        "unknown option 'BLOKC_M'; did you mean 'BLOCK_M'",
    ),
    "both_returns": (
        lambda: flex_attention(q, k, v, return_lse=True, return_aux=AuxRequest(lse=True)),
        ValueError,
        "return_lse and return_aux",
    ),
    "aux_type": (
        lambda: flex_attention(q, k, v, return_aux=True),
        TypeError,
        "return_aux must be an AuxRequest",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_an_error_in_words(name):
    call, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        call()


def test_an_explicit_backend_that_cannot_raises_with_reasons():
    with pytest.raises(Unsupported, match="(?s)backend 'triton' cannot run this problem.*these can: numba_cpu, reference"):
        flex_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (1, 2, 0, 8), (1, 2, 8, 0), (1, 2, 0, 0)])
def test_nothing_to_attend(shape):
    batch, heads, length, kv_len = shape
    query, key, value = qkv(batch, heads, length, kv_len, 4, grad=True)
    out, lse = flex_attention(query, key, value, return_lse=True)
    assert out.shape == (batch, heads, length, 4) and not out.any()
    assert (lse == -float("inf")).all()
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(not g.any() and g.shape == x.shape for g, x in zip(gradients, (query, key, value), strict=True))


def test_the_variants_keep_their_meaning_through_pickle():
    query, key, value = qkv()
    mod = score_mods.alibi(4)
    assert torch.equal(
        flex_attention(query, key, value, pickle.loads(pickle.dumps(mod))),
        flex_attention(query, key, value, mod),
    )


def test_public_names():
    assert all(hasattr(flexref, name) for name in flexref.__all__)
    theirs = {
        "BlockMask",
        "flex_attention",
        "AuxOutput",
        "AuxRequest",
        "create_block_mask",
        "create_mask",
        "or_masks",
        "and_masks",
        "noop_mask",
    }
    assert theirs <= set(flexref.__all__)


class _Shares:
    """An array of another library: by DLPack, or not at all."""

    def __init__(self, tensor, error=None):
        self.tensor, self.error = tensor, error

    def __dlpack__(self, **how):
        if self.error:
            raise self.error
        return self.tensor.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_of_other_libraries_are_taken_as_they_lie():
    query, key, value = qkv()
    wanted = flex_attention(query, key, value)
    assert torch.equal(flex_attention(query.numpy(), key.numpy(), value.numpy()), wanted)
    assert torch.equal(flex_attention(_Shares(query), key, value), wanted)
    with pytest.raises(TypeError, match="key is a _Shares whose memory torch cannot share: not now; copy it"):
        flex_attention(query, _Shares(key, BufferError("not now")), value)
    with pytest.raises(TypeError, match="query must be a torch.Tensor, got list"):
        flex_attention([1.0], key, value)
