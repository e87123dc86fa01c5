"""Sparse gradients: their rows alone are updated, as the natives do."""

from __future__ import annotations

import pytest
import torch
from support import assert_agree
from twins import native, numbers, ours

from portopt import Around, rules
from portopt_torch import from_rule

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PyTorch's own
ROWS = [[1, 1, 3], [0, 3, 9], [], [9, 9, 9]]


def train(cls, dims=1, dtype=torch.float32, **options):
    """Some steps on gradients that have a row twice, or nothing; the parameter and its state."""
    torch.manual_seed(0)
    shape = (10, 4) if dims == 1 else (10, 3, 4)
    param = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = cls([param], **options)
    for rows in ROWS:
        indices = torch.tensor([rows, *[[row % 3 for row in rows]] * (dims - 1)], dtype=torch.long)
        values = torch.randn((len(rows), 4), dtype=dtype)
        param.grad = torch.sparse_coo_tensor(indices.reshape(dims, -1), values, shape)
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.5}),
        ("SGD", {"lr": 0.5, "maximize": True}),
        ("SGD", {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
        ("Adagrad", {"lr": 0.5}),
        ("Adagrad", {"lr": 0.5, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
        ("SparseAdam", {"lr": 0.5}),
        ("SparseAdam", {"lr": 0.5, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True}),
    ],
)
def test_as_the_native(name, options, dims):
    (mine, state), (theirs, expected) = (
        train(cls(name), dims, **options) for cls in (ours, native)
    )
    assert_agree(numbers(mine), numbers(theirs), "float32")
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        value = value.to_dense() if torch.is_tensor(value) else value
        assert_agree(
            numbers(torch.as_tensor(state[key])), numbers(torch.as_tensor(value)), "float32"
        )


def test_other_rows_keep_their_bits():
    param, state = train(ours("SparseAdam"), lr=0.5)
    torch.manual_seed(0)
    rest = [row for row in range(10) if row not in {0, 1, 3, 9}]
    assert torch.equal(param[rest], torch.randn(10, 4)[rest])
    assert not state["exp_avg"][rest].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    (mine, state), (theirs, _) = (train(cls("Adagrad"), dtype=dtype) for cls in (ours, native))
    assert mine.dtype == state["sum"].dtype == dtype
    kind = {torch.bfloat16: "bfloat16", torch.float64: "float64"}[dtype]
    assert_agree(numbers(mine), numbers(theirs), kind)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ours("SGD")(p, lr=0.1, fused=True), "`fused=True` is not possible: a grad"),
        (lambda p: ours("SGD")(p, lr=0.1, weight_decay=0.1), "weight_decay option is not compat"),
        (lambda p: ours("Adagrad")(p, weight_decay=0.1), "weight_decay option is not compatible"),
        (lambda p: ours("Adagrad")(p, around=Around(clip_norm=1.0)), "around is not compatible"),
        (lambda p: ours("Adam")(p), "Adam does not support sparse gradients"),
        (lambda p: ours("NAdam")(p), "NAdam does not support sparse gradients"),
        (lambda p: from_rule(rules.SGD)(p), "SGD does not support sparse gradients"),
    ],
)
def test_refusals_change_nothing(make, words):
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = make([param])
    param.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
    with pytest.raises(RuntimeError, match=f"^{words}"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))


def test_sparse_adam_takes_nothing_else():
    for cls in (ours("SparseAdam"), native("SparseAdam")):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"^SparseAdam does not support dense gradients"):
            cls([param]).step()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_compiled_steps_with_sparse_gradients(name):
    ends = []
    for cls, is_compiled in ((ours(name), True), (native(name), False)):
        param = torch.nn.Parameter(torch.ones(5, 2))
        optimizer = cls([param], lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for value in (1.0, -2.0, 3.0):
            rows = torch.full((2, 2), value)
            param.grad = torch.sparse_coo_tensor([[0, 3]], rows, (5, 2))
            step()
        ends.append(param.detach())
    torch._dynamo.reset()
    assert_agree(*ends, "float32")
