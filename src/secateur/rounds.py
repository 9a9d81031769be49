"""The steps of several optimizers, counted as one: a round is complete when each has stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from secateur import live_tensors
from secateur import optimizers as following
from secateur.errors import InputError, listed, warn
from secateur.scope import Scope


class Round:
    """The optimizers that are followed, and which tensors in scope were stepped since the last round.

    Args:
        scope: the tensors.
        given: the optimizers, or what holds them; none: any that steps, as they come (`add`).

    Attributes:
        given: the optimizers, and those inside them.
        waiting: names of the trainable tensors that were not stepped in this round.
        restless: of all that are followed, and those inside them, the ones that may move weights between their steps.

    Raises:
        InputTypeError: no torch Optimizer. InputError: trainable weights in scope that none of them holds.
    """

    def __init__(self, scope: Scope, given: Sequence[object] = ()) -> None:
        self.given = following.resolve(given, scope)
        self._scope = scope
        self._families: dict[int, list[Any]] = {}
        self.restless: list[Any] = []
        for one in self.given:
            self.add(one)
        self._parameters = [id(weight) for weight in scope.values()]
        self.begin()
        self._clock = following.family(given[0]) if given and not self.waiting else []  # nothing in scope is trained

    def begin(self) -> None:
        """Wait for every trainable tensor."""
        self.waiting = following.trained(self._scope)

    @property
    def optimizers(self) -> list[Any]:
        """All that are followed, and those inside them."""
        return [one for family in self._families.values() for one in family]

    def __contains__(self, optimizer: object) -> bool:
        return id(optimizer) in self._families

    def add(self, optimizer: Any) -> None:
        """Follow another one."""
        self._families[id(optimizer)] = found = following.family(optimizer)
        self.restless += [one for one in found if following.moves_outside_step(one)]

    def held(self, optimizer: Optimizer) -> set[str] | None:
        """Names of the tensors in scope that an optimizer steps; None for one that is of no concern."""
        found = self._families.get(id(optimizer), [optimizer])
        held = following.held(found, live_tensors.here(self._scope))
        return held if held or any(optimizer is one for one in self._clock) else None

    def inner(self, optimizer: Optimizer) -> bool:
        """Whether this is a step inside the step of another optimizer that counts."""
        return any(self.held(outer) is not None for outer in following.enclosing(optimizer))

    def completes(self, optimizer: Optimizer, held: set[str]) -> bool:
        """Take note of a step that was made; say whether it was the last of its round. If so, the next one begins."""
        self.waiting -= held
        if self.waiting or self.inner(optimizer):
            return False
        self.begin()
        return True

    def warn_of_renewed(self) -> None:
        """Warn if Parameters were renewed since the optimizers were last looked at, and none steps the new ones."""
        parameters = [id(weight) for weight in self._scope.values()]
        if self.given and parameters != self._parameters:
            self._parameters = parameters
            try:
                following.resolve([family[0] for family in self._families.values()], self._scope)
            except InputError as error:
                warn(str(error))

    def why_incomplete(self, *, ever: bool) -> str | None:
        """What keeps steps from being complete, and what to do; None if nothing does.

        Args:
            ever: whether a round was ever complete.
        """
        missing = listed(sorted(self.waiting)) if self.waiting else ""
        if not ever:
            return (
                f"the optimizer{missing and f' of {missing}'} never stepped; the loop may step another object than the "
                "one attached (made later, or a copy), or GradScaler skipped every step (inf or NaN in the gradients); "
                "attach what the loop steps, or attach() without arguments, which follows any"
            )
        if self.waiting and self.waiting < following.trained(self._scope):
            return (
                f"{missing} was not stepped since; a step is complete when each trainable tensor in scope was stepped: "
                "detach(), and attach() every optimizer, made from the parameters that the model has now"
            )
        return None
