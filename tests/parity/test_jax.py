"""Rules in JAX: against NumPy and Optax, donated, compiled once, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support import assert_agree, gradients, weights

import portopt
from portopt import rules

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import portopt.jax  # noqa: E402
from portopt.jax import Optimizer, gradient_transformation  # noqa: E402

SHAPES = {"Dense_0": {"kernel": (5, 7), "bias": (7,)}, "scale": ()}
STEPS = 20
RULES = [
    rules.SGD(lr=0.1, weight_decay=0.1, maximize=True),
    rules.Momentum(lr=0.1, dampening=0.3),
    rules.RMSprop(lr=0.1, centered=True, momentum=0.9, buffer="velocity"),
    rules.Adam(lr=0.1, amsgrad=True),
    rules.AdamW(lr=0.1, eps_form="hat"),
]


def is_shape(tree):
    return isinstance(tree, tuple)


def tree_of(make, dtype=np.float32):
    """A nested dict of parameters, as Flax has them; each leaf from a seed of its own."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_shape)
    return jax.tree.unflatten(structure, [make(s, seed, dtype) for seed, s in enumerate(leaves)])


def start(dtype=np.float32):
    return tree_of(lambda shape, seed, dtype: weights(shape, seed=seed, dtype=dtype), dtype)


def all_gradients(dtype=np.float32, steps=STEPS):
    trees = tree_of(lambda s, seed, dtype: list(gradients(s, steps, seed=seed, dtype=dtype)), dtype)
    return [
        jax.tree.map(lambda g, i=i: g[i], trees, is_leaf=lambda t: isinstance(t, list))
        for i in range(steps)
    ]


def train(optimizer, dtype=np.float32, jit=jax.jit):
    params = jax.tree.map(jnp.asarray, start(dtype))
    state = optimizer.init(params)
    step = jit(optimizer.step)
    for grads in all_gradients(dtype):
        params, state = step(params, state, grads)
    return params, state


def train_optax(transformation, steps=STEPS):
    params = jax.tree.map(jnp.asarray, start())
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for grads in all_gradients(steps=steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_trees_agree(actual, expected, kind, origin):
    jax.tree.map(lambda a, e, o: assert_agree(a, e, kind, start=o), actual, expected, origin)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_steps_are_those_of_numpy(rule, dtype):
    params, state = train(Optimizer(rule), dtype)
    leaves, structure = jax.tree.flatten(start(dtype))
    optimizer = portopt.Optimizer(rule, leaves)
    for grads in all_gradients(dtype):
        optimizer.step(jax.tree.leaves(grads))
    kind = np.dtype(dtype).name
    assert int(state.count) == STEPS
    assert_trees_agree(params, jax.tree.unflatten(structure, leaves), kind, start(dtype))
    for slot in rule.slots:
        expected = [optimizer.state[i][slot] for i in range(len(leaves))]
        zeros = jax.tree.map(np.zeros_like, start())
        assert_trees_agree(state.slots[slot], jax.tree.unflatten(structure, expected), kind, zeros)
    assert {a.dtype for a in jax.tree.leaves([params, state.slots])} == {np.dtype(dtype)}


def test_scalars_are_formed_in_float64():
    # In float32 1 - beta2**t is 2e-5 off at first, which shows in every weight.
    rule = rules.Adam(lr=0.1, beta2=0.9999)
    grads = {"w": np.ones(3, np.float32)}
    optimizer = Optimizer(rule)
    params = {"w": np.zeros(3, np.float32)}
    new, _ = jax.jit(optimizer.step)(params, optimizer.init(params), grads)
    assert not jax.config.jax_enable_x64
    assert_agree(new["w"], np.full(3, -0.1), "float32")


def test_float64_where_it_is_enabled():
    with jax.enable_x64(True):
        params, _ = train(Optimizer(rules.Adam(lr=0.1)), np.float64)
        leaves, structure = jax.tree.flatten(start(np.float64))
        optimizer = portopt.Optimizer(rules.Adam(lr=0.1), leaves)
        for grads in all_gradients(np.float64):
            optimizer.step(jax.tree.leaves(grads))
        expected = jax.tree.unflatten(structure, leaves)
        assert_trees_agree(params, expected, "float64", start(np.float64))


INSIDE = {"alpha": 0.9, "eps_form": "inside", "buffer": "velocity"}
TWINS = {
    "sgd": (rules.SGD(lr=0.1), optax.sgd(0.1)),
    "momentum": (rules.Momentum(lr=0.1), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (
        rules.Momentum(lr=0.1, nesterov=True),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (rules.RMSprop(lr=0.1, **INSIDE), optax.rmsprop(0.1)),
    "rmsprop, centered": (
        rules.RMSprop(lr=0.1, centered=True, momentum=0.5, **INSIDE),
        optax.rmsprop(0.1, centered=True, momentum=0.5),
    ),
    "rmsprop, outside": (rules.RMSprop(lr=0.1, alpha=0.9), optax.rmsprop(0.1, eps_in_sqrt=False)),
    "adam": (rules.Adam(lr=0.1), optax.adam(0.1)),
    "adamw": (rules.AdamW(lr=0.1, weight_decay=0.2), optax.adamw(0.1, weight_decay=0.2)),
}
SCHEDULE = optax.cosine_decay_schedule(0.1, decay_steps=STEPS)


@pytest.mark.parametrize("name", TWINS)
def test_a_transformation_is_its_twin_in_optax(name):
    rule, twin = TWINS[name]
    ours = train_optax(gradient_transformation(rule))
    assert_trees_agree(ours, train_optax(twin), "float32", start())


def clipped(transformation):
    return optax.chain(optax.clip_by_global_norm(1.0), transformation)


def injected(make):
    return optax.inject_hyperparams(make)(lr=SCHEDULE)


def masked(transformation):
    frozen = tree_of(lambda shape, *_: shape == (7,))
    return optax.masked(transformation, frozen)


@pytest.mark.parametrize(
    ("ours", "twin"),
    [
        (gradient_transformation(rules.Adam(), SCHEDULE), optax.adam(SCHEDULE)),
        (
            clipped(gradient_transformation(rules.AdamW(lr=0.1))),
            clipped(optax.adamw(0.1, weight_decay=0.01)),
        ),
        (
            injected(lambda lr: gradient_transformation(rules.Adam(), lr)),
            injected(lambda lr: optax.adam(lr)),
        ),
        (masked(gradient_transformation(rules.Adam(lr=0.1))), masked(optax.adam(0.1))),
        (
            optax.MultiSteps(gradient_transformation(rules.Adam(lr=0.1)), every_k_schedule=2),
            optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
        ),
    ],
    ids=["schedule", "clipped", "injected", "masked", "accumulated"],
)
def test_a_transformation_among_others(ours, twin):
    assert_trees_agree(train_optax(ours), train_optax(twin), "float32", start())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_applied_updates_give_the_new_parameters(dtype):
    """To the last bit where the parameter stays between half and twice itself."""
    rule = rules.Adam(lr=2.0**-6)
    params = {"w": np.linspace(0.25, 4, 1000).astype(dtype)}
    grads = {"w": next(gradients(1000, 1)).astype(dtype)}
    transformation = gradient_transformation(rule)
    updates, _ = transformation.update(grads, transformation.init(params), params)
    optimizer = Optimizer(rule)
    expected, _ = optimizer.step(params, optimizer.init(params), grads)
    actual = optax.apply_updates(params, updates)
    assert updates["w"].dtype == dtype
    assert_agree(actual["w"], expected["w"], "same")
    assert np.any(actual["w"] != params["w"])


def test_donated_buffers_are_used_again():
    optimizer = Optimizer(rules.Adam())
    params = jax.tree.map(jnp.asarray, start())
    state = optimizer.init(params)
    old = jax.tree.leaves([params, state])
    step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    grads = jax.tree.map(jnp.asarray, all_gradients(steps=1)[0])
    step(params, state, grads)
    assert all(array.is_deleted() for array in old)
    assert not any(array.is_deleted() for array in jax.tree.leaves(grads))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_step_needs_no_memory_of_its_own(rule):
    optimizer = Optimizer(rule)
    params = {"w": jnp.zeros((256, 256)), "v": jnp.zeros((256, 256))}
    step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    compiled = step.lower(params, optimizer.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["w"].nbytes / 100


def test_nothing_is_compiled_for_a_step_or_a_learning_rate():
    traced = 0

    def step(params, state, grads, lr):
        nonlocal traced
        traced += 1
        return Optimizer(rules.Adam(), lr).step(params, state, grads)

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.asarray, start())
    state = Optimizer(rules.Adam()).init(params)
    leaves, structure = jax.tree.flatten(start())
    numpy = portopt.Optimizer(rules.Adam(), leaves)
    for lr, grads in zip((0.1, 0.2, 0.0), all_gradients(steps=3), strict=True):
        params, state = step(params, state, grads, lr)
        numpy.param_groups[0]["lr"] = lr
        numpy.step(jax.tree.leaves(grads))
    assert traced == 1
    assert_trees_agree(params, jax.tree.unflatten(structure, leaves), "float32", start())


def test_no_parameters():
    optimizer = Optimizer(rules.Adam())
    params, state = optimizer.step({}, optimizer.init({}), {})
    assert params == {} and state.slots == {"exp_avg": {}, "exp_avg_sq": {}} and state.count == 1
    transformation = optax.masked(gradient_transformation(rules.Adam()), {"w": False})
    grads = {"w": jnp.ones(2)}
    updates, _ = transformation.update(grads, transformation.init(grads), grads)
    assert_agree(updates["w"], grads["w"], "same")


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"rule must be a portopt\.Rule"):
        Optimizer(rules.Adam)
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -1"):
        gradient_transformation(rules.Adam(), -1)
    with pytest.raises(TypeError, match="lr must be a real number, a 0-d array or a schedule"):
        Optimizer(rules.Adam(), np.zeros(2))
    with pytest.raises(TypeError, match=r"params\['n'\] must be an array of dtype .*got int32"):
        Optimizer(rules.Adam()).init({"n": jnp.zeros(2, "int32")})
    transformation = gradient_transformation(rules.Adam())
    params = {"w": jnp.zeros((2, 3))}
    state = transformation.init(params)
    with pytest.raises(ValueError, match=r"params must be given.*got None"):
        transformation.update(params, state)
    with pytest.raises(ValueError, match="grads must be a pytree like params"):
        transformation.update([params["w"]], state, params)
    with pytest.raises(ValueError, match=r"grads\['w'\] must have shape \(2, 3\), got \(3, 2\)"):
        transformation.update({"w": jnp.zeros((3, 2))}, state, params)
    for wrong in (1.0, jnp.ones((2, 3), "int32"), jnp.ones((2, 3), "complex64")):
        with pytest.raises(TypeError, match=r"grads\['w'\] must be an array of dtype .*got "):
            transformation.update({"w": wrong}, state, params)
    slots = {slot: {"w": jnp.ones((2, 3), "int32")} for slot in state.slots}
    with pytest.raises(TypeError, match=r"state.slots\['exp_avg'\]\['w'\] must be an array of"):
        transformation.update(params, state._replace(slots=slots), params)
    with pytest.raises(ValueError, match=r"state must have the slots \['exp_avg', 'exp_avg_sq'\]"):
        transformation.update(params, state._replace(slots={}), params)


@pytest.mark.parametrize("rule", [rules.ScheduleFreeAdamW(lr=0.1), rules.Adam(lr=0.1)], ids=repr)
def test_the_weights_to_evaluate_are_numpys(rule):
    optimizer, params, start = Optimizer(rule), jnp.ones(50), np.ones(50, np.float32)
    numpy = portopt.Optimizer(rule, [start])
    state = optimizer.init(params)
    for grad in gradients(50, 5):
        params, state = optimizer.step(params, state, jnp.asarray(grad))
        numpy.step([grad])
    numpy.eval()
    for evaluated in (optimizer.evaluated, jax.jit(optimizer.evaluated)):
        assert_agree(evaluated(params, state), start, "float32")
    assert np.array_equal(optimizer.evaluated(params, state), params) != rule.has_modes
    with pytest.raises(ValueError, match="state must have the slots"):
        optimizer.evaluated(params, state._replace(slots={}))
