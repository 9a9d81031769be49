"""A judge of smaller models that knows nothing of how they were made.

Every parameter holds distinct values, so that what stays of it is found by value. The original with all else masked
then runs beside the small model. A statistic over units (norms, means, softmax) is taken over the entries that are
alive, as many as the small model has. Nothing else is told to the original: a scale that changed is a difference,
unless the small model's weights make up for it.
"""

import copy
import math

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

LIMIT = 1e-9  # of outputs, in double precision: right models differ by 1e-13


class Wrong(AssertionError):
    """The small model is not the original with units removed."""


def tag(model, seed=1):
    """Give each parameter distinct values of its usual size, and each batch norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            n = p.numel()
            values = (torch.randperm(n, generator=generator).double() + 0.37) / n * 2 - 1
            if p.ndim > 1:
                values *= (3 / p[0].numel()) ** 0.5
            else:
                values = 0.3 * values + ("weight" in name or "scale" in name)
            p.copy_(values.reshape(p.shape))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator) / 3)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)


def ties(model):
    """Which names share a parameter."""
    found = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(name)
    return sorted(found.values())


SCALES = sorted({(a / b) ** 0.5 for a in range(1, 65) for b in range(1, 65)} - {1.0})  # of queries, by sizes of heads


def stays(old, new, name, scales):
    """The mask of what stays of a parameter, by value, and the factors that its rows were scaled by."""
    values, at = old.flatten().sort()
    middles, mask, used = (values[1:] + values[:-1]) / 2, torch.zeros(old.numel(), dtype=torch.bool), set()
    for row in new.reshape(len(new), -1) if new.ndim else new.reshape(1, 1):
        for scale in (1.0, *scales):
            nearest = torch.searchsorted(middles, row / scale)
            if torch.allclose(values[nearest], row / scale, rtol=0 if scale == 1 else 1e-6, atol=0):
                used |= {scale}
                mask[at[nearest]] = True
                break
        else:
            raise Wrong(f"{name} holds values that the original has not")
    if int(mask.sum()) != new.numel():
        raise Wrong(f"{name} holds a value twice")
    return mask.reshape(old.shape), used - {1.0}


def masked(original, small):
    """The original in double precision, zero where the small model has nothing; masks by id; and scales."""
    ours = dict(small.named_parameters())
    theirs = copy.deepcopy(original).double()
    masks, scales = {}, set()
    pairs = list(zip(theirs.named_parameters(), original.parameters(), strict=True))
    for (name, p), q in sorted(pairs, key=lambda pair: -pair[1].ndim):  # a single value would fit many scales
        mask, used = stays(q.detach(), ours[name].detach(), name, SCALES if q.ndim > 1 else sorted(scales))
        scales |= used
        gain = name.endswith("original0")  # weight norm of a row of zeros is 0 / 0: its gain is what masks it
        with torch.no_grad():
            p.mul_(mask)
            if name.endswith("original1"):
                p.add_((p == 0).all(dim=list(range(1, p.ndim)), keepdim=True).to(p))
        masks[id(p)] = mask if not gain else mask.flatten()
    return theirs, masks, scales


def reduced(name, args, kwargs):
    """The dimensions that a statistic runs over."""
    ndim = args[0].ndim
    if name in ("layer_norm", "rms_norm"):
        return set(range(ndim - len(args[1]), ndim))
    if name == "group_norm":
        return {1}
    if name == "batch_norm":
        return {0, *range(2, ndim)}
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = range(ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    return {d % ndim for d in dims}


NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm"}
OVER_UNITS = NORMS | {"mean", "var", "std", "var_mean", "std_mean", "softmax"}


class _Sizes(TorchFunctionMode):
    """What the statistics of the small model run over."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in OVER_UNITS:
            self.calls.append((func.__name__, args))
        return func(*args, **kwargs or {})


class _Alive(TorchFunctionMode):
    """Statistics of the masked original: over as many entries as in the small model, those that are alive."""

    def __init__(self, calls, masks):
        super().__init__()
        self.calls, self.masks = iter(calls), masks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ not in OVER_UNITS:
            return func(*args, **kwargs)
        name, ours = next(self.calls, ("nothing", ()))
        if name != func.__name__:
            raise Wrong(f"the original calls {func.__name__}, the small model {name}")
        x, vectors = args[0], [t for t in (*args[1:], *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim == 1]
        cut = [d for d in reduced(name, args, kwargs) if x.shape[d] != ours[0].shape[d]]
        if name == "mean":  # what is masked adds nothing
            return func(*args, **kwargs) * math.prod(x.shape[d] / ours[0].shape[d] for d in cut)
        if not cut:
            return func(*args, **kwargs)
        at = {d: self.alive(x, d, ours[0].shape[d], vectors) for d in cut}
        small = x
        for d, places in at.items():
            small = small.index_select(d, places)

        def part(t):
            """A vector along the dimension that is normed."""
            return t[places] if isinstance(t, torch.Tensor) and len(t) == x.shape[d] and name != "batch_norm" else t

        rest = tree_map(part, args[1:])
        if name in NORMS - {"batch_norm"}:
            rest = (ours[1], *rest[1:])  # the sizes to norm over, or the number of groups
        out = func(small, *rest, **tree_map(part, kwargs))
        if name in NORMS | {"softmax"}:
            for d, places in at.items():
                full = out.new_zeros([x.shape[k] if k == d else n for k, n in enumerate(out.shape)])
                out = full.index_copy(d, places, out)
        return out

    def alive(self, x, dim, count, vectors):
        """Places along a dimension: those whose weight stays, or those that are not all zero."""
        known = [self.masks[id(t)] for t in vectors if id(t) in self.masks and len(t) == x.shape[dim]]
        places = (known[0] if known else x.movedim(dim, 0).flatten(1).any(1)).nonzero().flatten()
        if len(places) != count:
            raise Wrong(f"{len(places)} of {x.shape[dim]} are alive along dimension {dim}, the small model has {count}")
        return places


def floats(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def outputs(out):
    """What a caller relies on: all tensors; beside logits, the logits."""
    return floats(out["logits"] if isinstance(out, dict) and "logits" in out else out)


def other(inputs, seed=7):
    """Inputs of the same shapes with other numbers in them."""
    generator = torch.Generator().manual_seed(seed)

    def new(t):
        real = isinstance(t, torch.Tensor) and t.is_floating_point()
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) if real else t

    return tree_map(new, inputs)


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def double(tree):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def gradients(model, inputs):
    """The names of the parameters that a training step reaches."""
    model = copy.deepcopy(model).train()
    sum(t.square().mean() for t in outputs(call(model, inputs))).backward()
    found = {name: p for name, p in model.named_parameters() if p.grad is not None}
    if not all(bool(p.grad.isfinite().all()) for p in found.values()):
        raise Wrong("a gradient is not finite")
    return set(found)


def judge(original, small, inputs, limit=LIMIT):
    """Raise Wrong unless `small` is `original` with units removed, in every way that a user sees.

    Outputs may differ by `limit`, relative to the largest number.

    Returns the share of the parameters that is gone.
    """
    if type(small) is not type(original):
        raise Wrong(f"{type(original).__name__} became {type(small).__name__}")
    if ties(small) != ties(original):
        raise Wrong(f"tied were {ties(original)}, tied are {ties(small)}")
    if list(small.state_dict()) != list(original.state_dict()):
        raise Wrong("the state_dict has other keys")
    theirs, masks, scales = masked(original, small)
    limit = max(limit, 1e-6) if scales else limit  # scaled in single precision
    ours = copy.deepcopy(small).double()
    with torch.no_grad():
        for given in (inputs, other(inputs)):
            given = double(given)
            with _Sizes() as sizes:
                got = outputs(call(ours, copy.deepcopy(given)))
            with _Alive(sizes.calls, masks):
                want = outputs(call(theirs, copy.deepcopy(given)))
            if [t.shape for t in got] != [t.shape for t in want]:
                raise Wrong(f"outputs are {[tuple(t.shape) for t in got]}")
            for a, b in zip(got, want, strict=True):
                apart = float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))
                if not apart < limit:
                    raise Wrong(f"differs from the masked original by {apart:.1e}")
    lost = gradients(original, inputs) - gradients(small, inputs)
    if lost:
        raise Wrong(f"no gradient reaches {sorted(lost)}")
    return 1 - count(small) / count(original)


def count(model: nn.Module):
    return sum(p.numel() for p in model.parameters())
