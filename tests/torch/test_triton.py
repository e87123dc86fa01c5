"""The CUDA printer: its kernels in Triton's interpreter against NumPy, and their machine code."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from runpy import run_path

import launches
import numpy as np
import pytest
import torch
from launches import ALONE, assert_same, expected, make_scalars, make_tensors, whole
from support import assert_agree
from twins import assert_params_agree, make_grads, make_params, train

import portopt_torch
from portopt.program import ARRAY_OPS
from portopt.rules import Adam, AdamW, Around, Momentum, RMSprop, Rule
from portopt.trace import trace

pytest.importorskip("triton", minversion="3.6", reason="the CUDA printer needs Triton")

from portopt.kernels import triton
from portopt_torch import cuda

RULES = run_path(str(Path(__file__).parents[1] / "core" / "conftest.py"))["RULES"]
SIZES = [0, 1, 700, 1300]


@pytest.fixture(scope="module")
def interpreter():
    with launches.interpreter() as pool:

        def run(function, *args, **keywords):
            return pool.submit(function, *args, **keywords).result()

        yield run


@dataclass(frozen=True, kw_only=True)
class Operations(Rule):
    """Every operation whose result IEEE settles, with numbers and scalars on either side.

    Its names are also those of the kernel's own text.
    """

    lr: float = 0.3
    scalars: float = -2.0
    tl: float = -2.0

    @property
    def slots(self):
        return ("mask", "lanes", "start")

    def update(self, xp, t, param, grad, slot):
        i = xp.sqrt(slot.start)
        float = xp.where(grad < self.lr, slot.mask, 1.5)
        range = xp.where(grad > 0.5, self.scalars, -grad)
        number = xp.maximum(grad, 0.0) + xp.minimum(xp.minimum(self.tl, grad), math.inf)
        mask_at = xp.maximum(param, grad) - xp.minimum(param, grad)
        β = 0.1 / param + abs(grad) / slot.lanes
        param_ = xp.sign(grad) * (1e-3 - grad)
        new = {"mask": float + range, "lanes": number * mask_at, "start": i + β}
        return param - param_, new


@dataclass(frozen=True, kw_only=True)
class Copies(Rule):
    """Hands its inputs on, and what one operation makes of them."""

    lr: float = 0.1

    @property
    def slots(self):
        return ("grad_before", "sign", "negative", "larger", "smaller")

    def update(self, xp, t, param, grad, slot):
        new = {"grad_before": grad, "sign": xp.sign(grad), "negative": -grad}
        # Of 0 and -0 NumPy takes now the one, now the other.
        larger, smaller = xp.maximum(param, grad) + 0.0, xp.minimum(param, grad) + 0.0
        return param, {**new, "larger": larger, "smaller": smaller}


@dataclass(frozen=True, kw_only=True)
class Curves(Rule):
    """The two functions that IEEE does not settle."""

    lr: float = 0.1

    @property
    def slots(self):
        return ("exponential", "logarithm")

    def update(self, xp, t, param, grad, slot):
        return param, {"exponential": xp.exp(param), "logarithm": xp.log(abs(param))}


def check(run, rule, storage=None, sizes=SIZES, spans=None, shift=0, tensors=None, around=ALONE):
    """Launch a rule's program, each tensor with scalars of its own, and compare with NumPy."""
    program = trace(rule, around)
    storage = storage or ("float32",) * len(program.operands)
    tensors = tensors or make_tensors(program, storage, sizes)
    scalars = [make_scalars(program, rule, t, around) for t in range(2, 2 + len(tensors))]
    work = program, storage, tensors, scalars, spans or whole(tensors)
    assert_same(run(launches.launch, *work, shift=shift), expected(*work))


def test_there_is_a_meaning_for_every_operation():
    assert set(triton.MEANING) == set(ARRAY_OPS)


# The interpreter is slow: of a form's six surroundings one, each time the next. On a GPU, all.
@pytest.mark.parametrize("rule", RULES[::7], ids=repr)
def test_every_rule_is_numpy_bit_for_bit(interpreter, rule):
    check(interpreter, rule, sizes=[700])


def test_what_stands_around_a_rule_is_in_the_same_launch(interpreter):
    around = Around(grad_scale=3.0, ema_decay=0.9, zero_grad=True)
    for clip in ({"clip_value": 1e-3}, {"clip_norm": 0.5}):
        check(interpreter, AdamW(lr=0.1), around=replace(around, **clip), sizes=[700])


@pytest.mark.parametrize("rule", [Operations(), Copies(), Adam(amsgrad=True)], ids=repr)
@pytest.mark.parametrize("param", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("others", ["float32", "float64", "same"])
def test_dtypes_may_be_mixed(interpreter, rule, param, others):
    if (param, others) == ("float64", "same"):
        others = "float32"
    others = param if others == "same" else others
    grads = "float64" if others == "float64" else param
    storage = (param, grads, *[others] * len(rule.slots))
    check(interpreter, rule, storage, sizes=[1, 1300])


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_spans_may_begin_and_end_anywhere(interpreter, shift):
    spans = [(3, 0, 513), (0, 0, 0), (3, 513, 1), (1, 0, 1), (3, 640, 600), (2, 3, 697)]
    check(interpreter, RMSprop(momentum=0.9, centered=True), spans=spans, shift=shift)


def test_nan_infinity_and_zeros(interpreter):
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 3e38, -1.0]
    param, grad = (torch.tensor(x.ravel()) for x in np.float32(np.meshgrid(special, special)))
    for rule in (Operations(), Copies(), Adam(amsgrad=True), Momentum(nesterov=True)):
        slots = dict.fromkeys(trace(rule).slots, abs(param))
        check(interpreter, rule, tensors=[{"param": param, "grad": grad, **slots}])


def test_exp_and_log_are_within_a_rounding(interpreter):
    rule = Curves()
    program, storage = trace(rule), ("float32",) * 4
    tensors = make_tensors(program, storage, [1300])
    work = program, storage, tensors, [make_scalars(program, rule)], whole(tensors)
    (ours,), (theirs,) = interpreter(launches.launch, *work), expected(*work)
    for name in rule.slots:
        assert_agree(ours[name], theirs[name], "float32", what=name)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, float("inf"), float("nan")])
def test_found_inf_leaves_everything_as_it_is(interpreter, found_inf):
    rule = Adam(lr=0.1)
    program, storage = trace(rule), ("float32",) * 4
    tensors = make_tensors(program, storage, SIZES)
    work = program, storage, tensors, [make_scalars(program, rule)] * 4, whole(tensors)
    ours = interpreter(launches.launch, *work, found_inf=found_inf)
    assert_same(ours, tensors if found_inf else expected(*work))


def test_no_spans_are_no_launch(interpreter):
    program, storage = trace(Adam()), ("float32",) * 4
    assert interpreter(launches.launch, program, storage, [], [], []) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_square_sums(interpreter, dtype):
    program = trace(Momentum())
    tensors = make_tensors(program, (dtype,) * 3, [1, 5000])
    grads = [tensor["grad"] for tensor in tensors]
    spans = [(1, 0, 4321), (0, 0, 1), (1, 4321, 679), (1, 3, 0)]
    sums = interpreter(launches.square_sums, dtype, grads, spans)
    squares = [(grads[n][start : start + size].double() ** 2).sum() for n, start, size in spans]
    assert_agree(sums, torch.stack(squares), "float64")
    # The address and the other spans change nothing.
    moved = interpreter(launches.square_sums, dtype, grads, spans[::-1], shift=1)
    assert_agree(moved.flip(0), sums, "same")


@pytest.mark.parametrize("away", [[], [(0, 2), (1, 0), (2, 0), (2, 2)]], ids=["move", "go"])
def test_steps_follow_gradients_that(interpreter, away):
    rule = Adam(lr=0.1, weight_decay=0.1)
    program, storage = trace(rule), ("float32",) * 4
    tensors = make_tensors(program, storage, [1, 0, 9000])
    drawn = [make_tensors(program, storage, [1, 0, 9000], seed=10 * t) for t in (1, 2, 3)]
    grads = [[operands["grad"] for operands in step] for step in drawn]
    for step, place in away:
        grads[step][place] = None
    scalars = [
        [make_scalars(program, rule, t), make_scalars(program, rule, t + 5)] for t in (1, 2, 3)
    ]
    ours, squares = interpreter(launches.run_steps, program, storage, tensors, grads, scalars)
    given = [[grad for grad in step if grad is not None] for step in grads]
    assert_agree(
        squares, [sum(float((g.double() ** 2).sum()) for g in step) for step in given], "float64"
    )
    for step, (first, others) in zip(grads, scalars, strict=True):
        here = [place for place, grad in enumerate(step) if grad is not None]
        work = [{**tensors[place], "grad": step[place]} for place in here]
        own = [[first, others, others][place] for place in here]
        for place, new in zip(
            here, expected(program, storage, work, own, whole(work)), strict=True
        ):
            tensors[place] = new
    for operands in (*ours, *tensors):
        del operands["grad"]
    assert_same(ours, tensors)


SHAPES = [(67,), (5,), (0,), (3, 5)]


@pytest.mark.parametrize(
    "around",
    [
        None,
        Around(clip_value=0.5, ema_decay=0.9, zero_grad=True),
        Around(clip_norm=0.5, skip_nonfinite=True, zero_grad=True),
    ],
    ids=["", "value", "norm"],
)
@pytest.mark.parametrize(
    ("name", "options", "on_device"),
    [
        ("SGD", {}, False),
        ("SGD", {"momentum": 0.9}, False),
        ("AdamW", {"amsgrad": True}, False),
        ("AdamW", {"amsgrad": True}, True),
        ("NAdam", {}, False),
        ("NAdam", {}, True),
    ],
)
@pytest.mark.parametrize("skipped", [[4], []], ids=["skipped", ""])
def test_optimizers_go_the_way_of_cuda(interpreter, name, options, on_device, around, skipped):
    """As on the CPU: groups, scaled gradients, steps that are skipped; where the host counts, also
    gradients that come and go."""
    options = {**options, "around": around}
    grads = make_grads(SHAPES, 7)
    if not on_device:
        grads[1][0] = grads[3][1] = grads[3][3] = None
    taken = [t for t in range(7) if t not in skipped]
    if around is not None and around.skip_nonfinite:
        grads[5][1] = grads[5][1] * math.nan
        taken.remove(5)

    def groups():
        params = make_params(SHAPES)
        lr = torch.tensor(0.1) if name == "AdamW" else 0.1
        return [
            {"params": params[:2], "lr": lr},
            {"params": params[2:], "lr": 0.05, "weight_decay": 0.1},
        ]

    start = [{**group, "params": [p.detach() for p in group["params"]]} for group in groups()]
    ours, state = interpreter(
        launches.train_by_triton,
        *(name, start, grads),
        on_device=on_device,
        scale=8.0,
        skipped=skipped,
        **options,
    )
    twin = train(getattr(portopt_torch, name)(groups(), **options), [grads[t] for t in taken])
    kind = "float32" if on_device or (around and around.clip_norm) else "same"
    theirs = [param for group in twin.param_groups for param in group["params"]]
    assert_params_agree(ours, theirs, kind, make_params(SHAPES))
    for place, entries in twin.state_dict()["state"].items():
        for entry, value in entries.items():
            assert_agree(state[place][entry].numpy(), value.numpy(), kind, what=entry)


def test_a_table_that_a_graph_may_have_changed_is_sent_again(monkeypatch):
    """No graph can be here: what its replay does is done by hand."""
    grads = [torch.ones(4), torch.ones(4)]
    launch = cuda.SquareSum("float32", [grads[0].data_ptr()], [4], torch.device("cpu"))
    captured = [False]
    monkeypatch.setattr(launch, "is_captured", lambda: captured[0])
    assert launch._current().item() == grads[0].data_ptr()
    captured[0] = True
    launch.table[:] = grads[1].data_ptr()
    launch._current()
    captured[0] = False
    for _ in range(2):
        launch._table.zero_()  # as the replay would write what was there when it was captured
        assert launch._current().item() == grads[1].data_ptr()
    cuda._captured.remove(launch)


def test_a_captured_step_that_the_host_counts_is_refused(interpreter):
    words = r"a CUDA graph that captures step\(\) counts no steps: capturable must be True"
    with pytest.raises(RuntimeError, match=words):
        interpreter(launches.capture_by_triton)


ARGUMENTS = {"table": "*i64", "spans": "*i64", "found_inf": "*fp32"}
STORAGE = {
    "float32": ("float32",) * 4,
    "bfloat16": ("bfloat16",) * 4,
    "mixed": ("bfloat16", "bfloat16", "float32", "float32"),
    "float64": ("float64",) * 4,
}


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_machine_code_is_exact_and_vectorized(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = ptx(triton.kernel(trace(Adam()), storage), ARGUMENTS)
    kind = "f64" if storage[0] == "float64" else "f32"
    assert {f"div.rn.{kind}", f"sqrt.rn.{kind}"} <= set(re.findall(r"\b(?:div|sqrt)\.[\w.]+", code))
    assert not re.findall(r"\b(?:fma|mad)\.\w*\.?f\d+|approx|ftz|div\.full|bar\.sync", code)
    if "bfloat16" in storage:
        assert "cvt.rn.bf16" in code
    # Each of 4 loads and 3 stores of the fast loop is one instruction, of 16 bytes at the most.
    assert len(re.findall(r"(?:ld|st)\.global\.v[24]\.b(?:32|64) ", code)) == 7


@pytest.mark.parametrize("rule", [Operations(), Copies(), Curves()], ids=repr)
def test_every_operation_compiles(rule, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype in ("float32", "float64"):
        storage = (dtype,) * (2 + len(rule.slots))
        assert ".visible .entry kernel" in ptx(triton.kernel(trace(rule), storage), ARGUMENTS)


def test_machine_code_of_square_sums_is_vectorized(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton.compiled(triton.square_sums_source("float32"))
    code = ptx(kernel, {"addresses": "*i64", "stride": "i64", "spans": "*i64", "sums": "*fp64"})
    assert "ld.global.v4.b32" in code


def ptx(kernel, signature):
    """The assembly for an H100; no GPU is needed."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = compile(ASTSource(kernel, signature), GPUTarget("cuda", 90, 32), triton._OPTIONS)
    return made.asm["ptx"]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("3.5.1", "Triton 3.5.1 makes zeros of subnormal numbers; 3.6 does not"),
        ("3.6.0", None),
        ("3.10.0+git5", None),
        (None, "Triton is not installed: pip install triton"),
    ],
)
def test_a_triton_that_is_not_exact_is_refused(version, words, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    if version is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cuda._lack.cache_clear()
    try:
        assert cuda.refusal(("float32",) * 4) == words
    finally:
        cuda._lack.cache_clear()
