"""Dense weights beside the sparse ones: a pruned weight keeps its value, may go on learning, and may come back.

The model holds the sparse weights, and gives the gradients. What it does not show is kept here: the dense weights less
the shown ones. After each step of the optimizer both are added, which is the step made by the dense weights, and what
the masks leave is shown again. So at any moment but inside a step of the optimizer the model is the sparse one.

`Pruner(..., regrow=sc.feedback.sr_ste())`. `print(sc.feedback.FEEDBACKS)` lists the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur import optimizers as following
from secateur import sharding
from secateur.errors import InputError, StateError, listed
from secateur.masks import Masks
from secateur.movers import Mover
from secateur.scores import SCORES, Score, elementwise
from secateur.support import bits, checks
from secateur.support.registry import Registry

STATE = ("hidden", "logs", "cuts")
"""What a Pruner saves of it: tensors by the names of the weights; `hidden` of their shapes, the others numbers. And as
`seen` the names of those that have dense weights."""

_M = TypeVar("_M", bound=Callable[..., "Feedback"])

FEEDBACKS: Registry[Callable[..., Feedback]] = Registry("feedback", "an sc.feedback.Feedback of your own")
"""The methods that have a name: functions that make a Feedback."""


@dataclass(frozen=True)
class Feedback(Mover):
    """How pruned weights live on, and when the masks are chosen anew, freely, from the dense weights.

    Attributes:
        kind: the name of the method.
        every: steps between choices of the masks.
        stop: the step from which on the masks stay and nothing is withheld any more, or a fraction of the training
            (float, up to 1.0), of which `over(total_steps)` makes steps; None is the end, as in the papers.
        straight: pruned weights are trained by the gradients at the zeros shown (straight-through); else they rest.
        decay: times the pruned weights is added to their gradients. The weight decay of the optimizer sees only zeros.
        score: what ranks the weights, if it is part of the method.
        soft: weights are shown shrunk by the threshold below which they are pruned: sign(w) max(abs(w) - t, 0). They
            are ranked by their magnitudes over thresholds that `learn` makes differ.
        learn: with `soft`, the learning rate of the logarithms of the tensors' thresholds.

    Raises:
        InputError, InputTypeError: a value that cannot be used.
    """

    kind: str
    every: int = 1
    stop: int | float | None = None
    straight: bool = True
    decay: float = 0.0
    score: str | None = None
    soft: bool = False
    learn: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise checks.wrong("kind", self.kind, "a name")
        self.require_usable()
        checks.flag("straight", self.straight)
        checks.flag("soft", self.soft)
        for name in ("decay", "learn"):
            value = getattr(self, name)
            checks.number(name, value, "a number, 0 or more")
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}: give a number, 0 or more")
        if self.score is not None:
            if not isinstance(self.score, str):
                raise checks.wrong("score", self.score, "the name of one, or None")
            SCORES.find(self.score)
        if self.decay and not self.straight:
            raise InputError(f"decay is {self.decay}, but pruned weights rest: leave it out, or give straight=True")

    def __str__(self) -> str:
        until = f", stop={self.stop}" if self.stop is not None else ""
        return f"{self.kind}(every={self.every}{until})"


def _feedback(source: str) -> Callable[[_M], _M]:
    def register(made: _M) -> _M:
        FEEDBACKS.add(made.__name__.rstrip("_"), made, source=source)
        return made

    return register


@_feedback('Lin et al. 2020, "Dynamic Model Pruning with Feedback", algorithm 1')
def dpf(every: int = 16, decay: float = 0.0, stop: int | float | None = None) -> Feedback:
    """Gradients of the sparse model train the dense weights; masks by their magnitude, every 16 steps."""
    return Feedback("dpf", every, stop, decay=decay)


@_feedback('Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", eq. 9')
def sr_ste(decay: float = 2e-4, every: int = 1, stop: int | float | None = None) -> Feedback:
    """The same at each step, and pruned weights decay, which settles the masks; for patterns n:m from scratch."""
    return Feedback("sr_ste", every, stop, decay=decay)


@_feedback('Sanh et al. 2020, "Movement Pruning", section 4; the count, exact, in the place of the threshold')
def soft_movement(every: int = 1, stop: int | float | None = None) -> Feedback:
    """Movement scores, ranked over all tensors, also those of pruned weights, which come back as they were."""
    return Feedback("soft_movement", every, stop, straight=False, score="movement")


@_feedback('Kusupati et al. 2020, "Soft Threshold Weight Reparameterization", eq. 5; the count, exact, scales them')
def str_(every: int = 1, learn: float = 0.02, stop: int | float | None = None) -> Feedback:
    """Weights are shrunk by the threshold of their tensor; gradients learn how the thresholds differ."""
    return Feedback("str", every, stop, straight=False, soft=True, learn=learn)


class Withheld:
    """The dense weights less those that the model shows, of each tensor, and what a method learns.

    Of a DTensor only the part that is here.

    Args:
        method: how they live on.
    """

    def __init__(self, method: Feedback) -> None:
        self.method = method
        self.hidden: dict[str, Tensor] = {}
        self.logs: dict[str, Tensor] = {}
        """Logarithms of the thresholds of the tensors, of which only the differences count."""
        self.cuts: dict[str, Tensor] = {}
        """What weights are shrunk by: the largest magnitude among the pruned ones of the tensor."""
        self._looked = False
        self._marks: dict[str, str] = {}

    def ranking(self, given: str | Score | Mapping[str, Tensor]) -> str | Score | Mapping[str, Tensor]:
        """The score that the method ranks by, or the one given.

        Raises:
            InputError: the method has its own, and another was given.
        """
        own: str | Score | None = self._over_threshold if self.method.soft else self.method.score
        if own is not None and given not in ("magnitude", own):
            raise InputError(f"{self.method} ranks the weights itself: leave score out")
        return own or given

    @elementwise
    def _over_threshold(self, name: str, weight: Tensor) -> Tensor:
        """abs(w) over the threshold of its tensor."""
        return weight.abs() / self.logs[name].to(weight.device).exp() if name in self.logs else weight.abs()

    @torch.no_grad()
    def dense(self, scope: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The dense weights of some tensors."""
        return {
            name: weight + self.hidden[name].to(weight.device) if name in self.hidden else weight
            for name, weight in ((name, bits.local(weight)) for name, weight in scope.items())
        }

    def require_looked(self, step: int) -> None:
        """See that gradients were shown since the last call of this.

        Raises:
            StateError: a method that learns from them saw none.
        """
        if self.hidden and (self.method.decay or self.method.learn) and not self._looked:
            raise StateError(
                f"no gradient was shown at step {step}, from which {self.method} learns: without attach() call "
                "pruner.observe() after backward, before optimizer.step()"
            )
        self._looked = False

    @torch.no_grad()
    def look(self, scope: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Let pruned weights decay, by way of their gradients, or learn the thresholds from them.

        Args:
            scope: tensors with gradients.
            scale: what these are multiplied by.
        """
        self._looked = True
        for name, weight in scope.items():
            if weight.grad is None or name not in self.hidden:
                continue
            if self.method.decay:
                weight.grad = sharding.placed_as(weight.grad, weight)
                rest = self.hidden[name].to(weight.device, weight.grad.dtype)
                if weight.grad.is_sparse:  # rows without a gradient rest
                    weight.grad = weight.grad.coalesce()
                    rest = rest.sparse_mask(weight.grad)
                gradient = bits.local(weight.grad) if bits.is_sharded(weight.grad) else weight.grad
                gradient.add_(rest, alpha=self.method.decay * scale)
            if self.method.learn:
                slope = (weight.grad * weight.sgn().conj()).real.float().sum() * self.cuts[name].to(weight.device)
                old = self.logs.get(name, torch.zeros_like(slope))
                self.logs[name] = old.to(weight.device) + self.method.learn / scale * slope

    @torch.no_grad()
    def recall(self, scope: Mapping[str, Tensor], masks: Masks, zero: bits.Zeroer) -> None:
        """Put the dense weights into the model: what it shows, as the optimizer left it, and the rest."""
        for name, weight in scope.items():
            if name in self.hidden:
                if not self.method.straight:
                    zero(weight, masks.packed(name))
                bits.local(weight).add_(self.hidden.pop(name).to(weight.device))

    @torch.no_grad()
    def withhold(self, scope: Mapping[str, Tensor], masks: Masks, zero: bits.Zeroer, *, anew: bool = False) -> None:
        """Show what the masks leave of the dense weights that the model holds, and keep the rest.

        Args:
            scope: of tensors that hold dense weights.
            masks: what is shown.
            zero: sets what is not shown to zero.
            anew: the masks were chosen just now, so that `soft` has other thresholds.
        """
        for name, tensor in scope.items():
            weight, kept = bits.local(tensor), masks.packed(name)
            whole = weight.clone()
            zero(weight, kept)
            if not self.method.soft:
                zero(whole, ~kept)
                self.hidden[name] = whole
                continue
            if anew:
                self.cuts[name] = (whole - weight).abs().amax() if whole.numel() else whole.new_zeros(())
            least = torch.finfo(weight.dtype).tiny  # one that is kept at the threshold, as some are in bf16, is no zero
            weight.copy_(weight.sgn() * (weight.abs() - self.cuts[name].to(weight.device)).clamp_(min=least))
            self.hidden[name] = whole - weight

    @torch.no_grad()
    def mark(self, scope: Mapping[str, Tensor]) -> None:
        """Note what some tensors show, so that `moved` may see whether it was changed since."""
        self._marks |= {name: _sum(weight) for name, weight in scope.items()}

    @torch.no_grad()
    def moved(self, scope: Mapping[str, Tensor]) -> list[str]:
        """The tensors that were changed, in any part, since they were noted; the notes are forgotten."""
        marks, self._marks = self._marks, {}
        noted = {name: scope[name] for name in marks if name in scope}
        found = sharding.total(noted, {name: int(_sum(weight) != marks[name]) for name, weight in noted.items()})
        return [name for name, changed in found.items() if changed]

    def require_still(self, optimizers: Iterable[object]) -> None:
        """See that no optimizer shows weights that are withheld, or compares gradients of others.

        Raises:
            InputError: one does.
        """
        for one in optimizers:
            if isinstance(one, torch.optim.LBFGS):
                raise InputError(
                    f"LBFGS takes the curvature from gradients of one step and the next, and {self.method} shows "
                    "others in between, so that its steps have no bounds: take another optimizer, or leave regrow out"
                )
            if moving := following.moves_outside_step(one):
                raise InputError(
                    f"{self.method} keeps dense weights, which an optimizer that moves weights between its steps "
                    f"would show: {type(one).__name__} may, in {listed([f'{name}()' for name in moving])} (those of "
                    "schedule-free ones do in eval()). Take another optimizer, or leave regrow out; methods of your "
                    "own that move no weights take names that begin with an underscore"
                )

    def require_own(self, scope: Mapping[str, Tensor]) -> None:
        """See that tensors that were noted are still those to which the rest belongs.

        Raises:
            StateError: they are others.
        """
        marks = self._marks
        if moved := self.moved(scope):
            self._marks = marks
            raise StateError(
                f"{listed(moved)} changed while this pruner was detached (sc.rewind, load_state_dict, a training), and "
                f"the dense weights that {self.method} withholds belong to the old ones: load the pruner's state that "
                "was saved with these weights, or make a new Pruner"
            )

    def state_dict(self, scope: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copies of what is withheld and learned, of all tensors of a Pruner: a checkpoint that is read in place needs
        them from the first step on."""
        hidden, logs, cuts = {}, {}, {}
        for name, weight in scope.items():
            part, real = bits.local(weight), weight.dtype.to_real()
            part = self.hidden[name].clone() if name in self.hidden else torch.zeros_like(part)
            hidden[name] = sharding.spread_like(part, weight)
            if self.method.soft:
                learned = torch.promote_types(real, torch.float32)
                logs[name] = self.logs.get(name, torch.zeros((), dtype=learned)).clone()
                cuts[name] = self.cuts.get(name, torch.zeros((), dtype=real)).clone()
        return {"hidden": hidden, "logs": logs, "cuts": cuts, "seen": [*self.hidden]}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from there."""
        for key in STATE:
            setattr(self, key, {name: value.clone() for name, value in state[key].items()})
        self._marks = {}

    def settle(self, scope: Mapping[str, Tensor], masks: Masks, zero: bits.Zeroer, *, anew: bool = False) -> None:
        """After a step of the optimizer: the dense weights make it too, and what the masks leave is shown again."""
        self.recall(scope, masks, zero)
        self.withhold(scope, masks, zero, anew=anew)


def _sum(weight: Tensor) -> str:
    return repr(bits.local(weight).sum().item())  # as words a NaN is equal to itself
