"""What sparse layers share: refusals, falling back, and knowing when their weights have changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurWarning, StateError
from secateur.measurement import costs
from secateur.runtime import native, products, swapping
from sparse_models import off, sparse, thin

INPUTS = {
    "Linear": (lambda: nn.Linear(16, 32), (4, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 16)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 3), (2, 4, 4, 5, 6)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 4, stride=2), (2, 4, 16)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 4, stride=2), (2, 4, 8, 8)),
    "LSTM": (lambda: nn.LSTM(16, 8, batch_first=True), (2, 5, 16)),
    "GRU": (lambda: nn.GRU(16, 8), (5, 2, 16)),
    "RNN": (lambda: nn.RNN(16, 8), (5, 2, 16)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (2, 16)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (2, 16)),
    "RNNCell": (lambda: nn.RNNCell(16, 8), (2, 16)),
    "MultiheadAttention": (lambda: Attend(), (2, 5, 16)),
}


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0]


@pytest.fixture(params=INPUTS)
def kind(request, isa):
    make, shape = INPUTS[request.param]
    model = thin(make(), seed=3)
    return model, sparse(model), torch.randn(shape)


def tensor(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, swapping.Sparse))


def test_training_is_refused_with_the_remedy(kind):
    _, fast, x = kind
    fast.train()
    with pytest.raises(StateError, match=r"fast\.eval\(\)(.|\n)*sc\.dense\(fast\)"):
        fast(x)
    with torch.no_grad():
        tensor(fast(x))


def test_an_input_that_wants_gradients_is_refused(kind):
    _, fast, x = kind
    x.requires_grad_()
    with pytest.raises(StateError, match="gives no gradients"):
        fast(x)
    with torch.inference_mode():
        tensor(fast(x))


def test_forgotten_no_grad_is_forgiven(kind):
    model, fast, x = kind
    assert not tensor(fast(x)).requires_grad
    assert off(tensor(fast(x)), tensor(model(x)).detach()) <= 1e-5


def test_autocast_goes_dense_and_says_so_once(kind):
    model, fast, x = kind
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            model(x)
        except RuntimeError:  # oneDNN has no LSTM of bfloat16 for a processor without AVX-512
            with pytest.warns(SecateurWarning, match="autocast is on"), pytest.raises(RuntimeError, match="primitive"):
                fast(x)
            return
        with pytest.warns(SecateurWarning, match="autocast is on"):
            got = tensor(fast(x))
        tensor(fast(x))  # warnings are errors
        assert got.dtype == tensor(model(x)).dtype
        assert off(got.float(), tensor(model(x)).float()) <= 2e-2


def test_float64_goes_dense(kind):
    model, fast, x = kind
    assert off(tensor(fast.double()(x.double())), tensor(copy.deepcopy(model).double()(x.double()))) <= 1e-12


def test_modes_that_watch_operators_see_dense_ones(kind):
    model, fast, x = kind
    with torch.inference_mode():
        seen = costs.macs(fast, ((x,), {}))
        assert seen == costs.macs(model, ((x,), {}))
    assert seen["macs"] > seen["zero_macs"] > 0


CHANGES = {
    "in place": lambda layer, name: getattr(layer, name).mul_(2),
    "data": lambda layer, name: setattr(getattr(layer, name), "data", getattr(layer, name).data * 2),
    "replaced": lambda layer, name: setattr(layer, name, nn.Parameter(getattr(layer, name) * 2, requires_grad=False)),
    "loaded": lambda layer, name: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "assigned": lambda layer, name: layer.load_state_dict(
        {k: 2 * v for k, v in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(kind, change):
    _model, fast, x = kind
    layer = layer_of(fast)
    layer._place = "encoder.lin"
    CHANGES[change](layer, [name for name, p in layer.named_parameters() if p.dim() > 1 and "." not in name][-1])
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with pytest.raises(StateError, match=r"encoder\.lin(.|\n)*sc\.accelerate\(sc\.dense\(fast\)"):
            one(x)


def test_a_changed_out_projection_is_noticed(isa):
    fast = sparse(thin(Attend()))
    fast.a.out_proj.weight.add_(1)
    with pytest.raises(StateError, match="changed"):
        fast(torch.randn(2, 5, 16))


def test_copies_stay_sparse_and_fresh(kind, tmp_path):
    _, fast, x = kind
    torch.save(fast, tmp_path / "fast.pt")
    reference = tensor(fast(x))
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(tmp_path / "fast.pt", weights_only=False),
    ]
    with torch.inference_mode():
        copies.append(copy.deepcopy(fast))  # whose parameters count no versions
    for one in copies:
        assert type(layer_of(one)) is type(layer_of(fast))
        assert tensor(one(x)).equal(reference)
        with torch.inference_mode():
            assert tensor(one(x)).equal(reference)


def test_moves_that_keep_the_weights_keep_the_layer(kind):
    _, fast, x = kind
    reference = tensor(fast(x))
    assert tensor(fast.to("cpu").float().share_memory()(x)).equal(reference)
    fast.to(torch.bfloat16).float()  # these have lost digits
    with pytest.raises(StateError, match="changed"):
        fast(x)


def test_state_dict_knows_nothing(kind):
    model, fast, _ = kind
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(fast.state_dict()[name].equal(value) for name, value in model.state_dict().items())
    model.load_state_dict(fast.state_dict(), strict=True)


def test_restored_leaves_no_trace(kind):
    model, fast, _ = kind
    for module in list(fast.modules()):
        if isinstance(module, swapping.Swapped):
            module.restore()
    for mine, plain in zip(fast.modules(), model.modules(), strict=True):
        assert type(mine) is type(plain)
        assert sorted(vars(mine)) == sorted(vars(plain))
        assert sorted(mine._buffers) == sorted(plain._buffers)
        assert mine._non_persistent_buffers_set == plain._non_persistent_buffers_set


def test_unpickled_where_the_library_is_not(monkeypatch, kind):
    model, fast, x = kind
    kept = pickle.dumps(fast)
    monkeypatch.setattr(native, "library", lambda: None)
    assert off(tensor(pickle.loads(kept)(x)), tensor(model(x)).detach()) <= 1e-5


def test_unpickled_where_the_library_is_again(monkeypatch):
    if native.library() is None:
        pytest.skip("no native library")
    model, x = thin(nn.Linear(16, 32)), torch.randn(4, 16)
    with monkeypatch.context() as without:
        without.setattr(native, "library", lambda: None)
        kept = pickle.dumps(sparse(model))
    one = pickle.loads(kept)
    assert one.packed_weight.equal(products.pack(one.weight))
    assert off(one(x), model(x).detach()) <= 1e-5


def test_shares():
    assert swapping.zero_share(torch.tensor([[0.0, 1.0]])) == 0.5
    assert swapping.zero_share(torch.empty(0, 3)) == 1.0


def _stacked(kind):
    return kind(16, 16, num_layers=2, dropout=0.5)


NOISY = {
    "Dropout in a chain": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 8)), lambda m: None),
    "LSTM(dropout=)": (lambda: nn.Sequential(_stacked(nn.LSTM)), lambda m: None),
    "GRU(dropout=)": (lambda: nn.Sequential(_stacked(nn.GRU)), lambda m: None),
    "recurrent dropout": (lambda: nn.Sequential(nn.LSTM(16, 16)), lambda m: sc.dropout.recurrent(m, hidden=0.5)),
    "learned rates": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)),
        lambda m: sc.dropout.hard_concrete(m, n_data=10),
    ),
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.filterwarnings("ignore:the standard deviation")  # of outputs that depend on no kept weight
def test_a_sampled_accelerated_model_has_the_noise_of_the_plain_one(name, isa):
    make, add = NOISY[name]
    model = thin(make(), seed=3).eval()
    fast = sparse(model)
    assert any(isinstance(m, swapping.Sparse) for m in fast.modules())
    for one in (model, fast):
        add(one)
        one.eval()
    x = torch.randn(2, 5, 16)
    take = {"output": lambda out: out[0]} if "Linear" not in str(model) else {}
    plain, found = (sc.dropout.sample(one, x, n=30, seed=1, **take) for one in (model, fast))
    assert plain.std.max() > 0
    torch.testing.assert_close(found.samples, plain.samples, rtol=0, atol=1e-4)


def test_a_default_device_costs_no_sparse_kernel(isa, monkeypatch):
    fast = sparse(thin(nn.Linear(16, 32), seed=3))
    runs = []
    linear = products.linear
    monkeypatch.setattr(products, "linear", lambda *given: runs.append(1) or linear(*given))
    with torch.device("cpu"), torch.inference_mode():
        fast(torch.randn(4, 16))
    assert runs
