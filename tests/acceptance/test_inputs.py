"""Odd layouts, whole models, generators, attention."""

import pytest
import torch
from torch import nn

import secateur as sc
from models import MODELS, Attention, Net, Tagger, build, copies, example, k, same, train, zeros


def by_hand(before, count):
    """The `count` smallest of some tensors, row-major: masks."""
    flat = torch.cat([t.abs().flatten() for t in before.values()])
    kept = torch.ones(flat.numel(), dtype=torch.bool)
    kept[flat.sort(stable=True).indices[:count]] = False
    return {n: part.view(before[n].shape) for n, part in zip(
        before, kept.split([t.numel() for t in before.values()]), strict=True)}  # fmt: skip


@pytest.mark.parametrize("allocation", ["global", "uniform", "lamp"])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a29_channels_last(score, allocation):
    model, plain = build(Net).to(memory_format=torch.channels_last), build(Net)
    strides = [p.stride() for p in model.parameters()]
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    plain.load_state_dict(model.state_dict())
    masks = sc.prune(model, 0.9, score=score, allocation=allocation, optimizer=optimizer)
    assert sc.prune(plain, 0.9, score=score, allocation=allocation) == masks
    assert same(copies(model), copies(plain))
    assert zeros(sc.weights(model)) == masks.pruned == k(0.9, masks.size)
    for name, weight in sc.weights(model).items():
        assert bool((optimizer.state[weight]["exp_avg"][~masks[name]] == 0).all())
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        assert zeros(sc.weights(model)) == masks.pruned
    assert [p.stride() for p in model.parameters()] == strides
    pruner.finish()


@pytest.mark.parametrize("layout", ["transposed", "slice", "channels_last_3d"])
def test_a29_transposed_and_sliced_weights(layout):
    if layout == "channels_last_3d":
        model = nn.Conv3d(4, 6, 3, bias=False).to(memory_format=torch.channels_last_3d)
    else:
        model = nn.Linear(9, 14, bias=False)
        stored = torch.randn(9, 14) if layout == "transposed" else torch.randn(28, 18)
        model.weight = nn.Parameter(stored.t() if layout == "transposed" else stored[::2, ::2])
        rest = stored[1::2].clone()
    stride, before = model.weight.stride(), {"weight": model.weight.detach().clone()}
    assert not model.weight.is_contiguous()
    masks = sc.prune(model, 0.9)
    exact = by_hand(before, k(0.9, model.weight.numel()))
    assert torch.equal(masks["weight"], exact["weight"])
    assert torch.equal(model.weight, torch.where(exact["weight"], before["weight"], 0))
    assert model.weight.stride() == stride
    if layout == "slice":
        assert torch.equal(stored[1::2], rest)  # what lies between is not ours


@pytest.mark.parametrize("kind", MODELS)
def test_a32_a_whole_model(kind):
    model = build(kind)
    before = copies(model)
    masks = sc.prune(model, 0.8, allocation="uniform")
    expected = {
        name for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name and "norm" not in name
    }
    assert set(masks) == expected
    assert masks.pruned == zeros(sc.weights(model)) == k(0.8, masks.size)
    untouched = [name for name in before if name not in masks and name != "decoder.weight"]
    assert all(same(copies(model)[name], before[name]) for name in untouched)


def test_a32_bias_none_generators_and_names():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.LSTM(8, 4, bias=False), nn.Linear(4, 2))
    assert sc.prune(model, 0.5).pruned == k(0.5, 48 + 128 + 64 + 8)
    for scope in (
        sc.weights(model, only=(name for name in ["0.weight", "3.weight", "3.bias"])),
        sc.weights(model, only=["0", "3.weight", "3.bias"]),
        {name: p for name, p in model.named_parameters() if name in ("0.weight", "3.weight", "3.bias")},
    ):
        masks = sc.prune(model, 0.6, scope=scope)
        assert list(masks) == ["0.weight", "3.weight", "3.bias"]
        assert masks.pruned == k(0.6, 48 + 8 + 2)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model if list(layer.parameters())]
    sc.prune(model, 0.7, optimizer=(one for one in optimizers))
    pruner = sc.Pruner(model, 0.7)
    pruner.attach(*(one for one in optimizers))
    pruner.finish()
    with pytest.raises(KeyError, match=r"'0\.bias' matches no tensor and no module") as caught:
        sc.weights(model, only=["0.bias"])
    assert all(name in str(caught.value) for name in ("0.weight", "3.bias"))
    few = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 2))
    with pytest.raises(KeyError, match="valid names are") as caught:
        sc.prune(few, {"zzz": 0.5})
    assert all(name in str(caught.value) for name in ("0.weight", "1.weight"))


def test_a32_the_scope_explains_itself():
    told = str(sc.weights(build(Tagger), skip=["head"]))
    for line in ("embed.weight", "Embedding is not pruned by default", "head.weight", "skipped", "a bias"):
        assert line in told


def test_a34_multihead_attention():
    model = build(Attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    scope = sc.weights(model, only=[nn.MultiheadAttention, "*.out_proj"])
    assert {n for n in scope if "self_attn" in n} == {
        "layer.self_attn.in_proj_weight",
        "layer.self_attn.out_proj.weight",
    }
    assert {n for n in scope if "cross" in n} == {f"cross.{p}_proj_weight" for p in "qkv"} | {"cross.out_proj.weight"}
    pruner = sc.Pruner(model, 0.7, scope=scope)
    pruner.attach(optimizer)
    for step in range(3):
        before = copies(model)
        train(model, optimizer, 1, first=step)  # a second backward would raise
        now = copies(model)
        for name in scope:
            assert not torch.equal(now[name], before[name]), name
            assert not bool(now[name][~pruner.masks[name]].any()), name
        assert zeros(scope) == k(0.7, scope.size)
    pruner.finish()

    model.eval()
    x = example(model)
    slow = model.layer(x)  # gradients are wanted: the slow path
    with torch.inference_mode():
        fast = model.layer(x)
        padded = model.layer(x, src_key_padding_mask=torch.zeros(4, 6, dtype=torch.bool))
    assert torch.allclose(slow, fast, atol=1e-5)
    assert torch.allclose(slow, padded, atol=1e-5)
    mha = model.layer.self_attn
    with torch.inference_mode():
        quick = mha(x, x, x, need_weights=False)[0]
    assert torch.allclose(quick, mha(x, x, x, need_weights=True)[0], atol=1e-5)


def test_a34_the_fast_path_is_really_taken():
    model = build(Attention).eval()
    sc.prune(model, 0.7, allocation="uniform")
    x = example(model)
    with torch.inference_mode(), torch.profiler.profile() as seen:
        model.layer(x)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in seen.key_averages()}


def test_a16_tokens_of_padding_keep_their_row_in_training():
    model = build(Tagger)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scope = sc.weights(model, only=["embed", "head.weight"])
    assert scope.size == 19 * 6 + 80
    row = model.embed.weight[0].detach().clone()
    pruner = sc.Pruner(model, 0.5, scope=scope, schedule=sc.linear(0, 4))
    pruner.attach(optimizer)
    train(model, optimizer, 5)
    assert pruner.finish().pruned == k(0.5, scope.size)
    assert torch.equal(model.embed.weight[0], row)
