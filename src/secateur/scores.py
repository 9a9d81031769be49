"""How much each weight matters: the lowest scores are pruned first.

A score is any function `(name, weight) -> Tensor` of the weight's shape. Signs are kept: -2 goes before -1.
+inf means "never prune this one". A function marked `elementwise` is called on flat pieces of the weights,
so that no second copy of the model is made. If a score has a method `prepare()`, it is called before each choice of
masks; the state of its `generator` is saved with the Pruner's. A `GradientScore` must first see gradients.

`print(sc.scores.SCORES)` lists those that have a name. A new one is a function under `@score("name")`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from secateur import scope as scopes
from secateur import sharding
from secateur.errors import InputError, InputTypeError, NotFiniteError, StateError, UnknownNameError, nearest
from secateur.scope import unwrap
from secateur.support import bits, checks
from secateur.support.process_groups import collective
from secateur.support.progress import progress_bar
from secateur.support.registry import Registry

Score = Callable[[str, Tensor], Tensor]
_F = TypeVar("_F", bound=Callable[..., Tensor])
_G = TypeVar("_G", bound=Callable[..., Any])

SCORES: Registry[Callable[..., Any]] = Registry("score", "a function (name, weight), or a dict of tensors")
"""The scores that have a name."""


def score(name: str, *, source: str = "", call: str = "") -> Callable[[_G], _G]:
    """Give a score a name, under which `prune(score=name)`, errors and the docs know it.

    What is decorated is the score itself, `(name, weight) -> Tensor`; or, for one that holds a state, what makes a
    fresh one when called without arguments.

    Args:
        name: of the score.
        source: the paper and equation it comes from.
        call: how to make it, if it needs arguments: its name alone is then refused, with this as the remedy.

    Raises:
        InputError: another score has that name.

    >>> @score("distance_to_one")
    ... def distance_to_one(name, weight):
    ...     return (weight.abs() - 1).abs()
    >>> from secateur import prune
    >>> prune(nn.Linear(10, 10), 0.9, score="distance_to_one").pruned
    90
    """

    def register(made: _G) -> _G:
        SCORES.add(name, made, source=source, call=call)
        return made

    return register


def elementwise(score: _F) -> _F:
    """Mark a score that looks at each weight alone: it is called on flat pieces of a tensor, on each more than once."""
    checks.function("score", score, "a function (name, weight)")
    score.elementwise = True  # type: ignore[attr-defined]
    return score


def by_shape(score: _F) -> _F:
    """Mark a score that looks at the name and the shape of a weight alone: of a sharded one it is given the whole
    shape, and a stand-in for the values."""
    score.by_shape = True  # type: ignore[attr-defined]
    return score


@score("magnitude", source='Han et al. 2015, "Learning both Weights and Connections"')
@elementwise
def magnitude(name: str, weight: Tensor) -> Tensor:
    """abs(w): small weights go first."""
    return weight.abs()


@score("random", source='Gale et al. 2019, "The State of Sparsity", the baseline')
def random(seed: int = 0, *, generator: torch.Generator | None = None) -> Score:
    """Uniform in [0, 1), from its own generator: the global random state is not touched.

    The numbers are drawn on the generator's device (the CPU, for a seed), so the masks are the same on any device.

    Args:
        seed: of the generator; the same seed draws the same masks.
        generator: draw from this one instead; that changes its state.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise checks.wrong("generator", generator, "a torch.Generator, or leave it out and give a seed")
    checks.whole("seed", seed, -(2**63), "a whole number of 64 bits")
    if seed >= 2**64:
        raise InputError(f"seed is {seed}: give a whole number of 64 bits")
    source = generator if generator is not None else torch.Generator().manual_seed(seed)

    @by_shape
    def score(name: str, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=source, device=source.device).to(weight.device)

    score.__name__ = "random"
    score.generator = source  # type: ignore[attr-defined]
    return score


def given(table: Mapping[str, Tensor]) -> Score:
    """Scores computed beforehand: a tensor of the weight's shape for each name in scope.

    Of a sharded weight it is the whole one, or one that is sharded in the same way.
    """
    if not isinstance(table, Mapping):
        raise checks.wrong("table", table, "a dict of tensors, one for each name in scope")

    @by_shape
    def score(name: str, weight: Tensor) -> Tensor:
        if name not in table:
            raise UnknownNameError(
                f"no score for {name}: give one for each tensor in scope, or leave it out, "
                f"scope=sc.weights(model, only=list(scores)); {nearest(name, table)}"
            )
        return table[name]

    score.table = table  # type: ignore[attr-defined]
    return score


class GradientScore:
    """A score made of gradients: call `observe` after each backward, or let `accumulate` or a Pruner do it.

    Args:
        name: of the score.
        statistic: what a batch adds to the sum, of (weight, gradient), in float32 where they are in half precision.
        score: the score, of (weight, sum).
        forget: start anew after each change of the masks, because the weights are no longer the same.
    """

    def __init__(
        self,
        name: str,
        statistic: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor] = lambda weight, total: total,
        *,
        forget: bool = True,
    ) -> None:
        checks.function("statistic", statistic, "a function (weight, gradient)")
        checks.function("score", score, "a function (weight, sum)")
        checks.flag("forget", forget)
        self.__name__ = name
        self.forget = forget
        self.sums: dict[str, Tensor] = {}
        self._statistic = statistic
        self._score = score

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.sums:
            raise StateError(
                f"the score {self.__name__} has seen no gradient of {name}: sc.accumulate(model, batches, loss), or "
                f"observe() after each backward; leave a frozen tensor out: sc.weights(model, skip=[{name!r}])"
            )
        return self._score(weight, self.sums[name])

    @torch.no_grad()
    def observe(self, scope: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None] | None = None) -> None:
        """Add one batch: the `.grad` of each tensor in `scope`, or the gradients given by name."""
        for name, weight in scope.items():
            gradient = gradients.get(name) if gradients is not None else weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            gradient = precise(bits.local(sharding.placed_as(gradient, weight)))
            added = self._statistic(precise(bits.local(weight)), gradient)
            if name in self.sums:
                self.sums[name] += added
            else:
                self.sums[name] = added.clone() if added is gradient else added

    def clear(self) -> None:
        """Forget every gradient seen."""
        self.sums = {}


def precise(tensor: Tensor) -> Tensor:
    """The same numbers, in float32 where they are in half precision.

    There a sum stands still after some hundred batches, and a square falls to zero.
    """
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


@score("taylor", source='Molchanov et al. 2019, "Importance Estimation", eq. 8 without the square')
def taylor() -> GradientScore:
    """Sum over batches of abs(w g): what the loss would change by, to first order, without the weight."""
    return GradientScore("taylor", lambda w, g: (w * g).abs())


@score("snip", source='Lee et al. 2019, "SNIP", eq. 4')
def snip() -> GradientScore:
    """abs(w sum of g): SNIP's connection sensitivity (its normalisation does not change the order)."""
    return GradientScore("snip", lambda w, g: g, lambda w, total: (w * total).abs())


@score("movement", source='Sanh et al. 2020, "Movement Pruning", eq. 5')
def movement() -> GradientScore:
    """Minus the sum of w g over the whole training: weights that move towards zero go first (signed)."""
    return GradientScore("movement", lambda w, g: -(w * g.conj()).real, forget=False)


@score("fisher", source='Theis et al. 2018, "Faster gaze prediction", eq. 6')
def fisher() -> GradientScore:
    """Sum over batches of g^2 w^2: the diagonal of the empirical Fisher information."""
    return GradientScore("fisher", lambda w, g: (w * g).abs().square())


@score(
    "synflow",
    source='Tanaka et al. 2020, "SynFlow", eq. 2 and algorithm 1',
    call="sc.scores.synflow(model, example_inputs)",
)
class synflow:
    """w dR/dw, without data: R is the sum of what the model puts out with abs(w) in place of each parameter w.

    Only the shape of an input is needed. Repeat it: prune in many small steps (`sc.geometric`).

    The model itself is not run: a copy in double precision is, with abs(w) for each parameter, on inputs of ones and
    in eval() mode; its outputs are summed to R.

    Args:
        model: its parameters as they are when the masks are chosen.
        inputs: example input or inputs; floating-point ones are replaced by ones of their shape, others kept.

    Raises:
        InputTypeError: no module, or inputs that are no tensors.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> None:
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        if not several or not all(isinstance(one, Tensor) for one in several):
            raise checks.wrong("inputs", inputs, "an example input, a Tensor or a tuple of them")
        self._model = unwrap(model)
        self._inputs = several
        self._table: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Run the backward that serves every tensor; called before the masks are chosen."""
        self._table = _synaptic_flow(self._model, self._inputs)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._table:
            raise StateError(f"{name} does not affect the output for these inputs: leave it out of the scope")
        return self._table[name]


def _synaptic_flow(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    ones = tuple(torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x for x in inputs)
    # a copy, not functional_call: that leaves the fused weights of an LSTM pointing at what it was called with
    stand_in = copy.deepcopy(model).double().eval()
    linear = dict(stand_in.named_parameters())
    for parameter in linear.values():
        parameter.requires_grad_().data.abs_()
    with torch.enable_grad():
        flow = torch.stack([tensor.sum() for tensor in _tensors(stand_in(*ones))]).sum()
        gradients = torch.autograd.grad(flow, list(linear.values()), allow_unused=True)
    pairs = zip(linear.items(), gradients, strict=True)
    return {name: (weight * gradient).detach() for (name, weight), gradient in pairs if gradient is not None}


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        out = list(out.values())
    return [tensor for part in out for tensor in _tensors(part)] if isinstance(out, (list, tuple)) else []


@score(
    "grasp",
    source='Wang et al. 2020, "GraSP", eq. 8',
    call="sc.scores.grasp(model, batches, loss)",
)
class grasp:
    """w H g: weights go first without which the gradient shrinks least, or grows (signed); before training.

    g is the gradient of the loss, summed over the batches, and H its Hessian, both of the weights in the default scope.
    It takes about as long as three gradients; `.grad` and the mode of the model are untouched.

    Of a DistributedDataParallel model each rank gives its own batches, and the sums are those of all ranks.

    Args:
        model: run as it stands, when the masks are chosen.
        batches: of data, kept; about ten examples of each class.
        loss: `loss(model, batch)` -> scalar Tensor, twice differentiable.

    Raises:
        InputTypeError: an argument of another type. InputError: no batch, a loss that is not one number or has no
            curvature.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor]) -> None:
        checks.several("batches", batches, "an iterable of batches, such as [batch] or a DataLoader")
        checks.function("loss", loss, "a function (model, batch) that returns a scalar Tensor")
        self._model, self._batches, self._loss = unwrap(model), list(batches), loss
        if not self._batches:
            raise InputError("no batch came: give an iterable of at least one batch (a generator runs only once)")
        self._parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        self._group = model.process_group if self._parallel else None
        self._table: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Compute the products that serve every tensor; called before the masks are chosen."""
        weights = {name: w for name, w in scopes.weights(self._model).items() if w.requires_grad}
        first = [torch.zeros_like(precise(weight)) for weight in weights.values()]
        products = [torch.zeros_like(precise(weight)) for weight in weights.values()]
        with torch.enable_grad():
            for batch in self._batches:
                _add(first, self._gradients(batch, weights))
            self._over_ranks(first)
            for batch in self._batches:
                pairs = zip(self._gradients(batch, weights, create_graph=True), first, strict=True)
                flow = torch.stack([(one * all_).real.sum() for one, all_ in pairs if one is not None]).sum()
                if not flow.requires_grad:
                    raise InputError("the loss has no curvature, so that no weight changes its gradient: use taylor")
                _add(products, torch.autograd.grad(flow, list(weights.values()), allow_unused=True))
        self._over_ranks(products)
        pairs_of = zip(weights.items(), products, strict=True)
        self._table = {name: weight.detach() * product for (name, weight), product in pairs_of}

    def _over_ranks(self, sums: Sequence[Tensor]) -> None:
        for total in sums if self._parallel else ():
            with collective():
                distributed.all_reduce(total, group=self._group)

    def _gradients(
        self, batch: Any, weights: Mapping[str, Tensor], create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        value = one_number(self._loss(self._model, batch))
        return torch.autograd.grad(value, list(weights.values()), allow_unused=True, create_graph=create_graph)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._table:
            raise StateError(f"{name} is frozen, or not in the default scope: leave it out of the scope")
        return self._table[name]


def _add(sums: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(sums, parts, strict=True):
        if part is not None:
            total += part.detach()


def resolve(given_score: str | Score | Mapping[str, Tensor]) -> Score:
    """Turn what a user may pass as `score=` into a function."""
    if isinstance(given_score, str):
        found = SCORES.find(given_score)
        score: Score = found() if takes_nothing(found) else found
        return score
    if isinstance(given_score, Mapping):
        return given(given_score)
    if not callable(given_score):
        raise InputTypeError(f"score is {checks.kind(given_score)}: give a name, a function (name, weight), or a dict")
    return given_score


def takes_nothing(made: Callable[..., Any]) -> bool:
    """Whether something is called without arguments: it makes a score, and is none."""
    try:
        inspect.signature(made).bind()
    except (TypeError, ValueError):  # it wants arguments, or is written in C and does not say
        return False
    return True


def evaluate(score: Score, name: str, weight: Tensor) -> Tensor:
    """Call a score on one tensor and see that what it returns can rank weights.

    Raises:
        InputTypeError: no real tensor; InputError: another shape; NotFiniteError: NaN or -inf.
    """
    checks.function("score", score, "a function (name, weight)")
    with torch.no_grad():
        found = score(name, weight.detach())
    if not isinstance(found, Tensor):
        raise InputTypeError(f"the score of {name} is {checks.kind(found)}: return a Tensor of its shape")
    found = found.detach()
    if not weight.is_meta:  # a weight without values may have a score that has some
        found = found.to(weight.device)
    if found.shape != weight.shape:
        raise InputError(f"the score of {name} has shape {tuple(found.shape)}: it must be {tuple(weight.shape)}")
    if found.is_complex():
        raise InputTypeError(f"the score of {name} is complex, which has no order: return its abs()")
    if not found.is_floating_point():
        found = found.double()
    if found.numel() and not float(found.min()) > -math.inf:  # the least of some numbers and NaN is NaN
        raise NotFiniteError(
            f"the score of {name} holds NaN or -inf: scores must be numbers, or +inf for 'never prune'"
        )
    return found


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    score: str | GradientScore = "taylor",
    scope: Mapping[str, nn.Parameter] | None = None,
    progress: bool = False,
) -> GradientScore:
    """Feed a gradient score with a few batches, without training: `.grad` and the mode of the model are untouched.

    Each rank of a DistributedDataParallel model sees its own batches, and their number may differ: the sums are
    averaged over its ranks, so that all of them choose the same masks. All ranks must call it, then. The model inside
    (DDP's `.module`) asks no other rank.

    Of a model that is spread over processes all of them must call it, with equally many batches. Under `fully_shard`
    gradients are those that a training step would see: of each batch, averaged over the processes.

    Args:
        model: run as it stands (`train()` or `eval()`).
        batches: of data; each is passed on as it comes.
        loss: `loss(model, batch)` -> scalar Tensor. It gets the model inside a DDP.
        score: the name of one made of gradients, such as "taylor", or a GradientScore to go on with.
        scope: tensors to score; by default `sc.weights(model)`.
        progress: draw a bar on stderr.

    Returns:
        The score, to be passed as `sc.prune(model, 0.9, score=...)`.

    Raises:
        InputTypeError: an argument of another type. What `loss` itself raises passes on.
        InputError: no batch came (to any rank), a score that takes no gradients, a loss that is not one number, or no
            tensor in scope that takes gradients. Of a model that is spread over processes: more batches in one of them;
            hooks of `register_post_accumulate_grad_hook`, which a backward would call.
    """
    checks.several("batches", batches, "an iterable of batches, such as [batch] or a DataLoader")
    checks.function("loss", loss, "a function (model, batch) that returns a scalar Tensor")
    checks.flag("progress", progress)
    scope = scopes.resolve(model, scope)
    gathered = resolve(score)
    if not isinstance(gathered, GradientScore):
        known = ", ".join(SCORES.written(lambda made: takes_nothing(made) and isinstance(made(), GradientScore)))
        raise InputError(f"the score {score!r} takes no gradients: choose {known}")
    trained = {name: weight for name, weight in scope.items() if weight.requires_grad}
    if not trained:
        raise InputError("every tensor in scope is frozen, so that none gets a gradient: call requires_grad_() first")
    # DDP itself counts the backwards that it sees, and these go by it
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    inner = model.module if parallel else model
    parameters = list(scopes.resharded(model).parameters())
    seen = 0
    total = len(batches) if isinstance(batches, Sized) else None
    with progress_bar("batches", total, shown=progress) as advance:
        for seen, batch in enumerate(_as_long_as_all(batches, scope), 1):  # noqa: B007
            with torch.enable_grad():
                gradients = _gradients(one_number(loss(inner, batch)), list(trained.values()), parameters)
            gathered.observe(trained, dict(zip(trained, gradients, strict=True)))
            advance(1)
    if parallel:
        seen = _average(gathered, trained, seen, model.process_group)
    if not seen:
        raise InputError("no batch came: give an iterable of at least one batch (a generator runs only once)")
    return gathered


def _as_long_as_all(batches: Iterable[Any], scope: Mapping[str, Tensor]) -> Iterator[Any]:
    """The batches; where the tensors are spread over processes, see that each of these has as many.

    Raises:
        InputError: one has more, or its batches raised.
    """
    left, end, number = iter(batches), object(), 0

    def told(batch: Any) -> dict[str, Any]:
        return {"batches": number if batch is end else f"more than {number}"}

    remedy = "Give equally many to all of them, since all take part in each backward"
    while (batch := sharding.alike(scope, lambda: next(left, end), told, remedy=remedy)) is not end:
        yield batch
        number += 1


def _gradients(value: Tensor, weights: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of a loss with respect to each weight; `.grad` stays as it is.

    Args:
        value: the loss.
        weights: among the parameters.
        parameters: of the whole model. `fully_shard` puts the gradients of sharded ones into `.grad`, after a backward.

    Raises:
        InputError: a sharded model, and a hook that would step an optimizer.
    """
    if not any(map(bits.is_sharded, weights)):
        return torch.autograd.grad(value, weights, allow_unused=True)
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        raise InputError(
            "a hook of register_post_accumulate_grad_hook, such as an optimizer inside backward, would be called: "
            "accumulate first, or remove it meanwhile"
        )
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        value.backward()  # type: ignore[no-untyped-call]
        return [weight.grad for weight in weights]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def one_number(value: object) -> Tensor:
    """See that a loss is one.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        told = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss is {told}: return one number as a Tensor, computed from the weights (its mean())")
    return value


def _average(score: GradientScore, scope: Mapping[str, Tensor], seen: int, group: Any) -> int:
    """Replace the sums by their average over the ranks of a group; return the batches that all of them saw."""
    device = next(iter(scope.values())).device
    known = torch.tensor([seen, *(name in score.sums for name in scope)], device=device)
    with collective():
        distributed.all_reduce(known, group=group)
    batches: int
    batches, *ranks = known.tolist()
    for (name, weight), count in zip(scope.items(), ranks, strict=True):
        if count:
            if name not in score.sums:
                score.observe({name: weight}, {name: torch.zeros_like(weight)})
            with collective():
                distributed.all_reduce(score.sums[name], group=group)
            score.sums[name] /= distributed.get_world_size(group)
    return batches


__all__: Sequence[str] = (
    "SCORES", "GradientScore", "Score", "accumulate", "elementwise", "evaluate", "fisher", "given", "grasp",
    "magnitude", "movement", "random", "resolve", "score", "snip", "synflow", "taylor",
)  # fmt: skip
