"""`prune` once, or hold a `Pruner` beside a training loop that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur import live_tensors, plan, schedules, sharding
from secateur import optimizers as following
from secateur import pruner_states as states
from secateur import regrow as regrowth
from secateur.allocation import Allocation
from secateur.errors import InputError, MaskError, NotFiniteError, StateError, listed, warn
from secateur.feedback import Feedback, Withheld
from secateur.masks import Masks, check
from secateur.patterns import Pattern
from secateur.regrow import Regrowth
from secateur.rounds import Round
from secateur.schedules import Schedule
from secateur.scope import Scope, unwrap
from secateur.scores import GradientScore, Score
from secateur.sparsity import Sparsity
from secateur.support import bits, checks
from secateur.support.process_groups import during
from secateur.support.tables import counted

_Made = TypeVar("_Made")
_FEW = 0.1
"""Share of the weights in scope: `prune` warns of more zeros than that beyond those asked for."""


def prune(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    score: str | Score | Mapping[str, Tensor] = "magnitude",
    allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]] = "global",
    pattern: str | Pattern | None = None,
    scope: Mapping[str, nn.Parameter] | None = None,
    optimizer: Any = (),
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
        optimizer: one or several, whose momenta of pruned weights are cleared; an object that holds its optimizer in
            `.optimizer` works too.

    Returns:
        The masks: which weights are kept.

    Warns:
        SecateurWarning: many more weights are zero already than asked for; a tensor lost nearly all its weights.

    Raises:
        InputError, InputTypeError: a value that cannot be used, NaN or inf in a weight.
        UnknownNameError: a name or glob that matches nothing.
        PatternError: the pattern does not fit a tensor.
        StateError: a Pruner still follows the optimizer and holds some of these weights.
        In each case the model is as it was.

    >>> masks = prune(nn.Linear(10, 10), 0.9)
    >>> masks.pruned, masks.size
    (90, 100)
    """

    def checked() -> tuple[plan.Plan | plan.FixedMasks, list[Any]]:
        chosen = plan.of(model, sparsity, score=score, allocation=allocation, pattern=pattern, scope=scope)
        several = isinstance(optimizer, Iterable) and not isinstance(optimizer, str)
        found = following.resolve([*optimizer] if several else [optimizer], chosen.scope)
        _require_alone(found, chosen.scope)
        return chosen, found

    chosen, found = sharding.alike(unwrap(model), checked, lambda made: made[0].settings())
    with during("masks were chosen"):
        masks = chosen.masks(chosen.counts())
        pruned = [name for name, count in masks.counts().items() if count]
        loose = live_tensors.loose_zeros(chosen.scope, masks, pruned)
    forgetting = following.forgetting(found, chosen.scope, masks, bits.Zeroer())
    masks.apply(chosen.scope)
    for forget in forgetting:
        forget()
    if loose > _FEW * chosen.scope.size:
        fixed = chosen.pattern is not None and chosen.pattern.sparsity is not None
        further = "" if fixed else "; to prune further, ask for a higher sparsity"
        warn(
            f"the masks keep {counted(loose, 'weight')} whose value is zero: the model has more zeros than asked for. "
            "They may grow back in training. To hold them as well, take masks = "
            f"sc.Masks.from_zeros(sc.weights(model)){further}"
        )
    return masks


class Pruner:
    """Prunes a model while it trains, and keeps pruned weights at zero after each optimizer step.

    Nothing in the model is renamed, wrapped or hooked. `attach` hooks the *optimizer*; without it call `step` after
    each optimizer step. What is pruned stays pruned, unless `regrow` moves the masks or `ac_dc` lifts them. One
    bit a weight is kept, and with `sc.feedback` another copy of the weights.

    Args:
        model, score, allocation, pattern, scope: as for `prune`.
        sparsity: as for `prune`; or masks to hold, while fine-tuning: `sc.Pruner(model, masks)`. Masks leave nothing to
            choose: leave the other arguments at their defaults.
        schedule: when to prune; a `Schedule` such as `sc.cubic(start=500, stop=4000, every=100)`, "one_shot" (at once),
            or a function `step -> sparsity` that never falls.
        regrow: lets pruned weights come back: `sc.regrow.rigl(every=100)` moves the masks at a constant number of zeros
            in each tensor, `sc.feedback.sr_ste()` keeps dense weights beside the model. See there.

    Raises:
        As `prune`; UnknownNameError, MaskError: masks of another model. The model is as it was.

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
        sparsity: Sparsity | Masks,
        *,
        schedule: str | Schedule | Callable[[int], float] = "one_shot",
        score: str | Score | Mapping[str, Tensor] = "magnitude",
        allocation: str | Allocation | Callable[[Mapping[str, Tensor], int], Mapping[str, int]] = "global",
        pattern: str | Pattern | None = None,
        scope: Mapping[str, nn.Parameter] | None = None,
        regrow: str | Regrowth | Feedback | None = None,
    ) -> None:
        self._model = unwrap(model)

        def checked() -> tuple[
            plan.Plan | plan.FixedMasks,
            Schedule | schedules.Function,
            Regrowth | Feedback | None,
            Withheld | None,
        ]:
            moves = regrowth.resolve(regrow)
            dense = Withheld(moves) if isinstance(moves, Feedback) else None
            by = score if dense is None else dense.ranking(score)
            chosen = plan.of(model, sparsity, score=by, allocation=allocation, pattern=pattern, scope=scope)
            chosen.require_possible()
            when = _schedule(schedule, chosen)
            regrowth.require_movable(moves, chosen)
            return chosen, when, moves, dense

        made = sharding.alike(self._model, checked, lambda made: states.settings(*made[:3]))
        self._plan, self._schedule, self._regrow, self._dense = made
        self._gradient_score = self._plan.score if isinstance(self._plan.score, GradientScore) else None
        self._generator = self._regrow.generator() if isinstance(self._regrow, Regrowth) else torch.Generator()
        self._gradients: dict[str, Tensor] = {}  # of this step, if it is one at which the masks move
        self._grown = 0
        self._steps = 0
        self._asked = self._plan.counts()
        self._counts = tuple(0 for _ in self._asked)
        self._masks = _all_kept(self._plan)
        self._zero = bits.Zeroer()
        self._originals: dict[str, Tensor] = {}
        self._beginning: dict[str, Any] = {}
        self._hooks: following.Hooks | None = None
        self._round = Round(self._plan.scope)
        self._ways: live_tensors.Ways | None = None  # by which all tensors were reached at the last step
        self._idle = False  # the step being made trains nothing
        self._around: set[int] = set()  # ids of the optimizers in whose step the last one was made
        self._found: int | None = self._at_risk()  # told of at the first step
        self._loaded = False  # since the last step; the model should be too
        self._told: set[str] = set()  # warnings given
        self._listeners: list[Callable[[dict[str, float]], object]] = []

    def __repr__(self) -> str:
        asked = sum(self._asked) / self._plan.scope.size
        return f"Pruner(sparsity={asked:.4g}, schedule={self._schedule}, steps={self._steps}, now={self.sparsity:.4g})"

    @property
    def masks(self) -> Masks:
        """The masks of this moment."""
        return self._masks

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._steps

    @property
    def model(self) -> nn.Module:
        """The model that is pruned, without the wrapper of DistributedDataParallel and the like."""
        return self._model

    @property
    def done(self) -> bool:
        """Whether the sparsity asked for is reached: from here on the number of zeros stays."""
        return self._counts == self._asked and self._schedule.ended(self._steps)

    @property
    def withholds(self) -> bool:
        """Whether dense weights are kept beside the model at this moment, as `sc.feedback` does."""
        return self._withheld is not None and bool(self._withheld.hidden)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in scope that is pruned at this moment."""
        return self._masks.pruned / self._plan.scope.size

    def metrics(self) -> dict[str, float]:
        """The sparsity of this moment, of all and of each tensor, as trackers of experiments take it.

        >>> Pruner(nn.Linear(10, 10), 0.9).metrics()
        {'pruning/step': 0, 'pruning/sparsity': 0.0, 'pruning/sparsity/weight': 0.0}

        With `regrow` also the number of weights that grew so far, as `pruning/grown`.
        """
        each = self._masks.counts()
        shares = {f"pruning/sparsity/{name}": each[name] / weight.numel() for name, weight in self._plan.scope.items()}
        grown = {"pruning/grown": self._grown} if self._regrow is not None else {}
        return {"pruning/step": self._steps, "pruning/sparsity": self.sparsity, **grown, **shares}

    def on_update(self, call: Callable[[dict[str, float]], object]) -> None:
        """Call a function with `metrics()` after each change of the masks: `pruner.on_update(wandb.log)`.

        Raises:
            InputTypeError: it cannot be called.
        """
        checks.function("call", call, "a function of a dict of numbers")
        self._listeners.append(call)

    def over(self, total_steps: int) -> None:
        """Say how long the training is, for a schedule or a regrowth in fractions of it; one in steps stays as it is.

        Callbacks of training loops do that. In a loop of your own, `schedule=sc.cubic(0.1, 0.7).over(total_steps)`.

        Args:
            total_steps: steps of the optimizer, in all.
        """
        before = self._schedule, self._regrow

        def change() -> None:
            self._schedule = self._schedule.over(total_steps)
            if self._regrow is not None:
                self._regrow = self._regrow.over(total_steps)

        try:
            self._alike(change)
        except BaseException:
            self._schedule, self._regrow = before
            raise
        if self._beginning:
            self._beginning["settings"] = self._settings()

    def attach(self, *optimizers: Any) -> None:
        """Follow these optimizers: after each of their steps pruned weights are zero again and the schedule advances.

        An object that holds its optimizer in `.optimizer` works too (accelerate, Lightning, a Trainer). An optimizer
        inside another is followed with it (SAM, Lookahead, ZeRO-1), and a step inside a step counts once. With several,
        a step is complete when each one that holds pruned weights has stepped. Without arguments, every optimizer of
        the process that holds pruned weights is followed, also one that is made later or steps inside backward; then a
        weight in scope that gets no gradient holds the schedule back. A schedule that begins at step 0 prunes now.

        Raises:
            InputTypeError: no torch Optimizer. InputError: trainable weights in scope that none of them holds; an
                optimizer state in an encoding whose zero is not known.
            StateError: attached already; another Pruner follows these weights.
        """
        first = self._alike(lambda: self._checked(optimizers))
        self._round, self._ways = first, None
        if not self._steps:  # in a run that goes on, the masks of this step were chosen then
            self._update()
        self._found = 0 if self._steps else None
        self._around = set()
        self._hooks = following.Hooks(first.given, self, self._before_step, self._after_step, self._after_wrapper)

    def _checked(self, optimizers: Sequence[object]) -> Round:
        """Some optimizers that may be attached."""
        if self._hooks is not None:
            raise StateError("this pruner is attached already: give all optimizers in one call, or detach() first")
        scope = self._live()
        first = Round(scope, optimizers)
        _require_alone(first.given, live_tensors.here(scope), self)
        following.forgetting(first.given, scope, self._masks, self._zero)  # can it be done?
        if self._withheld is not None:
            self._withheld.require_still(first.given)
            self._withheld.require_own(scope)
        return first

    def detach(self) -> None:
        """Stop following the optimizers."""
        if self._hooks is not None:
            self._hooks.remove()
            if self._withheld is not None:
                self._withheld.mark({name: self._plan.scope[name] for name in self._withheld.hidden})
        self._hooks = None

    def step(self) -> None:
        """Count one step: advance the schedule, and set pruned weights to zero again. For loops without `attach`.

        An optimizer that moves weights outside its steps (schedule-free ones do, in `eval()`) must be attached instead:
        what it remembers of pruned weights is not cleared here.

        Raises:
            StateError: attached, so that steps would be counted twice; a tensor that is no longer the model's; a
                feedback that saw no gradient.
            InputError: NaN or inf in a weight at a change of the masks; masks and weights are as they were.
        """
        if self._hooks is not None:
            raise StateError("this pruner is attached and counts the optimizer's steps itself: do not call step() too")
        if self._withheld is not None:
            self._withheld.require_looked(self._steps + 1)
        self._warn_of_troubles()
        before = self._masks
        try:
            self._advance(self._plan.scope)
        except BaseException:
            if self._masks is before:  # else it came from one that was told of the change
                self._steps -= 1
            raise
        self._tell_of_zeros()

    def observe(self) -> None:
        """Give the gradients to the score and to `regrow`, after backward and before `optimizer.step()`.

        For loops without `attach`.
        """
        self._look(self._live())

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, so that they do not count when gradients are clipped.

        At a step at which `regrow` moves the masks they stay, and with `sc.feedback` always: they are looked at.
        """
        if self._withheld is not None or self._moves(self._steps + 1):
            return
        for name, weight in self._live().items():
            if weight.grad is not None and not weight.grad.is_sparse:
                self._zero(weight.grad, self._masks.packed(name))

    def finish(self, *, lift_denormals: bool = False) -> Masks:
        """End the pruning: check that the sparsity is the one asked for, and detach the optimizers.

        The zeros are counted in the model as it is now. An average of the weights (EMA, SWA) that is put in their place
        afterwards has zeros of its own: `sc.remask(average, masks)`.

        Args:
            lift_denormals: also replace numbers too small for full precision, which slow a CPU down, by the smallest
                normal ones.

        Raises:
            StateError: the schedule has not come to its end; a tensor in scope is no longer the model's.
            MaskError: pruned weights of the model are not zero.
        """
        checks.flag("lift_denormals", lift_denormals)
        scope = self._alike(self._ended)
        back = check(scope, self._masks)
        if back:
            named = ", ".join(f"{name} ({count:,})" for name, count in back.items())
            raise MaskError(
                f"pruned weights are no longer zero: {named}; something moved them after the last step of the pruner "
                "(an optimizer it does not follow, load_state_dict, an average of the weights swapped in): attach() "
                "that optimizer, or call sc.remask(model, pruner.masks) and finish() again"
            )
        loose = live_tensors.loose_zeros(scope, self._masks, scope)
        if loose:
            warn(
                f"{loose:,} weights outside the masks are zero too, so that the sparsity is "
                f"{(self._masks.pruned + loose) / scope.size:.3g} and not {self.sparsity:.3g}: they were zero before, "
                "or another pruner holds the model (detach() it)"
                + (", or they grew where no gradient comes" if self._grown else "")
            )
        live_tensors.warn_of_newcomers(self._model, scope)
        if lift_denormals:
            for weight in scope.values():
                bits.lift_subnormals(weight)
        self.detach()
        return self._masks

    def _ended(self) -> Scope:
        """The tensors in scope, seen to be the model's still; the pruning has come to its end."""
        scope = self._live()
        if not self.done:
            raise StateError(self._unfinished())
        if isinstance(self._regrow, Regrowth) and not self._grown:
            raise StateError(
                f"after {self._steps} steps no weight has grown: {self._regrow} came to no update; train longer, "
                "give a smaller every or a larger drop, or leave regrow out"
            )
        return scope

    def snapshot(self) -> None:
        """Keep a copy of the weights in scope, so that `undo` can bring them back (their size in memory once more).

        Biases, norms, buffers and the optimizer are not among them.
        """
        self._originals = {name: weight.detach().clone() for name, weight in self._live().items()}
        self._beginning = self.state_dict()

    def undo(self) -> None:
        """Bring back the weights in scope of the last `snapshot`, bit for bit, and go back to its step, detached.

        All else stays as it is now: trained biases, norms, buffers, and what an optimizer remembers.

        Raises:
            StateError: there is no snapshot, or a tensor in scope is no longer the model's.
        """
        if not self._originals:
            raise StateError("nothing to go back to: call snapshot() before pruning (it keeps a copy of the weights)")
        scope = self._live()
        self.detach()
        with torch.no_grad():
            for name, weight in scope.items():
                weight.copy_(self._originals[name])
        self.load_state_dict(self._beginning)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs beside the model's and the optimizer's: plain tensors, numbers, strings."""
        state: dict[str, Any] = {
            "version": states.VERSION,
            "settings": self._settings(),
            "steps": self._steps,
            "counts": list(self._counts),
            "shapes": {name: list(weight.shape) for name, weight in self._plan.scope.items()},
            "bits": {name: self._masks.rows(name) for name in self._masks},
        }
        if self._gradient_score is not None:
            state |= states.sums(self._gradient_score, self._plan.scope)
        generator = getattr(self._plan.score, "generator", None)
        if generator is not None:
            state["generator"] = generator.get_state()
        if self._regrow is not None:
            state["regrow"] = {"generator": self._generator.get_state(), "grown": self._grown}
        if self._dense is not None:
            state["withheld"] = self._dense.state_dict(self._plan.scope)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Pruner stopped; the model and the optimizer load their own state.

        Raises:
            InputError: no state of a Pruner, a damaged one, or one of another scope, sparsity, schedule, score,
                allocation, pattern or regrowth; nothing was changed.
        """
        scope = self._alike(lambda: self._readable(state))
        with during("the state of the Pruner was read"):
            masks = states.read_masks(state, scope)
            sums = states.read_sums(state, scope) if self._gradient_score is not None else {}
            given = self._plan.masks(()) if isinstance(self._plan, plan.FixedMasks) else None
            withheld = states.read_withheld(state, scope) if self._dense is not None else {}

        def fit() -> tuple[int, ...]:
            counts = states.read_numbers(state, masks, self._asked, exact=self._plan.pattern is None)
            if given is not None:
                states.require_same(masks, given)
            if self._regrow is not None and withheld and not self._regrow.ended(state["steps"]):
                states.require_dense([name for name, count in masks.counts().items() if count], withheld)
            return counts

        counts = self._alike(fit, **{"steps saved": state["steps"], "weights pruned": state["counts"]})
        generator = getattr(self._plan.score, "generator", None)
        if self._regrow is not None:
            self._grown = state["regrow"]["grown"]
            self._generator.set_state(state["regrow"]["generator"].cpu())
        if generator is not None:
            generator.set_state(state["generator"].cpu())
        if self._gradient_score is not None:
            self._gradient_score.sums = sums
        if self._dense is not None:
            self._dense.load_state_dict(withheld)
        self._masks, self._steps, self._counts = masks, state["steps"], counts
        self._round.begin()
        self._found, self._loaded = 0, True

    def _readable(self, state: Mapping[str, Any]) -> Scope:
        """See that this process may go on from a state, as far as it can tell by itself; the tensors in scope."""
        scope = self._live()
        states.require_whole(state)
        states.require_shapes(state["shapes"], scope)
        states.require_settings(state["settings"], self._plan, self._schedule, self._regrow)
        states.require_bits(state, scope)
        if self._gradient_score is not None:
            states.require_sums(state, scope)
        generator = getattr(self._plan.score, "generator", None)
        if generator is not None:
            states.require_generator(state, generator)
        if self._regrow is not None:
            states.require_grown(state.get("regrow"), self._generator)
        if self._dense is not None:
            states.require_withheld(state, scope)
        return scope

    # ---- processes that have parts of the model ----------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What two runs must have in common to go on with each other."""
        return states.settings(self._plan, self._schedule, self._regrow)

    def _alike(self, call: Callable[[], _Made], **more: Any) -> _Made:
        """Call a function that waits for no other process. If parts of the model are in others, they must do alike.

        Args:
            call: the function.
            more: what must be the same beside the settings and the steps, by its name in a message.

        Raises:
            InputError: others did something else, or stopped with an error.
        """
        return sharding.alike(self._model, call, lambda _: {**self._settings(), "steps made": self._steps, **more})

    # ---- the model that is there -------------------------------------------------------------------------------------

    def _live(self) -> Scope:
        """The tensors in scope, seen to be the model's still."""
        for trouble in live_tensors.troubles(self._model, self._plan.scope, self._masks):
            raise StateError(trouble)
        return self._plan.scope

    def _warn_of_troubles(self) -> None:
        """Warn, once, of tensors that are no longer the model's: a long run goes on, and `finish` refuses."""
        if self._ways is not None and self._ways.stand():
            return
        self._ways, scope = None, self._plan.scope
        troubles = [*live_tensors.troubles(self._model, scope, self._masks)]
        if troubles and len(live_tensors.here(scope)) < len(scope):
            raise StateError(troubles[0])  # a weight is computed now, so that nothing can be written into it
        for trouble in troubles:
            if trouble not in self._told:
                self._told.add(trouble)
                warn(trouble)
        self._round.warn_of_renewed()
        self._ways = None if troubles else live_tensors.ways(self._model, scope)

    def _tell_of_others(self) -> None:
        """Warn, before the first step after a state was loaded, if the weights are not those of that state."""
        if self._loaded:
            self._loaded = False
            live_tensors.warn_of_others(self._plan.scope, self._masks)

    def _tell_of_zeros(self) -> None:
        """Warn, before the first step, of zeros that nothing holds: those of a pruned checkpoint, most likely."""
        if self._found != 0:
            loose = self._at_risk() if self._found is None else self._found - self._masks.pruned
            self._found = 0
            live_tensors.warn_of_loose(loose, self._plan.scope)

    def _at_risk(self) -> int:
        """Count the zeros that are not held and may grow: those of frozen tensors stay as they are."""
        return live_tensors.loose_zeros(self._plan.scope, self._masks, following.trained(self._plan.scope))

    def _unfinished(self) -> str:
        pruned, asked = sum(self._counts), sum(self._asked)
        so_far = f"after {self._steps} steps {pruned:,} weights are pruned, of the {asked:,} asked for"
        why = f"the schedule {self._schedule} has not come to its end; go on training, or give it an earlier stop"
        if self._hooks is not None:
            why = self._round.why_incomplete(ever=self._steps > 0) or why
        elif self._steps == 0:
            why = (
                "attach(optimizer) before the loop (again after undo() or detach()), or call step() after each step of "
                "the optimizer"
            )
        return f"{so_far}: {why}"

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _advance(self, names: Iterable[str]) -> None:
        self._steps += 1
        try:
            changed = self._update(advanced=True)
        finally:
            self._gradients = {}
        if not changed:
            self._settle(names)
        if self._dense is not None and self._withheld is None:
            self._dense.hidden.clear()

    def _update(self, *, advanced: bool = False) -> bool:
        """Choose new masks if the schedule wants another number of zeros, or they are to move; say whether it did."""
        if isinstance(self._schedule, schedules.Function):  # which may say something else in another process
            counts = sharding.alike(self._model, self._counts_now, lambda counts: {"weights to prune": counts})
        else:
            counts = self._counts_now()
        try:
            with during(f"masks were chosen at step {self._steps}"):
                masks = self._masks_now(counts, advanced=advanced)
                if masks is self._masks:
                    return False
                # what grows begins at zero, in the optimizer too: dense gradients filled both
                always = masks & self._masks
            straight = self._withheld is not None and self._withheld.method.straight
            every = [] if straight else self._round.optimizers
            forgetting = following.forgetting(every, self._plan.scope, always, self._zero)
        except BaseException:
            if self._withheld is not None:
                self._settle()
            raise
        self._grown += always.pruned - masks.pruned
        changed = len({masks.pruned, always.pruned, self._masks.pruned}) > 1  # in any part
        self._masks, self._counts = masks, counts
        self._settle(masks=always, chosen=masks)
        for forget in forgetting:
            forget()
        if self._gradient_score is not None and self._gradient_score.forget:
            self._gradient_score.clear()
        if changed:
            self._tell()
        return True

    def _tell(self) -> None:
        """Tell the listeners; if one of them raises, all processes raise."""

        def tell() -> None:
            for call in self._listeners:
                call(self.metrics())

        words = f"The masks were changed in all processes, at step {self._steps}; a function given to on_update raised"
        sharding.alike(self._model, tell, lambda _: {}, remedy=words)

    def _counts_now(self) -> tuple[int, ...]:
        """How many weights of each share are to be pruned at this step.

        Raises:
            InputError: the schedule falls, or goes beyond the end.
        """
        if self.done and self._schedule.settles:
            return self._counts
        counts = self._plan.counts(lambda final: self._schedule.sparsity(self._steps, final))
        lifted = self._schedule.lifts and not any(counts)
        if not lifted and any(new < old for new, old in zip(counts, self._counts, strict=True)):
            raise InputError(
                f"the schedule falls at step {self._steps}, from {sum(self._counts):,} pruned weights to "
                f"{sum(counts):,}: the number of zeros must never fall"
            )
        if any(count > most for count, most in zip(counts, self._asked, strict=True)):
            raise InputError(
                f"the schedule goes beyond what was asked for at step {self._steps}, to {sum(counts):,} pruned weights "
                f"in place of {sum(self._asked):,}: let it end at the sparsity of the Pruner, or make that higher"
            )
        return counts

    def _masks_now(self, counts: tuple[int, ...], *, advanced: bool) -> Masks:
        """The masks that prune so many weights and have moved, if they are to; those of this moment, if they stay."""
        moves, masks = self._moves(self._steps) and advanced, self._masks
        if counts != self._counts or (moves and any(counts) and self._withheld is not None):
            held: Masks | None = masks
            self._alike(lambda: None, **{"weights to prune": counts})
            if self._withheld is not None:  # chosen among all the dense weights
                self._withheld.recall(self._plan.scope, masks, self._zero)
                held = None
            masks = self._plan.masks(counts, held) if any(counts) else _all_kept(self._plan)
            if len(masks) < len(self._plan.scope):  # the others stay dense
                masks = _all_kept(self._plan) & masks
        if moves and isinstance(self._regrow, Regrowth):
            masks = self._regrow.moved(self._plan.scope, masks, self._gradients, self._generator, self._steps)
        return masks

    @property
    def _withheld(self) -> Withheld | None:
        """The dense weights beside the model, while they may come back."""
        return None if self._regrow is not None and self._regrow.ended(self._steps) else self._dense

    def _moves(self, step: int) -> bool:
        """Whether masks move at a step."""
        return self._regrow is not None and self._regrow.due(step)

    def _look(self, seen: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Show the gradients to the score and to a feedback; keep them if the masks move at the end of this step.

        Args:
            seen: tensors in scope.
            scale: what their gradients are multiplied by.
        """
        if self._gradient_score is not None:
            dense = seen if self._withheld is None else self._withheld.dense(seen)
            gradients = {name: sharding.placed_as(w.grad, w) for name, w in seen.items() if w.grad is not None}
            self._gradient_score.observe(dense, {name: g if scale == 1 else g / scale for name, g in gradients.items()})
        if self._withheld is not None:
            self._withheld.look(seen, scale)
        if isinstance(self._regrow, Regrowth) and self._moves(self._steps + 1):
            self._gradients |= regrowth.gradients(seen)

    def _settle(
        self, names: Iterable[str] | None = None, masks: Masks | None = None, *, chosen: Masks | None = None
    ) -> None:
        """Set pruned weights to zero again, and what an optimizer remembers that may put it in their place.

        Args:
            names: of the tensors; None is all of them.
            masks: in the place of those of this moment.
            chosen: masks that were chosen just now, by which dense weights are shown and withheld.
        """
        if masks is None and any(self._counts):
            masks = self._masks
        if masks is not None:
            scope = self._plan.scope
            settled = {name: scope[name] for name in (scope if names is None else names)}
            if self._withheld is not None:
                self._withheld.settle(settled, chosen or masks, self._zero, anew=chosen is not None)
            else:
                for name, weight in settled.items():
                    self._zero(weight, masks.packed(name))
            following.forget(self._round.restless, scope, masks, self._zero)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """See that all is well, and show a score the gradients: those there are, or those that a closure will make."""
        if not self._round.given and self._round.held(optimizer) is None:
            return None
        self._warn_of_troubles()
        scope = self._plan.scope
        if optimizer not in self._round:
            _require_alone([optimizer], live_tensors.here(scope), self)
            if self._withheld is not None:
                self._withheld.require_still(following.family(optimizer))
            self._round.add(optimizer)
        looks = self._gradient_score is not None or self._withheld is not None or self._moves(self._steps + 1)
        if not looks and optimizer.state and not self._idle and self._found == 0 and not self._loaded:
            return None  # as most steps are
        held = self._round.held(optimizer)
        if held is None or self._round.inner(optimizer):
            return None
        self._tell_of_others()
        self._tell_of_zeros()
        self._idle = following.trains_nothing(optimizer, args, kwargs)
        if not looks or self._idle or following.overflown(optimizer):
            return None
        seen, scale = {name: scope[name] for name in held}, following.scale(optimizer)
        return following.after_backward(lambda: self._look(seen, scale), args, kwargs)

    def _require_unmoved(self, outer: object) -> None:
        """See that nothing moved weights since a step that was made inside that of another optimizer.

        Dense weights would get what the outer one remembers of them, added to what is withheld.
        """
        moved = self._withheld.moved(self._plan.scope) if self._withheld is not None else []
        if not moved:
            return
        for name in moved:
            self._zero(self._plan.scope[name], self._masks.packed(name))
        self._settle(moved)
        raise InputError(
            f"{type(outer).__name__ if outer else 'an optimizer'} moved {listed(moved)} after the step of the one "
            f"inside it (as Lookahead does), by what it remembers of the weights that are shown; {self._regrow} "
            "withholds others: train with the optimizer inside it alone, or leave regrow out"
        )

    def _after_wrapper(self) -> None:
        """After the step of a wrapper that takes no hooks."""
        self._require_unmoved(None)
        self._settle()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = self._round.held(optimizer)
        if held is None or following.overflown(optimizer):
            return
        if id(optimizer) in self._around:
            self._require_unmoved(optimizer)
        self._count(optimizer, held)
        if self._withheld is not None:
            self._around = {id(outer) for outer in following.enclosing(optimizer)}
            if self._around or (self._hooks is not None and self._hooks.wraps):
                self._withheld.mark({name: self._plan.scope[name] for name in held})

    def _count(self, optimizer: Optimizer, held: set[str]) -> None:
        """Count a step that was made, if it is a whole one."""
        if self._idle or not self._round.completes(optimizer, held):
            self._settle(held)
            return
        try:
            self._advance(held)
        except NotFiniteError as error:  # a long run goes on; finish() tells if the end was never reached
            self._settle(held)
            if self._gradient_score is not None:
                self._gradient_score.clear()
            if "not finite" not in self._told:
                self._told.add("not finite")
                warn(f"the masks were to change at step {self._steps}, and stay as they are: {error}")
        except BaseException:  # of a score, of a listener, an interruption: who goes on has the zeros
            self._settle(held)
            raise
        else:
            self._told.discard("not finite")


def _require_alone(optimizers: Sequence[object], scope: Mapping[str, Tensor], me: Pruner | None = None) -> None:
    """See that no other Pruner follows some optimizers (none: every optimizer) and holds weights of this scope."""
    mine = {id(parameter): name for name, parameter in scope.items()}
    for other in (other for one in optimizers or [None] for other in following.owners(one)):
        theirs = live_tensors.here(other._plan.scope) if other is not me else {}
        both = [mine[id(parameter)] for parameter in theirs.values() if id(parameter) in mine]
        if both:
            raise StateError(
                f"another pruner, {other!r}, still holds {listed(both)}: "
                "call its finish() or detach() first; if no variable holds it any more, as in a notebook cell that ran "
                "twice, make a new optimizer"
            )


def _schedule(
    given: str | Schedule | Callable[[int], float], chosen: plan.Plan | plan.FixedMasks
) -> Schedule | schedules.Function:
    if isinstance(chosen, plan.FixedMasks) and given != "one_shot":
        raise InputError("given masks are held from the start: leave the schedule out")
    found = schedules.resolve(given)
    if isinstance(found, schedules.Function) and len(chosen.shares) > 1:
        raise InputError(
            "a function as schedule gives one sparsity, but each tensor has its own: use sc.cubic or another"
        )
    return found


def _all_kept(chosen: plan.Plan | plan.FixedMasks) -> Masks:
    return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in chosen.scope.items()})
