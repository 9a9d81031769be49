"""When masks move while a model trains, and until when; `regrow` and `feedback` say how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from secateur.errors import InputError
from secateur.support import checks

_M = TypeVar("_M", bound="Mover")


class Mover:
    """What masks that move have in common; the dataclasses made from it hold these attributes.

    Attributes:
        kind: the name of the way.
        every: steps between updates.
        stop: the step from which on the masks stay; a fraction of the training (float, up to 1.0), of which `over`
            makes steps; None: they move to the end.
    """

    kind: str
    every: int
    stop: int | float | None

    def require_usable(self) -> None:
        """See that the attributes can be used.

        Raises:
            InputError, InputTypeError: they cannot; no update comes before `stop`.
        """
        checks.whole("every", self.every, 1, "a number of steps")
        if self.stop is None:
            return
        checks.number("stop", self.stop, "a step, or a fraction of the training such as 0.75")
        if isinstance(self.stop, float) and not 0 < self.stop <= 1:
            raise InputError(
                f"stop is {self.stop}: give a fraction of the training, up to 1.0, or steps without a point"
            )
        if isinstance(self.stop, int) and self.stop <= self.every:
            raise InputError(f"{self} never moves a mask: give an every that is less than stop")

    def due(self, step: int) -> bool:
        """Whether the masks move at this step.

        Raises:
            InputError: stop is a fraction of a training whose length is not known.
        """
        if isinstance(self.stop, float):
            raise InputError(
                f"{self} ends after a fraction of the training, whose length is not known: call over(total_steps), "
                "with all steps of the optimizer that the loop will make, or give stop in steps"
            )
        return step > 0 and step % self.every == 0 and not self.ended(step)

    def ended(self, step: int) -> bool:
        """Whether the masks stay from this step on."""
        return isinstance(self.stop, int) and step >= self.stop

    def over(self: _M, total_steps: int) -> _M:
        """The same with `stop` in steps, where it is a fraction of a training of `total_steps` steps of the optimizer.

        >>> from secateur import regrow
        >>> print(regrow.rigl(every=100).over(1000))
        rigl(every=100, drop=0.3, stop=750)
        """
        checks.whole("total_steps", total_steps, 1, "the number of steps in all")
        if not isinstance(self.stop, float):
            return self
        changed: dict[str, Any] = {"stop": round(self.stop * total_steps)}
        return replace(self, **changed)  # type: ignore[type-var]
