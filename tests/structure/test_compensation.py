import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.fidelity import Fidelity
from secateur.errors import InputError, InputTypeError, SecateurWarning
from secateur.structure.compensation import fit
from secateur.structure.plan import Plan
from secateur.structure.shrink import propose

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(6, 12, generator=GENERATOR)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.qkv, self.mix, self.out = (nn.Linear(*n) for n in ((12, 16), (16, 48), (16, 16), (16, 5)))

    def forward(self, x):
        x = self.into(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(torch.tanh(x + self.mix(found)))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.attention = nn.Linear(12, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        x = self.into(x)
        return self.out(torch.tanh(x + self.attention(x, x, x)[0]))


class Recurs(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


def mlp():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5))


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def made(kind):
    """A model, and batches whose numbers depend on one another, as those of real data do."""
    torch.manual_seed(0)
    shape = {mlp: (32,), cnn: (8, 14, 14)}.get(kind, (8, 10))
    seen = [torch.randn(*shape, 6, generator=GENERATOR) @ MIX for _ in range(10)]
    return kind().eval(), [x[..., :3].movedim(-1, 1) for x in seen] if kind is cnn else seen


@pytest.mark.parametrize("kind", [mlp, cnn, Attends, Heads, Recurs])
@pytest.mark.parametrize("score", ["energy", "greedy"])
def test_the_outputs_come_nearer_to_those_of_the_given_model(kind, score):
    model, batches = made(kind)
    stats, before = sc.calibrate(model, batches), copy.deepcopy(model.state_dict())
    small = sc.shrink(model, batches[0], 0.5, score=score, stats=stats)
    cut = sc.shrink(model, batches[0], plan=propose(model, batches[0], 0.5, score=score, stats=stats))
    assert [p.shape for p in small.parameters()] == [p.shape for p in cut.parameters()]
    fidelity = Fidelity(model, batches[9:])
    assert 1 - fidelity.of(small) < 0.8 * (1 - fidelity.of(cut))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert owned.isdisjoint(p.untyped_storage().data_ptr() for p in small.parameters())


def test_a_reader_is_the_least_squares_solution_on_what_stays():
    model, batches = made(mlp)
    stats, kept = sc.calibrate(model, batches), [0, 2, 3, 5, 7, 11, 13, 20, 21, 30]
    cut = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
    found = dict(fit(model, cut, stats, ["2.weight", "4.weight"]))
    assert found.keys() == {"2.weight"}
    read = torch.relu(model[0](torch.cat([x for i, x in enumerate(batches) if i not in (4, 9)]))).detach().double()
    damping = (0.01 * read.square().sum(0).mean()).sqrt() * torch.eye(32, dtype=torch.float64)
    read = torch.cat([read, damping])
    want = torch.linalg.lstsq(read[:, kept], read @ model[2].weight.detach().double().T).solution.T
    assert torch.allclose(found["2.weight"][:, kept].double(), want, atol=1e-4)
    others = [i for i in range(32) if i not in kept]
    assert not found["2.weight"][:, others].any()


def test_the_plan_names_what_was_fitted():
    model, batches = made(mlp)
    stats = sc.calibrate(model, batches)
    plan = propose(model, batches[0], 0.5, stats=stats)
    assert plan.fitted == ("2.weight", "4.weight")
    assert "fitted anew, by the statistics: 2.weight, 4.weight" in plan.explain().text()
    assert Plan.from_json(plan.to_json()) == plan
    again = sc.shrink(model, batches[0], plan=plan, stats=stats)
    small = sc.shrink(model, batches[0], 0.5, stats=stats)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))


def test_a_target_and_an_optimizer_go_with_statistics():
    model, batches = made(mlp)
    optimizer = torch.optim.Adam(model.parameters())
    small = sc.shrink(model, batches[0], params=0.5, stats=sc.calibrate(model, batches), optimizer=optimizer)
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, small.parameters())]


def test_what_would_only_lose_is_not_fitted():
    model, batches = made(mlp)
    stats = sc.calibrate(model, batches)
    noise = [torch.randn(1, m.inputs, m.inputs, dtype=torch.float64, generator=GENERATOR) for m in stats.moments]
    wrong = replace(stats, moments=tuple(replace(m, gram=n @ n.mT) for m, n in zip(stats.moments, noise, strict=True)))
    with pytest.warns(
        SecateurWarning, match=r"2\.weight, 4\.weight \(2\) are not fitted anew.*Give sc\.calibrate more"
    ):
        small = sc.shrink(model, batches[0], 0.5, score="l2", stats=wrong)
    cut = sc.shrink(model, batches[0], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), cut.parameters(), strict=True))


def test_readers_without_statistics_stay_as_they_were_cut():
    model, batches = made(mlp)
    stats = sc.calibrate(model, batches, scope=sc.weights(model, skip="4.weight"))
    with pytest.warns(SecateurWarning, match=r"4\.weight \(1\) read units that went, and stay as they were cut"):
        small = sc.shrink(model, batches[0], 0.5, score="l2", stats=stats)
    cut = sc.shrink(model, batches[0], 0.5)
    assert torch.equal(small[4].weight, cut[4].weight)
    assert not torch.equal(small[2].weight, cut[2].weight)


def test_a_tied_reader_stays_as_it_was_cut():
    torch.manual_seed(0)
    model = Tied().eval()
    batches = [torch.randint(20, (8, 10), generator=GENERATOR) for _ in range(10)]
    stats = sc.calibrate(model, batches, scope={"head.weight": model.head.weight})
    with pytest.warns(SecateurWarning, match="tied to another weight"):
        small = sc.shrink(model, batches[0], 0.5, score="l2", stats=stats)
    assert torch.equal(small.head.weight, sc.shrink(model, batches[0], 0.5).head.weight)


def test_units_that_no_sample_ever_moved_go_without_a_trace():
    model, batches = made(mlp)
    model[0].bias.data[:16], model[0].weight.data[:16] = -1e3, model[0].weight.data[:16]
    small = sc.shrink(model, batches[0], 0.5, keep="2.bias", stats=sc.calibrate(model, batches))
    assert torch.allclose(small(batches[0]), model(batches[0]), atol=1e-3)


def test_what_cannot_be_used():
    model, batches = made(mlp)
    x, stats, other = batches[0], sc.calibrate(model, batches), nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5))
    with pytest.raises(InputTypeError, match=r"stats is .*give what sc\.calibrate"):
        sc.shrink(model, x, 0.5, stats=batches)
    with pytest.raises(InputError, match="the statistics are of another model"):
        sc.shrink(other, x, 0.5, stats=stats)
    with pytest.raises(InputError, match="leave stats out"):
        sc.shrink(model, x, stats=stats)
    masks = sc.prune(copy.deepcopy(model), 0.5)
    with pytest.raises(InputError, match=r"sc\.refit\(model, masks, stats\)"):
        sc.shrink(model, x, masks=masks, stats=stats)
    with pytest.raises(InputError, match="shrink with depth= first"):
        sc.shrink(model, x, depth=0.5, stats=stats)
    with pytest.raises(InputError, match="meta device, without weights that tell how layers are fitted anew"):
        sc.shrink(copy.deepcopy(model).to("meta"), x.to("meta"), 0.5, verify=False, score="random", stats=stats)


def test_in_the_end_batches_that_were_held_out_are_fitted_to_as_well():
    model, batches = made(mlp)
    stats, held = sc.calibrate(model, batches), [*batches[:4], *batches[5:9], batches[4], batches[9]]
    small = sc.shrink(model, batches[0], 0.5, score="l2", stats=stats)
    whole = replace(sc.calibrate(model, [torch.cat(held)]), kept=[])  # all in the sums, none to check on
    wanted = sc.shrink(model, batches[0], 0.5, score="l2", stats=whole)
    for a, b in zip(small.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_with_a_loss_have_no_batches_to_check_on_and_serve_too():
    model, batches = made(mlp)
    labelled = [(x, torch.randn(*x.shape[:-1], 5, generator=GENERATOR)) for x in batches]
    stats = sc.calibrate(model, labelled, loss=lambda model, pair: (model(pair[0]) - pair[1]).square().mean())
    plan = propose(model, batches[0], 0.5, stats=stats)
    assert plan.fitted == ("2.weight", "4.weight")
