"""Dropout inside the recurrent layers of torch: masks that last a whole sequence, in one call of the fused kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from secateur import anatomy
from secateur.dropout import noise
from secateur.dropout.substitution import begin, end
from secateur.errors import InputError, StateError
from secateur.scope import unwrap
from secateur.support.tables import Printed, Table, counted

__all__ = ["RecurrentDropout", "recurrent"]

_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)


def recurrent(
    model: nn.Module,
    *,
    weight: float = 0.0,
    input: float = 0.0,
    hidden: float = 0.0,
    embedding: float = 0.0,
) -> RecurrentDropout:
    """Put dropout into every `nn.LSTM`, `nn.GRU` and `nn.RNN` of a model, with masks that stay for a whole pass.

    A mask on the hidden state is, in each step, a mask on the columns of the matrix that multiplies it: so the layer
    runs with masked weights, in one call of the fused kernel. The model stays itself: no parameter or module is renamed
    or replaced, gradients reach the parameters, and zeros stay zeros. It carries hooks until `remove()`; in `eval()`
    they do nothing. All masks are scaled by 1 / (1 - rate).

    Args:
        model: the model and its later copies (deepcopy, pickle) have the dropout. Call this before `torch.compile`.
        weight: rate of `weight_hh`, weight by weight (the weight-drop of AWD-LSTM), 0 <= rate < 1, as all rates.
        input: rate of the inputs of each layer. Those of the first have a mask for each sequence; those of an upper
            layer have one that the batch shares.
        hidden: rate of the hidden state h that a step takes from the step before: one mask for each layer and
            direction, the same for all gates and shared by the batch. The z * h of a GRU and the outputs use h without
            the mask.
        embedding: rate of whole words: of every `nn.Embedding`, one mask a pass for the vocabulary, so that a word is
            dropped wherever it stands. For one of several, give the module itself as `model`.

    Returns:
        A handle: `print` shows where the dropout is, `remove()` takes it off.

    Raises:
        InputError, InputTypeError: a rate outside [0, 1) or all 0; no layer that a rate is for; computed weights.
        StateError: the model has it already. In each case the model is as it was.

    Sources: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    section 4 (eq. 7: one mask for all gates); Merity, Keskar & Socher 2018, "Regularizing and Optimizing LSTM Language
    Models", sections 2 and 4.

    >>> model = nn.Sequential(nn.Embedding(100, 8), nn.LSTM(8, 16, num_layers=2))
    >>> handle = recurrent(model, hidden=0.25, embedding=0.1)
    >>> print(handle)
    module       type        dropped
    ------  ---------  -------------
    0       Embedding  embedding 0.1
    1            LSTM    hidden 0.25
    >>> output, (h, c) = model(torch.randint(100, (35, 4)))
    >>> handle.remove()
    """
    rates = {"weight": weight, "input": input, "hidden": hidden, "embedding": embedding}
    rates = {name: noise.require_rate(rate, name) for name, rate in rates.items()}
    model = unwrap(model)
    _require(model, rates)
    handle = RecurrentDropout()
    inner = {name: rates[name] for name in ("weight", "input", "hidden")}
    for name, module in model.named_modules():
        if _is_recurrent(module) and any(inner.values()):
            handle.attach(name, module, _Masks(handle, **inner))
        elif embedding and _is_embedding(module):
            handle.attach(name, module, _Words(handle, rates["embedding"]))
    return handle


class RecurrentDropout(Printed):
    """The dropout that `recurrent` put into a model; `str()` is a table of where it is."""

    def __init__(self) -> None:
        self._rows: list[list[str]] = []
        self._handles: list[RemovableHandle] = []

    @classmethod
    def of(cls, model: nn.Module) -> RecurrentDropout:
        """Find the handle of a model: that of a deepcopy, or of what was unpickled, is another one.

        Raises:
            StateError: the model has none.
        """
        for hook in _hooks(unwrap(model)):
            return hook.owner
        raise StateError("the model has no recurrent dropout: put it in with secateur.dropout.recurrent(model, ...)")

    def remove(self) -> None:
        """Take the dropout off: the model is plain.

        Raises:
            StateError: it is off already.
        """
        if not self._handles:
            raise StateError(
                "this recurrent dropout was removed already, so remove() must not be called again: "
                "to put it in again, use secateur.dropout.recurrent(model, ...)"
            )
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def attach(self, name: str, module: nn.Module, hook: _Masks | _Words) -> None:
        """Hook it to a module."""
        rates = {what: rate for what, rate in vars(hook).items() if isinstance(rate, float) and rate}
        self._rows.append([name or "(model)", type(module).__name__, ", ".join(f"{k} {v:g}" for k, v in rates.items())])
        if isinstance(hook, _Words):
            self._handles += [module.register_forward_hook(hook, with_kwargs=True)]
        else:
            self._handles += [
                module.register_forward_pre_hook(hook, with_kwargs=True),
                module.register_forward_hook(end, always_call=True),
            ]

    def table(self) -> Table:
        """One row a module."""
        return Table(("module", "type", "dropped"), self._rows, notes=[] if self._handles else ["removed"])

    def __repr__(self) -> str:
        on = f"on {counted(len(self._rows), 'module')}" if self._handles else "removed"
        return f"RecurrentDropout({on})"


class _Masks:
    """Forward pre-hook of a recurrent layer: for one forward it computes with masked weights, on masked inputs."""

    def __init__(self, owner: RecurrentDropout, weight: float, input: float, hidden: float) -> None:
        self.owner = owner
        self.weight, self.input, self.hidden = weight, input, hidden

    def __call__(self, module: nn.RNNBase, args: Any, kwargs: Any) -> Any:
        if not noise.active(module.training):
            return None
        module._update_flat_weights()  # as forward does, if parameters have been replaced
        plain = module._flat_weights
        masked = self._masked(module)
        pairs = [(old, new) for old, new in zip(plain, masked, strict=True) if old is not new]
        if pairs:
            begin(module, [(plain, _compact(masked, plain)), *pairs])
        if not self.input:
            return None
        options: dict[str, Any] = {"kind": "recurrent_input", "batch_first": module.batch_first}
        if args:
            return (locked(args[0], self.input, training=module.training, **options), *args[1:]), kwargs
        return args, {**kwargs, "input": locked(kwargs["input"], self.input, training=module.training, **options)}

    def _masked(self, module: nn.RNNBase) -> list[Any]:
        found: list[Any] = []
        inputs: dict[str, Tensor | float] = {}  # both directions of a layer read the same
        for name, weight in zip(module._flat_weights_names, module._flat_weights, strict=True):
            mask: Tensor | float = 1.0
            if weight is not None and name.startswith("weight_hh"):
                mask = _mask(weight, weight.shape, self.weight, "recurrent_weight")
                mask = mask * _mask(weight, (1, weight.shape[1]), self.hidden, "recurrent_hidden")
            elif weight is not None and name.startswith("weight_ih") and "_l0" not in name:
                layer = name.removesuffix("_reverse")
                if layer not in inputs:
                    inputs[layer] = _mask(weight, (1, weight.shape[1]), self.input, "recurrent_input")
                mask = inputs[layer]
            found.append(weight if weight is None or isinstance(mask, float) else weight * mask)
        return found


def _mask(like: Tensor, shape: Sequence[int], rate: float, kind: str) -> Tensor | float:
    return noise.mask_of(noise.uniform(like, shape, kind=kind, rate=rate), rate, like.dtype) if rate else 1.0


class _Words:
    """Forward hook of an embedding: some words of the vocabulary are dropped, wherever they stand."""

    def __init__(self, owner: RecurrentDropout, embedding: float) -> None:
        self.owner = owner
        self.embedding = embedding

    def __call__(self, module: nn.Embedding, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not noise.active(module.training):
            return None
        numbers = noise.uniform(module.weight, (module.num_embeddings,), kind="embedding", rate=self.embedding)
        tokens = args[0] if args else kwargs["input"]
        return output * noise.mask_of(numbers, self.embedding, output.dtype)[tokens].unsqueeze(-1)


def _compact(weights: list[Any], plain: Sequence[Any]) -> list[Any]:
    """On CUDA, lay the weights out as the parameters lie, in one piece: cuDNN would do so at each call, and warn."""
    if not all(isinstance(p, Tensor) and p.is_cuda for p in plain):
        return weights
    return in_one_piece(weights, plain)


def in_one_piece(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Lay tensors out in memory as others lie, if those fill one storage from its start on."""
    order = sorted(range(len(like)), key=lambda i: like[i].storage_offset())
    sizes = [like[i].numel() for i in order]
    offsets = [like[i].storage_offset() for i in order]
    together = len({t.untyped_storage().data_ptr() for t in like}) == 1
    if not together or offsets != [sum(sizes[:i]) for i in range(len(sizes))]:
        return list(tensors)
    pieces = torch.split(torch.cat([tensors[i].flatten() for i in order]), sizes)
    where = dict(zip(order, pieces, strict=True))
    return [where[i].view_as(tensor) for i, tensor in enumerate(tensors)]


def locked(x: _Sequences, rate: float, *, training: bool, kind: str, batch_first: bool) -> _Sequences:
    """Drop the same features at every time step, different ones in each sequence.

    Args:
        x: `[time, batch, features]`, `[batch, time, features]` if `batch_first`, `[time, features]`, or packed.
        rate: probability that a feature of a sequence is dropped, 0 <= rate < 1.
        training: of the module.
        kind: what `find` calls this noise.
        batch_first: where the batch is.
    """
    if isinstance(x, Tensor):
        shape = list(x.shape)
        shape[1 if batch_first and x.ndim == 3 else 0] = 1
        return noise.drop(x, rate, training=training, kind=kind, shape=shape)
    if not noise.active(training) or rate == 0:
        return x
    packed: Any = x
    mask = _mask_of_rows(packed.data, packed.batch_sizes, rate, kind)
    return packed._replace(data=packed.data * mask)  # type: ignore[no-any-return]


def _mask_of_rows(data: Tensor, sizes: Tensor, rate: float, kind: str) -> Tensor:
    """For packed data: the first step of every sequence, then the second of those that have one, and so on."""
    starts = sizes.cumsum(0) - sizes
    sequence = (torch.arange(len(data)) - starts.repeat_interleave(sizes)).to(data.device)
    numbers = noise.uniform(data, (int(sizes[0]), *data.shape[1:]), kind=kind, rate=rate)
    return noise.mask_of(numbers, rate, data.dtype)[sequence]


def _is_recurrent(module: nn.Module) -> bool:
    return anatomy.family(module) == "recurrent"


def _is_embedding(module: nn.Module) -> bool:
    layer = anatomy.known(type(module))
    return layer is not None and layer.family == "embedding" and not layer.pooled


def _hooks(model: nn.Module) -> Iterator[_Masks | _Words]:
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, (_Masks, _Words)):
                yield hook


def _require(model: nn.Module, rates: dict[str, float]) -> None:
    """Refuse what cannot be done, before anything is."""
    if not any(rates.values()):
        raise InputError("all rates are 0, so nothing would be dropped: give one, such as hidden=0.25")
    if next(_hooks(model), None) is not None:
        raise StateError(
            "the model has recurrent dropout already: call remove() on its handle first, "
            "which secateur.dropout.RecurrentDropout.of(model) gives, and say all rates in one call"
        )
    modules = [(name or "the model", module) for name, module in model.named_modules()]
    layers = [(name, cast(nn.RNNBase, module)) for name, module in modules if _is_recurrent(module)]
    inner = ", ".join(f"{name}={rate:g}" for name, rate in rates.items() if rate and name != "embedding")
    made_of = f"it is made of: {', '.join(sorted({type(module).__name__ for _, module in modules}))}"
    if inner and not layers:
        raise InputError(
            f"the model has no nn.LSTM, nn.GRU or nn.RNN for {inner}: leave that out, or use nn.Dropout; {made_of}"
        )
    if rates["embedding"] and not any(_is_embedding(module) for _, module in modules):
        raise InputError(f"the model has no nn.Embedding for embedding={rates['embedding']:g}: leave it out; {made_of}")
    for name, module in layers:
        computed = [weight for weight in module._flat_weights_names if weight not in module._parameters]
        if inner and computed:
            raise InputError(
                f"{name}: {computed[0]} is computed at each forward, so a mask on it would not last: make it plain "
                "first, with sc.from_torch_prune(model) or torch.nn.utils.parametrize.remove_parametrizations"
            )
