"""accelerate, explain and dense on whole models: what is chosen, what is refused, what is left alone."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import secateur as sc
from models import MODELS, build, example
from secateur.errors import FileError, InputError, InputTypeError, StateError
from secateur.runtime import native, swapping, tuning
from sparse_models import Apart, off, thin


def mlp():
    return thin(build(Apart))


X = torch.randn(4, 12)


def kinds(model):
    return [type(module).__name__ for module in model.modules()]


def test_every_layer_that_is_faster_is_sparse(backend, sparse_wins):
    model = mlp()
    fast = sc.accelerate(model, X)
    assert kinds(fast) == ["Apart", "SparseLinear", "SparseLinear"]
    assert fast.plan.sparse == ("first", "second")
    assert (fast.plan.isa, fast.plan.threads) == (native.isa(), torch.get_num_threads())
    for n in (0, 1, 4, 333):
        x = torch.randn(n, 12)
        assert off(fast(x), model(x).detach()) <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_real_models_in_every_mode(backend, sparse_wins, kind):
    model = thin(build(kind), 0.7)
    x = example(model)
    fast = sc.accelerate(model, x)
    assert any(isinstance(module, swapping.Sparse) for module in fast.modules())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert off(fast(x), model(x).detach()) <= 1e-5
    back = sc.dense(fast)
    with torch.no_grad():
        assert back(x).equal(model(x))


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_given_is_left_alone(backend, sparse_wins, kind):
    model = build(kind).train()
    before = copy.deepcopy(model.state_dict())
    attributes = [sorted(vars(module)) for module in model.modules()]
    sc.accelerate(model, example(model))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("kind", MODELS)
def test_dense_leaves_no_trace(backend, sparse_wins, kind):
    model = thin(build(kind), 0.7)
    next(model.parameters()).requires_grad_(False)
    fast = sc.accelerate(model, example(model))
    back = sc.dense(fast)
    assert sc.explain(fast) is fast.plan  # which is still fast
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert [sorted(vars(module)) for module in back.modules()] == [sorted(vars(module)) for module in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict()) == list(fast.state_dict())
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [n for n, _ in back.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_tied_and_shared_stay_so(backend, sparse_wins):
    one = nn.Linear(12, 12)
    model = thin(nn.Sequential(one, nn.ReLU(), one, nn.Linear(12, 12)))
    model[3].weight = one.weight
    fast = sc.accelerate(model, X)
    assert fast[0] is fast[2]
    assert fast[3].weight is fast[0].weight
    assert off(fast(X), model(X).detach()) <= 1e-5


def test_the_real_clock(backend, monkeypatch):
    monkeypatch.setattr(tuning, "_CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(tuning, "_SECONDS", 0.01)
    monkeypatch.setattr(tuning, "_GAIN", ((0.01, 6),))
    model = thin(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)))
    fast = sc.accelerate(model, [torch.randn(1, 256), torch.randn(16, 256)])
    assert all(len(layer.timings) == 2 for layer in fast.plan.layers)
    x = torch.randn(3, 256)
    assert off(fast(x), model(x).detach()) <= 1e-5


class Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def masked():
    layer = nn.Linear(12, 12)
    prune.l1_unstructured(layer, "weight", 0.9)
    return layer


REASONS = {
    "too dense: 0.00 % zeros": lambda: nn.Linear(12, 12),
    "its class has a forward of its own": lambda: thin(Mine(12, 12)),
    "its weights are computed from parametrizations.weight.original0": lambda: nn.utils.parametrizations.weight_norm(
        thin(nn.Linear(12, 12))
    ),
    "weight is torch.bfloat16 on cpu": lambda: thin(nn.Linear(12, 12)).bfloat16(),
    "no sparse kernel for ConvTranspose3d": lambda: thin(nn.ConvTranspose3d(1, 8, 3)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_stays_dense_says_why(backend, sparse_wins, reason):
    model = REASONS[reason]()
    x = X.view(1, 1, 4, 12) if "ConvTranspose3d" in reason else X
    fast = sc.accelerate(model, x.to(next(model.parameters()).dtype))
    assert fast.plan.layers[0].reason.startswith(reason)
    assert type(fast).__name__ == type(model).__name__
    assert "no faster, all of it dense" in str(fast.plan)


def test_computed_weights_that_cannot_be_copied_are_refused():
    layer = nn.Linear(12, 12)
    prune.l1_unstructured(layer, "weight", 0.9)
    layer(X)
    with pytest.raises(InputError, match="make them plain first"):
        sc.accelerate(layer, X)
    assert parametrize


def test_layers_that_the_example_does_not_reach(backend, sparse_wins):
    model = mlp()
    model.spare = thin(nn.Linear(12, 12))
    fast = sc.accelerate(model, X)
    assert [layer.reason for layer in fast.plan.layers] == ["", "", "the example does not reach it"]
    assert type(fast.spare) is nn.Linear


def test_the_plan_is_saved_with_the_model(backend, sparse_wins, tmp_path, monkeypatch):
    model = mlp()
    fast = sc.accelerate(model, X)
    torch.save(fast, tmp_path / "fast.pt")
    for one in (
        copy.deepcopy(fast),
        torch.load(tmp_path / "fast.pt", weights_only=False),
        pickle.loads(pickle.dumps(fast)),
    ):
        assert one.plan == fast.plan
        assert one(X).equal(fast(X))
        assert kinds(sc.dense(one)) == kinds(model)
    monkeypatch.setattr(tuning, "times", None)
    monkeypatch.setattr(tuning, "gain", None)
    for plan in (fast.plan, json.loads(json.dumps(fast.plan.to_dict()))):
        again = sc.accelerate(model, X, plan=plan)
        assert again.plan == fast.plan
        assert again(X).equal(fast(X))


def test_a_plan_for_something_else_is_refused(backend, sparse_wins):
    model = mlp()
    plan = sc.accelerate(model, X).plan
    other = copy.deepcopy(model)
    other.first.weight.data = other.first.weight.data.flip(0)
    with pytest.raises(InputError, match="'first' is Linear 20 x 12 with zeros"):
        sc.accelerate(other, X, plan=plan)
    with pytest.raises(InputError, match="is missing here"):
        sc.accelerate(nn.Sequential(model), X, plan=plan)
    with pytest.raises(InputError, match=r"measured on .* 1 threads(.|\n)*Leave plan out"):
        sc.accelerate(model, X, threads=2, plan=plan)
    with pytest.raises(FileError, match="not a plan"):
        sc.accelerate(model, X, plan={})


def test_threads_are_for_tuning_alone(backend, sparse_wins):
    before = torch.get_num_threads()
    fast = sc.accelerate(mlp(), X, threads=2)
    assert (torch.get_num_threads(), fast.plan.threads) == (before, 2)


def test_what_cannot_be_accelerated_is_refused_before_anything_changes(sparse_wins):
    model = mlp()
    for inputs, error, words in (([], InputError, "empty list"), ("x", InputTypeError, "inputs is a str")):
        with pytest.raises(error, match=words):
            sc.accelerate(model, inputs)
    with pytest.raises(InputError, match="threads is 0"):
        sc.accelerate(model, X, threads=0)
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        sc.accelerate("model", X)
    with pytest.raises(InputError, match="lazy or on the meta device"):
        sc.accelerate(nn.LazyLinear(3), X)
    with pytest.raises(RuntimeError, match="shapes"):
        sc.accelerate(model, torch.randn(4, 13))
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="shapes"):
        sc.accelerate(model, torch.randn(4, 13), threads=2)
    assert torch.get_num_threads() == before


def test_twice_is_refused_with_the_remedy(sparse_wins):
    model = mlp()
    fast = sc.accelerate(model, X)
    with pytest.raises(StateError, match=r"sc\.accelerate\(sc\.dense\(model\)"):
        sc.accelerate(fast, X)
    assert kinds(sc.accelerate(sc.dense(fast), X)) == kinds(fast)


def test_plain_models_are_refused():
    with pytest.raises(StateError, match=r"sc\.accelerate\(model, example_inputs\)"):
        sc.explain(nn.Linear(3, 3))
    with pytest.raises(StateError, match="plain already"):
        sc.dense(nn.Linear(3, 3))
    with pytest.raises(InputTypeError, match="int"):
        sc.explain(3)


def test_a_model_within_a_model(backend, sparse_wins):
    fast = sc.accelerate(mlp(), X)
    outer = nn.Sequential(fast, nn.Linear(5, 5))
    back = sc.dense(outer)
    assert kinds(back) == ["Sequential", "Apart", "Linear", "Linear", "Linear"]
    assert all(p.requires_grad for p in back.parameters())


def test_a_model_with_a_plan_of_its_own(backend, sparse_wins):
    model = mlp()
    model.plan = "of mine"
    fast = sc.accelerate(model, X)
    assert fast.plan == "of mine"
    assert sc.explain(fast).sparse == ("first", "second")
    assert sc.dense(fast).plan == "of mine"


def test_within_inference_mode(backend, sparse_wins):
    model = mlp()
    with torch.inference_mode():
        fast = sc.accelerate(model, X)
    assert off(fast(X), model(X).detach()) <= 1e-5
    fast.first.weight.add_(1)  # no inference tensor
    with pytest.raises(StateError, match="first"):
        fast(X)
    assert sc.dense(fast).first.weight.equal(model.first.weight + 1)


def test_packed_sequences_are_examples(sparse_wins):
    model = thin(nn.LSTM(12, 16))
    x = nn.utils.rnn.pack_sequence([torch.randn(5, 12), torch.randn(3, 12)])
    fast = sc.accelerate(model, x)
    assert off(fast(x)[0].data, model(x)[0].data.detach()) <= 1e-5


def test_attention_to_others_is_seen_in_the_example(backend, sparse_wins):
    torch.manual_seed(0)
    model = thin(nn.Transformer(16, 2, 1, 1, 32, batch_first=True), 0.7)
    src, tgt = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    fast = sc.accelerate(model, (src, tgt))
    assert sorted(fast.decoder.layers[0].multihead_attn._buffers) == ["packed_k", "packed_out", "packed_q", "packed_v"]
    assert sorted(fast.decoder.layers[0].self_attn._buffers) == ["packed_in", "packed_out"]
    with torch.inference_mode():
        assert off(fast(src, tgt), model(src, tgt)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_through_torch_compile(sparse_wins):
    fast = sc.accelerate(torch.compile(mlp()), X)
    assert kinds(fast)[0] == "Apart"
    assert sc.explain(torch.compile(fast)) == fast.plan


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_torch_jit_stays_as_it_is():
    plain = nn.Sequential(nn.Linear(8, 8)).eval()
    scripted, traced = torch.jit.script(plain), torch.jit.trace(plain, torch.ones(1, 8))
    for model in (scripted, traced, nn.Sequential(scripted, nn.Linear(8, 8)).eval()):
        fast = sc.accelerate(model, torch.ones(1, 8))
        torch.testing.assert_close(fast(torch.ones(2, 8)), model(torch.ones(2, 8)))
        assert not any(parameter.requires_grad for parameter in fast.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_measured_side_by_side(backend, sparse_wins):
    model = mlp()
    fast = sc.accelerate(model, X)
    result = sc.compare({"pruned": model, "fast": fast}, X, seconds=0.01)
    ours, plain = result.measurements["fast"], result.measurements["pruned"]
    assert (ours.macs, ours.zero_macs, ours.nonzeros) == (plain.macs, plain.zero_macs, plain.nonzeros)
    assert ours.file_bytes == plain.file_bytes


def test_pruning_what_is_accelerated_is_noticed(sparse_wins):
    fast = sc.accelerate(mlp(), X)
    sc.prune(fast, 0.99)
    with pytest.raises(StateError, match="have changed"):
        fast(X)


def test_what_prunes_and_calls_it_on_the_way_is_told_what_to_take(sparse_wins):
    fast = sc.accelerate(nn.Sequential(mlp()), X)
    before = copy.deepcopy(fast.state_dict())
    for verb in (
        lambda: sc.oneshot(fast, sc.calibrate(sc.dense(fast), [(torch.randn(64, 12),)]), 0.95),
        lambda: sc.shrink(fast, X, 0.5),
        lambda: sc.prune(fast, 0.5, pattern=sc.units(fast, X)),
    ):
        with pytest.raises((StateError, InputError), match=r"sc\.dense\("):
            verb()
        assert all(torch.equal(before[name], tensor) for name, tensor in fast.state_dict().items())


HF = {
    "bert": ("BertConfig", "BertModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 50}),
    "gpt2": ("GPT2Config", "GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}),
    "llama": ("LlamaConfig", "LlamaModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 50}),
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_hugging_face_models(backend, sparse_wins, name):
    transformers = pytest.importorskip("transformers")
    config, kind, sizes = HF[name]
    torch.manual_seed(0)
    model = thin(getattr(transformers, kind)(getattr(transformers, config)(**sizes)), 0.7)
    inputs = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    fast = sc.accelerate(model, inputs)
    assert len(fast.plan.sparse) >= 8
    with torch.inference_mode():
        assert off(fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state) <= 1e-5
        again = copy.deepcopy(fast)
        assert off(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state) <= 1e-5
    assert [type(m) for m in sc.dense(fast).modules()] == [type(m) for m in model.modules()]


def test_the_demo_model(backend, sparse_wins):
    from secateur.demo.digits import LSTMClassifier

    torch.manual_seed(0)
    model, x = thin(LSTMClassifier(), 0.7), torch.randn(5, 8, 8)
    assert off(sc.accelerate(model, x)(x), model(x).detach()) <= 1e-5


LOSSY = pytest.mark.parametrize("values", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@LOSSY
def test_values_of_16_bits_are_rounded_and_half_the_size(isa, sparse_wins, values):
    model, name = thin(nn.Linear(200, 96)), str(values).removeprefix("torch.")
    x = torch.randn(7, 200)
    exact, half = sc.accelerate(model, x), sc.accelerate(model, x, values=values)
    rounded = copy.deepcopy(model).double()
    rounded.weight.data = model.weight.detach().to(values).double()
    assert off(half(x), rounded(x.double())) <= 1e-5
    assert half.packed_weight.numel() < 0.75 * exact.packed_weight.numel()
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), model.state_dict().values(), strict=True))
    assert name in str(sc.explain(half))
    assert name not in str(sc.explain(exact))
    assert torch.equal(pickle.loads(pickle.dumps(half))(x), half(x))
    again = sc.accelerate(model, x, plan=half.plan.to_dict(), values=values)
    assert torch.equal(again(x), half(x))
    with pytest.raises(InputError, match=rf"for values=torch\.{name}"):
        sc.accelerate(model, x, plan=half.plan)


@LOSSY
def test_values_of_16_bits_refuse_what_they_cannot_hold(isa, sparse_wins, values):
    model = thin(nn.Linear(64, 64))
    with torch.no_grad():
        model.weight[0, 0] = 3.4e38
    layer = sc.accelerate(model, torch.randn(1, 64), values=values).plan.layers[0]
    assert f"does not fit into {str(values).removeprefix('torch.')}" in layer.reason
    with pytest.raises(InputError, match=r"torch\.float16 or torch\.bfloat16"):
        sc.accelerate(model, torch.randn(1, 64), values=torch.float64)


def test_a_value_that_does_not_fit_leaves_its_layer_dense(sparse_wins):
    model, x = thin(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), torch.randn(2, 16)
    with torch.no_grad():
        model[0].weight[0, 0] = 70000.0
    fast = sc.accelerate(model, x, values=torch.float16)
    assert "does not fit into float16" in fast.plan.layers[0].reason
    assert type(fast[0]) is nn.Linear
    assert torch.allclose(fast(x), model(x), rtol=1e-2, atol=1e-2)
