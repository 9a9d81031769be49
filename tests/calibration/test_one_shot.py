"""One call after training: exact counts, the survivors repaired, never worse than the quick way, nothing lost."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import secateur as sc
from secateur.calibration.fidelity import Fidelity
from secateur.errors import (
    InputError,
    InputTypeError,
    NotFiniteError,
    PatternError,
    SecateurWarning,
    UnknownNameError,
)


def inputs(count, *shape):
    """Batches whose numbers hang together, as those of real layers do."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[-1], shape[-1], generator=generator)
    return [torch.randn(shape, generator=generator).cumsum(-1) @ mix / 8 for _ in range(count)]


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 7))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv1d(8, 16, 3, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        h = self.conv(x).relu().transpose(1, 2)
        return self.head(h + self.attention(h, h, h)[0])


def zeros(model):
    return sum(int((p == 0).sum()) for p in sc.weights(model).values())


@pytest.fixture(scope="module")
def dense():
    return mlp()


@pytest.fixture(scope="module")
def stats(dense):
    return sc.calibrate(dense, inputs(10, 64, 24))


@pytest.mark.parametrize("options", [
    {}, {"effort": "fast"}, {"solver": "sparsegpt"}, {"solver": "wanda"}, {"solver": "magnitude"},
    {"allocation": "global"}, {"allocation": "erk"}, {"allocation": "lamp"}, {"allocation": "sensitivity"},
    {"pattern": "rows"}, {"pattern": sc.blocks(4, 4, tail="keep")},
], ids=str)  # fmt: skip
def test_count(dense, stats, options):
    model = copy.deepcopy(dense)
    masks = sc.oneshot(model, stats, 0.6, **options)
    size = sc.weights(dense).size
    if "pattern" not in options:
        assert masks.pruned == int(0.6 * size + 0.5)
    assert abs(masks.sparsity - 0.6) < 0.01
    assert zeros(model) == masks.pruned
    assert not any(bool((p == 0).logical_and(p.signbit()).any()) for p in model.parameters())
    assert list(masks) == list(sc.weights(model))


@pytest.mark.parametrize("asked", [sc.Count(1), sc.Count(0), {"0": 0.5, "2.weight": 0.25}, 0.99])
def test_amounts(dense, stats, asked):
    model = copy.deepcopy(dense)
    masks = sc.oneshot(model, stats, asked)
    assert masks.pruned == sc.prune(copy.deepcopy(dense), asked, allocation="uniform").pruned == zeros(model)


def test_n_of_m(dense, stats):
    model = copy.deepcopy(dense)
    sc.oneshot(model, stats, 0.5, pattern="2:4")
    for weight in sc.weights(model).values():
        assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) == 2).all()


def test_truer_than_others(dense, stats):
    fresh = inputs(13, 64, 24)[10:]
    judge = Fidelity(dense, fresh)
    found = {}
    for name, options in {"alps": {}, "fast": {"effort": "fast"}, "wanda": {"solver": "wanda"}}.items():
        model = copy.deepcopy(dense)
        sc.oneshot(model, stats, 0.7, **options)
        found[name] = judge.of(model)
    pruned = copy.deepcopy(dense)
    sc.prune(pruned, 0.7, allocation="uniform")
    assert found["alps"] > found["fast"] > found["wanda"] > judge.of(pruned)


def test_itself(dense, stats):
    model = copy.deepcopy(dense).train()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    sc.oneshot(model, stats, 0.5)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model.get_parameter(n), p) for n, p in dense.named_parameters() if "bias" in n)


def test_again(dense, stats, tmp_path):
    one, other = copy.deepcopy(dense), copy.deepcopy(dense)
    first = sc.oneshot(one, stats, 0.5)
    stats.save(tmp_path / "stats.safetensors")
    loaded = type(stats).load(tmp_path / "stats.safetensors")
    assert sc.oneshot(other, loaded, 0.5) == first
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_zeros_that_are_there_stay(dense, stats):
    model = copy.deepcopy(dense)
    there = sc.prune(model, 0.3)
    stats = sc.calibrate(model, inputs(5, 64, 24))
    masks = sc.oneshot(model, stats, 0.5)
    assert masks.pruned == zeros(model) == int(0.5 * masks.size + 0.5)
    for name in masks:
        assert not bool((masks[name] & ~there[name]).any())


def test_kinds_of_layers():
    model = Net().eval()
    batches = inputs(10, 16, 8, 12)
    judge = Fidelity(model, batches)
    pruned = copy.deepcopy(model)
    sc.prune(pruned, 0.5, allocation="uniform")
    stats = sc.calibrate(model, batches)
    masks = sc.oneshot(model, stats, 0.5)
    assert {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"} == set(masks)
    assert zeros(model) == masks.pruned == int(0.5 * masks.size + 0.5)
    assert judge.of(model) > judge.of(pruned)


def test_part_of_the_model(dense, stats):
    model = copy.deepcopy(dense)
    masks = sc.oneshot(model, stats, 0.5, scope=sc.weights(model, only=["2"]))
    assert list(masks) == ["2.weight"]
    assert torch.equal(model[0].weight, dense[0].weight)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind):
    """Where magnitude loses a recurrent layer, this keeps it: on inputs of other sequences than it was fitted to."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": kind(6, 32, 2, batch_first=True), "head": nn.Linear(32, 5)})
    model.forward = lambda x: model["head"](model["rnn"](x)[0])
    batches = inputs(12, 16, 10, 6)
    judge, pruned = Fidelity(model, batches[10:]), copy.deepcopy(model)
    stats = sc.calibrate(model, batches[:10])
    pruned.forward = lambda x: pruned["head"](pruned["rnn"](x)[0])
    sc.prune(pruned, 0.6, allocation="uniform")
    masks = sc.oneshot(model, stats, 0.6)
    assert zeros(model) == masks.pruned == int(0.6 * masks.size + 0.5)
    assert 1 - judge.of(model) < 0.5 * (1 - judge.of(pruned))
    assert {"alps, closed loop", "alps, open loop"} <= set(masks.tried)


def test_block_by_block(dense, tmp_path):
    model, batches = copy.deepcopy(dense), inputs(4, 64, 24)
    with pytest.warns(SecateurWarning, match="blocks"):
        masks = sc.oneshot(model, batches, 0.5, sequential=True)
    assert zeros(model) == masks.pruned
    other = copy.deepcopy(dense)
    with pytest.warns(SecateurWarning, match="blocks"):
        assert sc.oneshot(other, batches, 0.5, sequential=tmp_path / "run") == masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match="leave one of them out"):
        sc.oneshot(model, batches, 0.5, sequential=True, evaluate=zeros)
    with pytest.raises(InputTypeError, match="sequential"):
        sc.oneshot(model, batches, 0.5, sequential=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dense, dtype):
    model = copy.deepcopy(dense).to(dtype)
    stats = sc.calibrate(model, [x.to(dtype) for x in inputs(5, 64, 24)])
    masks = sc.oneshot(model, stats, 0.5)
    assert all(p.dtype == dtype for p in model.parameters())
    assert zeros(model) >= masks.pruned  # half a number may round to zero


def test_metric_of_the_user(dense, stats):
    model, seen = copy.deepcopy(dense), []

    def evaluate(candidate):
        assert candidate is model
        seen.append(float(candidate[0].weight.abs().sum()))
        return -seen[-1]

    masks = sc.oneshot(model, stats, 0.5, evaluate=evaluate)
    assert seen.pop() == float(dense[0].weight.detach().abs().sum())  # how good it was before
    assert masks.tried == dict(zip(masks.tried, [-x for x in seen], strict=True))
    assert masks.tried[masks.way] == max(masks.tried.values())


def test_solver_of_the_user(dense, stats):
    def mine(weights, curvature, select):
        kept = select(weights.abs())
        return weights * kept * 2, kept

    model = copy.deepcopy(dense)
    masks = sc.oneshot(model, stats, 0.5, solver=mine)
    assert torch.equal(model[0].weight, dense[0].weight * masks["0.weight"] * 2)


@pytest.mark.parametrize(("solver", "error", "remedy"), [
    (lambda w, c, select: w, InputTypeError, r"let it return \(weights, kept\)"),
    (lambda w, c, select: (w, select(w.abs()).float()), InputTypeError, r"let it return \(weights, kept\)"),
    (lambda w, c, select: (w[:, :1], select(w.abs())), InputError, "in the shape of the weights"),
    (lambda w, c, select: (w, torch.zeros_like(w, dtype=torch.bool)), InputError, r"the bools that select\(scores\)"),
    (lambda w, c, select: (w * torch.nan, select(w.abs())), NotFiniteError, "let it return finite ones"),
])  # fmt: skip
def test_what_a_solver_of_the_user_returns_is_checked(dense, stats, solver, error, remedy):
    model = copy.deepcopy(dense)
    with pytest.raises(error, match=remedy):
        sc.oneshot(model, stats, 0.5, solver=solver)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_model_of_another_dtype_than_its_batches(dense, stats):
    with pytest.raises(InputError, match=r"does not take the batches to check on .*calibrate again"):
        sc.oneshot(copy.deepcopy(dense).double(), stats, 0.5)


def test_weights_in_float64_that_nothing_reached_are_not_rounded():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)}).double()
    model.forward = lambda x: model["used"](x)
    before = model["unused"].weight.detach().clone()
    with pytest.warns(SecateurWarning, match="unused"):
        masks = sc.oneshot(model, sc.calibrate(model, [x.double() for x in inputs(5, 64, 8)]), 0.5)
    assert torch.equal(model["unused"].weight, before * masks["unused.weight"])


def test_table(dense, stats):
    text = str(sc.oneshot(copy.deepcopy(dense), stats, 0.5))
    assert "1,232 of 2,464" in text
    assert all(word in text for word in ("0.weight", "(taken)", "wanda with refit"))


def test_not_reached():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    with pytest.warns(SecateurWarning, match="unused"):
        stats = sc.calibrate(model, inputs(5, 64, 8))
    with pytest.warns(SecateurWarning, match=r"unused\.weight.*give batches that reach it"):
        masks = sc.oneshot(model, stats, 0.5)
    assert zeros(model) == masks.pruned == 64


@pytest.mark.parametrize(("options", "error", "remedy"), [
    ({"solver": "obc"}, InputError, "choose alps"),
    ({"solver": 3}, InputTypeError, "function"),
    ({"effort": "max"}, InputError, "'full' or 'fast'"),
    ({"effort": "fast", "solver": "alps"}, InputError, "leave out effort or solver"),
    ({"allocation": "best"}, InputError, "choose"),
    ({"pattern": "3:5"}, PatternError, "tail='keep'"),
    ({"evaluate": 3}, InputTypeError, "function"),
    ({"evaluate": lambda model: float("nan")}, InputError, "finite"),
    ({"progress": 3}, InputTypeError, "progress"),
    ({"allocation": "sensitivity", "pattern": "2:4"}, InputError, "leaves nothing to share"),
])  # fmt: skip
def test_refused(dense, stats, options, error, remedy):
    model = copy.deepcopy(dense)
    with pytest.raises(error, match=remedy):
        sc.oneshot(model, stats, 0.5 if "pattern" in options else 0.4, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_other_arguments(dense, stats):
    with pytest.raises(InputTypeError, match=r"sc\.calibrate"):
        sc.oneshot(dense, inputs(1, 64, 24), 0.5)
    with pytest.raises(InputError, match="another model"):
        sc.oneshot(nn.Sequential(nn.Linear(24, 41)), stats, 0.5)
    with pytest.raises(UnknownNameError, match="head"):
        sc.oneshot(dense, stats, {"head": 0.5})
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"2\.weight"):
        sc.oneshot(broken, stats, 0.5)
    with pytest.raises(InputError, match=r"0\.1"):
        sc.oneshot(dense, stats, 10.0)


def test_interrupted(dense, stats):
    model = copy.deepcopy(dense)

    def evaluate(candidate):
        raise KeyboardInterrupt("now")

    with pytest.raises(KeyboardInterrupt, match="now"):
        sc.oneshot(model, stats, 0.5, evaluate=evaluate)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_all_zeros_of_a_gru_are_in_the_table():
    model = nn.GRU(6, 8)
    stats = sc.calibrate(model, [torch.randn(5, 16, 6) for _ in range(2)])
    masks = sc.oneshot(model, stats, 0.5, effort="fast")
    assert sum(zeros for zeros, _, _ in masks.losses.values()) == masks.pruned
    assert "weight_ih_l0[0:16] + weight_hh_l0[0:16]" in masks.losses


def test_sensitivity_has_nothing_to_judge_by_after_a_loss():
    model = nn.Linear(8, 4)
    stats = sc.calibrate(model, inputs(6, 16, 8), loss=lambda model, x: model(x).square().mean())
    with pytest.raises(InputError, match="evaluate="):
        sc.oneshot(model, stats, 0.5, allocation="sensitivity")


def test_a_metric_that_tells_nothing_is_said_to(dense, stats):
    model = copy.deepcopy(dense)
    masks = sc.oneshot(model, stats, 0.5, evaluate=lambda model: 1.0)
    assert len(masks.tried) > 1
    assert f"all of these are equal, so that none is better: {masks.way} is the first of them" in str(masks)
    assert "are equal" not in str(sc.oneshot(copy.deepcopy(dense), stats, 0.5))


def test_a_sharded_model_is_refused_and_stays_as_it_is(dense, stats, tmp_path):
    masks = sc.prune(copy.deepcopy(dense), 0.5)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = fully_shard(copy.deepcopy(dense), mesh=init_device_mesh("cpu", (1,)))
        before = {name: weight.full_tensor().clone() for name, weight in model.state_dict().items()}
        for call, remedy in (
            (lambda: sc.calibrate(model, inputs(2, 8, 24)), "calibrate before sharding"),
            (lambda: sc.oneshot(model, stats, 0.5), "prune the whole model on one process, before sharding it"),
            (lambda: sc.oneshot(model, inputs(2, 8, 24), 0.5, sequential=True), "prune the whole model on one process"),
            (lambda: sc.refit(model, masks, stats), "prune the whole model on one process, before sharding it"),
            (lambda: sc.recover(model, dense, inputs(2, 8, 24), steps=2), "recover before sharding"),
        ):
            with pytest.raises(InputError, match=rf"0\.weight.* is sharded(.|\n)*{remedy}"):
                call()
        assert all(torch.equal(weight.full_tensor(), before[name]) for name, weight in model.state_dict().items())
    finally:
        distributed.destroy_process_group()


def test_a_warning_of_blocks_points_at_the_caller():
    with pytest.warns(SecateurWarning, match="the whole model is one block") as seen:
        sc.oneshot(nn.Linear(8, 4), inputs(2, 16, 8), 0.5, sequential=True)
    assert {warning.filename for warning in seen} == {__file__}


@pytest.mark.filterwarnings("ignore:no blocks were found")
def test_block_by_block_prints_the_zeros_of_each_tensor():
    masks = sc.oneshot(nn.Linear(8, 4), inputs(2, 16, 8), 0.5, sequential=True)
    assert ["weight", "16", "50.00", "%"] in [line.split() for line in str(masks).splitlines()]


def test_block_by_block_with_padding_of_a_torch_transformer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    padding = torch.arange(5) >= torch.tensor([[2], [5], [4]])
    batches = [{"src": x, "src_key_padding_mask": padding} for x in inputs(2, 3, 5, 8)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    masks = sc.oneshot(model, batches, 0.5, sequential=True)
    assert (masks.pruned, torch.backends.mha.get_fastpath_enabled()) == (masks.size // 2, fast_path)


def test_an_unknown_allocation_is_told_all_that_there_are(dense, stats):
    with pytest.raises(InputError, match="choose global, uniform, erk, lamp, sensitivity, or a function"):
        sc.oneshot(dense, stats, 0.5, allocation="sensitive")
    with pytest.raises(InputError, match="choose global, uniform, erk, lamp, or a function"):
        sc.oneshot(dense, [inputs(8, 12)], 0.5, allocation="sensitive", sequential=True)


@pytest.mark.filterwarnings("ignore:no blocks were found")
@pytest.mark.parametrize("sequential", [False, True])
def test_the_table_tells_what_whole_groups_miss(sequential):
    torch.manual_seed(0)
    model, batches = nn.Linear(12, 7), [torch.randn(40, 12) for _ in range(4)]
    stats = batches if sequential else sc.calibrate(model, batches)
    masks = sc.oneshot(model, stats, 0.5, pattern="rows", sequential=sequential)
    assert (masks.asked, masks.pruned) == (42, 48)
    assert "6 weights more than asked: those of a group of the pattern go together" in str(masks)
    assert "than asked" not in str(sc.oneshot(nn.Linear(12, 7), batches, 0.5, sequential=True))


@pytest.mark.filterwarnings("ignore:no blocks were found")
def test_block_by_block_has_no_column_of_what_is_not_known():
    masks = sc.oneshot(nn.Linear(12, 7), [torch.randn(40, 12)] * 2, 0.5, sequential=True)
    assert list(masks.table().header) == ["weights", "zeros", "sparsity"]


def test_what_may_help_where_the_outputs_are_kept_badly():
    """A convolution with BatchNorm of which three quarters go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    stats = sc.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(5)])
    text = " ".join(str(sc.oneshot(copy.deepcopy(model), stats, 0.9)).split())
    assert "the outputs are not kept well (a mean cosine of 0." in text
    assert 'try allocation="sensitivity"; a lower sparsity; sc.recalibrate(model, batches), for its BatchNorm;' in text
    text = str(sc.oneshot(copy.deepcopy(model), stats, 0.9, allocation="sensitivity"))
    assert "not kept well" in text
    assert 'allocation="sensitivity"' not in text
    assert "kept well" not in str(sc.oneshot(copy.deepcopy(model), stats, 0.1))


def test_what_may_help_by_the_metric_of_the_user_and_with_a_pattern(dense, stats):
    def share(model):
        return float((model[0].weight != 0).double().mean())

    masks = sc.oneshot(copy.deepcopy(dense), stats, 0.5, pattern="2:4", evaluate=share)
    assert masks.advice.startswith("the outputs are not kept well (a metric of 0.5, before it was 1): try sc.recover(")
    assert sc.oneshot(copy.deepcopy(dense), stats, 0.05, evaluate=share).advice == ""
    assert sc.oneshot(copy.deepcopy(dense), stats, 0.05, evaluate=lambda model: share(model) - 2).advice == ""
    assert sc.oneshot(copy.deepcopy(dense), stats, 0.5, evaluate=lambda model: share(model) - 2).advice != ""
