"""The IR: what makes nodes the same, what the checker refuses, how templates are filled, how programs run."""
from __future__ import annotations

import math

import pytest
import torch

from flexref.program.builder import Builder, Ref
from flexref.program.interpret import interpret
from flexref.program.ir import Graph, Node, check
from flexref.program.ops import OPS
from flexref.program.template import fill
from flexref.recent import Recent


def test_constants_are_the_same_by_their_bits():
    zero, minus_zero = Node("const", (), "float", 0.0), Node("const", (), "float", -0.0)
    assert zero != minus_zero
    assert Node("const", (), "float", math.nan) == Node("const", (), "float", math.nan)
    assert Node("const", (), "int", 1) != Node("const", (), "bool", True) != Node("const", (), "float", 1.0)


def test_where_a_node_comes_from_does_not_change_what_it_is():
    assert Node("load", (), "float", 0, "a.py:1") == Node("load", (), "float", 0, "b.py:2")


def test_equal_nodes_are_built_once_and_unused_ones_are_dropped():
    g = Builder()
    score = Ref(g.input("score"))
    first, second = g.op("mul", score, 2.0), g.op("mul", score, 2.0)
    g.op("exp", score)
    assert first.position == second.position
    graph = g.graph({"out": first.position})
    check(graph)
    assert [n.op for n in graph.nodes] == ["input", "const", "mul"]


def test_equal_graphs_hash_alike():
    def build(value):
        g = Builder()
        return g.graph({"out": g.op("add", Ref(g.input("score")), value).position})

    assert build(1.0) == build(1.0) and hash(build(1.0)) == hash(build(1.0))
    assert build(0.0) != build(-0.0)


WRONG = {
    "an argument is not above": (Node("neg", (1,), "float"),),
    "unknown operation": (Node("const", (), "float", 1.0), Node("frobnicate", (0,), "float")),
    "unknown type": (Node("const", (), "double", 1.0),),
    "is no int": (Node("input", (), "int", "score"),),
    "is no float": (Node("input", (), "float", "batch"),),
    "indices are int": (Node("const", (), "float", 1.0), Node("load", (0,), "float", 0)),
    "takes 2 arguments": (Node("const", (), "float", 1.0), Node("add", (0,), "float")),
    "exp is ff, got if": (Node("const", (), "int", 1), Node("exp", (0,), "float")),
    "add is nnn, got fif": (Node("const", (), "float", 1.0), Node("const", (), "int", 1), Node("add", (0, 1), "float")),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_checker_names_what_is_wrong(message):
    nodes = WRONG[message]
    with pytest.raises(AssertionError, match=message.replace("an argument is not above", "an argument is not above")):
        check(Graph(nodes, (("out", len(nodes) - 1),)))


EXAMPLES = {"float": torch.tensor([0.3, 0.9]), "int": torch.tensor([2, 1]), "bool": torch.tensor([True, False])}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("number", ["float", "int"])
def test_every_operation_has_the_types_of_its_signature(op, number):
    letters = {"f": "float", "i": "int", "b": "bool", "n": number, "t": number}
    *arguments, result = (letters[x] for x in OPS[op].signature)
    nodes = [Node("load", (), type, i) for i, type in enumerate(arguments)]
    nodes.append(Node(op, tuple(range(len(arguments))), result))
    graph = Graph(tuple(nodes), (("out", len(arguments)),))
    check(graph)
    out = interpret(graph, {}, [EXAMPLES[type] for type in arguments])["out"]
    assert out.dtype == {"float": torch.float32, "int": torch.int64, "bool": torch.bool}[result]


def test_float64_programs_stay_float64():
    graph = Graph((Node("input", (), "int", "h"), Node("int_to_float", (0,), "float")), (("out", 1),))
    assert interpret(graph, {"h": torch.tensor(1)}, acc_dtype=torch.float64)["out"].dtype == torch.float64


def test_fill_keeps_the_holes_indentation():
    text = "def f():\n    # hole: body\n    return x\n"
    assert fill(text, {"body": ["x = 1", "", "if x:", "    x = 2"]}) == (
        "def f():\n    x = 1\n\n    if x:\n        x = 2\n    return x\n"
    )
    assert fill("a\n  // hole: it\n", {"it": ["b;"]}) == "a\n  b;\n"


def test_fill_wants_exactly_its_holes():
    with pytest.raises(ValueError, match=r"no lines for the holes \['body'\], no holes for the lines \['boddy'\]"):
        fill("# hole: body\n", {"boddy": []})


def test_recent_forgets_the_oldest():
    made = []
    cache = Recent(2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert cache.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b", "c", "b"]
