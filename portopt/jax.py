"""Rules in JAX: pure functions on pytrees, for `jax.jit` and for Optax.

JAX and Optax are imported where they are used, so that this module needs neither.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

from portopt.arrays import STORAGE_DTYPES, compute_dtype
from portopt.program import Program
from portopt.rules import Rule
from portopt.rules.around import initial
from portopt.rules.base import PARAM, Slots
from portopt.trace import trace

Pytree: TypeAlias = Any
LearningRate: TypeAlias = "float | Callable[[Any], Any] | Any"


class State(NamedTuple):
    """What a rule keeps between steps: a pytree of arrays.

    Attributes:
        count: The number of steps made: a 0-d int32 array.
        slots: For each slot of the rule a pytree like the parameters'; with an empty array where
            the rule keeps none for a parameter of that shape.
        numbers: Each number of the rule (`Rule.numbers`), the same for all parameters: a 0-d
            float32 array.
    """

    count: Any
    slots: dict[str, Pytree]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """A rule at work on pytrees of JAX arrays: two pure functions, `init` and `step`.

    Args:
        rule: The rule.
        lr: A learning rate in place of the rule's: a float; a 0-d array, also one that `jax.jit`
            traces, so that another value compiles nothing; or an Optax schedule, a function of the
            number of steps made (0 at the first).

    Raises:
        TypeError: ``rule`` is no rule; ``lr`` is none of these.
        ValueError: ``lr`` is out of its range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from portopt import rules
        >>> optimizer = Optimizer(rules.Momentum(lr=0.5))
        >>> step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = step(params, state, {"w": jnp.array([1.0, 1.0])})
        >>> params
        {'w': Array([0.5, 1.5], dtype=float32)}
        >>> state.slots
        {'momentum_buffer': {'w': Array([1., 1.], dtype=float32)}}
    """

    rule: Rule
    lr: LearningRate | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a portopt.Rule, such as rules.Adam(), got {self.rule!r}")
        if isinstance(self.lr, numbers.Real):
            replace(self.rule, lr=self.lr)  # type: ignore[arg-type]  # checks it
        elif not (self.lr is None or callable(self.lr) or getattr(self.lr, "shape", None) == ()):
            raise TypeError(f"lr must be a real number, a 0-d array or a schedule, got {self.lr!r}")

    def init(self, params: Pytree) -> State:
        """The state before the first step: slots of the parameters' shapes and dtypes.

        Raises:
            TypeError: a parameter is no array of floats.
        """
        import jax
        import jax.numpy as jnp

        _check_dtypes("params", params)
        rule = self._rule(jnp.zeros((), "int32"))

        def begin(slot: str) -> Pytree:
            value = initial(rule, slot)
            if value is PARAM:
                return jax.tree.map(jnp.array, params)
            return jax.tree.map(
                lambda param: jnp.full_like(param, value, shape=_shape(rule, slot, param)), params
            )

        slots = {slot: begin(slot) for slot in rule.slots}
        numbers = {name: jnp.asarray(rule.initial(name), "float32") for name in rule.numbers}
        return State(jnp.zeros((), "int32"), slots, numbers)

    def step(self, params: Pytree, state: State, grads: Pytree) -> tuple[Pytree, State]:
        """The new parameters and the new state; changes nothing.

        Scalars are formed in float64, whatever JAX's configuration. float16 and bfloat16 are
        computed in float32 and rounded once.

        Under ``jax.jit`` donate the parameters and the state, ``donate_argnums=(0, 1)``, and the
        step needs no memory of its own: each new array takes over the buffer of the old. (XLA pairs
        donated buffers with results of equal shape in their order: so should a function that you
        put around this one.)

        Args:
            params: The parameters.
            state: What `init` or the last step returned.
            grads: Gradients, a pytree like ``params``.

        Raises:
            TypeError: a parameter, gradient or slot is no array of floats.
            ValueError: the gradients or the slots are not like the parameters.
        """
        import jax
        import jax.numpy as jnp

        rule = self._rule(state.count)
        stored = _stored(rule, grads, state, params)
        scalars, numbers = _scalars(trace(rule), rule, state)

        def update(*leaves: Any) -> dict[str, Any]:
            old = dict(zip(stored, map(jnp.asarray, leaves), strict=True))
            program = trace(rule, shape=old["param"].shape)
            own = _scalars(program, rule, state)[0] if rule.by_shape else scalars
            dtype = compute_dtype(old["param"].dtype.name)
            arrays = {key: array.astype(dtype) for key, array in old.items()}
            new = program.run(jnp, own[dtype], arrays)  # type: ignore[arg-type]
            del old["grad"]
            return {key: new.get(key, x).astype(x.dtype) for key, x in old.items()}

        rows = zip(*map(jax.tree.leaves, stored.values()), strict=True)
        structure, new = jax.tree.structure(params), [update(*row) for row in rows]

        def tree(name: str) -> Pytree:
            return jax.tree.unflatten(structure, [leaf[name] for leaf in new])

        slots = {slot: tree(slot) for slot in rule.slots}
        return tree("param"), State(state.count + 1, slots, numbers)

    def evaluated(self, params: Pytree, state: State) -> Pytree:
        """The parameters to evaluate a model with: others than to train with for some rules.

        Raises:
            TypeError, ValueError: as `step`.
        """
        import jax
        import jax.numpy as jnp

        rule = self._rule(state.count)
        stored = _stored(rule, params, state, params)

        def one(*leaves: Any) -> Any:
            old = dict(zip(stored, map(jnp.asarray, leaves), strict=True))
            dtype = compute_dtype(old["param"].dtype.name)
            arrays = {key: array.astype(dtype) for key, array in old.items()}
            new = rule.evaluated(jnp, arrays["param"], Slots(arrays))  # type: ignore[arg-type]
            return new.astype(old["param"].dtype)  # type: ignore[attr-defined]

        return jax.tree.map(one, *stored.values())

    def _rule(self, count: Any) -> Rule:
        """The rule at the learning rate of this step."""
        lr = self.rule.lr if self.lr is None else self.lr(count) if callable(self.lr) else self.lr
        values = {field.name: getattr(self.rule, field.name) for field in fields(self.rule)}
        return type(self.rule).unchecked(**{**values, "lr": lr})


def gradient_transformation(rule: Rule, lr: LearningRate | None = None) -> Any:
    """A rule as an ``optax.GradientTransformation``, to chain, mask and schedule as any other.

    Its ``update`` needs the parameters and returns ``new_param - param``, in the parameter's dtype,
    for ``optax.apply_updates`` to add again. The sum is the new parameter exactly if that lies
    between half and twice the old one (the difference of such numbers is exact); else the update
    has been rounded once more. `Optimizer.step` does without the detour.

    Args:
        rule: The rule.
        lr: As for `Optimizer`; also what ``optax.inject_hyperparams`` hands over.

    Raises:
        TypeError, ValueError: as for `Optimizer`; ``update`` as `Optimizer.step`, and a
            `ValueError` where it is not given the parameters.

    Example:
        >>> import optax
        >>> from portopt import rules
        >>> schedule = optax.cosine_decay_schedule(0.1, decay_steps=100)
        >>> optimizer = optax.chain(
        ...     optax.clip_by_global_norm(1.0),
        ...     gradient_transformation(rules.AdamW(), schedule),
        ... )
    """
    import jax
    import optax

    optimizer = Optimizer(rule, lr)

    def update(updates: Pytree, state: State, params: Pytree = None) -> tuple[Pytree, State]:
        if params is None:
            raise ValueError("params must be given, update(grads, state, params), got None")
        new, state = optimizer.step(params, state, updates)
        return jax.tree.map(lambda new, old: new - old, new, params), state

    return optax.GradientTransformation(optimizer.init, update)


def double_precision() -> Any:
    """A context in which JAX has float64, whatever its configuration."""
    import jax

    # Before jax.enable_x64 it was jax.experimental.enable_x64.
    holder: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return holder.enable_x64(True)


def _scalars(
    program: Program, rule: Rule, state: State
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """For each compute dtype the program's scalars, formed in float64, and the new numbers."""
    import jax

    with double_precision():

        def double(x: Any) -> Any:
            return x if isinstance(x, float) else jax.numpy.asarray(x, "float64")

        values = {name: double(getattr(rule, name)) for name in program.hyperparameters}
        values |= {name: double(state.numbers[name]) for name in program.numbers}
        scalars = program.scalars(values, double(state.count + 1), double)
        by_dtype = {
            dtype: {k: s if isinstance(s, float) else s.astype(dtype) for k, s in scalars.items()}
            for dtype in {compute_dtype(storage) for storage in STORAGE_DTYPES}
        }
        numbers = {k: jax.numpy.asarray(s, "float32") for k, s in program.kept(scalars).items()}
        return by_dtype, numbers


def _shape(rule: Rule, slot: str, param: Any) -> tuple[int, ...]:
    """The shape of a parameter's slot; that of an empty array for none."""
    return rule.slot_shapes(tuple(param.shape)).get(slot, (0,))


def _stored(rule: Rule, grads: Pytree, state: State, params: Pytree) -> dict[str, Pytree]:
    """The rule's arrays, each a pytree like ``params``, which is checked."""
    import jax
    import jax.numpy as jnp

    wanted, got = [[*rule.slots], [*rule.numbers]], [[*state.slots], [*state.numbers]]
    if [*map(sorted, wanted)] != [*map(sorted, got)]:
        raise ValueError(
            f"state must have the slots {wanted[0]} and the numbers {wanted[1]} of "
            f"{type(rule).__name__}, got {got[0]} and {got[1]}"
        )
    stored = {"param": params, "grad": grads}
    stored |= {slot: state.slots[slot] for slot in rule.slots}
    structure: Any = jax.tree.structure(params)
    for name, tree in stored.items():
        what = {"param": "params", "grad": "grads"}.get(name, f"state.slots[{name!r}]")
        own = jax.tree.structure(tree)
        if structure != own:
            raise ValueError(f"{what} must be a pytree like params, {structure}, got {own}")
        _check_dtypes(what, tree)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), param in zip(leaves, jax.tree.leaves(params), strict=True):
            shape = _shape(rule, name, param) if name in rule.slots else jnp.shape(param)
            if jnp.shape(leaf) != shape:
                where = what + jax.tree_util.keystr(path)
                raise ValueError(f"{where} must have shape {shape}, got {leaf.shape}")
    return stored


def _check_dtypes(what: str, tree: Pytree) -> None:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(getattr(leaf, "dtype", None), "name", type(leaf).__name__)
        if dtype not in STORAGE_DTYPES:
            where = f"{what}{jax.tree_util.keystr(path)}"
            allowed = ", ".join(STORAGE_DTYPES)
            raise TypeError(f"{where} must be an array of dtype {allowed}, got {dtype}")
