"""secateur.runtime.releasing: dense weights that were given back are rebuilt bit for bit, wherever they are wanted."""

import contextlib
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.errors import SecateurWarning, StateError
from secateur.runtime import check_weights, native, trust_weights, tuning
from secateur.runtime.kernel_plans import Gain, KernelPlan
from sparse_models import fake_times, off, thin

X = torch.randn(3, 48)
SLOW = "are rebuilt, which takes much longer"


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c = Conv1D(64, 48)

    def forward(self, x):
        return self.c(x)


def pruned(model, sparsity=0.8):
    """With positive zeros, as secateur makes them."""
    with torch.no_grad():
        for parameter in thin(model, sparsity).parameters():
            parameter.add_(0.0)
    return model


def net():
    return nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 32, bias=False), nn.Tanh())


MODELS = {
    "apart": net,
    "a run": lambda: nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)),
    "turned": Turned,
    "one layer": lambda: nn.Linear(48, 64),
}


@pytest.fixture(params=MODELS)
def model(request):
    pytest.importorskip("transformers")
    return pruned(MODELS[request.param]())


def released(model, x=X, **options):
    return sc.accelerate(model, x, keep_dense=False, **options)


def bits(state):
    return {name: tensor.contiguous().view(torch.int32).tolist() for name, tensor in state.items()}


def test_the_state_dict_is_rebuilt_bit_for_bit(backend, sparse_wins, model):
    fast = released(model)
    shapes = [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    assert [(name, p.shape, p.dtype) for name, p in fast.named_parameters()] == shapes
    assert all(p.is_meta == (p.dim() > 1) for p in fast.parameters())
    assert list(fast.state_dict()) == list(model.state_dict())
    assert bits(fast.state_dict()) == bits(model.state_dict())
    with torch.no_grad():
        for n in (1, 2, 5, 20, 130):
            x = torch.randn(n, 48)
            assert off(fast(x), model(x)) <= 1e-5
    check_weights(fast)
    trust_weights(fast)
    fast(X)


def test_copies_are_small_and_the_plain_model_comes_back(backend, sparse_wins):
    model = pruned(nn.Linear(256, 512), 0.95)
    fast = released(model, torch.randn(2, 256))
    x, file = torch.randn(2, 256), io.BytesIO()
    torch.save(fast, file)
    assert file.tell() < 0.5 * model.weight.nbytes
    file.seek(0)
    before = fast(x)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert copied(x).equal(before)
        assert copied.weight.is_meta
        plain = sc.dense(copied)
        assert type(plain) is nn.Linear
        assert bits(plain.state_dict()) == bits(model.state_dict())
        assert plain.weight.requires_grad
        assert vars(plain).keys() == vars(model).keys()
    assert fast.weight.is_meta


def test_the_given_model_stays_and_shares_nothing(sparse_wins):
    model = pruned(net()).train()
    before = bits(model.state_dict())
    fast = released(model)
    assert bits(model.state_dict()) == before
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in fast.parameters() if not p.is_meta)
    wanted = fast(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert fast(X).equal(wanted)


@pytest.mark.parametrize("pick", [0, 2])
def test_layers_that_are_dense_for_some_rows_keep_their_weights(monkeypatch, pick):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name == str(pick) or bucket < 3 else (1.0, 2.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fast = released(pruned(net()), [torch.randn(1, 48), torch.randn(64, 48)])
    assert [fast[i].weight.is_meta for i in (0, 2)] == [pick == 0, pick == 2]
    assert [layer.released_bytes for layer in fast.plan.layers if layer.kind == "Linear"] == [
        4 * fast[i].weight.numel() * fast[i].weight.is_meta for i in (0, 2)
    ]
    fast(torch.randn(64, 48))


def negative_zero(weight):
    weight[0, 0] = -0.0
    return weight


@pytest.mark.parametrize(
    ("change", "values", "goes"),
    [
        (lambda w: w, torch.float32, True),
        (negative_zero, torch.float32, False),
        (lambda w: w, torch.bfloat16, False),
        (lambda w: w, torch.float16, False),
        (lambda w: w.bfloat16(), torch.bfloat16, True),
        (lambda w: w.half(), torch.float16, True),
        (lambda w: w.bfloat16(), torch.float16, False),  # some are below what float16 has
    ],
)
def test_what_would_lose_a_bit_is_kept(isa, sparse_wins, change, values, goes):
    model = pruned(nn.Linear(48, 64), 0.8)
    with torch.no_grad():
        model.weight[1, 1] = 1e-6
        model.weight.copy_(change(model.weight.detach().clone()))
    with contextlib.nullcontext() if goes else pytest.warns(SecateurWarning, match=r"the model: the dense(.|\n)*copy_"):
        fast = released(model, values=values)
    assert fast.weight.is_meta == goes
    assert bits(fast.state_dict()) == bits(model.state_dict())


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_the_remedy_of_the_warning_runs_as_it_is_printed(sparse_wins, values):
    model = pruned(net())
    with torch.no_grad():
        negative_zero(model[0].weight), negative_zero(model[2].weight)
    norm = model[1].weight.detach().clone()
    with pytest.warns(SecateurWarning, match="make them so first") as told:
        assert not any(p.is_meta for p in released(model, values=values).parameters())
    exec(str(told[0].message).partition("make them so first:")[2], {"torch": torch, "model": model})
    assert all(p.is_meta == (p.dim() > 1) for p in released(model, values=values).parameters())
    assert model[1].weight.equal(norm)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(64, 48), nn.Linear(48, 48), nn.Linear(48, 64)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.up(self.embed(x)))


def test_weights_that_another_module_holds_are_kept(sparse_wins):
    model = pruned(Tied())
    fast = released(model, torch.arange(5))
    assert fast.head.weight is fast.embed.weight
    assert fast.up.weight.is_meta
    assert fast.plan.table().notes[-2] == "dense weights kept: head (shared with another module)"
    assert bits(fast.state_dict()) == bits(model.state_dict())
    assert off(fast(torch.arange(9)), model(torch.arange(9)).detach()) <= 1e-5


def densely(model, x):
    with torch.no_grad():
        return model(x)


def counted(model, x):
    with FlopCounterMode(display=False), torch.no_grad():
        return model(x)


def cast(model, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model(x)


CALLS = {
    "vmap": lambda model, x: densely(torch.vmap(model), x[None])[0],
    "trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False)(x),
    "modes": counted,
    "float64": lambda model, x: densely(copy.deepcopy(model).double(), x.double()),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_go_dense_rebuild_the_weights_and_say_so_once(backend, sparse_wins, model, call):
    fast = released(model)
    with pytest.warns(SecateurWarning, match=SLOW):
        got = CALLS[call](fast, X)
    assert off(got, CALLS[call](model, X).detach()) <= 1e-6
    CALLS[call](fast, X)  # warnings are errors
    assert all(p.is_meta for p in fast.parameters() if p.dim() > 1)


def test_an_empty_batch_rebuilds_nothing(backend, sparse_wins, model):
    fast = released(model)
    for x in (X[:0], X.new_empty(2, 0, 48)):
        assert densely(fast, x).shape == densely(model, x).shape  # warnings are errors
    with pytest.raises(RuntimeError, match=r"shape|size"):
        densely(fast, torch.empty(0, 47))


def test_under_autocast(sparse_wins, model):
    fast = released(model)
    with pytest.warns(SecateurWarning, match=SLOW), pytest.warns(SecateurWarning, match="autocast is on"):
        got = cast(fast, X)
    assert got.dtype == torch.bfloat16
    assert off(got, cast(model, X)) <= 2e-2


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
def test_inputs_that_are_not_finite(sparse_wins, model):
    fast, spoiled = released(model, check_inputs=True), X.clone()
    spoiled[0, 3], spoiled[1, 4] = float("nan"), float("inf")
    with torch.no_grad():
        assert torch.allclose(fast(spoiled), model(spoiled), equal_nan=True, atol=1e-5)


def test_it_goes_to_another_dtype_and_back(sparse_wins, model):
    fast = released(model)
    before = fast(X)
    assert fast.to("cpu") is fast
    assert all(p.dtype is torch.float64 for p in fast.double().parameters())
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b.double()) for a, b in zip(fast.state_dict().values(), model.state_dict().values()))
    assert fast.float()(X).equal(before)


def test_loading_is_refused_and_the_remedy_works(sparse_wins, model):
    fast, state = released(model), {name: 2 * tensor for name, tensor in model.state_dict().items()}
    before = fast(X)
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for assign in (False, True):
            with pytest.raises(StateError, match=r"were released(.|\n)*plain = sc\.dense\(fast\)"):
                one.load_state_dict(state, assign=assign)
            assert one(X).equal(before)
            assert bits(one.state_dict()) == bits(model.state_dict())
    plain = sc.dense(fast)
    plain.load_state_dict(state)
    again = released(plain)
    assert bits(again.state_dict()) == bits(state)
    biases = {name: tensor for name, tensor in state.items() if tensor.dim() == 1}
    fast.load_state_dict(biases, strict=False)
    assert all(torch.equal(fast.state_dict()[name], tensor) for name, tensor in biases.items())


def test_a_part_of_it_refuses_too(sparse_wins):
    fast = released(pruned(net()))
    with pytest.raises(StateError, match="weights of 2 were released"):
        fast[2].load_state_dict(fast[2].state_dict())
    fast[1].load_state_dict(fast[1].state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)),
        lambda layer: setattr(layer, "weight", None),
    ],
    ids=["replaced", "gone"],
)
def test_new_weights_in_its_place_are_noticed(sparse_wins, change):
    fast = released(pruned(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)), 0.8))
    fast(X)
    change(fast[0])
    with pytest.raises(StateError, match="weights of 0 have changed"):
        fast(X)
    now = fast[0].weight
    plain = sc.dense(fast)[0].weight
    assert plain is now is None or plain.equal(now)


def test_a_replaced_weight_is_noticed_where_it_is_turned(sparse_wins):
    fast = released(pruned(Turned()))
    fast.c.weight = nn.Parameter(torch.zeros(48, 64), requires_grad=False)
    with pytest.raises(StateError, match="weights of c have changed"):
        fast(X)
    assert not sc.dense(fast).c.weight.any()


def written(weight):
    weight[0, 0] = 1


READS = {
    "product": lambda w: F.linear(X, w),
    "turned": lambda w: torch.zeros(1, w.shape[0]) @ w,
    "added": lambda w: torch.zeros(w.shape) + w,
    "view": lambda w: w.t(),
    "norm": lambda w: w.norm(),
    "part": lambda w: w[0],
    "copy": lambda w: w.clone(),
    "cast": lambda w: w.double(),
    "sum of a list": lambda w: torch.cat([torch.zeros(w.shape), w]),
    "numpy": lambda w: w.numpy(),
    "array": lambda w: np.asarray(w),
    "tolist": lambda w: w.tolist(),
    "data": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "detached": lambda w: w.detach().zero_(),
    "in place": lambda w: w.mul_(2),
    "part in place": written,
    "source": lambda w: torch.zeros(w.shape).copy_(w),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_who_wants_its_values_is_refused(sparse_wins, read, mode):
    model = pruned(net())
    fast = released(model)
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast).double().float()):
        with mode(), pytest.raises(StateError, match=r"weights of 0 were released(.|\n)*plain = sc\.dense\(fast\)"):
            READS[read](one[0].weight)
    assert bits(sc.dense(fast).state_dict()) == bits(model.state_dict())
    assert off(fast(X), model(X).detach()) <= 1e-5


def test_what_is_known_without_values(sparse_wins):
    model = pruned(net())
    weight, plain = released(model)[0].weight, model[0].weight
    for name in ("shape", "dtype", "nbytes", "ndim", "is_leaf", "layout"):
        assert getattr(weight, name) == getattr(plain, name), name
    for name in ("numel", "stride", "dim", "size", "element_size", "is_contiguous", "is_floating_point"):
        assert getattr(weight, name)() == getattr(plain, name)(), name
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.data.is_meta
    assert "device='meta', size=(64, 48)" in repr(weight)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48)
        self.also = [self.up.weight, {"it": self.down.weight}]

    def forward(self, x):
        return self.down(self.up(x)) + x @ self.also[0].t() @ self.also[1]["it"].t()


def test_what_else_holds_a_weight_has_a_copy(backend, sparse_wins):
    model = pruned(Reads())
    fast, before = released(model), model(X).detach()
    assert fast.up.weight.is_meta
    assert fast.down.weight.is_meta
    assert fast.also[0].equal(model.up.weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert off(fast(X), before) <= 1e-5


@pytest.mark.parametrize("keep_dense", [True, False])
def test_to_empty_leaves_what_was_packed(isa, sparse_wins, model, keep_dense):
    fast = sc.accelerate(model, X, keep_dense=keep_dense)
    state = model.state_dict()
    fast.to_empty(device="cpu")
    values = state if keep_dense else {name: tensor for name, tensor in state.items() if tensor.dim() == 1}
    with torch.no_grad():
        fast.load_state_dict(values, strict=keep_dense)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert bits(fast.state_dict()) == bits(state)


def test_what_went_where_nothing_is_computed_is_not_taken_for_what_was_packed(sparse_wins):
    fast = released(pruned(net())).to("meta").to_empty(device="cpu")
    with pytest.raises(StateError, match="weights of 0 have changed"):
        fast(X)


def test_the_plan_tells_of_it(sparse_wins):
    model = pruned(net())
    fast = released(model)
    sizes = {layer.name: layer.released_bytes for layer in fast.plan.layers}
    assert sizes == {"0": 4 * 48 * 64, "2": 4 * 64 * 32}
    assert "dense weights released: 20.5 kB" in " ".join(str(fast.plan).split())
    assert KernelPlan.from_dict(fast.plan.to_dict()) == fast.plan
    again = released(model, plan=fast.plan.to_dict())
    assert again.plan == fast.plan
    assert again[0].weight.is_meta
    kept = sc.accelerate(model, X, plan=fast.plan)
    assert not kept[0].weight.is_meta
    assert {layer.released_bytes for layer in kept.plan.layers} == {0}
    assert "released" not in str(kept.plan)


def last_but_one(fast):
    return fast.plan.table().notes[-2]


def test_the_plan_says_what_was_not_released_and_why(monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name != "2" or bucket < 3 else (1.0, 2.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    many = [torch.randn(1, 48), torch.randn(64, 48)]
    assert last_but_one(released(pruned(net()), many)) == "dense weights kept: 2 (not sparse for all examples)"
    none = "dense weights released: none"
    convolution = pruned(nn.Conv1d(48, 64, 3))
    assert last_but_one(released(convolution, torch.randn(1, 48, 9))) == (
        f"{none}; kept: the model (a kind of layer that keeps them)"
    )
    model = pruned(nn.Linear(48, 64))
    with torch.no_grad():
        negative_zero(model.weight)
    with pytest.warns(SecateurWarning, match="negative zeros"):
        fast = released(model)
    assert last_but_one(fast) == f"{none}; kept: the model (what was packed has not each bit of them)"
    assert KernelPlan.from_dict(fast.plan.to_dict()) == fast.plan
    assert last_but_one(released(nn.Linear(48, 64))) == f"{none}, as no layer runs sparse for all examples"
    assert "dense weights" not in last_but_one(sc.accelerate(model, X))


@pytest.mark.parametrize("run", [True, False])
def test_the_plan_says_so_where_a_run_alone_is_sparse(isa, monkeypatch, run):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if run == name.endswith("]") else (1.0, 2.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    model = pruned(MODELS["a run"]())
    if run:
        assert last_but_one(released(model)).endswith("none, as no layer runs sparse for all examples by itself")
    else:
        assert "dense weights" not in last_but_one(released(model))


def test_it_is_accelerated_already(sparse_wins):
    with pytest.raises(StateError, match="accelerated already"):
        released(released(pruned(net())))


def test_where_the_library_is_missing_it_says_what_to_do(sparse_wins, monkeypatch):
    model = pruned(nn.Linear(48, 64), 0.8)
    here = pickle.dumps(released(model))
    library = native.library()
    monkeypatch.setattr(native, "library", lambda: None)
    there = pickle.dumps(released(model))
    with pytest.raises(StateError, match="SECATEUR_NATIVE=1"):
        pickle.loads(here)
    monkeypatch.setattr(native, "library", lambda: library)
    fast = pickle.loads(there)  # packed anew
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert bits(fast.state_dict()) == bits(model.state_dict())


def test_measured_and_reported_as_the_plain_one_without_a_warning(sparse_wins):
    model = pruned(net())
    fast = released(model)
    sc.measure(fast, X, seconds=0.01)
    told = sc.compare({"dense": model, "fast": fast}, X, seconds=0.01)
    dense, sparse = (told.measurements[name] for name in ("dense", "fast"))
    for field in ("parameters", "nonzeros", "denormals", "file_bytes", "device", "dtype", "macs", "zero_macs"):
        assert getattr(dense, field) == getattr(sparse, field), field
    with pytest.warns(SecateurWarning, match=SLOW):  # still, where somebody else has it rebuilt
        counted(fast, X)


def test_compiled_and_exported(sparse_wins, model):
    fast, file = released(model), io.BytesIO()
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    program = torch.export.export(fast, (X,))
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        for one in (compiled, torch.export.load(file).module()):
            assert off(one(X), model(X)) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert off(compiled(X), model(X)) <= 2e-2


def test_made_dense_it_can_be_trained(sparse_wins):
    model = pruned(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    model[0].bias.requires_grad_(False)
    plain = sc.dense(sc.accelerate(model, torch.randn(2, 16), keep_dense=False))
    trained = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
