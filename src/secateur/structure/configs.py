"""The config of a Hugging Face model, made to tell the sizes that a cut leaves.

`from_pretrained` makes a model from its config and fills it. So a config is right when a model made from it has tensors
of the same sizes, and with the same weights makes the same calls with the same results. Which number of a config tells
which sizes is found by doubling each of them in turn, on the meta device. transformers itself is never imported.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import listed
from secateur.structure.attributes import Edit, Edits, replay
from secateur.structure.blocks import Block, Renaming, lists
from secateur.structure.calls import Call
from secateur.structure.cut import named_tensors, twin
from secateur.structure.proof import apart, tolerance
from secateur.structure.reads import Named, strays
from secateur.structure.remains import Remains
from secateur.structure.traces import Trace
from secateur.support.inputs import Arguments

Keys = tuple[str | int, ...]
"""The way from a config to one of its numbers."""
Dim = tuple[str, int]
"""A dimension of a tensor of the state_dict."""
Knob = tuple[Keys, ...]
"""A number of a config, or several that are the same size and must change together."""
Moves = dict[Knob, dict[Dim, int]]
"""For each knob the sizes that change when it is doubled, and to what."""

_WITHIN_HEADS = re.compile("head_dim|head_size|d_kv|kv_channels")
_NO_SIZE = re.compile("(_id|_ids|_token|label2id|id2label|version|architectures|type|activation|dropout)$")
_UNUSUAL = 9240  # a size that no model has, and that everything divides
_TRIALS = 400
_NEAR = 16  # below a size that a config does not take, so many are tried
_DEPTH = re.compile("layer|depth|block")
_ROWS = re.compile("layer|depth|block|types")
_NOTHING = object()
_FEW = 2  # layers, where all are alike


@dataclass
class Untold:
    """What no config tells.

    Attributes:
        why: in words.
        call: the first call that a model made from the config makes otherwise; None if sizes are untold.
        dims: dimensions whose sizes are untold, and those that the same numbers tell.
        equal: (one dimension, another, factor): one number tells both, so that the first must keep its size of
            factor times the second. Empty if all are so.
        multiples: (dimension, of what): sizes of which the config takes multiples only.
    """

    why: str
    call: Call | None = None
    dims: Collection[Dim] = ()
    equal: Sequence[tuple[Dim, Dim, Fraction]] = ()
    multiples: Sequence[tuple[Dim, int]] = ()


class Configs:
    """The configs of the transformers models in a model, and what their numbers tell."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: dict[str, _Given] = {}
        self._found: dict[str, tuple[str, list[Trace]]] = {}  # config found for a path, as it is saved; its forwards

    def _whole(self, path: str) -> _Given:
        if path not in self._given:
            self._given[path] = _Given(self._model.get_submodule(path))
        return self._given[path]

    def follow(self, small: nn.Module, remains: Sequence[Remains], edits: Edits) -> Untold | None:
        """Let the configs, and what was made of them, follow the sizes.

        Args:
            small: the model, its tensors cut.
            remains: what is left of the results of its forwards.
            edits: takes up what is changed.

        Returns None, or what no config tells.
        """
        self._found.clear()
        for path in _roots(small):
            search = _Search(self._whole(path), small, path)
            untold = search.run(remains, edits)
            if untold is not None:
                return untold
            self._found[path] = _saved(search.module.config), search.traces
        return None

    def differ(self, small: nn.Module, traces: Sequence[Trace]) -> Untold | None:
        """What a model made from the configs computes otherwise than the small one.

        Args:
            small: the cut model, after `follow`, with all attributes right.
            traces: of its forwards.
        """
        for path in _roots(small):
            search = _Search(self._whole(path), small, path)
            saved, theirs = self._found.get(path, ("", []))
            if search.given.loads and saved != _saved(search.module.config):  # attributes have followed since
                whole = search.filled(search.module.config)
                theirs = [Trace(one.run).of(whole, one.run.arguments) for one in traces] if whole is not None else []
            for ours, other in zip(traces, theirs, strict=False):
                if not ours.run.training:
                    calls = ours.calls
                    call = calls[-1] if other.at < len(calls) else apart(ours, other, tolerance(small)).call
                    if call is not None:
                        return Untold(f"a model made from its config differs, first after {call}", call)
        return None

    def shorten(self, small: nn.Module, blocks: Sequence[Block], examples: Sequence[Arguments], edits: Edits) -> str:
        """Let the configs, and what was made of them, follow lists of modules from which some were taken.

        Args:
            small: the model without them.
            blocks: what was taken, and what the others are called now.
            examples: of the model.
            edits: takes up what is changed.

        Returns what no config tells, or an empty string.
        """
        renaming = Renaming(blocks)
        for path in _roots(small):
            before = renaming.before(path)
            count = _Count(self._whole(before), small, path, renaming)
            own = [block for block in blocks if f"{block.name}.".startswith(f"{before}." if before else "")]
            if not own or not count.given.loads:
                continue
            why = count.shorter(own, edits)
            whole = None if why else count.filled(count.config)
            if whole is not None:
                named = named_tensors(small)
                ours = Named(small, {id(t): name for name, t in named.items()})
                tied = {name: ours.names[id(t)] for name, t in named.items()}
                theirs = Named(whole, {id(t): tied.get(name, name) for name, t in named_tensors(whole).items()})
                why = next((why for arguments in examples if (why := strays(ours, theirs, arguments))), "")
                why = why and f"a model made from its config differs: {why}"
            if why:
                return why
        return ""


def _roots(model: nn.Module) -> Iterator[str]:
    """The outermost modules that transformers can save."""
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if any(
            c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
        ):
            inside = f"{path}." if path else ""
            yield path


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are made: a model that is filled later needs no random weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)  # others draw until it fits
        return kwargs["tensor"] if draws and "tensor" in kwargs else func(*args, **kwargs)


class _Given:
    """A transformers model as it was given.

    Attributes:
        config: of it.
        sizes: of its tensors.
        fresh: one that is made from the config, on the meta device; None if that fails.
        loads: whether the model can be loaded from its config.
        moves: what each number of the config tells; empty as long as nobody has asked.
        depths: numbers of layers, which may be lower in a trial.
        like: for each dimension one that is like it, and is there in a trial.
    """

    def __init__(self, module: Any) -> None:
        self.config: Any = copy.deepcopy(module.config)
        self.sizes = _sizes(module)
        self.fresh = _made(type(module), self.config)
        self.loads = self.fresh is not None and _sizes(self.fresh) == self.sizes
        self.moves: Moves = {}
        self.depths: list[Keys] = []
        self.like = {d: d for d in self.sizes}
        if self.loads:
            self._find_depths(type(module))
            for name, value in list(vars(self.config).items()):
                if value is None and not name.startswith("_") and not _NO_SIZE.search(name):
                    self._free(type(module), ((name,),))

    def _find_depths(self, kind: type[Any]) -> None:
        """Find the numbers of layers that are alike: with few of them models are faster to make."""
        for keys, value in _numbers(self.config):
            if value > _FEW and _DEPTH.search(str(keys)):
                fresh = _made(kind, _shortened(self.config, [*self.depths, keys]))
                sizes = {} if fresh is None else _sizes(fresh)
                first = {_kind(d, n): d for d, n in sizes.items()}
                like = {d: e for d, n in self.sizes.items() if (e := d if d in sizes else first.get(_kind(d, n)))}
                if (
                    sizes.keys() < set(self.like.values())
                    and like.keys() == self.sizes.keys()
                    and all(sizes[e] == self.sizes[d] for d, e in like.items())
                ):
                    self.depths, self.like = [*self.depths, keys], like

    def _free(self, kind: type[Any], knob: Knob) -> None:
        """Write down a size that by default follows from others, as n_inner of GPT-2 does, so that it may change."""
        probe = _made(kind, _shortened(_with(self.config, [(knob, _UNUSUAL)]), self.depths))
        found = {} if probe is None else _sizes(probe)
        was = {self.sizes.get(d) for d, n in found.items() if n == _UNUSUAL}
        if len(was) == 1 and (size := was.pop()) is not None:
            told = _with(self.config, [(knob, size)])
            if (fresh := _made(kind, told)) is not None and _sizes(fresh) == self.sizes:
                self.config = told


def _made(kind: type[Any], config: Any, device: str = "meta", fill: bool = False) -> Any:
    """A fresh model, as from_pretrained would make it of the saved config; None if that fails.

    With `fill`, its weights are drawn or computed as in a new model.
    """
    unfilled = contextlib.nullcontext() if fill else _Unfilled()
    for attention in (config._attn_implementation, None):  # parts of a model may not have the one of the whole
        with contextlib.suppress(Exception), _silent():  # whatever is said of numbers that do not go together
            saved = type(config).from_dict(json.loads(_saved(config)))
            saved._attn_implementation = attention
            with torch.device(device), torch.random.fork_rng(devices=[]), unfilled:
                return kind(saved)
    return None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Say nothing of numbers that are only tried."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _saved(config: Any) -> str:
    found: str = config.to_json_string()
    return found


class _Search:
    """The search for the config of one module.

    Attributes:
        was, want: its sizes in the given model and in the small one.
        traces: of a model made from the config that was found.
    """

    def __init__(self, given: _Given, small: nn.Module, path: str) -> None:
        self.small, self.path, self.given = small, path, given
        self.module: Any = small.get_submodule(path)
        self.config, self.moves = given.config, given.moves
        self.was, self.want = given.sizes, _sizes(self.module)
        self.left = _TRIALS
        self.traces: list[Trace] = []

    def full(self, dim: Dim) -> Dim:
        """A dimension by its name in the whole model."""
        return f"{self.path}.{dim[0]}".strip("."), dim[1]

    def run(self, remains: Sequence[Remains], edits: Edits) -> Untold | None:
        if not self.given.loads:
            return None
        self.remains = remains
        self.changed = {Fraction(self.want[d], n) for d, n in self.was.items() if self.want[d] != n}
        config, off = self.sized()
        fresh = self.made(config)
        if self.given.depths and not off and (fresh is None or _sizes(fresh) != self.want):
            self.given.depths, self.given.like = [], {d: d for d in self.was}  # layers are not alike after all
            self.moves.clear()
            config, off = self.sized()
            fresh = self.made(config)
        equal = [(self.full(a), self.full(b), k) for a, b, k in self.equations()]
        if off:
            why = f"no config tells the size of {_named(off)}"
            multiples = [(self.full(d), of) for d, of in ([] if equal else self.multiples(config, off))]
            return Untold(why, None, [*map(self.full, self.beside(off))], equal, multiples)
        found = self.alike(config)
        if isinstance(found, Untold):  # sizes may fit by chance: 4 heads of 19 // 4 are 1 head of 16
            return Untold(found.why, None, (), equal) if equal else found
        self.adopt(fresh if found is config else self.made(found), edits)
        return None

    def made(self, config: Any) -> Any:
        """A fresh model on the meta device; None if that fails."""
        self.left -= 1
        return _made(type(self.module), config)

    def told(self, config: Any) -> dict[Dim, int]:
        """The sizes that a config tells, read off a model of few layers; none if it cannot be made."""
        fresh, like = self.made(_shortened(config, self.given.depths)), self.given.like
        sizes = {} if fresh is None else _sizes(fresh)
        return {d: sizes[e] for d, e in like.items()} if sizes.keys() == set(like.values()) else {}

    # ------------------------------------------------------------------------------------------------------------ sizes

    def sized(self) -> tuple[Any, set[Dim]]:
        """The config that tells most sizes, and the dimensions whose sizes it does not tell."""
        if self.changed and not self.moves:
            self.probe()
        now, have = self.config, self.was
        while off := {d for d, n in self.want.items() if have[d] != n}:
            steps = self.steps(now, have, off)
            better = self.best(now, [[s] for s in steps], len(off))
            if better is None:
                better = self.best(now, map(list, itertools.combinations(steps, 2)), len(off))
            if better is None:  # a width that the old number of heads does not divide
                better = self.best(now, [s for s in self.silent(now) if len(s) == 1 and "head" in str(s)], len(off))
            if better is None:
                return now, off
            now, have = better
        return now, set()

    def probe(self) -> None:
        """Find which sizes each number tells, and each two of one value that cannot change alone."""

        def double(*knob: Keys) -> bool:
            for times in (2, 3):  # one of them may happen to be another size, at which a model has other tensors
                sizes = self.told(_with(self.config, [(knob, times * _at(self.config, knob[0]))]))
                if sizes:
                    self.moves[knob] = {
                        d: self.was[d] + (n - self.was[d]) // (times - 1) for d, n in sizes.items() if n != self.was[d]
                    }
                    return True
            return False

        stuck = [(keys, value) for keys, value in _numbers(self.config) if not double(keys)]
        for (one, a), (other, b) in itertools.combinations(stuck, 2):
            if a == b:
                double(one, other)

    def steps(self, now: Any, have: dict[Dim, int], off: set[Dim]) -> list[tuple[Knob, int]]:
        """Changes that would bring sizes nearer; those within heads last, because whole heads go first."""
        steps: list[tuple[Knob, int]] = []
        for knob, moved in sorted(self.moves.items(), key=lambda one: bool(_WITHIN_HEADS.search(str(one[0])))):
            value, votes = _at(now, knob[0]), Counter[int]()
            for d in off & set(moved):
                if moved[d] == 2 * self.was[d]:
                    new = Fraction(value * self.want[d], have[d])
                else:
                    new = value + Fraction(_at(self.config, knob[0]) * (self.want[d] - have[d]), moved[d] - self.was[d])
                votes[int(new)] += new.denominator == 1 and new > 0
            steps += [(knob, new) for new, n in votes.most_common(2) if n and new != value]
        return steps

    def best(self, now: Any, choices: Iterable[list[tuple[Knob, int]]], most: int) -> tuple[Any, dict[Dim, int]] | None:
        """The choice that leaves the fewest sizes untold, fewer than `most`; the first such one within heads."""
        found, within = None, False
        for choice in choices:
            inner = any(_WITHIN_HEADS.search(str(knob)) for knob, _ in choice)
            if self.left < 0 or (found is not None and inner and not within):
                break
            trial = _with(now, choice)
            have = self.told(trial)
            if set(have) == set(self.want) and (n := sum(have[d] != self.want[d] for d in have)) < most:
                found, most, within = (trial, have), n, inner
        return found

    def equations(self) -> list[tuple[Dim, Dim, Fraction]]:
        """Sizes that the same numbers tell, in proportion; none if all are in proportion already."""
        told: dict[frozenset[Knob], list[Dim]] = {}
        for d in self.was:
            by = {knob for knob, moved in self.moves.items() if moved.get(d) == 2 * self.was[d]}
            by = {knob for knob in by if not _WITHIN_HEADS.search(str(knob))} or by  # heads go whole
            told.setdefault(frozenset(by), []).append(d)
        told.pop(frozenset(), None)
        told = {by: own for by, dims in told.items() if (own := [d for d in dims if not self.summed(d)])}
        pairs = [(first, d) for first, *others in told.values() for d in others]
        for whole, (d, *_) in told.items():  # a width times a ratio: the ratio stays
            if parts := [own[0] for part, own in sorted(told.items(), key=lambda one: -len(one[1])) if part < whole]:
                pairs.append((parts[0], d))
        found = [(a, b, Fraction(self.was[a], self.was[b])) for a, b in pairs]
        return found if any(self.want[a] != k * self.want[b] for a, b, k in found) else []

    def summed(self, dim: Dim) -> bool:
        """Whether a number tells a part of a size: heads of the query beside one of keys and one of values."""
        return any(moved.get(dim, 0) not in (0, 2 * self.was[dim]) for moved in self.moves.values())

    def multiples(self, now: Any, off: set[Dim]) -> list[tuple[Dim, int]]:
        """Sizes of which no other than certain multiples are taken: of heads, for example."""
        for knob, new in self.steps(now, self.told(now), off):
            if not self.told(_with(now, [(knob, new)])):
                for value in range(new - 1, max(new - _NEAR, 0), -1):
                    if self.told(_with(now, [(knob, value)])):
                        old = _at(self.config, knob[0])
                        told = [d for d, n in self.moves[knob].items() if n == 2 * self.was[d]]
                        step = math.gcd(old, value)
                        return [
                            (d, step * self.was[d] // old) for d in told if step > 1 and step * self.was[d] % old == 0
                        ]
        return []

    def beside(self, off: set[Dim]) -> set[Dim]:
        """All dimensions that are told by a number that tells one of these."""
        return off.union(*(moved for moved in self.moves.values() if off & set(moved)))

    # --------------------------------------------------------------------------------------------------------- function

    def alike(self, config: Any) -> Any:
        """The config whose model makes the same calls, among those that tell the same sizes."""
        at, why = self.goes(config)
        while why:
            for choice in self.silent(config):
                trial = _with(config, choice)
                if self.left > 0 and self.told(trial) == self.want:
                    got, now = self.goes(trial)
                    if not now or got > at:
                        config, at, why = trial, got, now
                        break
            else:
                calls = [call for one in self.remains for call in one.run.calls]
                return Untold(f"no config tells what is left: {why}", calls[min(at, len(calls) - 1)])
        return config

    def silent(self, config: Any) -> Iterator[list[tuple[Knob, int]]]:
        """Numbers that no size depends on, or that undo each other's changes: those of heads first."""
        single: list[tuple[Knob, int]] = []
        for keys, value in sorted(_numbers(config), key=lambda one: "head" not in str(one[0])):
            for ratio in sorted(self.changed):
                if (new := value * ratio).denominator == 1 and new >= 1 and new != value:
                    single.append(((keys,), int(new)))
        yield from ([s] for s in single)
        heads = [s for s in single if "head" in str(s[0])]
        for ratio in sorted(self.changed):
            yield [s for s in heads if s[1] == _at(config, s[0][0]) * ratio]
        yield from map(list, itertools.combinations(heads, 2))

    def filled(self, config: Any) -> nn.Module | None:
        """The small model with one made from a config in place, filled with the tensors that are saved."""
        unsaved = "|".join(getattr(self.module, "_keys_to_ignore_on_save", None) or ())
        device = str(next(self.module.parameters()).device)
        fresh = _made(type(self.module), config, device, fill=bool(unsaved))
        if fresh is None or _sizes(fresh) != self.want:
            return None
        state = {k: t for k, t in self.module.state_dict().items() if not (unsaved and re.search(unsaved, k))}
        fresh.load_state_dict(state, strict=False, assign=True)
        return _placed(self.small, self.path, fresh)

    def goes(self, config: Any) -> tuple[int, str]:
        """How many calls of a model made from a config go as those of the small one, and what happens then."""
        whole, done = self.filled(config), 0
        if whole is None:
            return 0, "it cannot be made"
        self.traces = []
        for one in self.remains:
            trace, why = replay(whole, one.run, one.sizes)
            done += trace.at
            if why:
                return done, why
            self.traces.append(trace)
        return done, ""

    # ------------------------------------------------------------------------------------------------------- attributes

    def adopt(self, fresh: Any, edits: Edits) -> None:
        """Give the small model each attribute that the new config changes, the config itself among them."""
        was, now = (dict(one.named_modules(remove_duplicate=False)) for one in (self.given.fresh, fresh))
        for place in list(_attributes(self.module)):
            old, new = _look(was, self.before(place)), _look(now, place)
            if new is not _NOTHING and (type(old) is not type(new) or old != new):
                edits.set(place._replace(module=f"{self.path}.{place.module}".strip(".")), new)

    def before(self, place: Edit) -> Edit:
        """Where an attribute of the small model stood in the given one."""
        return place


class _Count(_Search):
    """The search for the config of one module in whose lists there are fewer modules."""

    def __init__(self, given: _Given, small: nn.Module, path: str, renaming: Renaming) -> None:
        super().__init__(given, small, path)
        self.renaming = renaming

    def before(self, place: Edit) -> Edit:
        path = self.renaming.before(f"{self.path}.{place.module}".strip("."))
        return place._replace(module=path.removeprefix(self.renaming.before(self.path)).lstrip("."))

    def shorter(self, blocks: Sequence[Block], edits: Edits) -> str:
        """Find the config that tells how many modules each list has now, and adopt it. Returns what none tells."""
        for container, own in lists(blocks).items():
            inside = container.removeprefix(self.renaming.before(self.path)).strip(".")
            config = self.counted(f"{inside}.".lstrip("."), own)
            if config is None:
                return f"no config tells that {container} has {sum(bool(b.becomes) for b in own)} modules"
            self.config = config
        self.adopt(self.made(self.config), edits)
        return ""

    def counted(self, inside: str, own: Sequence[Block]) -> Any:
        """The config with which one list has the modules that stay, and all else is as before; None if there is none.

        A number of the config counts the modules of the list, or a list of the config has an entry for each, or both.
        """
        gone = [i for i, block in enumerate(own) if not block.becomes]
        old, new = len(own), len(own) - len(gone)
        numbers = [keys for keys, value in _numbers(self.config) if value == old]
        rows = [keys for keys, value in _lists(self.config) if len(value) == old]
        want = {dim: n for dim, n in _sizes(self.made(self.config)).items() if not dim[0].startswith(inside)}
        want |= {dim: n for dim, n in self.want.items() if dim[0].startswith(inside)}

        def fits(config: Any) -> bool:
            fresh = self.made(_staged(config, new))
            return fresh is not None and _sizes(fresh) == want

        cuts = [[keys for keys in rows if _ROWS.search(str(keys[-1]))], rows, *([keys] for keys in rows), []]
        single = [([keys], cut) for keys in numbers for cut in (cuts if isinstance(keys[-1], str) else [[]])]
        for number, cut in (*single, *(([], cut) for cut in cuts)):
            config = _with(_without(self.config, cut, gone), [((keys,), new) for keys in number])
            if not fits(config):
                continue
            for other in numbers if number and isinstance(number[0][-1], str) else ():  # another name of the number
                again = _with(config, [((other,), new)])
                if other not in number and _ROWS.search(str(other[-1])) and fits(again):
                    config = again
            return _staged(config, new)
        return None


def _sizes(module: nn.Module) -> dict[Dim, int]:
    return {(name, d): n for name, t in module.state_dict().items() for d, n in enumerate(t.shape)}


def _named(dims: set[Dim]) -> str:
    return listed([f"{name}[{d}]" for name, d in sorted(dims)])


def _numbers(config: Any) -> Iterator[tuple[Keys, int]]:
    """The whole numbers of a config, of those inside it and of its lists, that may be sizes."""
    for name, value in list(_inside(config)):
        if _NO_SIZE.search(str(name)) or str(name).startswith("_"):
            continue
        if type(value) is int and value > 0:
            yield (name,), value
        elif isinstance(value, list | tuple | dict) or hasattr(value, "model_type"):
            for keys, inner in _numbers(value):
                yield (name, *keys), inner


def _inside(holder: Any) -> Iterator[tuple[str | int, Any]]:
    space = _space(holder)
    return iter(space.items() if isinstance(space, dict) else enumerate(space))


def _space(holder: Any) -> Any:
    return holder if isinstance(holder, list | tuple | dict) else vars(holder)


def _at(holder: Any, keys: Sequence[str | int]) -> Any:
    for one in keys:
        holder = _space(holder)[one]
    return holder


def _lists(config: Any) -> Iterator[tuple[Keys, Any]]:
    """The lists of a config, and of those inside it."""
    for name, value in list(_inside(config)):
        if isinstance(value, list | tuple):
            yield (name,), value
        if isinstance(value, list | tuple | dict) or hasattr(value, "model_type"):
            for keys, inner in _lists(value):
                yield (name, *keys), inner


def _without(config: Any, rows: Sequence[Keys], gone: Collection[int]) -> Any:
    """A copy of a config whose lists have lost some entries."""
    config = copy.deepcopy(config)
    for *way, last in rows:
        holder: Any = _at(config, way)
        if not isinstance(holder, tuple):
            old = _space(holder)[last]
            _space(holder)[last] = type(old)(v for i, v in enumerate(old) if i not in gone)
    return config


def _staged(config: Any, count: int) -> Any:
    """A config whose every layer is a stage, one of which a backbone gives, with so many stages; others as they are."""
    stages = getattr(config, "stage_names", None)
    if stages and config.out_features == stages[-1:] and getattr(config, "num_hidden_layers", None) == count:
        config.stage_names = stages[: count + 1]
        config.set_output_features_output_indices(out_features=config.stage_names[-1:], out_indices=[count])
    return config


def _kind(dim: Dim, size: int) -> tuple[str, int, int]:
    """What the same dimension of all layers has in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "", dim[0]), dim[1], size


def _shortened(config: Any, depths: Sequence[Keys]) -> Any:
    """A config of models of few layers."""
    for keys in depths:
        layers = _at(config, keys)
        config = _with(config, [((keys,), min(_FEW, layers))])
        space = _space(_at(config, keys[:-1]))
        for name, own in list(space.items()) if isinstance(space, dict) else ():
            if isinstance(own, list) and len(own) == layers:  # an entry for each layer
                space[name] = own[:_FEW]
    return config


def _with(config: Any, changes: Sequence[tuple[Knob, int]]) -> Any:
    """A copy of a config with some other numbers."""
    config = copy.deepcopy(config)
    for (*way, last), value in ((keys, value) for knob, value in changes for keys in knob):
        holder: Any = _at(config, way)
        new: Any = value
        while isinstance(holder, tuple):
            new = tuple(new if i == last else old for i, old in enumerate(holder))
            *way, last = way
            holder = _at(config, way)
        _space(holder)[last] = new
    return config


def _placed(whole: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """A copy of a model that has another module at a path."""
    if not path:
        return module
    whole = twin(whole)
    whole.set_submodule(path, module)
    return whole


def _attributes(model: nn.Module) -> Iterator[Edit]:
    """Where plain values stand, in modules and in what they own that is neither module nor tensor; each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        stack = [Edit(path, (), vars(module))]
        while stack:
            holder = stack.pop()
            if id(holder.space) in seen:
                continue
            seen.add(id(holder.space))
            for k, v in holder.space.items():
                if k in ("_parameters", "_buffers", "_modules") or isinstance(v, nn.Module | Tensor | type):
                    continue
                place = holder._replace(keys=(*holder.keys, k))
                if _plain(v):
                    yield place
                elif isinstance(inner := v if isinstance(v, dict) else getattr(v, "__dict__", None), dict):
                    stack.append(place._replace(space=inner))


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _look(modules: Mapping[str, nn.Module], place: Edit) -> Any:
    """What stands at the same place among the modules of another model; `_NOTHING` if there is no such place."""
    try:
        return _at(modules[place.module], place.keys)
    except (AttributeError, LookupError, TypeError):
        return _NOTHING
