"""The sharded update on simulated workers, bit for bit against the unsharded optimizer."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from bits import assert_bits, dtype_of
from support import gradients, weights

from portopt import Around, Optimizer, Rule
from portopt.rules import SGD, Adam, Lamb, Momentum, registry
from portopt.sharding import NumPyBuffers, Sharded, simulate
from portopt.sharding.plan import ALIGN

STEPS = 20
# "w" has a chunk of 65536 elements that every number of workers cuts; "late" begins at step 3.
SHAPES = {
    "w": (301, 400),
    "b": (37,),
    "scale": (),
    "none": (0, 3),
    "late": (50, 30),
    "frozen": (9,),
}
AROUND = Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.75, grad_scale=3.0, zero_grad=True)
RULES = [Momentum(lr=0.1), Adam(lr=0.1, weight_decay=0.1), Lamb(lr=0.1)]


def groups(arrays, rule):
    """Two groups, of two learning rates."""
    first, *rest = arrays
    return [
        {"params": {first: arrays[first]}},
        {"params": {name: arrays[name] for name in rest}, "lr": rule.lr / 2},
    ]


def start(dtypes=None):
    dtypes = dtypes or {}
    return {name: weights(shape, 1, dtypes.get(name, np.float32)) for name, shape in SHAPES.items()}


def draw(steps=STEPS, seed=9, dtypes=None):
    """One dict of gradients a step."""
    dtypes = dtypes or {}
    made = {
        name: gradients(shape, steps, seed, dtypes.get(name, np.float32))
        for name, shape in SHAPES.items()
    }
    for t, step in enumerate(zip(*made.values(), strict=True)):
        given = dict(zip(made, step, strict=True)) | {"frozen": None}
        yield given | ({"late": None} if t < 2 else {})


def unsharded(rule, around, grads, dtypes=None):
    params = start(dtypes)
    optimizer = Optimizer(rule, groups(params, rule), around=around)
    for given in grads:
        optimizer.step({k: None if g is None else g.copy() for k, g in given.items()})
    return params, optimizer


def sharded(rule, around, workers, grads, dtypes=None, **options):
    """For each worker its parameters and its optimizer; ``grads`` are a list for each."""

    def work(collectives):
        params = start(dtypes)
        optimizer = Sharded(rule, groups(params, rule), collectives, around=around, **options)
        for given in grads[collectives.rank]:
            optimizer.step({k: None if g is None else g.copy() for k, g in given.items()})
        return params, optimizer

    return simulate(workers, work)


def mean(given):
    """The averaged gradients of a step: added in the order of the ranks, halves in float32."""
    result = {}
    for name, first in given[0].items():
        result[name] = None
        if first is not None:
            compute = np.promote_types(first.dtype, np.float32)
            total = first.astype(compute)
            for other in given[1:]:
                total = total + other[name].astype(compute)
            result[name] = np.asarray(total * compute.type(1 / len(given))).astype(first.dtype)
    return result


def assert_state(results, reference):
    """Every slot of the unsharded optimizer is there once, in the pieces of the workers."""
    for name, entries in reference.state.items():
        assert_pieces(results, name, entries)


def assert_pieces(results, name, entries):
    pieces = [optimizer.state[name] for _, optimizer in results if name in optimizer.state]
    for key, value in entries.items():
        found = [piece[key] for piece in pieces]
        if isinstance(value, np.ndarray):
            flat = np.concatenate([np.ravel(x) for x in found])
            assert_bits(flat, np.ravel(value), f"{name}: {key}")
        else:
            assert set(found) == {value}


@pytest.mark.parametrize("around", [None, AROUND], ids=["alone", "around"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_same_averaged_gradients_give_the_same_bits(rule, around):
    grads = list(draw())
    expected, reference = unsharded(rule, around, grads)
    for workers in (1, 2, 3, 4):
        results = sharded(rule, around, workers, [grads] * workers, average=False)
        for params, _ in results:
            for name, value in expected.items():
                assert_bits(params[name], value, f"{name}, {workers} workers")
        assert_state(results, reference)


@pytest.mark.parametrize("name", registry.own())
def test_every_rule(name):
    shapes = [(90, 80), (20, 31)]  # matrices, as Muon takes nothing else
    grads = list(zip(*(gradients(shape, 4, 9) for shape in shapes), strict=True))
    rule = registry.own()[name](lr=0.1)

    def steps(make):
        params = [weights(shape) for shape in shapes]
        optimizer = make(rule, params)
        for given in grads:
            optimizer.step(given)
        return params

    def work(collectives):
        return steps(lambda *args: Sharded(*args, collectives, average=False))

    expected = steps(Optimizer)
    for params in simulate(3, work):
        for param, value in zip(params, expected, strict=True):
            assert_bits(param, value)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_gradients_of_their_own_are_averaged(workers, stage):
    dtypes = {"w": np.float16, "late": np.float64}
    grads = [list(draw(6, seed, dtypes)) for seed in range(workers)]
    averaged = [mean(given) for given in zip(*grads, strict=True)]
    expected, reference = unsharded(Adam(lr=0.1), AROUND, averaged, dtypes)
    results = sharded(Adam(lr=0.1), AROUND, workers, grads, dtypes, stage=stage)
    for params, _ in results:
        for name, value in expected.items():
            assert_bits(params[name], value, name)
    assert_state(results, reference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    """In float64 the norm is not rounded to float32 on its way."""
    dtypes = dict.fromkeys(SHAPES, dtype_of(dtype))
    grads = list(draw(6, dtypes=dtypes))
    expected, _ = unsharded(Adam(lr=0.1), AROUND, grads, dtypes)
    for workers in (2, 3):
        for params, _ in sharded(
            Adam(lr=0.1), AROUND, workers, [grads] * workers, dtypes, average=False
        ):
            for name, value in expected.items():
                assert_bits(params[name], value, name)


def test_the_norm_of_many_chunks():
    """One unit in the last place of it shows in some of these steps."""
    around, rng = Around(clip_norm=1e-3), np.random.default_rng(0)
    grads = [[rng.standard_normal(9) for _ in range(300)] for _ in range(8)]

    def steps(make):
        params = [np.zeros(9) for _ in range(300)]
        optimizer = make(SGD(lr=1.0), params)
        for given in grads:
            optimizer.step(given)
        return np.stack(params)

    def work(collectives):
        return steps(lambda *args: Sharded(*args, collectives, around=around, average=False))

    expected = steps(lambda *args: Optimizer(*args, around=around))
    for workers in (1, 3):
        for params in simulate(workers, work):
            assert_bits(params, expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_by_all(stage):
    """Only one worker has the NaN, and another owns the element."""
    clean = list(draw(4))
    spoiled = [{k: None if g is None else g.copy() for k, g in given.items()} for given in clean]
    spoiled[3]["w"][0, 0] = np.nan
    expected, reference = unsharded(Adam(lr=0.1), AROUND, clean[:3])
    grads = [clean, clean, clean, spoiled]  # a sum of four is exact, and so is a quarter of it
    for params, optimizer in sharded(Adam(lr=0.1), AROUND, 4, grads, stage=stage):
        for name, value in expected.items():
            assert_bits(params[name], value, name)
        for name, entries in optimizer.state.items():
            assert entries["step"] == reference.state[name]["step"]


def test_gradients_are_zeroed_everywhere():
    def work(collectives):
        grad = np.ones(64, np.float32)
        optimizer = Sharded(
            Momentum(), [np.ones(64, np.float32)], collectives, around=Around(zero_grad=True)
        )
        optimizer.step([grad])
        return grad

    for grad in simulate(2, work):
        assert not grad.any()


def test_each_worker_keeps_its_share():
    grads = list(draw(3))
    total = sum(2 * param.nbytes for name, param in start().items() if name != "frozen")
    for _, optimizer in sharded(Adam(), None, 3, [grads] * 3):
        state = sum(
            x.nbytes
            for entries in optimizer.state.values()
            for x in entries.values()
            if isinstance(x, np.ndarray)
        )
        assert abs(state - total / 3) <= 2 * 4 * (ALIGN + 9)  # of two slots; "frozen" counts


def test_hyperparameters_may_change_between_steps():
    grads = list(draw(2))
    expected, reference = unsharded(Momentum(lr=0.1, momentum=0.0), None, grads[:1])
    for group in reference.param_groups:
        group.update(lr=0.7, momentum=0.5)
    reference.step(grads[1])

    def work(collectives):
        params = start()
        rule = Momentum(lr=0.1, momentum=0.0)
        optimizer = Sharded(rule, groups(params, rule), collectives)
        optimizer.step(grads[0])
        for group in optimizer.param_groups:
            group.update(lr=0.7, momentum=0.5)
        optimizer.step(grads[1])
        return params

    for params in simulate(2, work):
        for name, value in expected.items():
            assert_bits(params[name], value, name)


def unaligned(array):
    """The same numbers at an odd address."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    result = memory.view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


@pytest.mark.parametrize("form", [np.asfortranarray, unaligned], ids=["Fortran", "unaligned"])
def test_gradients_may_lie_otherwise(form):
    grad = next(draw(1))["w"]

    def work(collectives, grad):
        param = start()["w"]
        Sharded(Adam(lr=0.1), [param], collectives, average=False).step([grad])
        return param

    assert NumPyBuffers().cut(form(grad), 0, 9).flags.aligned  # though many processors do not mind
    (expected,) = simulate(1, lambda collectives: work(collectives, grad))
    for param in simulate(2, lambda collectives: work(collectives, form(grad))):
        assert_bits(param, expected)


def bad_step(collectives, change):
    """A step that fails on one worker; what the parameters are afterwards."""
    params = start()
    optimizer = Sharded(Momentum(lr=0.1), params, collectives)
    (given,) = draw(1)
    try:
        optimizer.step(given | (change if collectives.rank == 1 else {}))
    finally:
        for name, value in start().items():
            assert_bits(params[name], value, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"b": None},
            r"grads\['b'\] must be None on all workers or on none, is an array on 2 of 3",
        ),
        ({"b": np.ones(3, np.float32)}, r"grads\['b'\] must have shape \(37,\).*got \(3,\)"),
        ({"b": np.ones(37)}, r"dtype float32 like its parameter, got \(37,\) and float64"),
        ({"b": np.ones(37, ">f4")}, r"dtype float32 like its parameter, got \(37,\) and >f4"),
        ({"b": 1.0}, r"grads\['b'\] must be an array, got 1.0"),
        ({"x": None}, r"grads must be for \['w', 'b'"),
    ],
    ids=["absent", "shape", "dtype", "order", "number", "unknown"],
)
def test_bad_gradients_change_nothing(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        simulate(3, lambda collectives: bad_step(collectives, change))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c: Sharded(Momentum(), [], c), "params must hold at least one array, got none"),
        (lambda c: Sharded(Momentum(), [[1.0]], c), r"params\[0\] must be a NumPy array, got list"),
        (lambda c: Sharded(Momentum(), [np.ones(3, int)], c), r"params\[0\].*got int64"),
        (lambda c: Sharded(Momentum(), [np.ones((3, 2)).T], c), r"params\[0\] must be contiguous"),
        (lambda c: Sharded(Momentum(), [np.ones(2)], c, stage=3), "stage must be 1 or 2, got 3"),
        (lambda c: Sharded(Momentum, [np.ones(2)], c), "rule must be a portopt.Rule"),
        (
            lambda c: Sharded(Momentum(), [{"params": [np.ones(2)], "rate": 1}], c),
            "unknown.*'rate'",
        ),
        (lambda c: Sharded(Momentum(), [np.ones(3, ">f4")], c), r"params\[0\].*got >f4"),
        (lambda c: Sharded(Momentum(), [unaligned(np.ones(3))], c), r"params\[0\].*aligned"),
        (lambda c: Sharded(Momentum(), [np.broadcast_to(1.0, ())], c), r"params\[0\].*writable"),
    ],
    ids=[
        "none",
        "list",
        "int",
        "gaps",
        "stage",
        "class",
        "unknown",
        "order",
        "unaligned",
        "read-only",
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        simulate(1, make)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own, params: own.update(momentum_buffer=np.zeros(4)), r"shape \(16,\), has \(4,\)"),
        (lambda own, params: own.update(momentum_buffer=np.zeros(32)[::2]), "must be contiguous"),
        (lambda own, params: own.update(momentum_buffer=np.zeros(16, ">f8")), "dtype in"),
        (lambda own, params: own["momentum_buffer"].setflags(write=False), "must be writable"),
        (
            lambda own, params: own.update(step=-1),
            r"\['step'\] must be an int of at least 0",
        ),
        (lambda own, params: params[0].setflags(write=False), r"params\[0\] must be writable"),
    ],
    ids=["shape", "gaps", "order", "read-only slot", "step", "read-only parameter"],
)
def test_what_became_of_states_and_parameters_is_looked_at(change, words):
    """By all workers: what one of them finds lets none of them change anything."""

    def work(worker):
        params = [np.zeros(32), np.zeros(3)]
        sharded = Sharded(Momentum(lr=0.5), params, worker)
        sharded.step([np.ones(32), np.ones(3)])
        if worker.rank == 0:
            change(sharded.state[0], params)
        before = {name: own["step"] for name, own in sharded.state.items()}
        try:
            sharded.step([np.ones(32), np.ones(3)])
        except (TypeError, ValueError, RuntimeError) as error:
            return params, before == {n: own["step"] for n, own in sharded.state.items()}, error

    for rank, (params, same, error) in enumerate(simulate(2, work)):
        assert all((param == -0.5).all() for param in params) and same
        if rank == 0:
            with pytest.raises((TypeError, ValueError), match=words):
                raise error
        else:
            assert "worker" in str(error)


def test_scalars_that_cannot_be_formed_on_one_worker_change_nothing_on_any():
    @dataclass(frozen=True, kw_only=True)
    class Inverse(Rule):
        lr: float = 1.0
        b: float = 1.0

        def update(self, xp, t, param, grad, slot):
            return param - 1 / (self.b - 0.5) * grad, {}

    def work(worker):
        params = [np.zeros(64), np.zeros(64)]
        groups = [{"params": {"a": params[0]}}, {"params": {"b": params[1]}, "b": 0.5}]
        sharded = Sharded(Inverse(), groups, worker)
        with pytest.raises((ArithmeticError, RuntimeError)) as caught:
            sharded.step({"a": np.ones(64), "b": np.ones(64)})
        assert not any(param.any() for param in params) and not sharded.state
        return type(caught.value)

    assert simulate(2, work) == [RuntimeError, ArithmeticError]


def test_parameters_that_share_memory_are_refused():
    memory = np.zeros(40)
    with pytest.raises(ValueError, match=r"params\[0\] shares memory with params\[1\]"):
        simulate(1, lambda worker: Sharded(SGD(), [memory[:32], memory[8:]], worker))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rule", "decays"), [(Lamb(lr=0.1), (0.1, 0.1)), (Adam(lr=0.1), (0.0, 0.1))], ids=repr
)
def test_norms_are_the_unsharded_ones_to_the_bit(rule, decays, dtype, seed):
    """Of a rule that no kernel takes, and of two programs."""
    rng, shapes = np.random.default_rng(seed), [(301, 300), (700,)]
    grads = [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    def made():
        params = [np.ones(shape, dtype) for shape in shapes]
        pairs = zip(params, decays, strict=True)
        return params, [
            {"params": {place: param}, "weight_decay": decay}
            for place, (param, decay) in enumerate(pairs)
        ]

    around = Around(clip_norm=0.1)
    (expected, groups), (actual, own) = made(), made()
    Optimizer(rule, groups, around=around).step(grads)
    simulate(1, lambda worker: Sharded(rule, own, worker, around=around).step(grads))
    for one, other in zip(actual, expected, strict=True):
        assert_bits(one, other)


def test_a_parameter_twice():
    param = np.ones(3)
    with pytest.raises(ValueError, match=r"params\[1\] is there already, as params\[0\]"):
        simulate(1, lambda collectives: Sharded(Momentum(), [param, param], collectives))


def test_simulated_collectives():
    def work(worker):
        pieces = [[np.full(rank + 1, worker.rank + rank, np.float32)] for rank in range(3)]
        (mine,) = worker.reduce_scatter(pieces)
        everything = worker.all_gather([[mine], [mine], [mine]])
        mine += 100  # what the others have got is theirs
        return worker.all_reduce(np.array([1.0, worker.rank])), everything

    for sums, everything in simulate(3, work):
        assert_bits(sums, np.array([3.0, 3.0]))
        for rank, (piece,) in enumerate(everything):
            assert_bits(piece, np.full(rank + 1, rank + 1, np.float32))


def test_a_worker_that_fails_ends_the_others():
    def work(worker):
        if worker.rank == 2:
            raise ArithmeticError("worker 2")
        worker.all_reduce(np.zeros(1))

    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="worker 2"):
        simulate(4, work)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        simulate(0, work)


def test_a_worker_that_returns_early_ends_those_that_wait_for_it():
    def work(worker):
        for _ in range(2 + (worker.rank > 0)):
            worker.all_reduce(np.zeros(1))

    with pytest.raises(RuntimeError, match=r"worker \d waits for worker 0, which ended"):
        simulate(3, work)


def test_groups_of_two_programs():
    """Only one of them has weight decay."""
    grads = list(draw(3))
    rule = Adam(lr=0.1)

    def with_decay(arrays):
        first, second = groups(arrays, rule)
        return [first, second | {"weight_decay": 0.1}]

    expected = start()
    reference = Optimizer(rule, with_decay(expected))
    for given in grads:
        reference.step(given)

    def work(collectives):
        params = start()
        optimizer = Sharded(rule, with_decay(params), collectives, average=False)
        for given in grads:
            optimizer.step(given)
        return params

    for params in simulate(2, work):
        for name, value in expected.items():
            assert_bits(params[name], value, name)
