"""On a CUDA device: the same masks as on the CPU, and the same promises."""

import copy
import pickle

import pytest
import torch

import secateur as sc
from models import Net, Tagger, build, example, k, zeros
from secateur.errors import StateError
from secateur.runtime import check_weights, tuning
from secateur.runtime.kernel_plans import Gain
from secateur.support import bits
from sparse_models import fake_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("pattern", [None, sc.n_m(2, 4, tail="keep"), sc.blocks(2, 2, tail="keep")], ids=str)
def test_selection_is_that_of_the_cpu(dtype, score, pattern):
    big = torch.nn.Linear(800, 700, dtype=dtype)  # large enough to be sampled
    here, there = big, torch.nn.Linear(800, 700, dtype=dtype, device="cuda")
    there.load_state_dict(here.state_dict())
    masks = sc.prune(here, 0.5, score=score, pattern=pattern)
    found = sc.prune(there, 0.5, score=score, pattern=pattern)
    assert found.packed("weight").is_cuda
    assert found == masks
    assert masks.pruned == int((there.weight == 0).sum())
    assert torch.equal(there.weight.cpu(), here.weight)


def test_ties_go_in_the_same_order():
    weight = torch.randn(700, 800).bfloat16().float().round(decimals=1)
    models = [torch.nn.Linear(800, 700, device=device) for device in ("cpu", "cuda")]
    for model in models:
        model.weight.data.copy_(weight)
    assert sc.prune(models[0], 0.9) == sc.prune(models[1], 0.9)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (13, 5), (64, 64), (0,)])
def test_pack_and_unpack(shape):
    mask = torch.rand(shape) > 0.5
    packed = bits.pack(mask.cuda())
    assert packed.is_cuda
    assert torch.equal(packed.cpu(), bits.pack(mask))
    assert torch.equal(bits.unpack(packed, mask.numel()).cpu(), mask.flatten())
    assert bits.count(packed) == int(mask.sum())


def test_remask():
    model = build(Net).cuda().to(memory_format=torch.channels_last)
    masks = sc.prune(model, 0.9)
    strides = [p.stride() for p in model.parameters()]
    with torch.no_grad():
        for name, weight in sc.weights(model).items():
            weight.masked_fill_(~masks[name], float("inf"))
    assert sum(sc.check(model, masks).values()) == masks.pruned
    sc.remask(model, masks)
    assert sc.check(model, masks) == {}
    assert not any(bool(w[~masks[n]].signbit().any()) for n, w in sc.weights(model).items())
    assert [p.stride() for p in model.parameters()] == strides
    masks.to("cpu").apply(model)


@pytest.mark.parametrize("kind", [Tagger, Net])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
@pytest.mark.parametrize("scaled", [False, True])
def test_attach(kind, options, scaled):
    model = build(kind).cuda()
    x = example(model).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=scaled)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(0, 6, every=2), allocation="uniform")
    pruner.attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=scaled):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sc.check(model, pruner.masks) == {}
    masks = pruner.finish()
    assert masks.pruned == zeros(sc.weights(model)) == k(0.9, masks.size)
    state = pruner.state_dict()
    again = sc.Pruner(model, 0.9, schedule=sc.cubic(0, 6, every=2), allocation="uniform")
    again.load_state_dict({**state, "bits": {name: packed.cpu() for name, packed in state["bits"].items()}})
    assert again.masks == masks
    assert all(again.masks.packed(name).is_cuda for name in masks)


@pytest.fixture
def two_of_four():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
    sc.prune(model, 0.5, pattern="2:4")
    return model.cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_2_4_layers_compute_what_the_dense_ones_do(two_of_four, dtype):
    model, x = two_of_four.to(dtype), torch.randn(4, 512, 1024, device="cuda", dtype=dtype)
    fast = sc.accelerate(model, [x, x[0, :1]])
    print(sc.explain(fast))
    for layer in fast.plan.layers:
        assert len(layer.timings) == 2, layer.reason  # tried, whether or not it gained
    with torch.inference_mode():
        for part in (x, x[0, :1], x[0, :333], x[:0], x[..., :512].repeat(1, 1, 2)):
            torch.testing.assert_close(fast(part), model(part), rtol=0.03, atol=0.03)
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in model.state_dict().items())
    assert [type(one) for one in sc.dense(fast).modules()] == [type(one) for one in model.modules()]


def test_torchs_2_4_product_is_used_copied_and_moved(two_of_four, monkeypatch):
    model, x = two_of_four.half(), torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    monkeypatch.setattr(tuning, "_CACHE", {})
    fake_times(monkeypatch, lambda name, bucket: (2e-3, 1e-3))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fast = sc.accelerate(model, x)
    assert fast.plan.sparse == ("0", "2"), str(fast.plan)
    assert fast.plan.gpu == torch.cuda.get_device_name()
    with torch.inference_mode():
        right = model(x)
        for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(one(x), right, rtol=0.02, atol=0.02)
            assert isinstance(one[0]._packed, torch.sparse.SparseSemiStructuredTensor)
        here = copy.deepcopy(fast).cpu()
        assert torch.equal(here(x.cpu()), copy.deepcopy(model).cpu()(x.cpu()))
        torch.testing.assert_close(here.cuda()(x), right, rtol=0.02, atol=0.02)
    fast[0].weight.data.mul_(2)
    with pytest.raises(StateError, match=r"sc\.dense\(fast\)"):
        check_weights(fast)


def test_float32_stays_dense_and_says_why(two_of_four):
    fast = sc.accelerate(two_of_four, torch.randn(8, 1024, device="cuda"))
    assert "the kernels are for float16 and bfloat16 on CUDA" in fast.plan.layers[0].reason
