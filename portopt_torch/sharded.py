"""`Sharded`: any of these optimizers, its state divided among the workers of a process group."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from portopt.sharding import Buffers, Plan, Span, grad_norm
from portopt.trace import specialized
from portopt_torch.collectives import WorkerError
from portopt_torch.division import Division
from portopt_torch.exchange import Exchange, part_of, rooms
from portopt_torch.launch import STORAGE
from portopt_torch.neighbours import connect
from portopt_torch.optimizer import Optimizer
from portopt_torch.plain import host


class Sharded(torch.optim.Optimizer):
    """An optimizer of which every worker keeps, and runs, one part: ZeRO's stages 1 and 2.

    Each worker has all parameters, the same on all of them. In `step` it updates its spans of them,
    by the optimizer's own kernels, and receives the others'. What it ends with is what the
    optimizer alone would have made of the averaged gradients, bit for bit.

    `step` uses up the gradients: new parameters are written and received where these were, and
    take their places when all have arrived everywhere. So there is no second copy of the model, and
    if a worker fails, parameters are as before the step (or, where another one failed right at
    the end, as after it), and not a part of them each.

    Args:
        optimizer: One of this package's, which this one takes the place of, with what state it has;
            schedulers, hooks and the like see an optimizer as ever.
        group: The workers: a process group or a 1-D ``DeviceMesh``; by default that of ``ddp``,
            else all there are.
        stage: 1: the gradients are averaged already, as ``DistributedDataParallel`` leaves them.
            2: a worker gets the averages of its spans alone, exchanged while the backward pass goes
            on, and keeps no other gradients.
        ddp: For stage 2, the ``DistributedDataParallel`` around the model, if there is one: it
            leaves the exchange to this optimizer. It keeps its own memory for all gradients, and
            those of another optimizer's parameters are averaged on all workers.
        timeout: How many seconds an exchange may take before it is an error. With NCCL it is the
            process group's own timeout that counts.

    Attributes:
        division: Who has which parts.
        collectives: The connection to the other workers.

    Raises:
        TypeError: ``optimizer`` is none of this package's, or a parameter's dtype cannot be cut.
        ValueError: the workers have different parameters, one that is not contiguous, or
            ``stage``, ``ddp`` or ``timeout`` is not allowed.

    Source:
        Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
        Models", sections 5.1 and 5.2. https://arxiv.org/abs/1910.02054

    Example::

        model = DistributedDataParallel(model)
        optimizer = Sharded(portopt_torch.AdamW(model.parameters(), lr=1e-3))
    """

    _step_supports_amp_scaling = True  # GradScaler's: a step that it skips, all have to skip

    def __init__(
        self,
        optimizer: Optimizer,
        group: Any = None,
        *,
        stage: Literal[1, 2] = 1,
        ddp: DistributedDataParallel | None = None,
        timeout: float = 300.0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be one of portopt_torch, got {optimizer!r}")
        if stage not in (1, 2) or (ddp is not None and stage == 1):
            raise ValueError(f"stage must be 1 or 2, and 2 with ddp, got {stage!r}")
        if not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if isinstance(group, DeviceMesh):
            group = group.get_group()  # raises where it has more dimensions
        group = group or (ddp.process_group if ddp else distributed.group.WORLD)
        device = next(p.device for some in optimizer.param_groups for p in some["params"])
        self.stage = stage
        self.collectives = connect(group, device, timeout)
        self.division = Division(self.collectives.rank, self.collectives.size)
        self._whole, self._local = optimizer, copy.copy(optimizer)
        self._local.param_groups, self._local.state = [], defaultdict(dict)
        self._local.into_grad = True
        own = weakref.proxy(self)  # so that all goes when this does, with its hooks
        self._local.rule_of = lambda group: own._rule_of(group)  # type: ignore[method-assign]
        self._failure: str | None = None
        self._exchange = Exchange(self) if stage == 2 and ddp is None else None
        self._reduced: set[int] = set()  # by DistributedDataParallel, since the last step
        self._reduced_twice = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._compare(self.param_groups)
        self._extend(self.param_groups)
        if ddp is not None:
            self._pool = ThreadPoolExecutor(1, "portopt")
            ddp.register_comm_hook(self, lambda own, bucket: own._reduce_bucket(bucket))
        if optimizer.state:
            self.load_state_dict(optimizer.state_dict())
            optimizer.state.clear()

    @property
    def plan(self) -> Plan:
        """Who updates what. Its tensors are numbered group by group, frozen ones last."""
        return self.division.plan

    @property
    def around(self) -> Any:
        """What stands around the rule; the norm is that of all gradients of all groups."""
        return self._whole.around

    @around.setter
    def around(self, value: Any) -> None:
        self._whole.around = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which is divided by itself; all workers do it together."""
        if any(param_group is group for group in self._whole.param_groups):  # as this one begins
            return super().add_param_group(param_group)
        self._ready()
        failure = None
        try:
            self._whole.add_param_group(param_group)
        except (TypeError, ValueError, RuntimeError) as error:
            failure = error
        try:
            self._compare([param_group], failure)
        except BaseException:
            if failure is None:
                self._whole.param_groups.pop()
            raise
        super().add_param_group(param_group)
        return self._extend([param_group])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies, which would have no connection to the other workers."""
        raise TypeError("Sharded cannot be copied or pickled: save its state_dict()")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; all workers do it together.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            WorkerError: another worker has ended, not answered in time, or is at something else:
                the error names the exchange and the timeout. Parameters are all as before the step,
                or all as after it; the state is not, so that every further step is refused, as
                after any other exception on the way: load a checkpoint into a new optimizer.
            RuntimeError: as the optimizer's own step does; or a gradient is sparse on one of the
                workers; or, in stage 2 with ``ddp``, more than one backward pass has exchanged
                since the last step or `zero_grad`; and nothing is changed.
            ValueError: stage 1, and a gradient is not there on all workers; nothing is changed.
        """
        return (self._step_unseen if torch.compiler.is_compiling() else self._step)(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ready()
        if not all(group.get("train_mode", True) for group in self.param_groups):
            raise RuntimeError("the weights are those of eval(): call train() first")
        found_inf = getattr(self, "found_inf", None)  # GradScaler's
        if found_inf is not None and self.stage == 2:
            raise RuntimeError("stage 2 takes no GradScaler: each worker sees other gradients")
        if self._reduced_twice:
            raise RuntimeError(
                "one backward pass may exchange between two steps: have the others within "
                "ddp.no_sync(), or drop their gradients by this optimizer's zero_grad()"
            )
        present = self._present()
        with self._guard():
            if found_inf is None or not host(found_inf):
                self._update(self._places(present), present)
        self._drop_grads()
        return loss

    _step_unseen = torch._disable_dynamo(_step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer`` does; a share of the gradients goes, too.

        Of a backward pass that has raised in stage 2, the rest is exchanged first, and goes.
        """
        super().zero_grad(set_to_none)
        self._reduced, self._reduced_twice = set(), False
        if self._exchange:
            self._exchange.drop()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward passes add up gradients without an exchange; for stage 2.

        A worker has all gradients meanwhile. Without it, passes add up what each exchanges.
        """
        if self._exchange is None:
            raise RuntimeError("no_sync is stage 2's: DistributedDataParallel has one of its own")
        self._exchange.waits = True
        try:
            yield
        finally:
            self._exchange.waits = False

    def eval(self) -> None:
        """See `Optimizer.eval`; all workers do it together."""
        self._switch("eval")

    def train(self) -> None:
        """See `Optimizer.train`; all workers do it together."""
        self._switch("train")

    # State

    def state_dict(self) -> dict[str, Any]:
        """This worker's part, under the optimizer's own keys, for ``torch.distributed.checkpoint``.

        A slot of a parameter that this worker has not all of is a `Shard`.
        """
        self._show_state()

        def divided(_: object, made: dict[str, Any]) -> dict[str, Any]:
            params, states = self._flat_params(), self._with_slots()
            shards = {
                key: self.division.shards(params[key], states[params[key]]) for key in made["state"]
            }
            return {**made, "state": shards}

        hook = self.register_state_dict_post_hook(divided, prepend=True)  # before the user's own
        try:
            state: dict[str, Any] = super().state_dict()
        finally:
            hook.remove()
        return state

    def _with_slots(self) -> dict[Tensor, dict[str, Any]]:
        """The states, with all slots, by the whole parameters."""
        self._tell_settings()
        views, local = self.division.views, self._local
        return {
            param: local.with_slots(theirs, views[param], self.state[param])
            for ours, theirs in zip(self.param_groups, local.param_groups, strict=True)
            for param in ours["params"]
            if param in self.state
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the unsharded optimizer, or of this class with the same division.

        That of another number of workers is loaded by `load_checkpoint`.

        Raises:
            ValueError: it does not fit; nothing is changed then.
        """
        self._check_usable()

        def take(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
            self._whole._check_state(state_dict)  # the others' parts, too
            self._local.load_state_dict(self.division.cut_state(state_dict, self.param_groups))
            return {**state_dict, "state": {}}

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(lambda _: self._show_state(), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def load_checkpoint(self, folder: Any, key: str = "optimizer") -> None:
        """Load what any number of workers, or the unsharded optimizer, saved; all do it together.

        Args:
            folder: Where ``torch.distributed.checkpoint`` saved a state, or a ``StorageReader``.
            key: What the optimizer's ``state_dict`` is called in it.

        Raises:
            ValueError: it does not fit; nothing is changed then.
        """
        is_reader = isinstance(folder, checkpoint.StorageReader)
        reader = folder if is_reader else checkpoint.FileSystemReader(folder)
        saved = reader.read_metadata().state_dict_metadata
        state = self.division.empty_state(key, saved, self.param_groups)
        if not state["param_groups"]:
            raise ValueError(f"there is no optimizer's state {key!r} in the checkpoint")
        params = self._flat_params()
        own = {n: x for n, x in state["state"].items() if params[n] in self.division.views}
        read = {key: {**state, "state": own}}
        checkpoint.load(read, storage_reader=reader, process_group=self.collectives.group)
        self.load_state_dict({**read[key], "state": state["state"] | own})

    @torch.no_grad()
    def consolidated_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """The unsharded optimizer's ``state_dict``, on one worker; all do it together.

        The parts go straight to where they belong; none needs more memory than some messages.

        Args:
            to: The worker, by its rank in the group.

        Returns:
            The state, on all other workers None.

        Raises:
            ValueError: there is no such worker.
            WorkerError: as `step` does.
        """
        if to not in range(self.collectives.size):
            raise ValueError(f"to must be a rank below {self.collectives.size}, got {to!r}")
        self._ready()
        self._show_state()
        rank, what = self.collectives.rank, "gathering of the state"
        states = self._with_slots()
        own = self.division.described(states)
        with self._guard("nothing is changed"):
            said = self.collectives.all_gather_object(own, what)
            whole: dict[int, dict[str, Any]] = defaultdict(dict)
            pieces: list[list[Tensor]] = [[] for _ in said]
            if rank == to:
                pieces = [[*self.division.rooms(r, some, whole)] for r, some in enumerate(said)]
            slots = [
                states[self.division.params[number]][name].reshape(-1)
                for number, entries in own.items()
                for name, what in entries.items()
                if not torch.is_tensor(what)
            ]
            if rank != to:
                pieces[rank] = slots
            elif slots:
                torch._foreach_copy_(pieces[rank], slots)
            self.collectives.gather(pieces, to, what)
        if rank != to:
            return None
        places = [self.division.number[param] for param in self._flat_params()]
        state = {place: whole[number] for place, number in enumerate(places) if number in whole}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def _show_state(self) -> None:
        """Let `state` have what the local optimizer's has, by the whole parameters."""
        if len(self.state) != len(self._local.state):
            self.state.clear()
            for param, view in self.division.views.items():
                if view in self._local.state:
                    self.state[param] = self._local.state[view]

    # The division

    def _compare(self, groups: Sequence[dict[str, Any]], failure: Exception | None = None) -> None:
        """Refuse, on all workers, groups that one of them refuses, or that differ.

        Args:
            groups: They.
            failure: Why this worker has refused them already.
        """
        described = None
        if failure is None:
            try:
                described = _described(groups)
            except (TypeError, ValueError) as error:
                failure = error
        own = described, failure and f"{type(failure).__name__}: {failure}"
        said = self.collectives.all_gather_object(own, "comparison of the parameters")
        if failure is not None:
            raise failure
        for rank, (other, why) in enumerate(said):
            if why is not None:
                raise ValueError(f"params must be taken by all workers, are not by {rank}: {why}")
            if other != described:
                raise ValueError(
                    "params must be the same on all workers, are of other shapes or dtypes"
                )

    def _extend(self, groups: Sequence[dict[str, Any]]) -> None:
        """Divide the parameters of groups, those that are frozen by themselves."""
        owned: dict[Tensor, bool] = {}
        for group in groups:
            rule, program = self._whole._traced(group)
            for param in group["params"]:
                own = specialized(program, rule, self.around, param.shape)
                owned[param] = own.elementwise
        self.division.extend(owned)
        for group in groups:
            views = [self.division.views.get(param) for param in group["params"]]
            mine = [view for view in views if view is not None]
            self._local.param_groups.append({**group, "params": mine})
            self._local.param_groups[-1].pop("param_names", None)
        if self._exchange:
            self._exchange.extend([param for param in owned if param.requires_grad])

    def _flat_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _rule_of(self, group: Mapping[str, Any]) -> Any:
        """A group's rule: Adafactor's depends on the first parameter, which may be elsewhere."""
        for ours, theirs in zip(self.param_groups, self._local.param_groups, strict=False):
            if theirs is group:
                group = {**group, "params": ours["params"]}
        return self._whole.rule_of(group)

    # A step

    def _ready(self) -> None:
        """Before anything that all workers do together."""
        self._check_usable()
        if self._exchange:
            self._exchange.settle()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise WorkerError(
                f"a worker has failed before: load a checkpoint into a new optimizer; it was "
                f"{self._failure}"
            )

    @contextmanager
    def _guard(self, what: str = "the parameters are those before the step") -> Iterator[None]:
        """Note that a worker fails, this one included, and say what has become of the parameters.

        Whatever ends an exchange here, the others have gone another way in it.
        """
        try:
            yield
        except BaseException as error:
            if self._failure is None:
                self._failure = f"{type(error).__name__}: {error}"
                if isinstance(error, WorkerError):
                    raise WorkerError(f"{error}; {what}: go on from a checkpoint") from error
            raise

    def _present(self) -> set[int]:
        """The tensors that have a gradient; the same on all workers."""
        grads = [param.grad for param in self.division.params]
        # What no worker takes is NaN in the sum, so that all of them refuse it.
        here = np.array([grad is not None for grad in grads], np.float64)
        here[[grad is not None and grad.is_sparse for grad in grads]] = np.nan
        with self._guard():
            if self._exchange:
                count = self._exchange.complete(here)
            else:
                count = self.collectives.all_reduce(here)
        if np.isnan(count).any():
            raise RuntimeError("a gradient must not be sparse to be sharded, on any worker")
        for number, workers in enumerate(count):
            if 0 < workers < self.collectives.size and self.stage == 1:
                shape = tuple(self.division.params[number].shape)
                raise ValueError(
                    f"a parameter of shape {shape} must have a gradient on all workers or on none, "
                    f"has one on {workers:g} of {self.collectives.size}"
                )
        return {*np.flatnonzero(count).tolist()}

    def _places(self, present: set[int]) -> dict[Span, Tensor]:
        """For all spans of tensors with a gradient, contiguous, where their new values are to go.

        Until then the averages of gradients are there: stage 1's all, stage 2's of the own spans.
        """
        spans = [*chain.from_iterable(self.division.spans_of(present))]
        if self._exchange:
            self.division.follow()
            there = self._exchange.shares | self._exchange.rooms
            own = {*self.division.own.values()}  # whose averages are there
            missing = [span for span in spans if span not in there and span not in own]
            new = rooms([self.division.parts[span] for span in missing])
            there |= dict(zip(missing, new, strict=True))
            return {span: there[span] for span in spans}
        grads: dict[int, Tensor] = {}
        seen: set[int] = set()
        for number in present:
            param = self.division.params[number]
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            if not grad.is_contiguous() or grad.data_ptr() in seen:
                grad = grad.clone(memory_format=torch.contiguous_format)
            seen.add(grad.data_ptr())
            grads[number] = grad
        return {span: part_of(grads[span.tensor], span) for span in spans}

    def _update(self, places: dict[Span, Tensor], present: set[int]) -> None:
        around, local, division = self.around, self._local, self.division
        if around.needs_norm:
            own = division.own.values() if self.stage == 2 else places
            local.grad_norm = grad_norm(
                {s: places[s].view(-1) for s in own if s in places and s.tensor in division.own},
                division.params,
                self.plan,
                self.collectives,
                _BUFFERS,
                scattered=present if self.stage == 2 else (),
            )
            if around.skip_nonfinite and not np.isfinite(local.grad_norm):
                return
        self._tell_settings()
        local.grad_scale = getattr(self, "grad_scale", None)  # GradScaler's
        division.follow()
        for param, view in division.views.items():
            view.grad = places.get(division.own[division.number[param]])
        local.step()
        for view in division.views.values():
            view.grad = None
        self._show_state()
        pieces = [[places[s] for s in some if s in places] for some in self.plan.spans]
        self.collectives.all_gather(pieces, "exchange of parameters")
        if places:
            torch._foreach_copy_([division.parts[span] for span in places], list(places.values()))

    def _tell_settings(self) -> None:
        """Let the local optimizer have what the groups, and what stands around, say now."""
        self._local.around = replace(self.around, skip_nonfinite=False, zero_grad=False)
        for ours, theirs in zip(self.param_groups, self._local.param_groups, strict=True):
            theirs.update(
                {key: value for key, value in ours.items() if key in theirs and key != "params"}
            )

    def _drop_grads(self) -> None:
        self._reduced, self._reduced_twice = set(), False
        grads = [param.grad for param in self.division.params if param.grad is not None]
        if self.around.zero_grad and grads:
            torch._foreach_zero_(grads)
        else:
            for param in self.division.params:
                param.grad = None
        if self._exchange:
            self._exchange.drop()

    @torch.no_grad()
    def _switch(self, mode: str) -> None:
        self._ready()
        self.division.follow()
        getattr(self._local, mode)()
        for ours, theirs in zip(self.param_groups, self._local.param_groups, strict=True):
            ours.update({key: theirs[key] for key in ("train_mode",) if key in theirs})
        pieces = [[self.division.parts[span] for span in some] for some in self.plan.spans]
        with self._guard("some parameters are those of before, others not"):
            self.collectives.all_gather(pieces, f"exchange of parameters of {mode}()")

    # Stage 2

    def _reduce_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """A hook of DistributedDataParallel: average of a bucket what is this worker's.

        What is another optimizer's is averaged on all workers.
        """
        grads, others = {}, []
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if param in self.division.number:
                grads[self.division.number[param]] = grad
            else:
                others.append(grad)
        self._reduced_twice |= not self._reduced.isdisjoint(grads)
        self._reduced |= grads.keys()
        done: torch.futures.Future[Tensor] = torch.futures.Future()

        def work() -> None:
            try:
                self.reduce(grads)
                self._average(others)
            finally:  # PyTorch cannot take an exception here; `step` raises it
                done.set_result(bucket.buffer())

        self._pool.submit(work)
        return done

    def reduce(self, grads: Mapping[int, Tensor]) -> dict[Span, Tensor]:
        """Average whole gradients over all workers, each its own spans, in place.

        Args:
            grads: Contiguous, by their numbers in the plan; the same ones on all workers.

        Returns:
            This worker's spans of them.
        """
        self._check_usable()
        with self._guard():
            spans = self.division.spans_of(grads)
            pieces = [[part_of(grads[s.tensor], s) for s in some] for some in spans]
            own = self.collectives.reduce_scatter(pieces)
        return dict(zip(spans[self.collectives.rank], own, strict=True))

    def _average(self, grads: Sequence[Tensor]) -> None:
        """Average whole gradients over all workers, in place; the same ones on all of them."""
        if not grads:
            return
        # Their elements in the order of memory, whatever axis is the innermost.
        lines = [grad.as_strided((grad.numel(),), (1,)) for grad in grads]
        parts = [line.tensor_split(self.collectives.size) for line in lines]
        pieces = [*zip(*parts, strict=True)]
        with self._guard():
            self.collectives.reduce_scatter(pieces)
            self.collectives.all_gather(pieces, "exchange of gradients")


def _described(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What all workers' groups must have alike; a TypeError or ValueError if they are refused."""
    for group in groups:
        if group.get("differentiable"):
            raise ValueError("differentiable must be False to be sharded, is True")
        for param in group["params"]:
            if param.dtype not in STORAGE or param.is_complex():
                raise TypeError(f"a parameter must be of real floats, is {param.dtype}")
            if not param.is_contiguous():
                raise ValueError(
                    f"a parameter must be contiguous, one of shape {tuple(param.shape)} is not"
                )
    return [
        [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in group["params"]]
        for group in groups
    ]


class _HostBuffers(Buffers):
    """PyTorch's tensors, also of a device."""

    def host(self, piece: Tensor) -> Any:
        return super().host(piece.cpu())


_BUFFERS = _HostBuffers()
