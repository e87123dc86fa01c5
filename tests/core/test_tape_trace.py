"""What a computation did, as a table and as a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from portopt import tape
from portopt.tape.layout import layered

PAGE = (Path(__file__).parents[2] / "docs" / "tape.md").read_text(encoding="utf-8")


@pytest.fixture
def traced():
    """`ln(x1) + x1 x2 - sin(x2)` at (2, 5), the example of the literature."""
    x1, x2 = tape.Variable(2.0), tape.Variable(5.0)
    with tape.Autograd() as autograd:
        y = tape.log(x1) + x1 * x2 - tape.sin(x2)
    return tape.trace(autograd, y, {"x1": x1, "x2": x2})


def test_the_figures_are_those_of_the_literature(traced):
    lines = {line.node: line for line in traced.lines}
    values = [0.693, 10, 10.693, -0.959, 11.652]
    assert [round(float(lines[f"v{n}"].value), 3) for n in range(1, 6)] == values
    assert [round(float(lines[name].adjoint), 3) for name in ("x1", "x2")] == [5.5, 1.716]
    assert [lines[name].so_far["x2"].round(3) for name in ("v4", "v2")] == [-0.284, 1.716]
    assert str(traced) in PAGE


def test_a_table_of_the_square():
    m, x, y = tape.Variable(7.0), tape.Variable(3.0), tape.Variable(5.0, requires_grad=False)
    with tape.Autograd() as autograd:
        loss = (m * x - y) ** 2
        tape.exp(loss)  # nothing that the loss depends on
    table = """\
node  operation   value  local derivatives  adjoint  adjoints so far
----  ----------  -----  -----------------  -------  ---------------
m     input       7                         96
u2    input       3                         224
y     constant    5
v1    mul(m, u2)  21     3, 7               32       m: 96, u2: 224
v2    sub(v1, y)  16     1                  32       v1: 32
v3    pow(v2, 2)  256    32                 1        v2: 32"""
    assert str(tape.trace(autograd, loss, {"m": m, "y": y})) == table
    assert str(tape.trace(autograd, loss, {"m": m, "x": x, "y": y})) in PAGE
    assert autograd.buffer.variables() == ()


def test_a_name_that_is_given_is_not_made_up_again():
    x1, x2 = tape.Variable(2.0), tape.Variable(5.0)
    with tape.Autograd() as autograd:
        y = tape.log(x1) + x1 * x2
    nodes = [line.node for line in tape.trace(autograd, y, {"v2": x1}).lines]
    assert nodes == ["v2", "u2", "v1", "v3", "v4"]


def test_of_arrays_shapes_are_printed_and_local_derivatives_are_whole():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(1.0, 4.0)
    x = tape.Variable(a)
    with tape.Autograd() as autograd:
        loss = tape.sum(tape.checkpoint([tape.exp], x @ b))
    trace = tape.trace(autograd, loss)
    _, product, chain, _ = trace.lines
    assert (product.operands, product.inputs) == (("u1", "(3,)"), ("u1",))
    (local,) = product.local
    np.testing.assert_array_equal(local, np.einsum("ik,j->ikj", np.eye(2), b))
    assert chain.name == "checkpoint"
    assert chain.local == ()
    assert "v1    matmul(u1, (3,))  (2,)" in str(trace)
    assert "(2, 2, 3)" in str(trace)


def test_nodes_stand_right_of_their_operands_and_apart():
    operands = {"x": (), "w": (), "a": "x", "b": "a", "late": (), "c": ("b", "late", "x", "x")}
    layout = layered(operands | {"d": ("c", "w")})
    columns = {node: column for node, (column, _) in layout.nodes.items()}
    assert columns == {"x": 0, "w": 3, "a": 1, "b": 2, "late": 2, "c": 3, "d": 4}
    for (operand, node), path in layout.edges.items():
        assert (path[0], path[-1]) == (layout.nodes[operand], layout.nodes[node])
        assert [column for column, _ in path] == [*range(columns[operand], columns[node] + 1)]
    bends = [place for path in layout.edges.values() for place in path[1:-1]]
    places = [*layout.nodes.values(), *bends]
    assert len(set(places)) == len(places) == 7 + 2


def test_edges_that_need_not_cross_do_not():
    layout = layered({"a": (), "b": (), "c": "b", "d": "a", "e": "cd"})
    row = {node: row for node, (_, row) in layout.nodes.items()}
    assert (row["a"] < row["b"]) == (row["d"] < row["c"])


def test_the_graph_shows_the_nodes_and_what_is_on_them(traced):
    pytest.importorskip("matplotlib")
    from portopt import plots

    figure = plots.computation(traced)
    (axis,) = figure.axes
    texts = [text.get_text() for text in axis.texts]
    assert "x1\nvalue 2\nadjoint 5.5" in texts
    assert "v4 = sin(x2)\nvalue -0.958924\nadjoint -1" in texts
    assert {"0.5", "0.283662", "-1"} < set(texts)  # local derivatives
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["input", "operation"]
    figure.draw_without_rendering()
    inside = axis.get_window_extent()
    for text in filter(lambda text: text.get_text(), axis.texts):
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, text
