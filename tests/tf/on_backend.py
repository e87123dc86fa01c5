"""A child process: native and our optimizers on the backend that KERAS_BACKEND names."""

import contextlib
import sys
import warnings

import keras
import numpy as np
from keras_runs import EACH, SHAPES, arrays, assert_variables, case, fit, small_model, twins
from support import assert_agree, gradients, weights

import portopt
import portopt_tf
from portopt import parity, rules
from portopt.trace import trace

backend = keras.backend.backend()


def variables(dtype="float32"):
    return [keras.Variable(weights(shape, seed), dtype=dtype) for seed, shape in enumerate(SHAPES)]


def steps(optimizer, made, apply):
    optimizer.build(made)
    for grads in zip(*(gradients(v.shape, 6, i) for i, v in enumerate(made)), strict=True):
        pairs = zip(grads, made, strict=True)
        apply(optimizer, [keras.ops.convert_to_tensor(g, v.dtype) for g, v in pairs], made)
    return made


def eager(optimizer, grads, made):
    optimizer.apply(grads, made)


def stateless(optimizer, grads, made, apply=None):
    apply = apply or optimizer.stateless_apply
    state = [v.value for v in optimizer.variables]
    new, state = apply(state, grads, [v.value for v in made])
    for variable, value in zip([*made, *optimizer.variables], [*new, *state], strict=True):
        variable.assign(value)


def jitted(optimizer, grads, made):
    """The stateless form, in which every value is symbolic."""
    import jax

    optimizer.jitted = getattr(optimizer, "jitted", None) or jax.jit(optimizer.stateless_apply)
    stateless(optimizer, grads, made, optimizer.jitted)


def in_numpy(rule, dtype="float64"):
    """The rule, by the core's own optimizer."""
    params = [weights(shape, seed).astype(dtype) for seed, shape in enumerate(SHAPES)]
    optimizer = portopt.Optimizer(rule, params)
    streams = [gradients(a.shape, 6, i, dtype) for i, a in enumerate(params)]
    for grads in zip(*streams, strict=True):
        optimizer.step(grads)
    return params


def joined(variables):
    return [np.concatenate([a.ravel() for a in arrays(variables)])]


def check_precision(apply):
    """In float32 all scalars come from float64: from 0.99999 as a float32, 1.3e-3 off."""
    _, adam = twins("Adam", learning_rate=0.25, beta_2=0.99999)
    actual = joined(steps(adam, variables(), apply))
    expected = in_numpy(rules.Adam(lr=0.25, beta2=0.99999, eps=1e-7, eps_form="hat"))
    assert_variables(actual, joined(expected), "float32", joined(variables()))
    _, adam = twins("Adam", learning_rate=0.125)
    half = [keras.Variable(np.ones(4), dtype="bfloat16")]
    adam.build(half)
    for _ in range(5):
        apply(adam, [keras.ops.ones(4, "bfloat16")], half)
    assert_variables(half, [np.full(4, 1 - 5 * 0.125)], "bfloat16", [np.ones(4)])


def check_launches():
    """On PyTorch the kernel works on the variables' own memory, and gives NumPy's bits."""
    import torch

    from portopt.kernels import cpu

    launches, run = [], cpu.Step.run
    cpu.Step.run = lambda self, *args: launches.append(len(self.table)) or run(self, *args)
    compared = [c for c in parity.CASES if c.keras and trace(c.rule).elementwise]
    for compare in compared:
        name, arguments = compare.keras
        made, ours = variables(), getattr(portopt_tf, name)(**arguments)
        places = [v.value.data_ptr() for v in made]
        launches.clear()
        actual = arrays(steps(ours, made, eager))
        assert [v.value.data_ptr() for v in made] == places and launches == [3] * 6
        for one, other in zip(actual, in_numpy(compare.rule, "float32"), strict=True):
            assert_agree(one, other, "same", what=name)
    assert len(compared) > 20

    def variable(array):
        parameter = torch.nn.Parameter(array)
        return keras.Variable(parameter, dtype="float32")

    base = torch.ones(4, 4)
    cases = {  # variables and gradients; how many tensors are launched
        "gradient transposed": ([torch.ones(2, 3)], [torch.ones(3, 2).T], [1]),
        "gradient negated": ([torch.ones(3)], [torch._neg_view(-torch.ones(3))], [1]),
        "gradient a parameter": ([torch.ones(3)], [torch.nn.Parameter(torch.ones(3))], [1]),
        "empty": ([torch.ones(0, 3), torch.ones(2)], [torch.ones(0, 3), torch.ones(2)], [1]),
        "transposed": ([torch.ones(3, 2).T], [torch.ones(2, 3)], []),
        "one memory": ([base[0], base[0]], [torch.ones(4), torch.zeros(4)], []),
        "gradient sparse": (
            [torch.ones(3), torch.ones(3)],
            [torch.ones(3), torch.ones(3).to_sparse()],
            [2],
        ),
        "half": ([torch.ones(1000)], [torch.ones(1000)], []),
    }
    for label, (values, grads, launched) in cases.items():
        launches.clear()
        made, sgd = [*map(variable, values)], twins("SGD", learning_rate=0.5)[1]
        sgd.build(made)
        if label == "half":  # as by model.half(), of which Keras does not know
            made[0].value.data = made[0].value.data.half()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sgd.apply(grads, made)
        assert all((v.numpy() == 0.5).all() for v in made), label
        told = [str(w.message) for w in said if "without a kernel" in str(w.message)]
        assert len(told) == (not launched), label
        assert launches == launched, label

    made, adam = variables(), twins("Adam", learning_rate=0.25)[1]
    adam.beta_1 = keras.Variable(0.5)  # which is trained, says PyTorch
    expected = in_numpy(rules.Adam(lr=0.25, beta1=0.5, eps=1e-7, eps_form="hat"), "float32")
    for one, other in zip(arrays(steps(adam, made, eager)), expected, strict=True):
        assert_agree(one, other, "same")

    weight, sgd = variable(torch.tensor([2.0])), twins("SGD", learning_rate=0.5)[1]
    sgd.build([weight])
    loss = (weight.value * weight.value).sum()
    launches.clear()
    with torch.no_grad():
        new, _ = sgd.stateless_apply([v.value for v in sgd.variables], [torch.ones(1)], [weight])
        assert weight.numpy() == 2.0 and new[0] == 1.5 and launches == []
        sgd.apply([torch.ones(1)], [weight])
    assert weight.numpy() == 1.5 and launches == [1]
    with contextlib.suppress(RuntimeError):  # as its memory is another's now
        loss.backward()
        raise AssertionError("a backward pass through an older graph must fail")
    weight.value.data = weight.value.data.double()
    with torch.no_grad():
        sgd.apply([torch.ones(1)], [weight])
    assert weight.value.dtype == torch.float64 and weight.numpy() == 1.0 and launches == [1]

    made, adam = variables(), twins("Adam", learning_rate=0.25)[1]
    expected = in_numpy(rules.Adam(lr=0.25, eps=1e-7, eps_form="hat"), "float32")
    adam.build(made)
    apply = torch.compile(adam.apply, backend="eager")
    launches.clear()
    steps(adam, made, lambda _, grads, made: apply(grads, made))
    for one, other in zip(arrays(made), expected, strict=True):
        assert_agree(one, other, "same")
    assert launches == [3] * 6  # the compiler has not looked into them
    cpu.Step.run = run


def check_parity(apply, labels=EACH, **options):
    """In float64 each case is the native."""
    for label in labels:
        # Keras's own norms and powers are float32's in part, outside TensorFlow.
        kind = "float32" if label.startswith(("adafactor", "muon")) else "float64"
        optimizers = case(label, learning_rate=0.25, **options)
        native, ours = (steps(o, variables("float64"), apply) for o in optimizers)
        assert_variables(ours, native, kind, arrays(variables("float64")))
        assert_variables(optimizers[1].variables, optimizers[0].variables, kind)


def check_fit(**compile_args):
    decay = keras.optimizers.schedules.ExponentialDecay(np.float64(0.1), 4, 0.5)
    optimizers = case("amsgrad", learning_rate=decay)
    native, ours = (fit(o, epochs=2, **compile_args) for o in optimizers)
    assert_variables(ours.weights, native.weights, "float64", arrays(small_model().weights))


forms = (eager, jitted) if backend == "jax" else (eager,)
for form in forms:
    check_precision(form)
if backend == "torch":
    check_launches()

keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
if backend == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
if backend == "numpy":  # there Keras's own are not of float64 precision
    rule = rules.Adam(lr=0.25, beta1=0.8, eps=1e-7, eps_form="hat", amsgrad=True)
    _, ours = twins("Adam", learning_rate=0.25, beta_1=0.8, amsgrad=True)
    assert_variables(steps(ours, variables("float64"), eager), in_numpy(rule), "float64")
else:
    check_parity(eager if backend == "torch" else stateless)
    check_parity(stateless if backend == "torch" else eager, ("centered", "nadam"))
    if backend == "jax":
        check_parity(jitted, ("amsgrad", "nadam"))
    shared = {"use_ema": True, "ema_overwrite_frequency": 2, "loss_scale_factor": 4.0}
    check_parity(eager, ("momentum", "amsgrad"), clipnorm=0.5, **shared)
    check_parity(eager, ("adamw",), gradient_accumulation_steps=2, global_clipnorm=0.5)
    check_fit(jit_compile=backend == "jax")

assert "tensorflow" not in sys.modules
print("agreed, without TensorFlow")
