"""Row D of sharded models: whatever the optimizer and the options of FSDP2, zeros are held and masks those of one."""

import copy
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError, SecateurWarning, StateError
from sharded_models import X, full, net, rows

CURVE = sc.cubic(0, 8, every=2)
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
}
SHARDED = {
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "reshard": {"reshard_after_forward": True},
    "no reshard": {"reshard_after_forward": False},
    "columns": {"shard_placement_fn": lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else None},
}


def sharded(ranks, **options):
    model, mesh = net(), init_device_mesh("cpu", (ranks,))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def seen_in_forward(model, names, run):
    """How many zeros the weights have as the layers use them."""
    found, handles = {}, []
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))

        def look(module, _, name=name):
            assert type(module.weight.data) is torch.Tensor
            found[name] = int((module.weight == 0).sum())

        handles.append(layer.register_forward_pre_hook(look))
    with torch.no_grad():
        run(X)
    for handle in handles:
        handle.remove()
    return found


def held(model, optimizer, step, run=None, whole=None):
    """Train, and see that the zeros are those of the masks, in what is stored and in what is used."""
    pruner = sc.Pruner(model, 0.8, schedule=CURVE)
    pruner.attach(optimizer)
    begun = {name: full(weight).detach().clone() for name, weight in sc.weights(model).items()}
    for _ in range(12):
        optimizer.zero_grad()
        step()
        optimizer.step()
    masks = pruner.finish()
    assert masks.pruned == 1015
    for name, weight in sc.weights(model).items():
        value, mask = full(weight), full(masks[name])
        assert torch.equal(value == 0, ~mask), name
        assert not bool(value[~mask].signbit().any())
        assert bool((value != begun[name])[mask].all()), name
    if run is not None:
        assert seen_in_forward(model, masks, run) == masks.counts()
    if whole is not None:
        assert all(torch.equal(full(mask), whole[name]) for name, mask in masks.items())


def plainly(model, run=None):
    return lambda: (model if run is None else run)(X).square().mean().backward()


def masks_of_one(make):
    model = net()
    optimizer = make(model.parameters())
    pruner = sc.Pruner(model, 0.8, schedule=CURVE)
    pruner.attach(optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        plainly(model)()
        optimizer.step()
    return pruner.finish()


def loops(rank, ranks):
    one = {name: masks_of_one(make) for name, make in OPTIMIZERS.items()}
    for name, make in OPTIMIZERS.items():
        model = sharded(ranks)
        held(model, make(model.parameters()), plainly(model), model, one[name])
    make = OPTIMIZERS["adam"]
    for name, options in SHARDED.items():
        model = sharded(ranks, **options)
        held(model, make(model.parameters()), plainly(model), model, None if name == "bf16" else one["adam"])

    model = sharded(ranks)
    model.set_reshard_after_backward(False)
    held(model, make(model.parameters()), plainly(model), model, one["adam"])

    for resharded in (True, False):
        model = sharded(ranks)

        def accumulated(model=model, resharded=resharded):
            for last in (False, True):
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last or resharded)
                (model(X).square().mean() / 2).backward()

        held(model, make(model.parameters()), accumulated, model, one["adam"])

    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model = sharded(ranks)
        compiled = torch.compile(model, backend=backend)
        held(model, make(model.parameters()), plainly(model, compiled))
        model = sharded(ranks)
        model.compile(backend=backend)
        held(model, make(model.parameters()), plainly(model))


@pytest.mark.slow
def test_zeros_are_held_in_every_loop():
    in_a_group(2, loops, 2)


def renewed(rank, ranks):
    """Parameters that are made late, or anew."""
    with torch.device("meta"):
        model = net()
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    with pytest.raises(InputError, match=r"up\.weight .*meta"):
        sc.prune(model, 0.5)
    model.to_empty(device="cpu")
    whole = net()
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.copy_(distribute_tensor(whole.get_parameter(name).detach(), mesh, weight.placements))
    one = masks_of_one(OPTIMIZERS["adam"])
    held(model, OPTIMIZERS["adam"](model.parameters()), plainly(model), model, one)

    # a whole state loaded with assign=True: the parameters are others, and the optimizer steps the old ones
    model = rows(net(), ranks)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = sc.Pruner(model, 0.8, schedule=CURVE)
    pruner.attach(optimizer)
    plainly(model)()
    optimizer.step()
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    plainly(model)()
    with pytest.warns(SecateurWarning, match=r"none of these optimizers: give every optimizer"):
        optimizer.step()
    pruner.detach()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        plainly(model)()
        optimizer.step()
    masks = pruner.finish()
    assert sc.check(model, masks) == {}
    assert masks.pruned == 1015

    # to_empty: the memory is another, and holds anything
    model = rows(net(), ranks)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = sc.Pruner(model, 0.8)
    pruner.attach(optimizer)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.25)
    plainly(model)()
    optimizer.step()
    assert sc.check(model, pruner.masks) == {}
    assert {name: int((full(w) == 0).sum()) for name, w in sc.weights(model).items()} == pruner.masks.counts()


def test_parameters_that_are_made_late_or_anew():
    in_a_group(2, renewed, 2)


def wrapped(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    for call in (lambda: sc.prune(model, 0.5), lambda: sc.Pruner(model, 0.5)):
        with pytest.raises(InputError, match=r"FullyShardedDataParallel.*prune before wrapping"):
            call()
    model = net()
    masks = sc.prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    with pytest.raises(StateError, match=r"up\.weight was sharded since the Pruner was made: make the Pruner"):
        optimizer.step()
    assert sc.check(model, masks) == {}
    assert copy.copy(masks).counts() == masks.counts()


def test_fsdp1_and_sharding_after_attach_are_refused():
    in_a_group(2, wrapped, 2)
