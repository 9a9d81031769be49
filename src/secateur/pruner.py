"""`prune` once, or hold a `Pruner` beside a training loop that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from secateur import plan, schedules
from secateur.allocation import Allocation
from secateur.errors import InputError, InputTypeError, MaskError, StateError
from secateur.masks import Masks, check
from secateur.patterns import Pattern
from secateur.schedules import Schedule
from secateur.scores import GradientScore, Score
from secateur.sparsity import Sparsity, fraction
from secateur.support import bits


def prune(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    score: str | Score | Mapping[str, Tensor] = "magnitude",
    allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]] = "global",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] = (),
) -> Masks:
    """Prune a model once, in place: exactly `floor(sparsity * N + 1/2)` of the N weights in scope become +0.0.

    Args:
        model: stays itself: same names, same parameters, same modules.
        sparsity: fraction of weights that become zero, 0 <= s < 1; or `{glob: fraction}` for single tensors, the
            others staying dense; or `sc.Count(n)`. Absolute: weights that are zero already count.
        score: what makes a weight worth keeping; see `secateur.scores`.
        allocation: how the budget is shared among tensors; see `secateur.allocation`.
        pattern: `sc.n_m(2, 4)`, `sc.blocks(4, 4)`, "rows", "columns"; None is free.
        scope: which tensors, from `sc.weights(model, ...)`; by default all its weight matrices.
        optimizer: one or several whose momenta of pruned weights are cleared.

    Returns:
        The masks: which weights are kept.

    Raises:
        InputError, InputTypeError: a value that cannot be used, NaN or inf in a weight.
        UnknownNameError: a name or glob that matches nothing.
        PatternError: the pattern does not fit a tensor.
        In each case the model is as it was.

    >>> masks = prune(nn.Linear(10, 10), 0.9)
    >>> masks.pruned, masks.size
    (90, 100)
    """
    chosen = plan.make(model, sparsity, score=score, allocation=allocation, pattern=pattern, scope=scope)
    optimizers = (
        [optimizer] if isinstance(optimizer, Optimizer) or not isinstance(optimizer, Iterable) else [*optimizer]
    )
    _require_held(optimizers, chosen.scope)
    masks = chosen.masks(chosen.counts())
    masks.apply(chosen.scope)
    for one in optimizers:
        _clear_state(one, chosen.scope, masks, bits.Zeroer())
    return masks


class Pruner:
    """Prunes a model while it trains, and keeps pruned weights at zero after each optimizer step.

    The model never knows: nothing is renamed, wrapped or hooked. `attach` hooks the *optimizer*; without it call
    `step` after each optimizer step. What is pruned stays pruned. One bit a weight is kept.

    Args:
        model, sparsity, score, allocation, pattern, scope: as for `prune`.
        schedule: when; a `Schedule` such as `sc.cubic(start=500, stop=4000, every=100)`, "one_shot" (at once), or a
            function `step -> sparsity` that never falls.

    Raises:
        As `prune`; the model is as it was.

    >>> model = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> pruner = Pruner(model, 0.9, schedule=Schedule("cubic", start=0, stop=20, every=5))
    >>> pruner.attach(optimizer)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 10)).sum().backward()
    ...     _ = optimizer.step()
    >>> pruner.finish().sparsity
    0.9
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        schedule: str | Schedule | Callable[[int], float] = "one_shot",
        score: str | Score | Mapping[str, Tensor] = "magnitude",
        allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]] = "global",
        pattern: str | Pattern | None = None,
        scope: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self._plan = plan.make(model, sparsity, score=score, allocation=allocation, pattern=pattern, scope=scope)
        self._schedule = _schedule(schedule, self._plan)
        self._steps = 0
        self._counts = tuple(0 for _ in self._plan.shares)
        self._masks = _all_kept(self._plan)
        self._zero = bits.Zeroer()
        self._originals: dict[str, Tensor] = {}
        self._beginning: dict[str, Any] = {}
        self._optimizers: list[Optimizer] = []
        self._hooks: list[RemovableHandle] = []
        self._waiting: set[str] = set()  # trainable tensors whose optimizer has not stepped in this round
        self._clock: Optimizer | None = None  # counts the steps where nothing in scope is trained

    @property
    def masks(self) -> Masks:
        """The masks of this moment."""
        return self._masks

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._steps

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in scope that is pruned at this moment."""
        return self._masks.pruned / self._plan.scope.size

    def attach(self, *optimizers: Optimizer) -> None:
        """Follow these optimizers: after each of their steps pruned weights are zero again and the schedule advances.

        With several, a step is complete when each that holds pruned weights has stepped. With none given, follow
        every optimizer of the process that holds pruned weights, also one that is made later or steps inside
        backward; a weight in scope that gets no gradient then holds the schedule back. A schedule that begins at step
        0 prunes now.

        Raises:
            InputTypeError: not a torch Optimizer. InputError: trainable weights in scope that none of them holds.
            StateError: attached already.
        """
        if self._hooks:
            raise StateError("this pruner is attached already: give all optimizers in one call, or detach() first")
        _require_held(optimizers, self._plan.scope)
        self._optimizers = list(optimizers)
        self._waiting = _trained(self._plan.scope)
        self._clock = optimizers[0] if optimizers and not self._waiting else None
        self._update()
        disable: Callable[[Any], Any] = torch.compiler.disable  # a compiled step calls the hooks as they are
        before, after = disable(self._before_step), disable(self._after_step)
        if optimizers:
            self._hooks = [optimizer.register_step_post_hook(after) for optimizer in optimizers]
            self._hooks += [optimizer.register_step_pre_hook(before) for optimizer in optimizers]
        else:
            self._hooks = [register_optimizer_step_post_hook(after), register_optimizer_step_pre_hook(before)]

    def detach(self) -> None:
        """Follow the optimizers no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def step(self) -> None:
        """Count one step: advance the schedule, and set pruned weights to zero again. For loops without `attach`.

        Raises:
            StateError: attached, so that steps would be counted twice.
            InputError: NaN or inf in a weight at a change of the masks; masks and weights are as they were.
        """
        if self._hooks:
            raise StateError("this pruner is attached and counts the optimizer's steps itself: do not call step() too")
        self._steps += 1
        if not self._update():
            self._remask(self._plan.scope)

    def observe(self) -> None:
        """Show a score the gradients, after backward and before `optimizer.step()`; for loops without `attach`."""
        if isinstance(self._plan.score, GradientScore):
            self._plan.score.observe(self._plan.scope)

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, so that they do not count when gradients are clipped."""
        for name, weight in self._plan.scope.items():
            if weight.grad is not None and not weight.grad.is_sparse:
                self._zero(weight.grad, self._masks.packed(name))

    def finish(self, *, lift_denormals: bool = False) -> Masks:
        """End the pruning: check that the sparsity is the one asked for, and follow the optimizers no longer.

        Args:
            lift_denormals: also replace subnormal weights, with which some CPUs compute a hundred times slower, by the
                smallest normal number of their sign; the zeros stay as they are.

        Returns:
            The final masks.

        Raises:
            StateError: the schedule has not come to its end. MaskError: zeros came back; the tensors are named.
        """
        if self._counts != self._plan.counts():
            raise StateError(
                f"after {self._steps} steps {sum(self._counts):,} weights are pruned, of the "
                f"{sum(self._plan.counts()):,} asked for: the schedule {self._schedule} has not come to its end; "
                "go on training, or give it an earlier stop"
            )
        back = check(self._plan.scope, self._masks)
        if back:
            listed = ", ".join(f"{name} ({count:,})" for name, count in back.items())
            raise MaskError(
                f"pruned weights are no longer zero: {listed}; something moved them after the last step of the pruner "
                "(an optimizer it does not follow, load_state_dict): attach() that optimizer, or call "
                "sc.remask(model, pruner.masks) and finish() again"
            )
        if lift_denormals:
            for weight in self._plan.scope.values():
                bits.lift_subnormals(weight)
        self.detach()
        return self._masks

    def snapshot(self) -> None:
        """Keep a copy of the weights in scope, so that `undo` can bring them back (their size in memory once more)."""
        self._originals = {name: weight.detach().clone() for name, weight in self._plan.scope.items()}
        self._beginning = self.state_dict()

    def undo(self) -> None:
        """Bring back the weights of the last `snapshot`, bit for bit, and go back to its step, detached.

        Raises:
            StateError: there is no snapshot.
        """
        if not self._originals:
            raise StateError("nothing to go back to: call snapshot() before pruning (it keeps a copy of the weights)")
        self.detach()
        with torch.no_grad():
            for name, weight in self._plan.scope.items():
                weight.copy_(self._originals[name])
        self.load_state_dict(self._beginning)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs beside the model's and the optimizer's: plain tensors, numbers, strings."""
        state: dict[str, Any] = {
            "version": 1,
            "settings": self._settings(),
            "steps": self._steps,
            "counts": list(self._counts),
            "shapes": {name: list(weight.shape) for name, weight in self._plan.scope.items()},
            "bits": {name: self._masks.packed(name).clone() for name in self._masks},
        }
        if isinstance(self._plan.score, GradientScore):
            state["sums"] = {name: total.clone() for name, total in self._plan.score.sums.items()}
        generator = getattr(self._plan.score, "generator", None)
        if generator is not None:
            state["generator"] = generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Pruner stopped; the model and the optimizer load their own state.

        Raises:
            InputError: no state of a Pruner, or of one with another scope, sparsity or schedule.
        """
        if state.get("version") != 1 or "bits" not in state:
            raise InputError("this is no state_dict of a Pruner of version 1")
        shapes = {name: list(weight.shape) for name, weight in self._plan.scope.items()}
        if state["shapes"] != shapes:
            theirs = set(state["shapes"])
            differ = sorted(theirs ^ set(shapes)) or [n for n in shapes if shapes[n] != state["shapes"][n]]
            raise InputError(
                f"the saved pruner has another scope ({', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}): "
                "build this one with the scope it had"
            )
        if state["settings"] != self._settings():
            raise InputError(
                f"the saved pruner was built with {state['settings']}, this one with {self._settings()}: build it alike"
            )
        devices = {name: weight.device for name, weight in self._plan.scope.items()}
        packed = {name: tensor.clone().to(devices[name]) for name, tensor in state["bits"].items()}
        self._masks = Masks.from_bits(packed, {name: torch.Size(shapes[name]) for name in packed})
        self._steps, self._counts = state["steps"], tuple(state["counts"])
        self._waiting = _trained(self._plan.scope)
        score = self._plan.score
        if isinstance(score, GradientScore):
            score.sums = {name: total.clone().to(devices[name]) for name, total in state["sums"].items()}
        if "generator" in state:
            score.generator.set_state(state["generator"])  # type: ignore[attr-defined]

    def _settings(self) -> str:
        """What two runs must have in common, in words."""
        shares = ", ".join(f"{float(share.sparsity)!r} of {share.size}" for share in self._plan.shares)
        schedule = self._schedule if isinstance(self._schedule, Schedule) else "a function"
        score = getattr(self._plan.score, "__name__", type(self._plan.score).__name__)
        return f"sparsity {shares}; schedule {schedule}; score {score}; pattern {self._plan.pattern}"

    def _update(self) -> bool:
        """Choose new masks if the schedule wants another number of zeros; say whether it did."""
        counts = self._plan.counts(self._at)
        if counts == self._counts:
            return False
        if any(new < old for new, old in zip(counts, self._counts, strict=True)):
            raise InputError(
                f"the schedule falls at step {self._steps}, from {sum(self._counts):,} pruned weights to "
                f"{sum(counts):,}: what is pruned stays pruned, so it must never fall"
            )
        masks = self._plan.masks(counts, self._masks)
        self._masks, self._counts = masks, counts
        self._remask(self._plan.scope)
        for optimizer in self._optimizers:
            _clear_state(optimizer, self._plan.scope, masks, self._zero)
        score = self._plan.score
        if isinstance(score, GradientScore) and score.forget:
            score.clear()
        return True

    def _at(self, final: Fraction) -> Fraction:
        if isinstance(self._schedule, Schedule):
            return self._schedule.sparsity(self._steps, final)
        return fraction(self._schedule(self._steps))

    def _remask(self, names: Iterable[str]) -> None:
        if any(self._counts):
            for name in names:
                self._zero(self._plan.scope[name], self._masks.packed(name))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Show the gradients to a score that needs them: those there are, or those that a closure will make."""
        score = self._plan.score
        held = _held(optimizer, self._plan.scope)
        if not isinstance(score, GradientScore) or not held or _overflown(optimizer):
            return None
        seen = {name: self._plan.scope[name] for name in held}
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            score.observe(seen)
            return None

        def watched() -> Any:
            loss = closure()
            score.observe(seen)
            return loss

        return (args[0], watched, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = _held(optimizer, self._plan.scope)
        if (not held and optimizer is not self._clock) or _overflown(optimizer):
            return
        if optimizer not in self._optimizers:
            self._optimizers.append(optimizer)
        self._waiting -= held
        if self._waiting:
            self._remask(held)
            return
        self._waiting = _trained(self._plan.scope)
        self._steps += 1
        if not self._update():
            self._remask(held)


def _schedule(given: str | Schedule | Callable[[int], float], chosen: plan.Plan) -> Schedule | Callable[[int], float]:
    found = schedules.resolve(given)
    if not isinstance(found, Schedule) and len(chosen.shares) > 1:
        raise InputError(
            "a function as schedule gives one sparsity, but each tensor has its own: use sc.cubic or another"
        )
    return found


def _all_kept(chosen: plan.Plan) -> Masks:
    return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in chosen.scope.items()})


def _require_held(optimizers: Sequence[object], scope: Mapping[str, nn.Parameter]) -> None:
    """See that these are optimizers, and that together they hold what is trained (nothing to see if there are none)."""
    held: set[str] = set()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) or "_optimizer_step_post_hooks" not in vars(optimizer):
            raise InputTypeError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer that takes step hooks: give the optimizer it "
                "wraps, or train with a Pruner and call pruner.step() after each of its steps"
            )
        held |= _held(optimizer, scope)
    missing = _trained(scope) - held
    if optimizers and missing:
        raise InputError(
            f"{', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''} is in scope and trainable, but in "
            "none of these optimizers: give every optimizer of the model in one call, freeze it with "
            "requires_grad_(False), or leave it out of the scope"
        )


def _trained(scope: Mapping[str, nn.Parameter]) -> set[str]:
    return {name for name, weight in scope.items() if weight.requires_grad}


def _overflown(optimizer: Optimizer) -> bool:
    """Whether this step is skipped, as GradScaler tells an optimizer that unscales by itself (a fused one)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _held(optimizer: Optimizer, scope: Mapping[str, nn.Parameter]) -> set[str]:
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, weight in scope.items() if id(weight) in ids}


def _clear_state(optimizer: Optimizer, scope: Mapping[str, nn.Parameter], masks: Masks, zero: bits.Zeroer) -> None:
    """Set what the optimizer remembers of pruned weights (momentum, Adam's moments) to zero."""
    for name, weight in scope.items():
        for remembered in optimizer.state.get(weight, {}).values():
            if isinstance(remembered, Tensor) and remembered.shape == weight.shape and name in masks:
                zero(remembered, masks.packed(name))
