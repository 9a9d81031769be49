"""The verbs of fast inference: accelerate a model, explain what was chosen, make it plain again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from secateur.errors import InputError, StateError, warn
from secateur.runtime import native
from secateur.runtime.chains import Fused
from secateur.runtime.kernel_plans import KernelPlan
from secateur.runtime.releasing import guard_loading, unguard_loading
from secateur.runtime.swapping import Sparse, Swapped
from secateur.runtime.tuner import Tuning
from secateur.scope import unwrap
from secateur.support import bits, checks
from secateur.support.inputs import Arguments, arguments
from secateur.support.progress import progress_bar


@dataclass(frozen=True)
class _Trace:
    """What an accelerated model carries besides its sparse layers."""

    plan: KernelPlan
    trained: frozenset[str]
    """Parameters that require gradients in the plain model."""


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    plan: KernelPlan | Mapping[str, Any] | None = None,
    values: torch.dtype = torch.float32,
    check_inputs: bool = False,
    generated: bool = True,
    keep_dense: bool = True,
    progress: bool = False,
) -> nn.Module:
    """Copy a model for inference in which every layer runs the faster of its dense and its sparse kernel.

    Linear, convolutions (Conv1d to Conv3d, ConvTranspose1d and 2d), LSTM, GRU, RNN, their cells, MultiheadAttention and
    transformers' Conv1D are tried, in float32 on the CPU. Each is timed in the model, on the example, and stays dense
    where sparse is not faster. Runs of Linear in an nn.Sequential, in torch's transformer layers or in a module of your
    own, with activations, Dropout and Identity between, or gated, are timed as one call too, and so are networks of
    Conv2d with BatchNorm2d, activations, additions and pooling between; your forward is traced by torch.fx for that. If
    in the end the whole model is not faster, all of it stays dense. Results equal the plain ones up to rounding.

    On a CUDA device Linear layers in float16 or bfloat16 are tried that are 2:4 (`pattern="2:4"`): as torch's
    semi-structured tensors, whose results are compared with the dense ones. There a change of weights that torch does
    not count shows in `check_weights` alone, and graphs of `torch.compile` are dense. This has not been run on a GPU.

    The copy is in evaluation mode and its parameters require no gradients. Its `state_dict()` is that of `model`;
    `fast.plan` holds what was chosen (unless the model has a `plan` of its own: then `sc.explain` alone does). A
    layer whose weights change afterwards, through `.data` or NumPy too, raises a StateError when it is called: at the
    next call if all of them changed, within 2,048 calls if a single one did. `secateur.runtime.check_weights` compares
    every weight, `secateur.runtime.trust_weights` ends the search. Under `torch.compile` and in an exported program
    nothing looks for such changes. (`torch.compile` refuses every LSTM, GRU and RNN, these too, unless
    `torch._dynamo.config.allow_rnn` is True; then each is one operator.)

    Tuning takes seconds for each example, and more where a call does. Interrupted (Ctrl-C) it ends with a warning: what
    was timed keeps what was chosen, all else stays dense, and the fast copy is returned.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as it will be in use; a list
            of these for several batch sizes. Any other size runs as the nearest one.
        threads: CPU threads to tune for; by default as many as torch has now.
        values: dtype of the packed weights on the CPU. `torch.float16` rounds them by a relative error of 0.0005 at
            most, `torch.bfloat16` by 0.004, which makes layers that have to be read from memory faster still; inputs
            and sums stay float32.
        check_inputs: run a layer dense where its inputs have a NaN or an infinity, so that the result is that of the
            plain model. Costs a sum over the inputs of each layer, and runs of Linear are not fused. Without it such an
            input affects only outputs that have a kept weight for it, as pruned weights are skipped.
        generated: False: make no machine code at run time. With AVX-512 it is made for layers that see 12 rows or more,
            about 16 bytes for each weight that is not zero, and kept where it is measured to be faster still. Where the
            system forbids memory that is made executable, none is made.
        keep_dense: False: Linear layers that run sparse for all inputs release their dense weights. Their parameters
            keep name, shape and dtype, on the meta device; `state_dict()` and `sc.dense` rebuild them bit for bit. A
            layer keeps its weights if what was packed has not each bit of them (values that were rounded, a negative
            zero), or if another module holds them, too. Where a call has to be dense they are rebuilt for it, which
            is slow. To read or write the values of a released one is a StateError, and so is loading into `fast`: new
            weights go into `sc.dense(fast)`.
        progress: show on stderr how far the tuning has come.
        plan: `fast.plan`, or its `to_dict()`, of an earlier run for the same weights and machine: nothing is timed.

    Returns:
        The fast copy, of the same type.

    Raises:
        InputTypeError: no module, or inputs of another type.
        InputError: `threads` below 1; no example; a lazy or meta parameter; a plan for something else; `values`
            neither float32, float16 nor bfloat16; sharded weights.
        StateError: the model is accelerated already.
        KeyboardInterrupt: before any layer was timed.

    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    >>> masks = sc.prune(model, 0.9)
    >>> fast = sc.accelerate(model, torch.zeros(1, 256))
    >>> torch.allclose(fast(torch.ones(1, 256)), model(torch.ones(1, 256)), atol=1e-5)
    True
    """
    model = unwrap(model)
    calls = [arguments(one) for one in (example_inputs if isinstance(example_inputs, list) else [example_inputs])]
    checks.flag("check_inputs", check_inputs)
    checks.flag("generated", generated)
    checks.flag("keep_dense", keep_dense)
    checks.flag("progress", progress)
    given = plan if plan is None or isinstance(plan, KernelPlan) else KernelPlan.from_dict(plan)
    _check(model, calls, threads, values)
    with _threads(threads), torch.inference_mode(False):
        fast, trained = _copy(model, shared=not keep_dense)
        tuned = Tuning(model, fast, calls, values=values, checked=check_inputs, generated=generated)
        with progress_bar("accelerating", tuned.steps, shown=progress) as done:
            tuned.pack(done)
            if given is None:
                tuned.measure(done)
        if given is not None:
            tuned.take(given)
        if tuned.interrupted:
            warn(tuned.interrupted)
        if not keep_dense:
            tuned.release()
            guard_loading(fast)
        found = tuned.found()
    if not hasattr(fast, "plan"):
        fast.__dict__["plan"] = found
    fast.__dict__["_secateur"] = _Trace(found, trained)
    return fast


def explain(fast: nn.Module) -> KernelPlan:
    """Tell which kernel each layer of an accelerated model runs, for how many rows, and why.

    Returns:
        The plan; `str()` is a table of layers with their times, and a line on the whole model.

    Raises:
        StateError: the model was not accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> print(sc.explain(fast).layers[0].reason)
    too dense: 0.00 % zeros
    """
    trace = unwrap(fast).__dict__.get("_secateur")
    if trace is None:
        raise StateError(
            f"this {type(fast).__name__} was not accelerated, so there is nothing to explain. "
            "Call fast = sc.accelerate(model, example_inputs), then sc.explain(fast)."
        )
    plan: KernelPlan = trace.plan
    return plan


def dense(fast: nn.Module) -> nn.Module:
    """Copy an accelerated model as a plain one: torch's own layers, with the weights as they are now.

    Args:
        fast: left as it is; or a model that contains one.

    Raises:
        StateError: nothing in the model is accelerated.

    >>> model = nn.Linear(8, 8)
    >>> type(sc.dense(sc.accelerate(model, torch.zeros(1, 8)))) is nn.Linear
    True
    """
    fast = unwrap(fast)
    if not _accelerated(fast):
        raise StateError(f"nothing in this {type(fast).__name__} is accelerated: it is plain already")
    with torch.inference_mode(False):
        plain = copy.deepcopy(fast)
    for module in list(plain.modules()):
        if isinstance(module, Swapped):
            module.restore()
    for module in plain.modules():
        trace = module.__dict__.pop("_secateur", None)
        if trace is not None:
            unguard_loading(module)
            if module.__dict__.get("plan") == trace.plan:
                del module.__dict__["plan"]
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trace.trained)
    return plain


def check_weights(fast: nn.Module) -> None:
    """Compare each weight of an accelerated model with what was packed.

    Args:
        fast: an accelerated model, or one that contains it.

    Raises:
        StateError: a weight has changed since, so that results would be those of the old weights; or nothing is
            accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> check_weights(fast)
    """
    for layer in _sparse_layers(fast):
        layer.require_fresh()


def trust_weights(fast: nn.Module, trusted: bool = True) -> None:
    """Stop looking for changed weights, or start again: saves 2 or 3 % of a call where nobody edits weights.

    What torch itself counts (in-place updates, `load_state_dict`, replaced parameters) is an error in any case; edits
    through `.data`, NumPy or C pass unnoticed, and results are then those of the old weights.

    Args:
        fast: an accelerated model, or one that contains it; its later copies behave the same.
        trusted: False to look again.

    Raises:
        StateError: a weight has changed already; or nothing is accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> trust_weights(fast)
    """
    checks.flag("trusted", trusted)
    check_weights(fast)
    for layer in _sparse_layers(fast):
        layer._trusted = trusted
        layer.stamp()
    for module in fast.modules():
        if isinstance(module, Fused):
            module.steps()


def _sparse_layers(fast: nn.Module) -> list[Sparse]:
    fast = unwrap(fast)
    if not _accelerated(fast):
        raise StateError(f"nothing in this {type(fast).__name__} is accelerated: give what sc.accelerate returned")
    return [module for module in fast.modules() if isinstance(module, Sparse)]


def _check(model: nn.Module, calls: Sequence[Arguments], threads: int | None, values: torch.dtype) -> None:
    if not calls:
        raise InputError("example_inputs is an empty list: give at least one example to tune for")
    checks.threads(threads)
    if values not in tuple(native.VALUES):
        raise InputError(
            f"values is {values}: packed weights are torch.float32 or, rounded, torch.float16 or torch.bfloat16"
        )
    if _accelerated(model):
        raise StateError("the model is accelerated already. To tune it again: sc.accelerate(sc.dense(model), ...)")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise InputError(
                f"{name!r} has no data (it is lazy or on the meta device), so the model cannot run. "
                "Call it once, or use `to_empty` and `load_state_dict`, before you accelerate."
            )
        if bits.is_sharded(tensor):
            raise InputError(
                f"{name} is sharded, and a layer runs sparse on one process: sc.save the model, and accelerate it "
                "where it is whole, after sc.load"
            )


def _accelerated(model: nn.Module) -> bool:
    return any(isinstance(module, Swapped) or "_secateur" in module.__dict__ for module in model.modules())


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


def _copy(model: nn.Module, shared: bool) -> tuple[nn.Module, frozenset[str]]:
    """A copy in evaluation mode without gradients, and the names of the parameters that required them.

    With `shared` its parameters are in the memory of the model's, until it gets its own.
    """
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    given = [parameter for parameter in model.parameters() if shared and type(parameter) is nn.Parameter]
    try:
        fast = copy.deepcopy(model, {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in given})
    except RuntimeError as error:
        raise InputError(
            f"the model cannot be copied: {error} Weights that a hook computes (weight_norm, torch.nn.utils.prune) "
            "are the usual cause: make them plain first"
        ) from error
    for module in fast.modules():
        module.training = False
    for parameter in fast.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(False)
        else:  # the copy of a module of torch.jit has a history
            parameter.detach_()
    return fast, trained
