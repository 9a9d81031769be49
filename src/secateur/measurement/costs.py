"""What a model costs besides time: its weights, multiply-accumulates, bytes on disk, peak memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from secateur.computed_weights import weights_by_name
from secateur.support import bits
from secateur.support.inputs import Arguments

_NO_WEIGHTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


def devices(model: nn.Module) -> set[torch.device]:
    """Where the parameters and buffers of a model are."""
    return {t.device for t in (*model.parameters(), *model.buffers())}


def join(things: set[Any]) -> str:
    """Devices or dtypes in words: "cpu", "bfloat16+float32"."""
    return "+".join(sorted(str(thing).removeprefix("torch.") for thing in things))


def weight_facts(model: nn.Module) -> dict[str, Any]:
    """The fields of a Measurement that can be read off the parameters."""
    weights, hidden = {id(w): w for w in weights_by_name(model).values()}.values(), hides_weights(model)
    return {
        "device": join({t.device for t in (*weights, *model.buffers())}) or "cpu",
        "dtype": join({w.dtype for w in weights if w.is_floating_point()}) or "none",
        "parameters": None if hidden else sum(w.numel() for w in weights),
        "nonzeros": None if hidden else sum(int(w.count_nonzero()) for w in weights),
        "denormals": sum(int(bits.subnormal(bits.plain(w.detach())).sum()) for w in weights if w.is_floating_point()),
        "flushed": _flushed(),
    }


def hides_weights(model: nn.Module) -> bool:
    """Whether some weights are not plain tensors: quantized, sparse, packed by a library, or constants of a script."""
    entries = [bits.local(t) if bits.is_sharded(t) else t for t in (*model.state_dict().values(), *model.parameters())]
    beside = tree_leaves([entry for entry in entries if not isinstance(entry, Tensor)])
    return (
        not all(is_plain(entry) for entry in entries if isinstance(entry, Tensor))
        or not all(isinstance(leaf, _NO_WEIGHTS) for leaf in beside)
        or any(_has_constants(module) for module in model.modules() if isinstance(module, torch.jit.ScriptModule))
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has one number for each place."""
    wrapped = is_traceable_wrapper_subclass(tensor) or getattr(tensor, "quant_state", None) is not None
    return tensor.layout is torch.strided and not tensor.is_quantized and not wrapped


def _has_constants(module: torch.jit.ScriptModule) -> bool:
    """Whether a script computes with tensors, or packed weights, that its state_dict does not have."""
    graph = getattr(module, "inlined_graph", None)  # none without a forward
    if graph is None:
        return False
    frozen = any(
        node.kindOf("value") == "t" and node.t("value").numel() > 1
        for node in graph.findAllNodes("prim::Constant")
        if node.hasAttribute("value")
    )
    return frozen or any(
        str(node.output().type()).startswith("__torch__.torch.classes") for node in graph.findAllNodes("prim::GetAttr")
    )


def _flushed() -> bool:
    """Whether every thread of torch takes subnormals for zero: ask all of them for one times 1.4e-45."""
    tiny = torch.ones(2**16 * torch.get_num_threads(), dtype=torch.int32).view(torch.float32)
    return not (tiny * 1.0).view(torch.int32).any()


def macs(model: nn.Module, call: Arguments) -> dict[str, Any]:
    """The MACs of a call, and those that meet a zero weight."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]

    missing = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    model = getattr(model, "_orig_mod", model)  # as it was before torch.compile
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    with _plain_kernels(), _ZeroMeter(model) as meter, counter:
        model(*call[0], **call[1])
    if meter.blind or not all(map(is_plain, model.parameters())):  # the zeros of sparse and quantized ones are not met
        return {"macs": None, "zero_macs": None}
    return {"macs": counter.get_total_flops() // 2, "zero_macs": round(meter.zero_macs)}


def counting() -> bool:
    """Whether `macs` counts on this thread, so that what it makes slow is no reason to warn."""
    return any(isinstance(mode, _ZeroMeter) for mode in _get_current_dispatch_mode_stack())


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off the fused kernels (LSTM, transformer layer) that hide their matrix products.

    Autocast may not use the casts of an earlier call, as it does in inference mode of torch 2.9: the meter has to see
    a weight being cast.
    """
    fused: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before, fast = [one.enabled for one in fused], torch.backends.mha.get_fastpath_enabled()
    cached = torch.is_autocast_cache_enabled()
    try:
        for one in fused:
            one.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        for one, enabled in zip(fused, before, strict=True):
            one.enabled = enabled
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_autocast_cache_enabled(cached)


class _ZeroMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs whose weight is zero, operator by operator.

    A weight is a tensor in one of the storages `fixed`: at first those of parameters and buffers, then also
    those of results computed from nothing else (a transpose, a cast, a weight times a mask).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self.zero_macs = 0.0
        self.blind = False  # an operator was called whose MACs torch cannot tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.blind |= func.namespace not in ("aten", "prim", "prims") or name.startswith("quantized_")
        if formula := flop_registry.get(func.overloadpacket):
            added = name in ("addmm", "baddbmm")  # their first tensor is no factor
            weights = [t for t in args[added : added + 2] if _storage(t) in self.fixed and not t.is_meta]
            density = math.prod(int(bits.plain(t).count_nonzero()) / max(t.numel(), 1) for t in weights)
            self.zero_macs += formula(*args, **(kwargs or {}), out_val=out) / 2 * (1 - density)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = {_storage(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.fixed = self.fixed | results if given and given <= self.fixed else self.fixed - results
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else id(tensor)


def file_bytes(model: nn.Module) -> int | None:
    """Size of the state_dict as a dense .safetensors file, tied tensors once; of a DTensor that of the whole.

    None if the model `hides_weights`, as such a file cannot hold them. Other entries that are no tensors are left out.
    """
    from safetensors.torch import save

    if hides_weights(model):
        return None
    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # an `_extra_state` need not be one
            sharded = bits.is_sharded(tensor)  # of which a process may hold nothing, in no memory
            same = id(tensor) if sharded else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            tensors.setdefault(same if sharded or tensor.numel() else name, (name, tensor))
    dtypes = {str(number): dtype for number, dtype in enumerate({tensor.dtype for _, tensor in tensors.values()})}
    order = _header(save({number: torch.zeros(1, dtype=dtype) for number, dtype in dtypes.items()}))
    codes = {dtypes[number]: (at, entry["dtype"]) for at, (number, entry) in enumerate(order.items())}
    entries, end = {}, 0
    for name, tensor in sorted(tensors.values(), key=lambda item: (codes[item[1].dtype][0], item[0].encode())):
        start, end = end, end + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": codes[tensor.dtype][1], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + -(-len(header) // 8) * 8 + end


def _header(file: bytes) -> dict[str, Any]:
    """What a .safetensors file says of its tensors, in the order of their bytes."""
    found: dict[str, Any] = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return found


def peak_bytes(model: nn.Module, call: Arguments) -> int | None:
    """The most that torch's allocator held above the start of a call; None except on CPU and CUDA."""
    places = devices(model) or {torch.device("cpu")}
    if {device.type for device in places} == {"cpu"}:
        return _cpu_peak(model, call)
    if {device.type for device in places} != {"cuda"}:
        return None
    for device in places:
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(torch.cuda.memory_allocated(device) for device in places)
    model(*call[0], **call[1])
    return int(sum(torch.cuda.max_memory_allocated(device) for device in places) - before)


def _cpu_peak(model: nn.Module, call: Arguments) -> int:
    from torch.autograd.profiler import profile

    level = os.environ.get("KINETO_LOG_LEVEL")  # read once, at the first profile of the process:
    os.environ["KINETO_LOG_LEVEL"] = level or "6"  # torch 2.13 would print at each start and stop
    try:
        with profile(profile_memory=True) as profiler:
            model(*call[0], **call[1])
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
