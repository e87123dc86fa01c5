"""The CUDA printer's kernels on a GPU: NumPy's bits, graphs, large tensors."""

from pathlib import Path
from runpy import run_path

import launches
import pytest
import torch
from launches import assert_same, expected, make_scalars, make_tensors, whole
from support import assert_agree

from portopt.kernels import triton
from portopt.rules import SGD, Adam, AdamW, RMSprop
from portopt.trace import trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

RULES = run_path(str(Path(__file__).parents[1] / "core" / "conftest.py"))["RULES"]
SIZES = [0, 1, 700, 1300, 100_003]


def check(rule, storage=None, spans=None, shift=0):
    """Launch a rule's program, each tensor with scalars of its own, and compare with NumPy."""
    program = trace(rule)
    storage = storage or ("float32",) * len(program.operands)
    tensors = make_tensors(program, storage, SIZES)
    scalars = [make_scalars(program, rule, t) for t in range(1, len(tensors) + 1)]
    work = program, storage, tensors, scalars, spans or whole(tensors, triton.SPAN)
    assert_same(launches.launch(*work, shift=shift, device="cuda"), expected(*work))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_is_numpy_bit_for_bit(rule):
    check(rule)


@pytest.mark.parametrize("param", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("others", ["float32", "float64", "same"])
def test_dtypes_may_be_mixed(param, others):
    others = {"same": param, "float32": "float32", "float64": "float64"}[others]
    check(Adam(amsgrad=True, lr=0.1), (param, param, others, others, others))


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("param", ["bfloat16", "float32"])
def test_spans_may_begin_and_end_anywhere(param, shift):
    spans = [(4, 0, 513), (0, 0, 0), (4, 513, 1), (1, 0, 1), (4, 640, 99_000), (2, 3, 697)]
    rule = RMSprop(momentum=0.9, centered=True)
    check(rule, (param, param, *["float32"] * 3), spans=spans, shift=shift)


@pytest.mark.parametrize("found_inf", [0.0, float("inf")])
def test_found_inf_leaves_everything_as_it_is(found_inf):
    rule = Adam(lr=0.1)
    program, storage = trace(rule), ("float32",) * 4
    tensors = make_tensors(program, storage, SIZES)
    work = program, storage, tensors, [make_scalars(program, rule)] * len(SIZES), whole(tensors)
    ours = launches.launch(*work, found_inf=found_inf, device="cuda")
    assert_same(ours, tensors if found_inf else expected(*work))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_square_sums(dtype):
    grads = [tensor["grad"] for tensor in make_tensors(trace(SGD()), (dtype, dtype), SIZES)]
    spans = whole([{"param": grad} for grad in grads], 5000)
    sums = launches.square_sums(dtype, grads, spans, device="cuda")
    squares = [(grads[n][start : start + size].double() ** 2).sum() for n, start, size in spans]
    assert_agree(sums, torch.stack(squares), "float64")
    moved = launches.square_sums(dtype, grads, spans[::-1], shift=1, device="cuda")
    assert_agree(moved.flip(0), sums, "same")


def test_a_captured_step_is_replayed():
    """The step count and the learning rate stay on the device, and change between replays."""
    rule = AdamW(lr=0.1)
    program, storage = trace(rule), ("float32",) * 4
    (operands,) = make_tensors(program, storage, [100_003])
    t = torch.zeros((), dtype=torch.float64, device="cuda")
    lr = torch.tensor(0.1, dtype=torch.float64, device="cuda")

    def run(step, steps):
        tensors = {name: tensor.cuda() for name, tensor in operands.items()}
        row = torch.zeros(len(program.scalar_names), device="cuda")
        addresses = [*(tensor.data_ptr() for tensor in tensors.values()), row.data_ptr()]
        table = torch.tensor([addresses], device="cuda")
        spans = torch.tensor(whole([operands], triton.SPAN), device="cuda")

        def once():
            t.add_(1)
            scalars = program.scalars({**vars(rule), "lr": lr}, t, torch.Tensor.double)
            for place, value in zip(row, scalars.values(), strict=True):
                place.copy_(value) if torch.is_tensor(value) else place.fill_(value)
            triton.launch(program, storage, table, spans)

        t.zero_()
        replay = step(once)
        for name, tensor in operands.items():  # as before what `step` did
            tensors[name].copy_(tensor)
        t.zero_()
        for number in range(1, steps + 1):
            lr.fill_(0.1 / number)
            tensors["grad"].copy_(operands["grad"] * number)
            replay()
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def captured(once):
        once()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return graph.replay

    assert_same([run(captured, 5)], [run(lambda once: once, 5)])
    assert float(t) == 5


def test_more_elements_than_32_bits_count():
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("needs 11 GB of free device memory")
    rule = SGD(lr=0.5)
    program = trace(rule)
    param = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones_like(param)
    grad[-3:] = 2.0
    row = torch.tensor([0.5], device="cuda")
    table = torch.tensor([[param.data_ptr(), grad.data_ptr(), row.data_ptr()]], device="cuda")
    spans = torch.tensor([(0, 0, 2**30), (0, 2**30, size - 2**30)], device="cuda")
    triton.launch(program, ("bfloat16",) * 2, table, spans)
    assert param[:-3].eq(0.5).all() and param[-3:].eq(0.0).all()
