"""A small sound backend, or the same with one fault of mutants.py planted in it.

Attention by tiles of 16 keys with an online softmax, in plain PyTorch: the shape that every fused kernel has, so that
the faults of fused kernels can be planted. The masks and mods are the user's own functions, called on flat indices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from flexref.problem import Gradients, Output, Problem, Tensors
from flexref.reference import at_each_position

TILE = 16


class Tiled:
    """The backend; `fault` is a name in mutants.FAULTS, or empty."""

    rank = -1
    options: dict[str, str] = {}

    def __init__(self, fault: str = ""):
        self.fault = fault
        self.name = "tiled" + (f" ({fault})" if fault else "")

    def __repr__(self) -> str:
        return self.name

    def unavailable(self) -> list[str]:
        return []

    def unsupported(self, problem: Problem) -> list[str]:
        return []

    def forward(self, problem: Problem, tensors: Tensors) -> Output:
        sweep = _Sweep(self.fault, problem, tensors)
        shape, acc = sweep.shape, problem.acc_dtype
        row_max = torch.full(shape[:3], -torch.inf, dtype=acc)
        old_max, top, row_sum = row_max, row_max, torch.zeros_like(row_max)
        out = torch.zeros(*shape[:3], problem.value_dim, dtype=acc)
        for tile in sweep.tiles():
            score, post, allowed = sweep.scores(tile)
            old_max, row_max = row_max, torch.maximum(row_max, post.amax(-1))
            top = torch.maximum(top, torch.where(allowed, score, -torch.inf).amax(-1))
            base = torch.where(row_max == -torch.inf, 0.0, row_max)
            rescale = torch.exp(old_max - base)
            weight = torch.exp(post - base[..., None])
            row_sum = row_sum * rescale + weight.sum(-1)
            if self.fault != "missing rescale":
                out = out * rescale[..., None]
            out = out + sweep.weighted(weight, allowed, tile, sweep.value)
            if self.fault == "accumulator in the inputs' type":
                out = out.to(problem.dtype).to(acc)
        return self._finish(problem, tensors, out, row_sum, row_max, old_max, top)

    def _finish(self, problem, tensors, out, row_sum, row_max, old_max, top) -> Output:
        empty = row_max == -torch.inf
        row_sum = torch.where(empty, 0.0 if self.fault == "empty row is NaN" else 1.0, row_sum)
        if self.fault == "empty row averages" and problem.kv_len:
            group_mean = tensors.value.to(out.dtype).mean(2).repeat_interleave(problem.group, 1)[:, :, None]
            out = torch.where(empty[..., None], group_mean.expand(out.shape), out)
        out = out / row_sum[..., None]
        lse = (old_max if self.fault == "stale lse" else row_max) + torch.log(row_sum)
        match self.fault:
            case "lse in base 2":
                lse = lse * 1.4426950408889634
            case "out off by 2e-5":
                out = out * (1 + 2e-5)
            case "lse off by 1e-5":
                lse = lse * (1 + 1e-5)
            case "out rounded twice through half":
                out = out.to(torch.float16).to(out.dtype)
            case "last row not written":
                out = torch.empty_like(out).index_copy_(2, torch.arange(problem.q_len - 1), out[:, :, :-1])
            case "writes to query":
                tensors.query.data.mul_(tensors.scale)
        row_max = torch.where(row_max == torch.inf, torch.nan, row_max)
        max_scores = (
            (top if self.fault == "max_scores before score_mod" else row_max)
            if problem.need_max_scores
            else None
        )
        return Output(out.to(problem.dtype), lse, max_scores)

    def backward(
        self, problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        fault, acc = self.fault, problem.acc_dtype
        sweep = _Sweep(fault, problem, tensors)
        grad_out = grad_out.to(acc)
        delta = (grad_out * output.out.to(acc)).sum(-1)
        if grad_lse is not None and fault != "lse has no gradient":
            delta = delta + grad_lse if fault == "lse's gradient has the wrong sign" else delta - grad_lse
        if fault == "delta left out":
            delta = torch.zeros_like(delta)
        lse = torch.where(output.lse == -torch.inf, torch.inf, output.lse)
        query, key, value = sweep.query, sweep.key, sweep.value
        grads = [torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        found = [torch.zeros_like(t, dtype=acc) for t in sweep.captured]
        for tile in sweep.tiles():
            score, post, allowed = sweep.scores(tile, unmasked=fault == "no mask in backward")
            weight = torch.exp(post - lse[..., None])
            upward = sweep.seen(grad_out, value, allowed, tile) - delta[..., None]
            grad_post = torch.where(allowed, weight * upward, 0.0)
            grad_score = sweep.pull(score, grad_post, allowed, tile, found)
            grads[0] += sweep.weighted(grad_score, allowed, tile, key)
            grads[1][:, :, tile] += grad_score.mT @ query
            grads[2][:, :, tile] += torch.where(allowed, weight, 0.0).mT @ grad_out
        scale = problem.head_dim**-0.5 if fault == "ignored scale" else tensors.scale
        grads[0] *= 1.0 if fault == "dq misses the scale" else scale
        grads[1] *= scale
        return self._gradients(problem, tensors, grads, found, sweep.captured)

    def _gradients(self, problem: Problem, tensors: Tensors, grads, found, captured) -> Gradients:
        def fold(grad: Tensor, like: Tensor, name: str) -> Tensor:
            grad = grad.unflatten(1, (problem.kv_heads, problem.group))
            one_head = self.fault == f"{name} of one query head of the group"
            grad = grad[:, :, 0] if one_head else grad.sum(2)
            return (grad if like.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)).to(like.dtype)

        if self.fault and self.fault.startswith("captured gradient 1 % off"):
            found = [g * 1.01 for g in found]
        if self.fault == "captured gradient times 1 + 1e-3":
            found = [g * 1.001 for g in found]
        by_id = {id(t): g.to(t.dtype) for t, g in zip(captured, found, strict=True)}
        key, value = fold(grads[1], tensors.key, "dk"), fold(grads[2], tensors.value, "dv")
        return Gradients(
            grads[0].to(problem.dtype), key, value, tuple(by_id.get(id(t)) for t in tensors.captured)
        )


class _Sweep:
    """The operands of one call with query's heads and batches, and what is done with one tile of keys."""

    def __init__(self, fault: str, problem: Problem, tensors: Tensors):
        self.fault, self.problem, self.tensors = fault, problem, tensors
        acc = problem.acc_dtype
        self.shape = problem.batch, problem.q_heads, problem.q_len, problem.kv_len
        self.query = tensors.query.to(acc)
        self.key, self.value = self._spread(tensors.key.to(acc)), self._spread(tensors.value.to(acc))
        pairs = zip(problem.captures, tensors.captured, strict=True)
        self.captured = [t for capture, t in pairs if capture.needs_grad]
        self.leaves = {
            id(t): t.detach().to(acc, copy=True) for t in tensors.captured if t.is_floating_point()
        }
        for t in self.captured:
            self.leaves[id(t)].requires_grad_()
        self.blocks = None if tensors.block_mask is None else self._planted(*tensors.block_mask.listed())

    def _planted(self, listed: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
        if self.fault == "dropped full block":
            listed = listed & ~full
        if self.fault == "row's last block dropped":
            assert self.problem.block_size
            end = self.problem.kv_len - self.problem.block_size[1]
            listed = listed & (torch.arange(self.problem.kv_len) < end)
        return listed, full

    def _spread(self, x: Tensor) -> Tensor:
        heads = torch.arange(self.problem.q_heads)
        heads = heads % x.shape[1] if self.fault == "wrong key head" else heads // self.problem.group
        batches = torch.arange(self.problem.batch) % x.shape[0]
        if self.fault == "key's batch taken modulo" and x.shape[0] == 1 and self.problem.batch > 1:
            x, batches = torch.cat([x, torch.zeros_like(x)]), torch.arange(self.problem.batch) % 2
        return x[batches][:, heads]

    def tiles(self) -> list[slice]:
        end = self.problem.kv_len
        if self.fault == "tail mask off by one" and end % TILE:
            end -= 1
        return [slice(start, min(start + TILE, end)) for start in range(0, end, TILE)]

    def index(self, tile: slice) -> tuple[Tensor, ...]:
        B, H, L, _ = self.shape
        sides = torch.arange(B), torch.arange(H), torch.arange(L), torch.arange(tile.start, tile.stop)
        return torch.meshgrid(*sides, indexing="ij")

    def scores(self, tile: slice, unmasked: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(score, the same after score_mod with -inf where masked, allowed) of a tile, all (B, Hq, L, T)."""
        scale = self.problem.head_dim**-0.5 if self.fault == "ignored scale" else self.tensors.scale
        if self.fault == "scale applied after score_mod":
            scale = 1.0
        score = self.query @ self.key[:, :, tile].mT * scale
        if self.fault == "score rounded to the inputs' type":
            score = score.to(self.problem.dtype).to(score.dtype)
        allowed = torch.ones_like(score, dtype=torch.bool) if unmasked else self.allowed(tile)
        with torch.no_grad():
            post = self.modified(score, allowed, tile)
        if self.fault == "scale applied after score_mod":
            post = post * self.tensors.scale
        return score, post, allowed & (post != -torch.inf)

    def modified(self, score: Tensor, allowed: Tensor, tile: slice) -> Tensor:
        """After score_mod, which is asked at the allowed positions only; -inf elsewhere."""
        if self.tensors.score_mod is None:
            return torch.where(allowed, score, -torch.inf)
        b, h, q_idx, kv_idx = (i[allowed] for i in self.index(tile))
        if self.fault == "swapped q_idx and kv_idx in score_mod":
            q_idx, kv_idx = kv_idx, q_idx
        if self.fault == "key head given to score_mod":
            h = h // self.problem.group
        post = score[allowed]
        if b.numel():
            with _StandIns(self.leaves):
                post = self.asked()(post, b, h, q_idx, kv_idx).to(score.dtype)
        return torch.full_like(score, -torch.inf).masked_scatter(allowed, post)

    def asked(self) -> Callable:
        score_mod = self.tensors.score_mod
        assert score_mod is not None
        if self.fault == "a branch that was not taken is multiplied by 0":
            return torch.vmap(score_mod)
        return at_each_position(score_mod, self.problem.acc_dtype)

    def allowed(self, tile: slice) -> Tensor:
        shape = *self.shape[:3], tile.stop - tile.start
        says = torch.ones(shape, dtype=torch.bool)
        if self.tensors.mask_mod is not None and self.fault != "mask_mod not asked in partial blocks":
            b, h, q_idx, kv_idx = (i.flatten() for i in self.index(tile))
            if self.fault == "swapped q_idx and kv_idx in mask_mod":
                q_idx, kv_idx = kv_idx, q_idx
            if b.numel():
                mask_mod = at_each_position(self.tensors.mask_mod, self.problem.acc_dtype)
                says = mask_mod(b, h, q_idx, kv_idx).view(shape)
        if self.blocks is None:
            return says
        listed, full = (side[..., tile] for side in self.blocks)
        return (
            listed & says if self.fault == "mask_mod asked in full blocks" else listed & (full | says)
        ).expand(shape)

    def weighted(self, weight: Tensor, allowed: Tensor, tile: slice, rows: Tensor) -> Tensor:
        """weight @ rows, where a masked row counts nothing even if it holds NaN."""
        rows = rows[:, :, tile]
        if rows.isfinite().all() or self.fault == "NaN leaks from masked values":
            return weight @ rows
        return torch.einsum(
            "bhlt,bhlte->bhle", weight, torch.where(allowed[..., None], rows[:, :, None], 0.0)
        )

    def seen(self, grad_out: Tensor, value: Tensor, allowed: Tensor, tile: slice) -> Tensor:
        return torch.where(allowed, grad_out @ value[:, :, tile].mT, 0.0)

    def pull(
        self, score: Tensor, grad_post: Tensor, allowed: Tensor, tile: slice, found: list[Tensor]
    ) -> Tensor:
        """d score of d post; adds what captured tensors get to `found`."""
        if self.tensors.score_mod is None or self.fault == "slope of score_mod left out":
            return grad_post
        if self.fault == "captured gradient of the first batch only":
            kept = grad_post * (torch.arange(self.shape[0]) == 0)[:, None, None, None]
        else:
            kept = grad_post
        with torch.enable_grad():
            leaf = score.detach().requires_grad_()
            post = self.modified(leaf, allowed, tile)
            if not post.requires_grad:
                return torch.zeros_like(grad_post)
            (grad_score,) = _grad(post, [leaf], grad_post)
            captured = _grad(post, [self.leaves[id(t)] for t in self.captured], kept)
        for total, grad in zip(found, captured, strict=True):
            if self.fault == "captured gradient of the last tile only":
                total.zero_()
            total += grad
        return grad_score


def _grad(post: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    if not leaves:
        return ()
    grads = torch.autograd.grad(
        post, leaves, grad.to(post.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return tuple(g.to(grad.dtype) for g in grads)


class _StandIns(TorchFunctionMode):
    """Within it a mod reads copies in the accumulation type, not its captured tensors: gradients add up in that type."""

    def __init__(self, copies: dict[int, Tensor]):
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def swap(value):
            return self.copies.get(id(value), value)

        return func(*tree_map(swap, args), **tree_map(swap, kwargs or {}))
