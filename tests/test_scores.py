"""secateur.scores: each against a hand computation; and nothing else is touched."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import secateur as sc
from processes import in_a_group
from secateur import scores
from secateur.errors import InputError, InputTypeError, StateError, UnknownNameError


def linear(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(3, 2, bias=False, **options)


BATCHES = [torch.tensor([[1.0, -2.0, 0.5], [0.5, 1.0, 1.0]]), torch.tensor([[-3.0, 1.0, 2.0]])]


def total(model, batch):
    return model(batch).sum()


def hand_gradients():
    """dL/dW of sum(x W^T) is the sum of the inputs, in each row."""
    return [batch.sum(0).expand(2, 3) for batch in BATCHES]


HAND = {
    "taylor": lambda w, gs: sum((w * g).abs() for g in gs),
    "snip": lambda w, gs: (w * sum(gs)).abs(),
    "movement": lambda w, gs: -sum(w * g for g in gs),
    "fisher": lambda w, gs: sum((w * g) ** 2 for g in gs),
}


@pytest.mark.parametrize("kind", HAND)
def test_gradient_scores_by_hand(kind):
    model = linear()
    score = sc.accumulate(model, BATCHES, total, score=kind)
    weight = model.weight.detach()
    torch.testing.assert_close(score("weight", weight), HAND[kind](weight, hand_gradients()))


@pytest.mark.parametrize("kind", HAND)
def test_observe_reads_grad_after_each_backward(kind):
    model, score = linear(), getattr(scores, kind)()
    for batch in BATCHES:
        model.zero_grad()
        total(model, batch).backward()
        score.observe(sc.weights(model))
    weight = model.weight.detach()
    torch.testing.assert_close(score("weight", weight), HAND[kind](weight, hand_gradients()))
    score.clear()
    with pytest.raises(StateError, match=r"seen no gradient of weight.*sc\.accumulate"):
        score("weight", weight)


def test_the_sum_of_gradients_is_no_view_of_grad():
    model, score = linear(), scores.snip()
    total(model, BATCHES[0]).backward()
    score.observe(sc.weights(model))
    before = score.sums["weight"].clone()
    model.weight.grad.zero_()
    assert torch.equal(score.sums["weight"], before)


@pytest.mark.parametrize("kind", ["taylor", "movement", "fisher", "snip"])
def test_accumulate_leaves_grad_mode_and_weights_alone(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].eval()
    model[0].weight.grad = torch.full((4, 3), 7.0)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    sc.accumulate(model, BATCHES, total, score=kind)
    assert [m.training for m in model.modules()] == modes
    assert model[0].weight.grad.eq(7).all()
    assert model[2].weight.grad is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_accumulate_under_no_grad_and_from_a_generator():
    model = linear()
    with torch.no_grad():
        score = sc.accumulate(model, (b for b in BATCHES), total)
    assert score("weight", model.weight).shape == (2, 3)


@pytest.mark.parametrize("batches", [BATCHES, (b for b in BATCHES)], ids=["list", "generator"])
def test_accumulate_shows_its_progress_if_asked(batches, capsys):
    quiet = sc.accumulate(linear(), BATCHES, total)
    assert capsys.readouterr() == ("", "")
    shown = sc.accumulate(linear(), batches, total, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{len(BATCHES)}/" in err
    torch.testing.assert_close(shown.sums, quiet.sums)


def test_accumulate_goes_on_with_a_score():
    model, score = linear(), scores.taylor()
    for batch in BATCHES:
        assert sc.accumulate(model, [batch], total, score=score) is score
    whole = sc.accumulate(model, BATCHES, total)
    torch.testing.assert_close(score.sums, whole.sums)


def test_accumulate_wants_batches_and_a_gradient_score():
    with pytest.raises(InputError, match="no batch came"):
        sc.accumulate(linear(), [], total)
    with pytest.raises(InputError, match=r"choose taylor, snip, movement, fisher$"):
        sc.accumulate(linear(), BATCHES, total, score="magnitude")
    for bad in (lambda m, b: m(b), lambda m, b: 3.0, lambda m, b: m(b).sum().detach()):
        with pytest.raises(InputError, match=r"the loss is .*: return one number as a Tensor, computed from"):
            sc.accumulate(linear(), BATCHES, bad)
    with pytest.raises(InputError, match=r"every tensor in scope is frozen.*requires_grad_\(\)"):
        sc.accumulate(linear().requires_grad_(False), BATCHES, total)


def test_a_frozen_or_unused_tensor_has_no_score_and_the_message_says_what_to_do():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "frozen": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    model["frozen"].weight.requires_grad_(False)

    def loss(m, batch):
        return (m["used"](batch) + m["frozen"](batch)).sum()

    score = sc.accumulate(model, BATCHES, loss)
    assert set(score.sums) == {"used.weight"}
    with pytest.raises(StateError, match=r"no gradient of frozen\.weight.*skip=\['frozen\.weight'\]"):
        sc.prune(model, 0.5, score=score)
    sc.prune(model, 0.5, score=score, scope=sc.weights(model, only="used"))


def test_sparse_gradients_are_read():
    model = nn.Embedding(5, 2, sparse=True)
    score = scores.taylor()
    model(torch.tensor([1, 1, 3])).sum().backward()
    score.observe(sc.weights(model, only=nn.Embedding))
    want = model.weight.detach().abs() * torch.tensor([0.0, 2, 0, 1, 0])[:, None]
    torch.testing.assert_close(score("weight", model.weight), want)


@pytest.mark.parametrize("kind", ["movement", "taylor", "fisher"])
def test_complex_weights_score_as_their_two_real_parts_would(kind):
    """Towards zero, w = a + ib, the loss changes by -(a dL/da + b dL/db); torch's grad is dL/da + i dL/db."""
    weight, gradient = torch.tensor([[3 + 4j, 1 - 2j, 2j]]), torch.tensor([[1 + 1j, 2 - 1j, -3j]])
    score = getattr(scores, kind)()
    score.observe({"w": weight}, {"w": gradient})
    together = (weight.conj() * gradient).real  # a dL/da + b dL/db
    want = {
        "movement": -together,
        "taylor": (weight * gradient).abs(),
        "fisher": (weight * gradient).abs() ** 2,
    }
    torch.testing.assert_close(score("w", weight), want[kind])


def test_magnitude():
    assert scores.magnitude("w", torch.tensor([-2.0, 1.0])).tolist() == [2.0, 1.0]
    assert scores.magnitude("w", torch.tensor([3 + 4j])).tolist() == [5.0]
    assert scores.magnitude.elementwise


def test_random_leaves_the_global_state_alone_and_goes_by_its_seed():
    models = [nn.Linear(9, 9) for _ in range(3)]
    before = torch.get_rng_state()
    masks = [sc.prune(model, 0.5, score=scores.random(seed)) for model, seed in zip(models, (1, 1, 2), strict=True)]
    assert torch.equal(torch.get_rng_state(), before)
    assert masks[0] == masks[1] != masks[2]


def test_random_draws_from_a_given_generator_and_leaves_it_further_on():
    generator = torch.Generator().manual_seed(3)
    first, second = (sc.prune(linear(), 0.5, score=scores.random(generator=generator)) for _ in range(2))
    assert first != second or not torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    again = torch.Generator().manual_seed(3)
    assert sc.prune(linear(), 0.5, score=scores.random(generator=again)) == first


def test_random_does_not_look_at_the_weights():
    one, other = nn.Linear(20, 20), nn.Linear(20, 20)
    assert sc.prune(one, 0.7, score="random") == sc.prune(other, 0.7, score="random")


def test_random_is_uniform():
    drawn = scores.random(5)("w", torch.empty(100, 100))
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.02


def test_signs_are_kept():
    model = linear()
    table = {"weight": torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, -3.0]])}
    masks = sc.prune(model, 0.5, score=table)
    assert masks["weight"].tolist() == [[False, False, True], [True, True, False]]


def test_integer_and_boolean_scores_rank():
    for table in (torch.tensor([[5, -1, 3], [0, 2, 9]]), torch.tensor([[True, False, True], [False, True, True]])):
        masks = sc.prune(linear(), sc.Count(2), score={"weight": table})
        lowest = table.double().flatten().sort(stable=True).indices[:2]
        assert (~masks["weight"]).flatten().nonzero().flatten().tolist() == sorted(lowest.tolist())


def test_a_user_function_gets_name_and_weight():
    model, seen = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), {}

    def score(name, weight):
        seen[name] = weight.shape, weight.requires_grad
        return weight**2

    sc.prune(model, 0.5, score=score)
    assert seen == {"0.weight": ((2, 3), False), "1.weight": ((2, 2), False)}


def test_an_elementwise_function_of_ones_own_equals_the_whole():
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(700, 700)
    model.weight.data = torch.randn(700, 700, generator=g)

    def cube(name, weight):
        return weight**3

    whole = sc.prune(copy.deepcopy(model), 0.3, score=cube)
    pieces = []

    @scores.elementwise
    def flat(name, weight):
        pieces.append(weight.shape)
        return weight**3

    assert sc.prune(model, 0.3, score=flat) == whole
    assert all(len(shape) == 1 for shape in pieces)


WRONG = {
    "shape": (lambda n, w: w[:1], InputError, r"score of weight has shape \(1, 3\): it must be \(2, 3\)"),
    "flat": (lambda n, w: w.flatten(), InputError, r"score of weight has shape \(6,\)"),
    "type": (lambda n, w: 1.0, InputTypeError, "score of weight is a float: return a Tensor"),
    "complex": (lambda n, w: w + 0j, InputTypeError, r"score of weight is complex.*abs\(\)"),
    "nan": (lambda n, w: w * math.nan, InputError, "score of weight holds NaN or -inf"),
    "-inf": (lambda n, w: w - math.inf, InputError, "score of weight holds NaN or -inf"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("pattern", [None, "rows"])
def test_a_score_that_cannot_rank_is_refused_by_name_before_anything_changes(kind, pattern):
    score, error, message = WRONG[kind]
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(error, match=message):
        sc.prune(model, 0.5, score=score, pattern=pattern)
    assert torch.equal(model.weight, before)


WRONG_PIECES = {
    "sum": lambda n, w: w.sum(),
    "short": lambda n, w: w[:2],
    "long": lambda n, w: torch.cat([w, w]),
    "type": lambda n, w: 1.0,
    "complex": lambda n, w: w + 0j,
    "nan": lambda n, w: w * math.nan,
    "-inf": lambda n, w: w - math.inf,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", WRONG_PIECES)
def test_an_elementwise_score_that_cannot_rank_is_refused_as_well(kind):
    with pytest.raises((InputError, InputTypeError), match="score of weight"):
        sc.prune(linear(), 0.5, score=scores.elementwise(lambda n, w: WRONG_PIECES[kind](n, w)))


def test_an_elementwise_score_of_integers_ranks_through_a_schedule():
    model = nn.Linear(8, 8)
    pruner = sc.Pruner(
        model, 0.5, schedule=sc.linear(0, 4), score=scores.elementwise(lambda n, w: (w * 1000).round().int())
    )
    for _ in range(4):
        pruner.step()
    assert pruner.finish().pruned == 32


@pytest.mark.parametrize("elementwise", [False, True])
def test_plus_infinity_protects(elementwise):
    def score(name, weight):
        return torch.where(weight < 0, math.inf, weight)

    model = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(-5.0, 15.0).view(4, 5))
    chosen = scores.elementwise(score) if elementwise else score
    masks = sc.prune(model, 0.7, score=chosen)
    assert (~masks["weight"]).flatten().nonzero().flatten().tolist() == list(range(5, 19))
    with pytest.raises(InputError, match="protect less"):
        sc.prune(model, 0.8, score=chosen)


def test_resolve_names_the_choices():
    with pytest.raises(InputError, match="no score named 'magnitud': choose magnitude, random"):
        sc.prune(linear(), 0.5, score="magnitud")
    with pytest.raises(InputError, match=r"sc\.scores\.synflow\(model, example_inputs\)"):
        sc.prune(linear(), 0.5, score="synflow")
    with pytest.raises(InputTypeError, match="score is a float"):
        sc.prune(linear(), 0.5, score=0.5)
    with pytest.raises(UnknownNameError, match=r"no score for weight: .*only=list.*the nearest names are: weights"):
        sc.prune(linear(), 0.5, score={"weights": torch.ones(2, 3)})


# SynFlow


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def test_synflow_by_hand():
    model = mlp()
    a, b, c = (model[i].weight.detach().abs().double().requires_grad_() for i in (0, 2, 4))
    p, q, r = (model[i].bias.detach().abs().double() for i in (0, 2, 4))
    out = c @ (b @ (a @ torch.ones(4, dtype=torch.float64) + p) + q) + r
    grads = torch.autograd.grad(out.sum(), (a, b, c))
    score = scores.synflow(model, torch.randn(1, 4))
    score.prepare()
    for name, weight, grad in zip(("0.weight", "2.weight", "4.weight"), (a, b, c), grads, strict=True):
        torch.testing.assert_close(score(name, weight), (weight * grad).detach(), rtol=1e-12, atol=0)


def test_synflow_conserves_flow():
    """Tanaka 2020, theorem 1: without biases the scores of each layer add up to the same."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    score = scores.synflow(model, torch.ones(2, 4))
    score.prepare()
    sums = [score(name, weight).sum() for name, weight in sc.weights(model).items()]
    torch.testing.assert_close(sums[0], sums[1])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return {"logits": self.head(self.norm(self.lstm(x)[0][:, -1]))}


def test_synflow_of_an_lstm_leaves_the_model_untouched():
    torch.manual_seed(0)
    model = Tagger()
    model.head.eval()
    model.head.weight.grad = torch.ones(3, 5)
    before = copy.deepcopy(model.state_dict())
    who = {name: id(p) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    score = scores.synflow(model, torch.ones(2, 3, 4))
    score.prepare()
    for name, weight in sc.weights(model).items():
        assert score(name, weight).shape == weight.shape
        assert score(name, weight).ge(0).all()
        assert score(name, weight).gt(0).any()
    assert [m.training for m in model.modules()] == modes
    assert {name: id(p) for name, p in model.named_parameters()} == who
    assert all(torch.equal(before[n], v) and before[n].dtype == v.dtype for n, v in model.state_dict().items())
    assert model.head.weight.grad.eq(1).all()
    assert model.lstm.weight_ih_l0.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert model.lstm(torch.randn(1, 2, 4))[0].dtype == torch.float32


def test_synflow_leaves_the_flat_weights_of_an_lstm_its_parameters():
    model = Tagger()
    score = scores.synflow(model, torch.randn(2, 3, 4))
    score.prepare()
    flat, own = model.lstm._flat_weights, dict(model.lstm.named_parameters())
    assert all(w is own[name] for w, name in zip(flat, model.lstm._flat_weights_names, strict=True))


def test_synflow_prunes_an_lstm_gradually():
    torch.manual_seed(0)
    model = Tagger()
    score = scores.synflow(model, torch.randn(2, 3, 4))
    pruner = sc.Pruner(model, 0.9, schedule=sc.geometric(0, 20), score=score)
    for _ in range(20):
        pruner.step()
    assert pruner.finish().pruned == math.floor(0.9 * pruner.masks.size + 0.5)


def test_synflow_restores_the_modes_when_the_model_fails():
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sc.prune(model, 0.5, score=scores.synflow(model, torch.ones(1, 99)))
    assert all(m.training for m in model.modules())


def test_synflow_keeps_integer_inputs():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    masks = sc.prune(model, 0.5, score=scores.synflow(model, torch.tensor([[1, 8]])))
    assert masks.pruned == 4


def test_synflow_names_a_tensor_outside_the_flow():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 2)
            self.idle = nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    with pytest.raises(StateError, match=r"idle\.weight does not affect the output"):
        sc.prune(model, 0.5, score=scores.synflow(model, torch.ones(1, 4)))


def curved(model, batch):
    return nn.functional.cross_entropy(model(batch), batch.abs().argmax(1))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.func
def test_grasp_is_that_of_the_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    weights = {name: weight.detach() for name, weight in sc.weights(model).items()}

    def of(flat):
        parts = flat.split([w.numel() for w in weights.values()])
        given = {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}
        return sum(curved(lambda x: torch.func.functional_call(model, given, (x,)), batch) for batch in batches)

    flat = torch.cat([w.flatten() for w in weights.values()])
    expected = flat * (torch.func.hessian(of)(flat) @ torch.func.grad(of)(flat))
    score = scores.grasp(model, iter(batches), curved)
    score.prepare()
    found = torch.cat([score(name, w).flatten() for name, w in weights.items()])
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in model.parameters())
    masks = sc.prune(model, 0.5, score=score)
    assert torch.equal(torch.cat([masks[name].flatten() for name in weights]), expected > expected.sort()[0][11])


def test_grasp_of_an_lstm_and_in_a_schedule():
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 6, batch_first=True), "head": nn.Linear(6, 3)})
    batch = torch.randn(5, 2, 4)
    score = scores.grasp(model, [batch], lambda m, x: m["head"](m["lstm"](x)[0][:, -1]).square().mean())
    pruner = sc.Pruner(model, 0.8, score=score, schedule=sc.geometric(0, 4))
    for _ in range(4):
        pruner.step()
    assert pruner.finish().sparsity == pytest.approx(0.8, abs=0.01)


def test_grasp_says_what_it_cannot_do():
    model = linear()
    with pytest.raises(InputError, match=r"the loss has no curvature.*use taylor"):
        sc.prune(model, 0.5, score=scores.grasp(model, BATCHES, total))
    with pytest.raises(InputError, match="no batch came: give an iterable"):
        scores.grasp(model, [], total)
    with pytest.raises(InputError, match=r"grasp\(model, batches, loss\)"):
        sc.prune(model, 0.5, score="grasp")
    with pytest.raises(InputError, match="return one number"):
        sc.prune(model, 0.5, score=scores.grasp(model, BATCHES, lambda m, b: m(b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["taylor", "fisher", "snip", "movement"])
def test_sums_in_half_precision_do_not_stand_still(score, dtype):
    def summed(dtype):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).to(torch.bfloat16).to(dtype)
        batches = [torch.full((2, 4), 2.0**-10, dtype=dtype)] * 600
        return sc.accumulate(model, batches, lambda model, x: model(x).sum(), score=score).sums["weight"]

    torch.testing.assert_close(summed(dtype), summed(torch.float32), rtol=1e-3, atol=0)


def test_saved_sums_of_half_precision_go_on_in_full():
    model = nn.Linear(4, 4).bfloat16()
    pruner = sc.Pruner(model, 0.5, score="taylor", schedule=sc.cubic(2, 9))
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    pruner.observe()
    state = pruner.state_dict()
    state["sums"] = {name: total.bfloat16() for name, total in state["sums"].items()}
    pruner.load_state_dict(state)
    assert pruner.state_dict()["sums"]["weight"].dtype is torch.float32


def incomplete(rank):
    """The gradient of a replicated weight whose batch is sharded is a sum that is not complete."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = distribute_module(nn.Linear(6, 8), mesh)
    model(distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)])).square().sum().backward()
    score = scores.movement()
    score.observe({"w": model.weight})
    assert model.weight.grad.placements[0].is_partial()
    weight, gradient = model.weight.full_tensor(), model.weight.grad.full_tensor()
    assert torch.equal(score.sums["w"], -(weight * gradient))


def test_sums_of_gradients_that_are_not_complete_are_added_up():
    in_a_group(2, incomplete)
