"""Eager steps on CPUs run as kernels in place; what was read before keeps its elements."""

import ctypes
import threading
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import EACH, apply_steps, arrays, case, raw_variables, train_in_two_threads, twins
from support import assert_agree, gradients

import portopt_tf
from portopt.kernels import compiler, cpu, slow
from portopt.trace import trace
from portopt_tf import launch, optimizer
from portopt_tf import memory_tensorflow as memory

SLOW = "portopt_tf steps without a kernel, slowly: "


@pytest.fixture
def launches(monkeypatch):
    """For each launch, how many tensors there were."""
    seen, run = [], cpu.Step.run

    def counted(self, *args):
        seen.append(len(self.table))
        return run(self, *args)

    monkeypatch.setattr(cpu.Step, "run", counted)
    return seen


@pytest.fixture
def fresh():
    """What is found out once, and said once, has not been yet."""
    cached = slow.warn, cpu.refusal, memory._place
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def without(monkeypatch):
    """Let each variable be updated by itself, operation by operation."""
    monkeypatch.setattr(optimizer, "_can_be_compiled", lambda variables: False)


def address(variable):
    values = memory.read([variable.handle], [tf.as_dtype(variable.dtype)])
    return memory.hold(values, 1).rows[0, memory.DATA]


# Bits


@pytest.mark.parametrize("label", EACH)
def test_same_bits_as_one_by_one(label, launches, monkeypatch):
    _, ours = case(label, learning_rate=0.25)
    made = apply_steps(ours, raw_variables("float32"))
    actual = [*arrays(made), *arrays(ours.variables)]
    (group,) = ours._groups.values()
    programs = [trace(ours.rule_for(variant, 0.25)) for variant in group.places]
    assert launches == [3] * 6 * all(program.elementwise for program in programs)
    without(monkeypatch)
    _, ours = case(label, learning_rate=0.25)
    made = apply_steps(ours, raw_variables("float32"))
    for one, other in zip(actual, [*arrays(made), *arrays(ours.variables)], strict=True):
        assert_agree(one, other, "same")


@pytest.mark.parametrize("grad_dtype", ("float32", "float64"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_same_bits_of_mixed_dtypes(dtype, grad_dtype, launches, monkeypatch):
    """Parameters of two dtypes, gradients of one; some of them excluded from decay."""

    def trained():
        ours = portopt_tf.AdamW(0.125, amsgrad=True)
        half = [keras.Variable(v, dtype=dtype) for v in raw_variables("float32")]
        mixed = [*half, *raw_variables("float32")]
        ours.exclude_from_weight_decay(var_list=mixed[1:3])
        ours.build(mixed)
        for grads in zip(*(gradients(v.shape, 4) for v in mixed), strict=True):
            ours.apply([tf.constant(g, grad_dtype) for g in grads], mixed)
        return [*arrays(mixed), *arrays(ours.variables)]

    actual = trained()
    assert sorted(launches) == [1] * 4 + [2] * 4 + [3] * 4
    without(monkeypatch)
    for one, other in zip(actual, trained(), strict=True):
        # TensorFlow's own operations take subnormal numbers for zero.
        tiny = np.abs(one) < np.finfo("float32").tiny
        assert_agree(np.where(tiny, 0, one), np.where(tiny, 0, other), "same")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("lacking", ("llvmlite", "buffers"))
def test_without_kernels_it_says_so_once(lacking, launches, monkeypatch):
    expected = arrays(apply_steps(portopt_tf.Adam(0.25), raw_variables("float32")))
    count = len(launches)
    if lacking == "llvmlite":
        monkeypatch.setattr(compiler, "available", lambda: False)
        cpu.refusal.cache_clear()
        words = "llvmlite is not installed: pip install llvmlite"
    else:
        monkeypatch.setattr(memory, "_FUNCTIONS", ("no such function", *memory._FUNCTIONS[1:]))
        memory._place.cache_clear()
        words = "TensorFlow's variables are not kept as expected"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for _ in range(2):
            actual = arrays(apply_steps(portopt_tf.Adam(0.25), raw_variables("float32")))
    assert [str(w.message) for w in said if w.category is UserWarning] == [SLOW + words]
    assert len(launches) == count > 0
    for one, other in zip(actual, expected, strict=True):
        assert_agree(one, other, "same")


# Memory


def test_values_are_overwritten_in_place(launches):
    """From the second step on, as the first gets slots that TensorFlow may share."""
    ours, variables = portopt_tf.Adam(0.5), raw_variables("float32")
    grads = [tf.ones(v.shape) for v in variables]
    ours.apply(grads, variables)
    kept = [*variables, *(v for v in ours.variables if v.shape == variables[0].shape)]
    before = [*map(address, kept)]
    for _ in range(3):
        ours.apply(grads, variables)
        assert [*map(address, kept)] == before
    assert launches == [3] * 4


HOLDERS = {
    "tensor": lambda v: v.read_value(),
    "alias": lambda v: tf.identity(v.read_value()),
    "view": lambda v: memoryview(v.read_value()),
    "rows": lambda v: tf.unstack(v.read_value()),
    "variable": lambda v: tf.Variable(v.read_value()),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("what", ("parameter", "slot"))
def test_what_was_read_before_keeps_its_elements(what, holder, launches):
    ours, variable = portopt_tf.Adam(0.5), tf.Variable(tf.random.normal([4, 1024]))
    ours.build([variable])
    for _ in range(2):
        ours.apply([tf.ones([4, 1024])], [variable])
    kept = variable if what == "parameter" else ours.variables[2].value
    held, expected = HOLDERS[holder](kept), kept.numpy()
    ours.apply([tf.ones([4, 1024])], [variable])
    assert_agree(np.asarray(held).reshape(4, 1024), expected, "same")
    assert (kept.numpy() != expected).all()
    assert launches == [1] * 3


def test_arrays_that_variables_were_made_of_keep_their_elements(launches):
    made = [np.ones((64, 64), "float32"), np.ones(64, "float32")]
    variables = [tf.Variable(made[0]), keras.Variable(made[1])]
    ours = portopt_tf.SGD(0.5)
    ours.build(variables)
    for _ in range(2):
        ours.apply([tf.ones(v.shape) for v in variables], variables)
    assert all((array == 1).all() for array in made)
    assert all((v.numpy() == 0).all() for v in variables)
    assert launches == [2] * 2


def test_variables_of_one_buffer_part(launches):
    """A value assigned to two variables, and rows of one, lie in memory that these share."""
    whole = tf.random.normal([3, 1024])
    expected = whole.numpy()
    variables = [*map(tf.Variable, (whole, whole, *tf.unstack(whole)))]
    portopt_tf.SGD(0.5).apply([tf.ones(v.shape) for v in variables], variables)
    for variable, start in zip(variables, (expected, expected, *expected), strict=True):
        assert_agree(variable.numpy(), start - 0.5, "same")
    assert_agree(whole.numpy(), expected, "same")
    assert launches == [5]


def test_a_tape_keeps_the_weights_that_it_saw(launches):
    weight, ours = tf.Variable([[2.0, 3.0]]), portopt_tf.SGD(0.5)
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(weight * weight * weight)
        grads = tape.gradient(loss, [weight])
        ours.apply(grads, [weight])  # recorded by nobody
    again = tape.gradient(loss, [weight])
    assert_agree(again[0].numpy(), [[12.0, 27.0]], "same")
    assert_agree(weight.numpy(), [[2 - 6.0, 3 - 13.5]], "same")
    assert launches == [1]


def test_a_variable_may_be_the_gradient(launches):
    ours, variables = portopt_tf.SGD(0.5), raw_variables("float32")
    ours.apply(variables, variables)
    for variable, start in zip(variables, raw_variables("float32"), strict=True):
        assert_agree(variable.numpy(), start.numpy() / 2, "same")
    assert launches == [3]


def test_values_assigned_between_steps_are_seen(launches):
    """Also by compiled functions, whose buffers are of another kind."""
    ours, variable = portopt_tf.SGD(0.5, momentum=0.5), tf.Variable(tf.zeros([100]))
    ours.build([variable])
    (velocity,) = (v for v in ours.variables if tuple(v.shape) == (100,))
    for jit in (False, True):
        for assign in (variable.assign, tf.function(lambda x: variable.assign(x), jit_compile=jit)):
            assign(tf.fill([100], 3.0))
            velocity.assign(tf.fill([100], 2.0))
            ours.apply([tf.ones([100])], [variable])
            assert (variable.numpy() == 3.5).all() and (velocity.numpy() == 0.5).all()
    assert launches == [1] * 4


# What no kernel takes


NOT_ITS_OWN = "a variable or a gradient is not in memory of its own"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("beside", ["tensorflow", "torch._dynamo"])  # which stands between
def test_variables_that_are_copied_when_read(beside, launches):
    """TensorFlow does so from the first update of single elements on."""
    pytest.importorskip(beside)
    variable, ours = tf.Variable(tf.zeros([100])), portopt_tf.SGD(0.5)
    variable.scatter_nd_update([[0]], [1.0])
    with pytest.warns(UserWarning, match=SLOW + NOT_ITS_OWN) as said:
        for step in (1, 2):
            ours.apply([tf.ones([100])], [variable])
            assert_agree(variable.numpy(), [1 - step / 2, *[-step / 2] * 99], "same")
    assert len(said) == 1 and said[0].filename == __file__
    assert launches == []


def test_empty_variables_are_left_alone(launches):
    variables = [tf.Variable(tf.zeros([0, 3])), tf.Variable([1.0])]
    portopt_tf.Adam(0.5).apply([tf.zeros([0, 3]), tf.ones([1])], variables)
    assert_agree(variables[1].numpy(), [0.5], "float32")
    assert launches == [1]
    portopt_tf.Adam(0.5).apply([tf.zeros([0, 3])], variables[:1])
    assert launches == [1]


@pytest.mark.usefixtures("fresh")
def test_a_variable_that_became_smaller_is_refused(launches):
    """A raw operation lets it: no kernel writes beyond it."""
    variable, ours = tf.Variable(tf.ones([1000])), portopt_tf.SGD(0.5)
    ours.apply([tf.ones([1000])], [variable])
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tf.ones([10]))
    with (
        pytest.warns(UserWarning, match=NOT_ITS_OWN),
        pytest.raises((tf.errors.InvalidArgumentError, TypeError)),
    ):
        ours.apply([tf.ones([1000])], [variable])
    assert launches == [1]


def test_gradients_of_another_size_are_not_worked_on():
    """The last look before memory is written to, behind that at shapes."""
    grads = [tf.ones([3]), tf.ones([2, 2])]
    assert memory.find(grads, [3, 4]) is not None
    for sizes in ([3, 5], [4, 4], [12, 4]):
        assert memory.find(grads, sizes) is None


@pytest.mark.usefixtures("fresh")  # nor is anything found out meanwhile
def test_asynchronous_steps_are_compiled(launches):
    variable, ours = tf.Variable(tf.ones([10])), portopt_tf.SGD(0.5)
    tf.config.experimental.set_synchronous_execution(False)
    try:
        for _ in range(2):
            ours.apply([tf.ones([10])], [variable])
        assert (variable.numpy() == 0).all()
    finally:
        tf.config.experimental.set_synchronous_execution(True)
    assert launches == []
    ours.apply([tf.ones([10])], [variable])
    assert (variable.numpy() == -0.5).all() and launches == [1]


def test_gradients_that_come_and_go(launches):
    ours, variables = portopt_tf.SGD(0.5), raw_variables("float32")
    ours.build(variables)
    expected = arrays(variables)
    for present in ((0, 1, 2), (1,), (0, 1, 2), (0, 2)):
        some = [variables[place] for place in present]
        ours.apply([tf.ones(v.shape) for v in some], some)
        for place in present:
            expected[place] -= 0.5
    for variable, value in zip(variables, expected, strict=True):
        assert_agree(variable.numpy(), value, "float32")
    assert launches == [3, 1, 3, 2]


def test_parts_of_a_model_that_take_turns_keep_their_plans(monkeypatch):
    made, plan = [], launch.Plan
    monkeypatch.setattr(launch, "Plan", lambda *args: made.append(args) or plan(*args))
    ours, variables = portopt_tf.Adam(0.5), raw_variables("float32")
    ours.build(variables)
    parts = variables[:1], variables[1:], variables[::2], variables[::-1], variables
    for part in (*parts[:4] * 3, *parts):  # a fifth, for which the oldest is forgotten
        ours.apply([tf.ones(v.shape) for v in part], part)
    assert len(made) == 5
    ours.apply([tf.ones(v.shape) for v in parts[0]], parts[0])
    assert len(made) == 6


def test_a_variable_given_twice_is_updated_twice(launches):
    """As by the native, one after the other."""
    results = []
    for each in twins("Adam", learning_rate=0.5):
        variable = tf.Variable([1.0, 2.0])
        for _ in range(2):
            each.apply([tf.ones([2]), tf.constant([1.0, -3.0])], [variable, variable])
        results.append(variable.numpy())
    assert_agree(results[1], results[0], "float32")
    assert launches == []


def test_a_plan_of_another_thread_is_not_run(monkeypatch):
    ours, variable, fits = portopt_tf.SGD(0.5), tf.Variable([1.0]), launch.Plan.fits
    ours.apply([tf.ones([1])], [variable])
    (group,) = ours._groups.values()

    def meanwhile(self, *args):
        group.plan = None  # as if another were about to put its own there
        return fits(self, *args)

    monkeypatch.setattr(launch.Plan, "fits", meanwhile)
    ours.apply([tf.ones([1])], [variable])
    assert variable.numpy() == [0.0]


def test_what_is_held_outlives_its_tensor():
    """As the copy does that TensorFlow makes of a tensor in another process."""
    expected = np.arange(100_000, dtype="float32")
    held = memory.hold([[tf.constant(expected)]], 1)
    others = [tf.zeros(100_000) for _ in range(10)]
    address = int(held.rows[0, memory.DATA])
    kept = np.ctypeslib.as_array((ctypes.c_float * 100_000).from_address(address))
    assert_agree(kept, expected, "same")
    assert len(others) == 10


def test_gradients_of_another_dtype(launches):
    ours, variable = portopt_tf.SGD(0.5), tf.Variable(tf.zeros([10]))
    for step, dtype in enumerate(("float16", "bfloat16", "float32", "float16"), 1):
        ours.apply([tf.ones([10], dtype)], [variable])
        assert (variable.numpy() == -step / 2).all()
    assert launches == [1] * 4


# Threads


def test_two_threads_at_once(launches):
    for actual, expected in train_in_two_threads(steps=100):
        assert_agree(actual, expected, "same")
    assert launches == [3] * 400


@pytest.mark.filterwarnings(
    "ignore:portopt_tf steps without a kernel"
)  # where it has the copy at once, too
def test_a_thread_that_reads_disturbs_no_step():
    variable, ours = tf.Variable(tf.zeros([1000])), portopt_tf.SGD(1.0)
    done, held = threading.Event(), []

    def read():
        while not done.is_set():
            held[:] = [variable.read_value()]

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(300):
        ours.apply([tf.ones([1000])], [variable])
    done.set()
    thread.join()
    assert (variable.numpy() == -300).all()


def test_steps_on_the_same_variable_wait_for_one_another(monkeypatch):
    """By one optimizer in two threads, and by another at once: no update is lost."""
    inside, seen, step = [], [], cpu.Step.run

    def run(self, *args):
        inside.append(self)
        time.sleep(0.001)  # a kernel is without Python's lock, too
        seen.append(len(inside))
        step(self, *args)
        inside.pop()

    monkeypatch.setattr(cpu.Step, "run", run)
    variable, ours = tf.Variable(tf.zeros([1000])), [portopt_tf.SGD(1.0) for _ in range(2)]
    for each in ours:
        each.build([variable])

    def train(each):
        for _ in range(20):
            each.apply([tf.ones([1000])], [variable])

    threads = [threading.Thread(target=train, args=(each,)) for each in (ours[0], *ours)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 60 and (variable.numpy() == -60).all()


def test_threads_are_those_of_tensorflow(monkeypatch):
    seen, step = [], cpu.Step.run

    def run(self, scalars, which, threads):
        seen.append(threads)
        return step(self, scalars, which, threads)

    monkeypatch.setattr(cpu.Step, "run", run)
    variable, ours = tf.Variable([1.0]), portopt_tf.SGD(0.5)
    ours.apply([tf.ones([1])], [variable])
    monkeypatch.setattr(tf.config.threading, "get_intra_op_parallelism_threads", lambda: 1)
    ours.apply([tf.ones([1])], [variable])
    assert seen == [cpu.threads(), 1]
