"""Sparsity is a budget on the total, exact to one weight."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from models import Attention, LanguageModel, Mlp, Net, Tagger, build, copies, k, loss, same, train, zeros


def linear(outputs, inputs, seed=0, **options):
    layer = nn.Linear(inputs, outputs, bias=False, **options)
    with torch.no_grad():
        values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layer.weight.copy_(values)
    return layer


def reference(scores, count):
    """The stable sort of all scores together: masks, True = kept."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.ones(flat.numel(), dtype=torch.bool)
    kept[flat.sort(stable=True).indices[:count]] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


# ------------------------------------------------------------------ A12 to A14: what may be asked


def test_a12_one_and_one_point_zero():
    model = linear(4, 5)
    before = copies(model)
    with pytest.raises(TypeError, match=r"(?s)1\.0.*fraction.*Count\(1\)"):
        sc.prune(model, 1)
    with pytest.raises(ValueError, match="allow_empty=True"):
        sc.prune(model, 1.0)
    assert same(copies(model), before)
    assert sc.prune(model, sc.Count(1)).pruned == 1
    assert int((model.weight == 0).sum()) == 1
    assert int(before["weight"].abs().argmin()) == int((model.weight == 0).flatten().nonzero())
    sc.prune(model, 1.0, allocation=sc.allocation.global_(allow_empty=True))
    assert int((model.weight == 0).sum()) == 20


@pytest.mark.parametrize(("size", "pruned"), [(5, 3), (7, 4), (1, 1), (2, 1), (9, 5)])
def test_a13_halves_go_up(size, pruned):
    model = linear(1, size)
    masks = sc.prune(model, 0.5, allocation=sc.allocation.global_(allow_empty=True))
    assert masks.pruned == int((model.weight == 0).sum()) == pruned


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "lamp"])
def test_a13_many_small_layers(allocation):
    model = nn.Sequential(*(linear(1, 3, seed) for seed in range(100)))
    masks = sc.prune(model, 0.1, allocation=allocation)
    assert masks.pruned == zeros(dict(model.named_parameters())) == 30
    if allocation == "uniform":
        assert set(masks.counts().values()) == {0, 1}


@pytest.mark.parametrize(
    "amount",
    [
        0.9,
        np.float32(0.9),
        np.float64(0.9),
        np.float16(0.9),
        torch.tensor(0.9),
        torch.tensor(0.9, dtype=torch.float64),
        Fraction(9, 10),
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [1000, 995])
def test_a14_numbers_of_all_kinds(amount, size):
    model = linear(5, size // 5)
    assert sc.prune(model, amount).pruned == k(0.9, size)
    assert sc.prune(linear(5, size // 5), 0.145).pruned == k(Fraction(145, 1000), size)


@pytest.mark.parametrize(
    "amount", [True, False, np.True_, "0.9", float("nan"), float("inf"), -0.1, 1.1, torch.tensor(float("nan")), None],
    ids=repr,
)  # fmt: skip
def test_a14_what_is_no_sparsity(amount):
    model = linear(4, 5)
    before = copies(model)
    shown = "nan" if isinstance(amount, torch.Tensor) else str(amount)
    with pytest.raises(ValueError, match=r"such as 0\.9") as caught:
        sc.prune(model, amount)
    assert shown in str(caught.value)
    with pytest.raises(ValueError, match=r"such as 0.9|1 or more|give"):
        sc.Pruner(model, amount)
    assert same(copies(model), before)


# ------------------------------------------------------------------ A15: ties


def test_a15_constant_weights():
    for value in (1.0, -0.25):
        model = build(Mlp)
        for p in model.parameters():
            nn.init.constant_(p, value)
        masks = sc.prune(model, 0.5)
        assert masks.pruned == zeros(sc.weights(model)) == 170
        assert not masks["first.weight"].flatten()[:170].any()  # ties in order of (parameter, index)
        assert masks["first.weight"].flatten()[170:].all()
        assert masks["second.weight"].all()


def test_a15_bf16_on_any_number_of_threads():
    sizes = [(700, 600), (300, 500), (10, 30)]  # large enough to be sampled
    wide = nn.Sequential(*(linear(*size, seed) for seed, size in enumerate(sizes))).bfloat16().float()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            for dtype in (torch.bfloat16, torch.float32):
                model = nn.Sequential(*(linear(*size) for size in sizes)).to(dtype)
                model.load_state_dict(wide.state_dict())
                found.append(sc.prune(model, 0.9))
                assert zeros(sc.weights(model)) == found[-1].pruned
    finally:
        torch.set_num_threads(threads)
    size = sum(a * b for a, b in sizes)
    assert found[0].pruned == k(0.9, size)
    assert all(masks == found[0] for masks in found)
    exact = reference({n: w.detach().abs() for n, w in wide.named_parameters()}, k(0.9, size))
    assert all(torch.equal(found[0][name], mask) for name, mask in exact.items())


# ------------------------------------------------------------------ A16: zeros that were there before


@pytest.mark.parametrize(
    "score",
    ["magnitude", "random", lambda n, w: -w.abs(), sc.scores.elementwise(lambda n, w: -w.abs())],
    ids=["magnitude", "random", "largest first", "largest first, elementwise"],
)
@pytest.mark.parametrize("allocation", ["global", "uniform", "lamp"])
def test_a16_pre_existing_zeros(score, allocation):
    model = build(Mlp)
    generator = torch.Generator().manual_seed(3)
    where = torch.randperm(340, generator=generator)[:204]  # 60 %
    flat = torch.cat([w.detach().flatten() for w in sc.weights(model).values()])
    flat[where] = 0
    with torch.no_grad():
        model.first.weight.copy_(flat[:240].view(20, 12))
        model.second.weight.copy_(flat[240:].view(5, 20))
    before = copies(model)
    masks = sc.prune(model, 0.5, score=score, allocation=allocation)
    assert same(copies(model), before)
    report = sc.report(model, masks)
    assert (report.asked, report.got) == (0.5, 0.6)
    assert "50" in str(report)
    assert "60" in str(report)


def test_a16_padding_row_is_outside_the_budget():
    for value in (0.0, 0.001):  # also when somebody has written into it
        model = nn.Embedding(10, 4, padding_idx=0)
        with torch.no_grad():
            model.weight[1:] = linear(9, 4).weight
            model.weight[0] = value
        masks = sc.prune(model, 0.5, scope=sc.weights(model, only=[nn.Embedding]))
        assert int((model.weight[1:] == 0).sum()) == masks.pruned == 18
        assert bool((model.weight[0] == value).all())
        assert bool(masks["weight"][0].all())


# ------------------------------------------------------------------ A17: shared


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = linear(100, 100)
        self.again = self.shared
        self.layers = nn.ModuleList([self.shared, linear(100, 100, seed=1), self.shared])

    def forward(self, x):
        for layer in (*self.layers, self.again, self.shared):
            x = layer(x)
        return x


def test_a17_shared_module():
    model = Twice()
    masks = sc.prune(model, 0.5)
    assert masks.size == 20000
    assert masks.pruned == 10000
    assert int((model.shared.weight == 0).sum() + (model.layers[1].weight == 0).sum()) == 10000
    twice = sc.weights(Twice(), only=["again", "shared", "layers.0.weight"])
    assert len(twice) == 1
    assert twice.size == 10000


# ------------------------------------------------------------------ A30: dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a30_dtypes(dtype, score):
    model = build(Mlp).to(dtype)
    before = copies(model)
    masks = sc.prune(model, 0.9, score=score)
    assert zeros(sc.weights(model)) == masks.pruned == k(0.9, 340)
    for name, weight in sc.weights(model).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, torch.where(masks[name], before[name], 0))
    if score == "magnitude":
        exact = reference({name: before[name].abs().double() for name in masks}, k(0.9, 340))
        assert all(torch.equal(masks[name], exact[name]) for name in masks)


def test_a30_complex_trains():
    layer = nn.Linear(6, 4, dtype=torch.complex64)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.1)
    sc.Pruner(layer, 0.5).attach(optimizer)
    x = torch.randn(8, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).abs().square().mean().backward()
        optimizer.step()
        assert int((layer.weight == 0).sum()) == 12


def test_a30_mixed_dtypes_together():
    model = nn.Sequential(linear(20, 20), linear(20, 20, 1), linear(20, 20, 2), linear(20, 20, 3))
    for layer, dtype in zip(model, (torch.float16, torch.bfloat16, torch.float64, torch.float32), strict=True):
        layer.to(dtype)
    before = copies(model)
    masks = sc.prune(model, 0.7)
    exact = reference({name: before[name].abs().double() for name in before}, k(0.7, 1600))
    assert all(torch.equal(masks[name], exact[name]) for name in before)
    assert [t.dtype for t in model.state_dict().values()] == [t.dtype for t in before.values()]
    assert zeros(model.state_dict()) == k(0.7, 1600)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a30_integers_and_fp8_are_refused(dtype):
    model = build(Mlp)
    model.first.weight = nn.Parameter(torch.ones(20, 12).to(dtype), requires_grad=False)
    before = copies(model)
    with pytest.raises(TypeError, match=r"first\.weight is torch\.\w+.*skip=\['first\.weight'\]"):
        sc.prune(model, 0.5)
    assert same(copies(model), before)
    assert sc.prune(model, 0.5, scope=sc.weights(model, skip=["first.weight"])).pruned == 50


# ------------------------------------------------------------------ A43: random


def test_a43_random():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(5)
            model = nn.Sequential(linear(700, 600), linear(50, 700))
            found.append(sc.prune(model, 0.5, score=sc.scores.random(5)))
            model = nn.Sequential(linear(700, 600), linear(50, 700))
            found.append(sc.prune(model, 0.5, score=sc.scores.random(generator=generator)))
    finally:
        torch.set_num_threads(threads)
    sc.prune(build(Tagger), 0.5, score="random")
    assert all(masks == found[0] for masks in found)
    assert found[0].pruned == k(0.5, 455000)
    assert found[0] != sc.prune(nn.Sequential(linear(700, 600), linear(50, 700)), 0.5, score=sc.scores.random(6))


def test_a43_global_state_is_untouched():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for score in ("random", sc.scores.random(3), sc.scores.random(generator=torch.Generator())):
        model = build(Tagger)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = sc.Pruner(model, 0.5, score=score, schedule=sc.linear(0, 3))
        pruner.attach(optimizer)
        train(model, optimizer, 3)
        pruner.finish()
        sc.prune(model, 0.6, score=score)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------ A44: collapse


def test_a44_layer_collapse():
    def model():
        built = nn.Sequential(linear(100, 100), linear(50, 100), linear(20, 50, 2))
        with torch.no_grad():
            built[1].weight.mul_(0.01)
        return built

    guarded = model()
    with pytest.warns(sc.errors.SecateurWarning, match=r"1\.weight keeps under 1 %.*min_keep"):
        masks = sc.prune(guarded, 0.6)
    assert masks.pruned == zeros(guarded.state_dict()) == k(0.6, 16000)
    assert int((guarded[1].weight != 0).sum()) >= 1
    kept = sc.prune(model(), 0.6, allocation=sc.allocation.global_(min_keep=0.01))
    assert kept.pruned == k(0.6, 16000)
    assert 5000 - kept.counts()["1.weight"] == 50
    empty = sc.prune(model(), 0.6, allocation=sc.allocation.global_(allow_empty=True))  # insisted on: no warning
    assert empty.counts()["1.weight"] == 5000
    assert empty.pruned == k(0.6, 16000)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "lamp"])
@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_a44_never_an_empty_tensor(allocation):
    model = nn.Sequential(*(linear(1, 3, seed) for seed in range(50)), linear(40, 40))
    masks = sc.prune(model, 0.95, allocation=allocation)
    assert masks.pruned == k(0.95, 1750) == zeros(model.state_dict())
    assert all(bool((w != 0).any()) for w in model.parameters())


# ------------------------------------------------------------------ A53: the report


def test_a53_report():
    model = build(Tagger)
    masks = sc.prune(model, 0.9, scope=sc.weights(model, only=["lstm.weight_ih_l0", "head.weight"]))
    with torch.no_grad():
        model.head.weight[2] = 0
        model.head.weight[0, 0] = 1.0  # perhaps a zero that came back
    report = sc.report(model, masks)
    lines = {line.name: line for line in report.lines}
    assert set(lines) == {"lstm.weight_ih_l0", "head.weight"}
    for name, line in lines.items():
        weight = model.get_parameter(name)
        assert line.weights == weight.numel()
        assert line.asked == int((~masks[name]).sum())
        assert line.got == int((weight == 0).sum())
        assert line.outputs == len(weight)
        assert line.dead_outputs == int((weight == 0).all(1).sum())
    assert lines["head.weight"].dead_outputs >= 1
    assert report.asked == masks.sparsity
    assert report.got == sum(line.got for line in report.lines) / masks.size
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.effective_parameters == sum(int(p.count_nonzero()) for p in model.parameters())
    assert report.effective_parameters < report.parameters
    for text in (str(report), report.markdown()):
        assert "head.weight" in text
        assert f"{report.effective_parameters:,} of {report.parameters:,}" in text
    assert report.to_dict()["effective_parameters"] == report.effective_parameters


def test_a53_tied_parameters_count_once():
    model = build(LanguageModel)
    report = sc.report(model, sc.prune(model, 0.5))
    assert report.parameters == 240 + 30 + sum(p.numel() for p in model.lstm.parameters())
    assert report.effective_parameters == report.parameters - zeros(dict(model.named_parameters()))


def test_a53_report_tells_the_bytes_on_disk(tmp_path):
    from safetensors.torch import save_model

    model = build(LanguageModel)
    report = sc.report(model, sc.prune(model, 0.5))
    save_model(model, str(tmp_path / "model.safetensors"))
    told = [value for name, value in report.to_dict().items() if "bytes" in name]
    assert told
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(told[0] - size) <= 0.5 * size  # the tensors, tied ones once; a header more or less


# ------------------------------------------------------------------ A54: scores


def test_a54_negative_scores_keep_their_sign():
    model = linear(4, 5)
    scores = torch.arange(-10.0, 10.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))].view(4, 5)
    for score in ({"weight": scores}, lambda name, weight: scores, lambda name, weight: scores.long()):
        masks = sc.prune(linear(4, 5), 0.5, score=score)
        assert torch.equal(masks["weight"], scores >= 0)
    assert torch.equal(sc.prune(model, 0.25, score={"weight": scores})["weight"], scores >= -5)


def test_a54_a_wrong_key():
    model = build(Mlp)
    before = copies(model)
    table = {"first.weigth": torch.rand(20, 12), "second.weight": torch.rand(5, 20)}
    with pytest.raises(KeyError, match=r"first\.weight.*first\.weigth"):
        sc.prune(model, 0.5, score=table)
    assert same(copies(model), before)


@pytest.mark.parametrize("name", ["taylor", "snip", "movement", "fisher"])
def test_a54_gradient_times_weight(name):
    model = build(Tagger)
    sums = {n: torch.zeros_like(w) for n, w in sc.weights(model).items()}
    for step in range(3):
        gradients = torch.autograd.grad(loss(model, step), list(sc.weights(model).values()))
        for (n, w), g in zip(sc.weights(model).items(), gradients, strict=True):
            add = {"taylor": (w * g).abs(), "snip": g, "movement": -(w * g), "fisher": (w * g).square()}[name]
            sums[n] += add.detach()
    if name == "snip":
        sums = {n: (sums[n] * w.detach()).abs() for n, w in sc.weights(model).items()}
    gathered = sc.accumulate(model, range(3), loss, score=name)
    assert all(p.grad is None for p in model.parameters())
    masks = sc.prune(model, 0.8, score=gathered)
    exact = reference(sums, k(0.8, masks.size))
    agree = sum(int((masks[n] == exact[n]).sum()) for n in masks)
    assert masks.pruned == k(0.8, masks.size)
    assert agree >= masks.size - 2  # the last bits of a sum may differ


# ------------------------------------------------------------------ A57: n:m


def test_a57_n_m_on_what_is_not_divisible():
    model = nn.Sequential(linear(8, 12), linear(8, 10, 1))
    before = copies(model)
    with pytest.raises(ValueError, match=r"(?s)1\.weight.*10 inputs.*multiple of 4.*tail='keep'"):
        sc.prune(model, 0.5, pattern=sc.n_m(2, 4))
    assert same(copies(model), before)
    masks = sc.prune(model, 0.5, pattern=sc.n_m(2, 4, tail="keep"))
    assert bool(masks["1.weight"][:, 8:].all())
    assert bool((masks["1.weight"][:, :8].view(8, 2, 4).sum(-1) == 2).all())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("kind", [Tagger, Net, Attention, LanguageModel, None])
def test_a57_every_group_through_training(kind, n, m):
    model = nn.Sequential(linear(16, 24), nn.ReLU(), linear(6, 16, 1)) if kind is None else build(kind)
    scope = sc.weights(model, where=lambda name, p: p.shape[1] % m == 0)
    if kind is None:
        model.example = lambda generator: torch.randn(8, 24, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    sparsity = Fraction(m - n, m)
    pruner = sc.Pruner(model, sparsity, pattern=sc.n_m(n, m), scope=scope, schedule=sc.cubic(0, 10, every=3))
    pruner.attach(optimizer)
    train(model, optimizer, 20)
    masks = pruner.finish()
    assert masks.pruned == sparsity * masks.size
    for name, weight in scope.items():
        rows = scope.members[name].layout.outputs_first(weight.detach())
        groups = (rows == 0).movedim(1, -1).reshape(-1, m).sum(-1)
        assert bool((groups == m - n).all()), name
        moved = rows.movedim(1, -1).reshape(-1, m)
        assert bool((moved.count_nonzero(-1) == n).all()), name


def test_a57_largest_two_of_four():
    model = linear(32, 64)
    before = model.weight.detach().clone()
    masks = sc.prune(model, 0.5, pattern=sc.n_m(2, 4))
    best = before.abs().view(-1, 4).topk(2).indices
    exact = torch.zeros(512, 4, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(masks["weight"].view(-1, 4), exact)
    assert torch.equal(model(torch.eye(64)), torch.where(masks["weight"], before, 0).T)
