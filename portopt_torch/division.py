"""The division of parameters, and of what is kept for them, among the workers of `Sharded`."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from portopt.sharding import Plan, Span, divide
from portopt_torch.exchange import part_of
from portopt_torch.shard import Shard


class Division:
    """Who has which parts of the parameters.

    Args:
        rank: This worker.
        size: How many there are.

    Attributes:
        plan: Who updates what.
        params: The parameters, in the plan's order.
        number: The place of each of them there.
        own: This worker's spans, by the numbers of their tensors.
        views: Of the parameters that this worker updates, its parts.
        parts: All spans of the parameters.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.plan = Plan((), (), ((),) * size)
        self.params: list[Tensor] = []
        self.number: dict[Tensor, int] = {}
        self.own: dict[int, Span] = {}
        self.views: dict[Tensor, Tensor] = {}
        self.parts: dict[Span, Tensor] = {}
        self._addresses: list[int] = []  # where the parameters were then

    def extend(self, cuttable: Mapping[Tensor, bool]) -> None:
        """Divide more parameters, those that are frozen by themselves.

        Args:
            cuttable: The parameters, each with whether it may be cut.
        """
        for trains in (True, False):
            params = [param for param in cuttable if param.requires_grad is trains]
            self.number |= {param: n for n, param in enumerate(params, len(self.params))}
            self.params += params
            more = divide(
                [param.numel() for param in params],
                len(self.plan.spans),
                whole=[place for place, param in enumerate(params) if not cuttable[param]],
                widths=[param.element_size() for param in params],
            )
            self.plan = self.plan.extended(more)
        self.own = {span.tensor: span for span in self.plan.spans[self.rank]}
        self.views |= {
            param: self._part(self.own[self.number[param]])
            for param in cuttable
            if self.number[param] in self.own
        }

    def _part(self, span: Span) -> Tensor:
        return part_of(self.params[span.tensor].detach(), span)

    def follow(self) -> None:
        """Look where the parameters are: ``module.to`` may have moved them."""
        addresses = [param.data_ptr() for param in self.params]
        if addresses != self._addresses:
            self._addresses = addresses
            self.parts = {span: self._part(span) for some in self.plan.spans for span in some}
            for param, view in self.views.items():
                view.data = self._part(self.own[self.number[param]])

    def spans_of(self, tensors: Collection[int]) -> list[list[Span]]:
        """Each worker's spans of these tensors."""
        return [[span for span in some if span.tensor in tensors] for some in self.plan.spans]

    # What is kept for parameters

    def is_cut(self, span: Span) -> bool:
        """Whether it is not all of its tensor."""
        return span.length < self.plan.sizes[span.tensor]

    def shards(self, param: Tensor, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this worker keeps for a parameter, as parts if it has not all of it."""
        span = self.own[self.number[param]]
        if not self.is_cut(span):
            return entries
        return {
            name: value if value.dim() == 0 else Shard(value, span.start, param.shape)
            for name, value in entries.items()
        }

    def empty_state(
        self, key: str, saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """An optimizer's state with room for what a checkpoint has and this worker keeps.

        What others keep is there without memory.

        Args:
            key: What the state is called in the checkpoint.
            saved: What is in that, by its names.
            groups: The groups that it is for.
        """
        params = [param for group in groups for param in group["params"]]
        ours = defaultdict(dict, enumerate(groups))
        state: dict[int, dict[str, Any]] = defaultdict(dict)
        found: dict[int, dict[str, Any]] = defaultdict(dict)
        pattern = re.compile(rf"{re.escape(key)}\.(state|param_groups)\.(\d+)\.(.+)")
        for match, meta in zip(map(pattern.fullmatch, saved), saved.values(), strict=True):
            if not match:
                continue
            place, entry = int(match[2]), match[3]
            if match[1] == "state":
                if place < len(params):
                    state[place][entry] = self._empty(params[place], meta)
            elif "." in entry:  # one of several tensors
                entry = entry.partition(".")[0]
                found[place][entry] = copy.deepcopy(ours[place].get(entry))
            elif isinstance(meta, TensorStorageMetadata):
                found[place][entry] = torch.empty(meta.size, dtype=meta.properties.dtype)
            else:
                found[place][entry] = None
        return {"state": dict(state), "param_groups": [found[place] for place in sorted(found)]}

    def _empty(self, param: Tensor, meta: TensorStorageMetadata) -> Any:
        shape, dtype = meta.size, meta.properties.dtype
        span = self.own.get(self.number[param])
        if span is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        device = param.device if shape else "cpu"
        if shape != param.shape or not self.is_cut(span):
            return torch.empty(shape, dtype=dtype, device=device)
        return Shard(torch.empty(span.length, dtype=dtype, device=device), span.start, shape)

    def described(self, state: Mapping[Tensor, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """What this worker keeps: numbers, and of a tensor the whole's shape and dtype."""
        return {
            number: {
                name: value
                if value.dim() == 0
                else (self.params[number].shape if self.is_cut(span) else value.shape, value.dtype)
                for name, value in state[self.params[number]].items()
            }
            for number, span in self.own.items()
            if self.params[number] in state
        }

    def rooms(
        self, rank: int, described: Mapping[int, Any], whole: dict[int, dict[str, Any]]
    ) -> Iterator[Tensor]:
        """Where to put what a worker keeps, in ``whole``; what needs no room is put there."""
        spans = {span.tensor: span for span in self.plan.spans[rank]}
        for number, entries in described.items():
            param, span = self.params[number], spans[number]
            for name, what in entries.items():
                if torch.is_tensor(what):
                    whole[number][name] = what
                    continue
                shape, dtype = what
                if name not in whole[number]:
                    whole[number][name] = torch.empty(shape, dtype=dtype, device=param.device)
                line = whole[number][name].view(-1)
                yield line[span.start : span.stop] if self.is_cut(span) else line

    def cut_state(
        self, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What this worker is to load of a state.

        Args:
            state_dict: The state of all parameters, or of this worker's.
            groups: The groups that it is for.

        Raises:
            ValueError: it does not fit.
        """
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
            raise ValueError(
                "loaded state dict has groups of another number or size than the optimizer's"
            )
        state: dict[Any, Any] = {}
        cut_groups = []
        for ours, theirs in zip(groups, saved, strict=True):
            keys = dict(zip(theirs["params"], ours["params"], strict=True))
            mine = [key for key, param in keys.items() if param in self.views]
            cut_groups.append({**theirs, "params": mine})
            cut_groups[-1].pop("param_names", None)
            for key in mine:
                if key in state_dict["state"]:
                    span = self.own[self.number[keys[key]]]
                    entries = state_dict["state"][key].items()
                    state[key] = {
                        k: self._cut(f"{k!r} of parameter {key}", x, span) for k, x in entries
                    }
        return {"state": state, "param_groups": cut_groups}

    def _cut(self, what: str, value: Any, span: Span) -> Any:
        param = self.params[span.tensor]
        if isinstance(value, Shard):
            has = value.start, value.local.numel(), value.shape
            if has != (span.start, span.length, param.shape):
                raise ValueError(
                    f"loaded {what} must be its elements from {span.start} to {span.stop}, is "
                    f"{value.start} to {value.start + value.local.numel()}: another number of "
                    "workers saved it; use load_checkpoint"
                )
            return value.local
        if not torch.is_tensor(value) or value.dim() == 0 or not self.is_cut(span):
            return value
        if value.shape != param.shape:
            raise ValueError(
                f"loaded {what} must have shape {tuple(param.shape)}, got {tuple(value.shape)}"
            )
        return value.reshape(-1)[span.start : span.stop].clone()
