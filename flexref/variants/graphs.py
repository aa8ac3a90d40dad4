"""Score mods of graphs: learned numbers for how far two nodes are apart and for the edges on the way; and the ways themselves."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.program.mod_objects import CallableMod
from flexref.variants.checks import count, floats, integers, kind


class graph_distance(CallableMod):
    """Adds bias[h, distances[b, q_idx, kv_idx]]; `bias` is floats (H, distances), and may be learned.

    `distances`: integers (N, N), or (B, N, N) with another graph in each batch, as `graph_distances` finds them.
    Ying et al., Graphormer, 2021, spatial encoding.
    """

    def __init__(self, bias: Tensor, distances: Tensor):
        self.bias, self.distances = floats("bias", bias, (2,)), integers("distances", distances, (2, 3))

    def __call__(self, score, b, h, q_idx, kv_idx):
        at = (b, q_idx, kv_idx)[-self.distances.dim() :]
        return score + self.bias[h, self.distances[at]]


class graph_path(CallableMod):
    """Adds the mean over the edges n of the shortest path of bias[h, n, edges[b, q_idx, kv_idx, n]]; 0 where there is no edge.

    `bias`: floats (H, K, types), may be learned; `edges`: integers (N, N, K) or (B, N, N, K), the type of the n-th edge;
    `lengths`: integers (N, N) or (B, N, N), how many there are, at most K; as `graph_paths` finds them. Ying et al.,
    Graphormer, 2021, edge encoding.
    """

    def __init__(self, bias: Tensor, edges: Tensor, lengths: Tensor):
        self.bias, self.edges = floats("bias", bias, (3,)), integers("edges", edges, (3, 4))
        self.lengths = integers("lengths", lengths, (edges.dim() - 1,))
        if bias.shape[1] < edges.shape[-1]:
            raise ValueError(f"bias must have a row for each of {edges.shape[-1]} edges of a path, got {bias.shape[1]}")

    def __call__(self, score, b, h, q_idx, kv_idx):
        at = (b, q_idx, kv_idx)[-self.lengths.dim() :]
        length, total = self.lengths[at], 0.0
        for n in range(self.edges.shape[-1]):
            total = total + torch.where(n < length, self.bias[h, n, self.edges[(*at, n)]], 0.0)
        return score + total / torch.clamp(length, min=1)


def graph_distances(adjacency: Tensor, longest: int) -> Tensor:
    """How many edges it is from node to node, int32; longest + 1 where more, or no way. `adjacency`: bool (N, N) or (B, N, N)."""
    return _distances(_edges(adjacency), count("longest", longest)).int()


def graph_paths(adjacency: Tensor, types: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The types of the first `longest` edges of a shortest path from node to node, int64 (..., N, N, longest), and how many.

    `types`: integers like `adjacency`, read where there is an edge. Of several shortest paths it is one that always goes to the
    least next node. Where there is no way, and past the end, the length and the type are 0. `graph_path` takes both.
    """
    edges = _edges(adjacency)
    if integers("types", types, (adjacency.dim(),)).shape != adjacency.shape:
        raise ValueError(f"types must have the shape of adjacency, {tuple(adjacency.shape)}, got {tuple(types.shape)}")
    nodes = edges.shape[-1]
    far = _distances(edges, nodes)
    lengths = torch.where(far <= nodes, far, 0).clamp(max=count("longest", longest))
    onward, flat = _next_nodes(edges, far), types.long().flatten(-2)
    at = torch.arange(nodes, device=edges.device).view(nodes, 1).expand(far.shape)
    found = far.new_zeros(*far.shape, longest)
    for n in range(longest):
        following = torch.gather(onward, -2, at)
        kinds = torch.gather(flat, -1, (at * nodes + following).flatten(-2)).view(far.shape)
        found[..., n] = torch.where(n < lengths, kinds, 0)
        at = following
    return found, lengths


def _edges(adjacency: Tensor) -> Tensor:
    square = isinstance(adjacency, Tensor) and adjacency.dim() in (2, 3) and adjacency.shape[-1] == adjacency.shape[-2]
    if not square or adjacency.dtype != torch.bool:
        raise TypeError(f"adjacency must be a bool tensor (N, N) or (B, N, N), got {kind(adjacency)}")
    return adjacency


def _distances(edges: Tensor, longest: int) -> Tensor:
    """By Floyd and Warshall; int64, at most longest + 1."""
    nodes = edges.shape[-1]
    far = torch.where(edges, 1, nodes + 1).masked_fill(torch.eye(nodes, dtype=torch.bool, device=edges.device), 0)
    for k in range(nodes):
        far = torch.minimum(far, far[..., :, k, None] + far[..., None, k, :])
    return far.masked_fill(far > nodes, longest + 1).clamp(max=longest + 1)


def _next_nodes(edges: Tensor, far: Tensor) -> Tensor:
    """Of two nodes the least one that comes after the first on a shortest path to the second; the first where none does."""
    nodes = edges.shape[-1]
    found = torch.arange(nodes, device=edges.device).view(nodes, 1).expand(far.shape)
    for k in reversed(range(nodes)):
        step = edges[..., :, k, None] & (far[..., None, k, :] == far - 1)
        found = torch.where(step, k, found)
    return found.contiguous()
