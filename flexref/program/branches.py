"""A derivative in which a branch that was not taken contributes nothing, even where its own derivative is infinite or NaN.

PyTorch's autograd hands 0 to the branch that `where` did not choose and multiplies on: 0 times inf is NaN. Here every
cotangent (a node that `grad` goes into) is followed together with the condition under which it is not zero by selection.
Where such a one was multiplied by something that is not proved to be finite, it is selected again by that condition: once,
at the end of the chain of factors. A derivative without a branch, or with harmless factors alone, stays node for node as it is.
"""

from __future__ import annotations

from functools import cached_property

from flexref.program.builder import Builder
from flexref.program.ir import Graph, Node, is_const

# a condition: the node that holds it, or True (anywhere) or False (nowhere)
Condition = int | bool
# products below this are finite in float32, in whatever order they are made
_FINITE = 1e30
_BOUNDED = frozenset({"tanh", "sigmoid", "erf", "sin", "cos", "sign"})


def masked_conditions(graph: Graph) -> frozenset[tuple[int, bool]]:
    """The conditions, with the value they must have, outside which a mod's result is -inf.

    Such a position is masked (R5), and engines look at no derivative there.
    """
    found, at = set(), dict(graph.outputs)["out"]
    while graph.nodes[at].op == "where":
        condition, a, b = graph.nodes[at].args
        if is_const(graph.nodes[b], -float("inf")):
            found.add((condition, True))
            at = a
        elif is_const(graph.nodes[a], -float("inf")):
            found.add((condition, False))
            at = b
        else:
            break
    return frozenset(found)


class TakenBranches:
    """Copies the nodes of a derivative into `builder`, selecting where it has to.

    `forward`: how many of the nodes are the mod's own, which keep PyTorch's meaning to the letter.
    `masked`: as masked_conditions gives them, in these nodes' positions.
    """

    def __init__(self, nodes: list[Node], forward: int, masked: frozenset[tuple[int, bool]]):
        self.nodes, self.forward, self.masked = nodes, forward, masked
        self.builder = Builder()
        # of each node: where it is now, whether `grad` goes into it, where it counts, whether it may be NaN elsewhere
        self.places: list[int] = []
        self.cotangent: list[bool] = []
        self.alive: list[Condition] = []
        self.tainted: list[bool] = []
        for i, node in enumerate(nodes):
            self._copy(i, node)

    def _copy(self, i: int, node: Node) -> None:
        self.cotangent.append(self._is_cotangent(i, node))
        alive, tainted, args = True, False, node.args
        if self.cotangent[i] and node.op in ("where", "mul", "div", "neg"):
            alive, tainted = getattr(self, f"_{node.op}")(*args)
            args = tuple(self.places[a] for a in args)
        elif self.cotangent[i] and node.op in ("add", "sub"):
            alive = self._or(*(self._alive(a) for a in args))
            args = tuple(self.settled(a) for a in args)
        else:
            args = tuple(self.settled(a) for a in args)
        self.places.append(self.builder.node(node.op, args, node.type, node.attr, node.where))
        self.alive.append(alive)
        self.tainted.append(tainted)

    def _is_cotangent(self, i: int, node: Node) -> bool:
        """Whether `grad` goes into it. A zero that autograd made itself, as the derivative of floor, goes on as one."""
        if node.op == "input":
            return node.attr == "grad"
        if node.type != "float":
            return False
        zeros = [self._is_zero(a) for a in node.args]
        nothing = {"neg": any, "mul": any, "div": lambda x: x[0], "where": lambda x: all(x[1:])}.get(node.op)
        from_zero = i >= self.forward and nothing is not None and nothing(zeros)
        return from_zero or any(self.cotangent[a] for a in node.args)

    def settled(self, i: int) -> int:
        """Where the node is now, with what is not taken made 0."""
        if not self.tainted[i]:
            return self.places[i]
        zero = self.builder.const(0.0)
        if isinstance(self.alive[i], bool):
            return zero
        condition = self.builder.nodes[int(self.alive[i])]
        if condition.op == "not":
            return self.builder.node("where", (condition.args[0], zero, self.places[i]), "float")
        return self.builder.node("where", (int(self.alive[i]), self.places[i], zero), "float")

    def _is_zero(self, i: int) -> bool:
        return self.nodes[i].op == "const" and self.nodes[i].attr == 0

    def _alive(self, i: int) -> Condition:
        """Of an operand that is selected or added; a constant 0 there is nothing anywhere."""
        return False if self._is_zero(i) else self.alive[i]

    def _where(self, condition: int, a: int, b: int) -> tuple[Condition, bool]:
        tainted = self.tainted[a] or self.tainted[b]
        alive = self._alive(a), self._alive(b)
        if (condition, True) in self.masked:
            return alive[0], tainted
        if (condition, False) in self.masked:
            return alive[1], tainted
        c = self.places[condition]
        return self._or(self._and(c, alive[0]), self._and(self._not(c), alive[1])), tainted

    def _neg(self, a: int) -> tuple[Condition, bool]:
        return self._alive(a), self.tainted[a] or self._is_zero(a)

    def _mul(self, a: int, b: int) -> tuple[Condition, bool]:
        alive, tainted = self._and(self.alive[a], self.alive[b]), self.tainted[a] or self.tainted[b]
        if not (self.cotangent[a] or self.cotangent[b]):
            # a zero of autograd's own, times a factor
            return False, True
        for one, other in ((a, b), (b, a)):
            tainted = tainted or (self.alive[one] is not True and self.sizes[other] > _FINITE)
        return alive, tainted

    def _div(self, a: int, b: int) -> tuple[Condition, bool]:
        if not self.cotangent[a]:
            return (False, True) if self._is_zero(a) else (True, False)
        divisor = self.nodes[b]
        harmless = divisor.op == "const" and divisor.attr == divisor.attr and divisor.attr != 0
        return self.alive[a], self.tainted[a] or (self.alive[a] is not True and not harmless)

    def _and(self, a: Condition, b: Condition) -> Condition:
        if a is False or b is False:
            return False
        if a is True or a == b:
            return b
        return a if b is True else self.builder.node("and", (int(a), int(b)), "bool")

    def _not(self, a: int) -> int:
        node = self.builder.nodes[a]
        return node.args[0] if node.op == "not" else self.builder.node("not", (a,), "bool")

    def _or(self, a: Condition, b: Condition) -> Condition:
        if a is True or b is True:
            return True
        if a is False or a == b:
            return b
        if b is False:
            return a
        if self._not(int(a)) == b or self._not(int(b)) == a:
            return True
        # both branches of one choice come together again
        one, other = (self.builder.nodes[int(x)] for x in (a, b))
        if one.op == other.op == "and" and one.args[0] == self._not(other.args[0]) and one.args[1] == other.args[1]:
            return one.args[1]
        return self.builder.node("or", (int(a), int(b)), "bool")

    @cached_property
    def sizes(self) -> list[float]:
        """For each node a number that its magnitude does not exceed; infinite where it may be anything, or NaN."""
        found: list[float] = []
        for node in self.nodes:
            found.append(_size(node, [found[a] for a in node.args]))
        return found


def _size(node: Node, args: list[float]) -> float:
    if node.type == "bool":
        return 1.0
    if node.type == "int":
        return 2.0**63
    if node.op == "const":
        return abs(float(node.attr)) if node.attr == node.attr else float("inf")  # type: ignore[arg-type]
    if node.op in _BOUNDED:
        return 1.0 if args[0] <= _FINITE else float("inf")
    if node.op in ("add", "sub"):
        return args[0] + args[1]
    if node.op == "mul":
        product = args[0] * args[1]
        return product if product == product else float("inf")
    if node.op in ("neg", "abs", "int_to_float"):
        return args[0]
    return max(args[-2:]) if node.op in ("where", "minimum", "maximum") else float("inf")
