"""`Optimizer`: any rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from portopt.kernels import pool
from portopt.program import Program
from portopt.rules import Around, HyperparameterError, Rule
from portopt.trace import specialized, trace
from portopt_torch import plain
from portopt_torch.plan import Plan, add_slots, ask, begin_count, make_plan, shapes_of

NATIVE_WORDS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "beta1": "Invalid beta parameter at index 0",
    "beta2": "Invalid beta parameter at index 1",
    "etaminus": "Invalid eta values",
    "etaplus": "Invalid eta values",
    "nesterov": "Nesterov momentum requires a momentum and zero dampening",
}
"""How the optimizers of ``torch.optim`` begin their errors, where not with its name."""


def _quiet(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as ``torch.optim.Optimizer`` wraps it, which takes longer than a small step itself.

    That is left out where it does nothing: where there are no hooks, and nobody records functions.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)
    is_recorded = getattr(ctypes.PyDLL(torch._C.__file__), "_ZN2at12hasCallbacksEv", lambda: True)
    is_recorded.restype = ctypes.c_bool

    @functools.wraps(step)
    def quiet(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass's own `step` is wrapped by PyTorch: its hooks are run there.
        needed = type(self).step is quiet and (
            torch.compiler.is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or is_recorded()
        )
        return (wrapped if needed else step)(self, *args, **kwargs)

    quiet.hooked = True  # type: ignore[attr-defined]  # so that the base class leaves it alone
    return quiet


class Optimizer(torch.optim.Optimizer):
    """Base of the adapters: PyTorch's parameters, gradients and state, and a rule's arithmetic.

    A subclass says by `rule_of` which rule a parameter group means.

    A step is one launch of a kernel for all parameters, wherever their memory allows it; the others
    are updated one by one, and a warning says once why. ``foreach`` and ``fused`` mean what they
    mean in ``torch.optim``: if one is given, it chooses, and ``fused=True`` is the kernel or an
    error. Under ``torch.compile`` and with ``differentiable`` the rule runs as it stands.

    Args:
        params: Tensors, named tensors or groups, as for every ``torch.optim.Optimizer``.
        defaults: What a group holds if it does not say otherwise.
        around: What stands around the rule: clipping, an average of the weights, and the like.

    Attributes:
        around: As given, free to change between steps.

    Raises:
        ValueError, TypeError: a hyperparameter is not allowed, in the native's leading words.
        RuntimeError: ``fused=True`` along with another way; at a step: for parameters that no
            kernel takes.
    """

    keeps_step: ClassVar[bool] = True
    """Whether ``state`` counts the steps, under "step" in a 0-d float tensor."""
    may_lack: ClassVar[tuple[str, ...]] = ()
    """What a loaded group may lack, as the native's of older versions do."""
    sparse: ClassVar[str] = "no"
    """Whether gradients may be sparse: "no", "also" or "only"; then their rows alone change."""
    words: ClassVar[Mapping[str, str]] = {}
    """How errors begin for a field, where not as in `NATIVE_WORDS`."""

    _around = Around()
    _loading = False
    _plan: Plan | None = None
    # What `Sharded` tells its part:
    grad_norm: float | None = None
    """The norm of all gradients, if they are not all here."""
    into_grad = False
    """Whether new parameters are to be written into the gradients."""

    def __init__(self, params: Any, defaults: dict[str, Any], around: Around | None = None) -> None:
        self.around = around  # type: ignore[assignment]  # the setter takes None
        self._check(defaults)
        super().__init__(params, defaults)

    @property
    def around(self) -> Around:
        """What stands around the rule; it may be changed between steps."""
        return self._around

    @around.setter
    def around(self, around: Around | None) -> None:
        self._around = Around.of(around)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: whether to leave the unscaling, and skipping, to `step`."""
        return self.around.zero_grad or any(group.get("fused") for group in self.param_groups)

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> tuple[type[Rule], dict[str, Any]]:
        """The rule that a parameter group means: its class, and the fields that it sets."""
        raise NotImplementedError

    @classmethod
    def checked_as(cls, group: Mapping[str, Any]) -> tuple[type[Rule], dict[str, Any]]:
        """As `rule_of`, but the rule that says what the group may hold."""
        return cls.rule_of(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does; its hyperparameters are checked first."""
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            rule, _ = self._traced(group)
            for param in group["params"]:
                if not torch.nn.parameter.is_lazy(param):
                    shapes_of(rule, param)
        except ValueError:  # the rule takes no such parameter
            self.param_groups.pop()
            raise

    @_quiet
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        The gradient is left as it is, unless ``around`` has ``zero_grad``.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient is sparse where that is not possible, a slot has not its
                parameter's shape, two parameters have one gradient, which ``zero_grad`` is to zero,
                or ``fused=True`` with what no kernel takes; nothing is changed then. After `eval`,
                for a rule that has other weights then.
            ArithmeticError: a scalar of the rule is no real number; nothing is changed then.
            TypeError: a hyperparameter is no number, or a parameter with a gradient has a dtype
                other than float16, bfloat16, float32, float64 and their complex kin; nothing is
                changed then.
        """
        for group in self.param_groups:
            if not group.get("train_mode", True):
                raise RuntimeError("the weights are those of eval(): call train() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        launch = self._launch_unseen if compiling or plain.watcher() is not None else self._launch
        rest = launch(compiling=compiling)
        if not rest:
            return loss
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            for scalars, members in rest:
                plain.update(scalars, members)
        return loss

    def eval(self) -> None:
        """Put the weights to evaluate the model with in the place of those to train.

        They are others for the rules that average them (`Rule.has_modes`: the schedule-free ones),
        whose groups say by "train_mode" which are there.
        """
        self._switch(training=False)

    def train(self) -> None:
        """Undo `eval`, to go on training."""
        self._switch(training=True)

    @torch.no_grad()
    def _switch(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group.get("train_mode", training) != training:
                group["train_mode"] = training
                rule, _ = self._traced(group)
                for param in group["params"]:
                    if self.state.get(param):
                        plain.switch(rule, param, self.state[param], training=training)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer`` does; with zeros for slots turned on since the last step."""
        # As a hook, before the user's own.
        hook = self.register_state_dict_post_hook(lambda _, made: self._filled(made), prepend=True)
        try:
            state: dict[str, Any] = super().state_dict()
        finally:
            hook.remove()
        return state

    def _filled(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same with all slots; the optimizer itself gets none."""
        state = dict(state_dict["state"])
        for ours, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for key, param in zip(packed["params"], ours["params"], strict=True):
                if state.get(key):
                    state[key] = self.with_slots(ours, param, state[key])
        return {**state_dict, "state": state}

    def with_slots(
        self, group: Mapping[str, Any], param: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        """A parameter's state, or what it will be where slots have been turned on since."""
        rule, program = self._traced(group)
        slots = specialized(program, rule, self.around, param.shape).slots
        if all(state.get(slot) is not None for slot in slots):
            return state
        state = dict(state)
        add_slots(state, rule, slots, param)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of its native twin; tensors keep the dtype they have there.

        Raises:
            ValueError: it does not fit: other groups, a slot missing, a shape that is not the
                parameter's, a hyperparameter that is not allowed (a TypeError if it is of a wrong
                type); nothing is changed then.
        """
        if self._loading:  # one of the user's hooks loads again: ours are there already
            return super().load_state_dict(state_dict)
        # As hooks, these see the state as the user's own hooks leave it, and before it is used.
        final: dict[str, Any] = {}

        def check(_: object, state_dict: dict[str, Any]) -> None:
            self._check_state(state_dict)
            final.update(state_dict)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(
            lambda _: self._restore_dtypes(final), prepend=True
        )
        self._loading = True
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = False
            before.remove()
            after.remove()
        return None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps."""
        state: dict[str, Any] = super().__getstate__()
        # The base class adds to the defaults that it is given.
        return {**state, "defaults": dict(self.defaults), "_around": self.around}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what the states of older versions lack."""
        self._plan = None
        defaults = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = defaults  # as they were: the base class puts "differentiable" there
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            rule, program = self._traced(group)
            for param in group["params"]:
                own = self.state.get(param, {})
                for name in ("step", *program.numbers):
                    if name in own and not torch.is_tensor(own[name]):
                        own[name] = begin_count(name, rule, group, param).fill_(float(own[name]))

    def _check(self, group: Mapping[str, Any]) -> None:
        if group.get("fused"):
            for other in ("differentiable", "foreach"):
                if group.get(other):
                    raise RuntimeError(f"`fused` and `{other}` cannot be `True` together.")
        cls, values = self.checked_as(group)
        for name, value in values.items():
            if torch.is_tensor(value) and value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, got shape {value.shape}")
        try:
            cls(**{name: plain.host(value) for name, value in values.items()})
        except HyperparameterError as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            is_flag = error.name not in cls.hyperparameters()
            if is_flag and (kind is TypeError or error.name not in NATIVE_WORDS):
                raise
            usual = NATIVE_WORDS.get(error.name, f"Invalid {error.name} value")
            words = f"{self.words.get(error.name, usual)}: {error.value}"
            raise kind(f"{words} ({error.name} must be {error.allowed})") from error

    def _traced(self, group: Mapping[str, Any]) -> tuple[Rule, Program]:
        cls, values = self.rule_of(group)
        rule = cls.unchecked(**values)
        return rule, trace(rule, self.around)

    def _launch(self, *, compiling: bool) -> list[tuple[plain.Scalars, list[plain.Member]]]:
        """Launch the kernels; returns, group by group, the parameters that go the plain way."""
        around = self._scaled()
        plan = self._plan.renewed(self, around) if self._plan and not compiling else None
        if plan is None or not plan.fits(self):
            plan = self._plan = None  # what it keeps alive may go before more is made
            plan = make_plan(self, ask(self, around), compiling=compiling)
        plan.check_grads()
        values = plan.asked.values
        skip: Any = getattr(self, "found_inf", None)  # GradScaler's
        if around.needs_norm:
            norm = plan.grad_norm() if self.grad_norm is None else self.grad_norm
            if around.skip_nonfinite:
                is_bad = norm - norm != 0  # as for NaN and Inf alone
                skip = is_bad if skip is None else skip + is_bad
            values = [{**one, "grad_norm": norm} for one in values]
        if not plan.on_device:
            if skip is not None and plain.host(skip):
                plan.undo(self)
                plan.zero_grads()
                self._plan = None if plan.made else plan
                return []
            skip = None
        try:
            for batch in plan.batches:
                batch.prepare(values)
        except Exception:
            plan.undo(self)
            raise
        pool.finish([batch.run for batch in plan.batches], skip)
        if skip is not None:
            plan.zero_grads()
        self._plan = None if compiling else plan.done()
        if not plan.rest:
            return []
        work = []
        for (g, program), members in plan.rest_alike():
            on_device = compiling or self.param_groups[g].get("capturable")
            work.append((plain.Scalars(program, values[g], on_device), members))
        return work

    # The compiler is to see the rule, and none of this.
    _launch_unseen = torch._disable_dynamo(_launch)

    def _scaled(self) -> Around:
        """`around`, with the scale of GradScaler if it has set one."""
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            return self.around
        if self.around.grad_scale:
            scale = scale * self.around.grad_scale
        return Around.unchecked(**{**vars(self.around), "grad_scale": scale})

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return  # the base class has its own words for it
        for ours, theirs in zip(self.param_groups, groups, strict=True):
            lacking = [key for key in self.defaults if key not in (*theirs, *self.may_lack)]
            if lacking:
                raise ValueError(
                    f"loaded parameter group must have {lacking[0]!r}: it has {list(theirs)}"
                )
            group = {**self.defaults, **theirs, "fused": None}  # it changes nothing but the speed
            self._check(group)
            rule, program = self._traced(group)
            for key, param in zip(theirs["params"], ours["params"], strict=True):
                state = state_dict["state"].get(key) or {}
                if any(value is not None for value in state.values()):
                    shapes = shapes_of(rule, param)
                    for slot in specialized(program, rule, self.around, param.shape).slots:
                        _check_slot(key, state, slot, param, shapes.get(slot, param.shape))
                    for name in (*(["step"] if self.keeps_step else []), *program.numbers):
                        _check_count(name, key, state)

    def _restore_dtypes(self, state_dict: Mapping[str, Any]) -> None:
        """Undo the base class's cast of every state tensor to its parameter's dtype.

        A number of steps is no longer the other optimizer's own, which goes on counting with it.
        """
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            _, program = self._traced(ours)
            beside = ours.get("capturable") or ours.get("fused")
            for key, param in zip(theirs["params"], ours["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    own = self.state[param][name]
                    device = param.device
                    if name in program.numbers and not beside:
                        device = torch.device("cpu")  # as its "step", which the base class leaves
                    if name == "step" and torch.is_tensor(own):
                        self.state[param][name] = own.clone()
                    elif torch.is_tensor(value) and (value.dtype, device) != (
                        own.dtype,
                        own.device,
                    ):
                        self.state[param][name] = value.detach().to(device, copy=True)


def _check_slot(
    key: Any, state: Mapping[str, Any], slot: str, param: Tensor, shape: Sequence[int]
) -> None:
    value = state.get(slot)
    if not torch.is_tensor(value):
        raise ValueError(
            f"loaded state of parameter {key} has no tensor {slot!r}: it has {list(state)}"
        )
    if value.shape != shape:
        raise ValueError(
            f"loaded {slot!r} of parameter {key} must have shape {tuple(shape)}, got "
            f"{tuple(value.shape)}"
        )
    if not (value.is_complex() if param.is_complex() else value.is_floating_point()):
        raise ValueError(
            f"loaded {slot!r} of parameter {key} must be of a kind with its {param.dtype}, got "
            f"{value.dtype}"
        )


def _check_count(name: str, key: Any, state: Mapping[str, Any]) -> None:
    count = state.get(name)
    if not isinstance(count, int | float) and not (torch.is_tensor(count) and count.numel() == 1):
        raise ValueError(f"loaded {name!r} of parameter {key} must be a number, got {count!r}")
