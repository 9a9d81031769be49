"""Bad input: an error that names the thing and the remedy, before anything has changed."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from models import Mlp, Tagger, build, copies, same, train
from secateur import errors


class Watched:
    """A model in training, of which nothing may change."""

    def __init__(self, kind=Mlp, model=None):
        self.model = build(kind) if model is None else model
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        if model is None:
            train(self.model, self.optimizer, 2)

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])

    def refuses(self, call, kind, message):
        before, identities = self.state(), [id(p) for p in self.model.parameters()]
        hooks = dict(self.optimizer._optimizer_step_post_hooks)
        with pytest.raises(kind, match=message) as caught:
            call()
        assert isinstance(caught.value, errors.SecateurError)
        assert same(self.state(), before)
        assert [id(p) for p in self.model.parameters()] == identities
        assert dict(self.optimizer._optimizer_step_post_hooks) == hooks
        return str(caught.value)


@pytest.fixture
def watched():
    return Watched()


AMOUNTS = [
    (1, TypeError, r"the int 1.*write 1\.0.*sc\.Count\(1\)"),
    (0, TypeError, r"the int 0.*write 0\.0.*sc\.Count\(0\)"),
    (True, ValueError, r"sparsity is True, a bool.*such as 0\.9"),
    ("0.9", ValueError, r"sparsity is '0\.9', a str.*such as 0\.9"),
    (float("nan"), ValueError, r"sparsity is nan.*such as 0\.9"),
    (-0.1, ValueError, r"sparsity is -0\.1, outside 0 to 1.*such as 0\.9"),
    (1.1, ValueError, r"sparsity is 1\.1, outside 0 to 1.*such as 0\.9"),
    ({"first*": 1.1}, ValueError, r"1\.1"),
    ({"frist.weight": 0.5}, KeyError, r"'frist\.weight'.*nearest names are: first\.weight"),
    (sc.Count(341), ValueError, r"341.*340 weights in scope"),
]


@pytest.mark.parametrize(("amount", "kind", "message"), AMOUNTS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("verb", ["prune", "Pruner"])
def test_sparsity(watched, verb, amount, kind, message):
    call = {
        "prune": lambda: sc.prune(watched.model, amount, optimizer=watched.optimizer),
        "Pruner": lambda: sc.Pruner(watched.model, amount),
    }[verb]
    watched.refuses(call, kind, message)


@pytest.mark.parametrize(
    "name", ["first.wieght", "fisrt", "first.*.weight", "lstm*", "third.weight", "first.weight.x", ""]
)
@pytest.mark.parametrize("how", ["only", "skip"])
def test_unknown_names(watched, name, how):
    told = watched.refuses(
        lambda: sc.prune(watched.model, 0.5, scope=sc.weights(watched.model, **{how: [name]})),
        errors.UnknownNameError,
        repr(name).replace(".", r"\.").replace("*", r"\*"),
    )
    assert "first.weight" in told  # the nearest names, or all


def test_an_unknown_type(watched):
    watched.refuses(lambda: sc.weights(watched.model, only=[nn.LSTM]), KeyError, r"no LSTM.*Linear")
    watched.refuses(lambda: sc.weights(watched.model, only=[3]), TypeError, r"3 selects nothing: give a glob")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["first", "second"])
def test_nan_and_inf(watched, value, where):
    with torch.no_grad():
        getattr(watched.model, where).weight[-1, -1] = value
    message = rf"{where}\.weight holds \d NaN and \d inf.*sound checkpoint.*nan_to_num_"
    watched.refuses(lambda: sc.prune(watched.model, 0.5, optimizer=watched.optimizer), ValueError, message)
    pruner = sc.Pruner(watched.model, 0.5)
    masks = pruner.masks
    watched.refuses(lambda: pruner.attach(watched.optimizer), ValueError, message)
    assert pruner.masks == masks
    assert pruner.steps == 0


def test_nan_in_the_middle_of_a_schedule(watched):
    pruner = sc.Pruner(watched.model, 0.9, schedule=sc.linear(0, 10, every=5))
    for _ in range(6):
        pruner.step()
    masks, before = pruner.masks, None
    for _ in range(3):
        pruner.step()
    with torch.no_grad():
        watched.model.first.weight[masks["first.weight"].nonzero()[0].tolist()[0]] = float("nan")
    before = copies(watched.model)
    with pytest.raises(errors.InputError, match=r"first\.weight holds"):
        pruner.step()
    assert pruner.masks == masks
    assert same(copies(watched.model), before)


def test_a31_meta():
    with torch.device("meta"):
        model = Mlp()
    for call in (lambda: sc.prune(model, 0.5), lambda: sc.Pruner(model, 0.5), lambda: sc.weights(model)):
        with pytest.raises(errors.InputError, match=r"first\.weight is on the meta device.*materialise it first"):
            call()
    assert all(p.is_meta for p in model.parameters())
    partly = Mlp()
    partly.second = model.second
    before = partly.first.weight.detach().clone()
    with pytest.raises(errors.InputError, match=r"second\.weight is on the meta device"):
        sc.prune(partly, 0.5)
    assert torch.equal(partly.first.weight, before)


def test_a31_lazy():
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(3), nn.LazyConv2d(4, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(errors.InputError, match=r"1\.weight is lazy: run one batch through the model"):
        sc.prune(model, 0.5)
    assert torch.equal(model[0].weight, before)
    assert isinstance(model[1], nn.LazyLinear)
    assert sc.prune(model, 0.5, scope=sc.weights(model, only=["0"])).pruned == 16


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("verb", [sc.prune, sc.Pruner])
def test_integers_and_fp8(dtype, verb):
    model = build(Mlp)
    model.second.weight = nn.Parameter(torch.ones(5, 20).to(dtype), requires_grad=False)
    watched = Watched(model=model)
    dtype_name = str(dtype).replace(".", r"\.")
    watched.refuses(
        lambda: verb(model, 0.5), TypeError, rf"second\.weight is {dtype_name}.*prune before quantizing, or leave it"
    )


def test_an_optimizer_without_the_pruned_parameters(watched):
    other = build(Mlp, seed=1)
    pruner = sc.Pruner(watched.model, 0.5)
    masks = pruner.masks
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    half = torch.optim.SGD(watched.model.first.parameters(), lr=0.1)
    watched.refuses(lambda: pruner.attach(stranger), ValueError, r"first\.weight, second\.weight.*every optimizer")
    watched.refuses(lambda: pruner.attach(half), ValueError, r"second\.weight.*every optimizer")
    assert "first.weight" not in watched.refuses(lambda: pruner.attach(half), ValueError, "second")
    assert not stranger._optimizer_step_post_hooks
    assert not half._optimizer_step_post_hooks
    assert pruner.masks == masks
    pruner.attach(watched.optimizer)  # free to go on


def test_prune_with_an_optimizer_without_the_pruned_parameters(watched):
    stranger = torch.optim.SGD(build(Mlp, seed=1).parameters(), lr=0.1)
    watched.refuses(lambda: sc.prune(watched.model, 0.5, optimizer=stranger), ValueError, r"first\.weight")


@pytest.mark.parametrize("wrong", [42, "adam", ["adam"]])
def test_prune_with_what_is_no_optimizer(watched, wrong):
    watched.refuses(lambda: sc.prune(watched.model, 0.5, optimizer=wrong), TypeError, "[Oo]ptimizer")


@pytest.mark.parametrize("wrong", [42, "adam", None])
def test_attach_to_what_is_no_optimizer(watched, wrong):
    pruner = sc.Pruner(watched.model, 0.5)
    watched.refuses(lambda: pruner.attach(wrong), TypeError, r"is not a torch\.optim\.Optimizer.*pruner\.step\(\)")
    watched.refuses(lambda: pruner.attach(watched.optimizer, wrong), TypeError, r"is not a torch\.optim\.Optimizer")


@pytest.mark.parametrize("kind", ["linear", "cubic", "geometric", "cosine"])
def test_a_schedule_that_ends_before_it_starts(kind):
    make = getattr(sc.schedules, kind)
    with pytest.raises(ValueError, match=rf"{kind}\(start=50, stop=20, every=1\) ends before.*stop of at least 50"):
        make(50, 20)
    with pytest.raises(ValueError, match="start must be 0 or more"):
        make(-1, 20)
    with pytest.raises(ValueError, match="every 1 or more"):
        make(0, 20, every=0)
    with pytest.raises(ValueError, match="both in steps, or both as fractions"):
        make(0.5, 20)
    with pytest.raises(TypeError, match="whole number of steps, or a fraction"):
        make("0", 20)


def test_a_schedule_that_is_none_or_falls(watched):
    for wrong, message in (("cubic", r"'cubic' needs its steps"), ("cubik", "cubik"), (3, "give sc.cubic")):
        watched.refuses(lambda wrong=wrong: sc.Pruner(watched.model, 0.9, schedule=wrong), Exception, message)
    pruner = sc.Pruner(watched.model, 0.9, schedule=lambda step: 0.5 - 0.1 * step)
    pruner.attach(watched.optimizer)
    masks = pruner.masks
    with pytest.raises(ValueError, match=r"falls at step 1.*never fall"):
        train(watched.model, watched.optimizer, 1)
    assert pruner.masks == masks
    pruner.detach()


@pytest.mark.parametrize("use", ["apply", "check", "remask", "report"])
@pytest.mark.parametrize("wrong", ["shape", "model"])
def test_masks_that_do_not_fit(watched, use, wrong):
    other = build(lambda: Mlp(hidden=24)) if wrong == "shape" else build(Tagger)
    masks = sc.prune(other, 0.5)
    call = {
        "apply": lambda: masks.apply(watched.model),
        "check": lambda: sc.check(watched.model, masks),
        "remask": lambda: sc.remask(watched.model, masks),
        "report": lambda: sc.report(watched.model, masks),
    }[use]
    if wrong == "shape":
        message = r"another model: first\.weight has shape \(20, 12\), its mask \(24, 12\)"
        watched.refuses(call, errors.MaskError, message)
    else:
        watched.refuses(call, errors.UnknownNameError, r"another model: it has no lstm\.weight_ih_l0.*first\.weight")


def test_masks_of_which_only_the_last_does_not_fit(watched):
    masks = sc.Masks({"first.weight": torch.zeros(20, 12, dtype=bool), "second.weight": torch.zeros(5, 21, dtype=bool)})
    for call in (lambda: masks.apply(watched.model), lambda: sc.remask(watched.model, masks)):
        watched.refuses(call, errors.MaskError, r"second\.weight has shape \(5, 20\), its mask \(5, 21\)")
    with pytest.raises(errors.MaskError, match="different models"):
        masks & sc.Masks({"second.weight": torch.zeros(5, 20, dtype=bool)})
    with pytest.raises(errors.InputTypeError, match=r"first\.weight.*float32.*bool tensor"):
        sc.Masks({"first.weight": torch.ones(20, 12)})


def test_attached_twice(watched):
    pruner = sc.Pruner(watched.model, 0.5, schedule=sc.linear(1, 4))
    pruner.attach(watched.optimizer)
    message = r"attached already.*all optimizers in one call, or detach\(\) first"
    watched.refuses(lambda: pruner.attach(watched.optimizer), errors.StateError, message)
    watched.refuses(lambda: pruner.attach(), errors.StateError, message)
    watched.refuses(lambda: pruner.step(), errors.StateError, r"attached and counts.*do not call step\(\)")
    train(watched.model, watched.optimizer, 4)
    assert pruner.steps == 4
    pruner.finish()


@pytest.mark.parametrize("other", ["scope", "shape", "sparsity", "schedule", "nothing"])
def test_a_resume_with_another_scope(watched, other):
    old = build(lambda: Mlp(hidden=24)) if other == "shape" else build(Mlp)
    pruner = sc.Pruner(old, 0.5, schedule=sc.linear(0, 10))
    for _ in range(5):
        pruner.step()
    state = {} if other == "nothing" else pruner.state_dict()
    options = {"scope": sc.weights(watched.model, skip=["second"])} if other == "scope" else {}
    again = sc.Pruner(
        watched.model,
        0.6 if other == "sparsity" else 0.5,
        schedule=sc.linear(0, 20 if other == "schedule" else 10),
        **options,
    )
    again.step()
    masks, before = again.masks, copy.deepcopy(again.state_dict())
    message = {
        "scope": r"another scope \(second\.weight\).*scope it had",
        "shape": r"another scope \(first\.weight.*scope it had",
        "sparsity": r"0\.5.*0\.6.*build this one with the same",
        "schedule": r"schedule\.stop 10 in the saved one, 20 in this one.*build this one with the same",
        "nothing": r"not a state_dict of a Pruner",
    }[other]
    watched.refuses(lambda: again.load_state_dict(state), errors.InputError, message)
    assert again.masks == masks
    assert same(again.state_dict(), before)


@pytest.mark.parametrize(("last", "kind"), [("generator", "random"), ("sums", "movement")])
def test_a_resume_with_another_score(watched, last, kind):
    """Of a score that carries a state: to go on without it would not be a resume."""
    old = sc.Pruner(build(Mlp), 0.5, schedule=sc.linear(1, 10), score=kind)
    again = sc.Pruner(watched.model, 0.5, schedule=sc.linear(1, 10))
    state = old.state_dict()
    assert last in state
    before = copy.deepcopy(again.state_dict())
    watched.refuses(lambda: again.load_state_dict(state), errors.InputError, "score")
    assert same(again.state_dict(), before)


def test_names_of_choices(watched):
    model = watched.model
    watched.refuses(lambda: sc.prune(model, 0.5, score="magnitud"), ValueError, "'magnitud'.*magnitude")
    watched.refuses(lambda: sc.prune(model, 0.5, allocation="globl"), ValueError, "'globl'.*global")
    watched.refuses(lambda: sc.prune(model, 0.5, pattern="2/4"), ValueError, r"'2/4'.*sc\.n_m\(2, 4\)")
    watched.refuses(lambda: sc.prune(model, 0.5, score=3), TypeError, "give a name, a function")
    watched.refuses(lambda: sc.prune(model, 0.5, allocation=3), TypeError, "give a name or a function")
    watched.refuses(lambda: sc.prune(model, 0.5, pattern=3), TypeError, "give sc.n_m")
    watched.refuses(lambda: sc.prune(model, 0.5, scope=["first"]), TypeError, r"give sc\.weights")
    watched.refuses(lambda: sc.prune("model", 0.5), TypeError, r"expected a torch\.nn\.Module, got str")
    watched.refuses(lambda: sc.prune(model, 0.5, scope=sc.weights(build(Mlp))), ValueError, "another model")
    watched.refuses(lambda: sc.prune(model, 0.6, pattern=sc.n_m(2, 4)), ValueError, r"sparsity of 0\.5, not 0\.6")
    watched.refuses(lambda: sc.prune(model, 0.5, score=lambda n, w: w.sum()), ValueError, r"first\.weight has shape")
    watched.refuses(lambda: sc.prune(model, 0.5, score=lambda n, w: w / 0 * 0), ValueError, r"first\.weight holds NaN")
    watched.refuses(lambda: sc.prune(model, 0.5, score="taylor"), RuntimeError, r"no gradient.*sc\.accumulate")
    watched.refuses(lambda: sc.prune(model, 0.5, allocation=lambda w, n: {}), ValueError, "for each tensor")
    watched.refuses(lambda: sc.prune(nn.BatchNorm1d(3), 0.5), ValueError, "nothing to prune")
    with pytest.raises(ValueError, match="0 < n < m"):
        sc.n_m(4, 4)
