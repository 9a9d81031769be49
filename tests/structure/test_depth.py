"""Models of torch alone; those of transformers are in test_configs_depth.py."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import InputError, MaskError, StructureError
from secateur.structure import Plan, propose


class Block(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, width, out=None):
        super().__init__()
        out = out or width
        self.conv1 = nn.Conv2d(width, out, 3, 1 if out == width else 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.downsample = nn.Conv2d(width, out, 1, 2) if out != width else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self, *counts):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*(Block(8) for _ in range(counts[0])))
        self.layer2 = nn.Sequential(Block(8, 16), *(Block(16) for _ in range(counts[1] - 1)))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args).eval()


def resnet():
    model = seeded(ResNet, 4, 4)
    for i, block in enumerate((*model.layer1, *model.layer2)):
        block.bn2.weight.data.fill_(0.1 + (i % 4))  # the first of layer1 and of layer2 do least
    return model


class Residual(nn.Module):
    def __init__(self, size=0.3):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.inner.weight.data *= size

    def forward(self, x):
        return x + self.inner(x)


class Stack(nn.Module):
    """Blocks that are called as a test says: `code(self, x)`."""

    def __init__(self, count, code):
        super().__init__()
        self.layers = nn.ModuleList(Residual(0.1 + i) for i in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.depth = self.steps = count
        self.code = code

    def forward(self, x):
        return self.code(self, x)


def in_turn(self, x):
    for layer in self.layers:
        x = layer(x)
    return self.norms[0](x)


def names(plan):
    return [block.name for block in plan.blocks if not block.becomes]


def passed(model, plan, x):
    """What the model computes when the same blocks give what they take."""
    model = copy.deepcopy(model)
    for name in names(plan):
        model.get_submodule(name).forward = lambda x: x
    return model(x)


def test_half_of_the_blocks_of_a_resnet():
    model = resnet()
    plan = propose(model, PICTURES, depth=0.5)
    small = sc.shrink(model, PICTURES, depth=0.5)
    assert len(small.layer1) + len(small.layer2) == 4
    assert small.layer2[0].downsample is not None
    assert "layer1.0" in names(plan)
    assert torch.allclose(small(PICTURES), passed(model, plan, PICTURES), atol=1e-5)
    assert (len(model.layer1), len(model.layer2)) == (4, 4)
    again = ResNet(len(small.layer1), len(small.layer2))
    again.load_state_dict(small.state_dict())
    small.layer2[0].bn1.weight.data += 1
    assert not torch.equal(small.layer2[0].bn1.weight, model.layer2[0].bn1.weight)


def test_all_blocks_of_lists_that_have_some_count():
    with pytest.raises(StructureError, match=r"leaves 1 of 8 blocks, and only 6 can go: layer2\.0: .*depth of 0\.25"):
        sc.shrink(resnet(), PICTURES, depth=0.1)
    assert len(names(propose(resnet(), PICTURES, depth=0.25))) == 6


def test_the_layers_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = seeded(nn.TransformerEncoder, layer, 4)
    small = sc.shrink(encoder, torch.randn(2, 5, 8), depth=0.5)
    assert (len(small.layers), small.num_layers) == (2, 2)


def test_the_blocks_with_the_least_influence_go_and_the_plan_tells_them():
    model = seeded(Stack, 4, in_turn)
    plan = propose(model, X, depth=0.5)
    assert names(plan) == ["layers.0", "layers.1"]
    influence = [block.influence for block in plan.blocks]
    assert influence == sorted(influence)
    with torch.no_grad():
        without = model.norms[0](model.layers[3](model.layers[2](model.layers[1](X))))
        assert influence[0] == pytest.approx(float((without - model(X)).norm() / model(X).norm()), rel=1e-4)
    table = plan.explain().text(None)
    assert "layers.0, influence 0." in table
    assert "others have less influence" in table


def test_a_plan_is_plain_data():
    model = resnet()
    small = sc.shrink(model, PICTURES, depth=0.5)
    plan = Plan.from_json(propose(model, PICTURES, depth=0.5).to_json())
    state = plan.apply_state_dict(model.state_dict())
    other = copy.deepcopy(model)
    plan.apply(other)
    assert [*state] == [*small.state_dict()] == [*other.state_dict()]
    assert all(
        torch.equal(t, state[n]) and torch.equal(t, other.state_dict()[n]) for n, t in small.state_dict().items()
    )
    with pytest.raises(MaskError, match="apply it to a copy of the model it was made for"):
        plan.apply(other)
    with pytest.raises(MaskError, match="apply it to a copy of the model it was made for"):
        plan.apply_state_dict(state)


def test_a_plan_is_followed_and_proven():
    for sparsity in (None, 0.5):
        plan = propose(resnet(), PICTURES, sparsity, depth=0.5)
        assert plan.proven
        trained = seeded(ResNet, 4, 4)
        small = sc.shrink(trained, PICTURES, plan=Plan.from_json(plan.to_json()))
        assert {*small.state_dict()} == {*plan.apply_state_dict(trained.state_dict())}
        assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in trained.parameters())
    with pytest.raises(MaskError, match="apply it to a copy of the model it was made for"):
        sc.shrink(small, PICTURES, plan=plan)
    other = seeded(Stack, 4, places)
    with pytest.raises(StructureError, match=r"takes layers\.0, layers\.1 out, .*norms.*Make a plan of this model"):
        sc.shrink(other, X, plan=propose(seeded(Stack, 4, in_turn), X, depth=0.5))


def test_a_plan_for_another_width_changes_nothing():
    plan = propose(resnet(), PICTURES, 0.5, depth=0.5)
    other = resnet()
    other.head = nn.Linear(16, 5)
    other.stem = nn.Conv2d(3, 12, 3)
    with pytest.raises(MaskError, match="apply it to a copy"):
        plan.apply(other)
    assert len(other.layer1) == 4


def test_first_blocks_then_units():
    model = resnet()
    small = sc.shrink(model, PICTURES, 0.5, depth=0.5)
    assert len(small.layer1) + len(small.layer2) == 4
    assert (small.stem.out_channels, small.layer2[0].conv2.out_channels) == (4, 8)
    plan = propose(model, PICTURES, 0.5, depth=0.5)
    assert {block.name for block in plan.blocks} >= {"layer1.0", "layer2.0"}
    plan.apply(model)
    assert torch.allclose(model(PICTURES), small(PICTURES), atol=1e-6)
    assert len(plan.explain().rows) == len(plan.blocks) + len(plan.groups)


def test_blocks_that_are_kept():
    model = seeded(Stack, 4, in_turn)
    assert names(propose(model, X, depth=0.5, keep="layers.0")) == ["layers.1", "layers.2"]
    assert names(propose(model, X, depth=0.5, keep=[model.layers[0], "layers.1.*"])) == ["layers.2", "layers.3"]
    with pytest.raises(StructureError, match=r"only 0 can go: layers\.0, .*: kept, as keep='layers' asks.*sparsity"):
        propose(model, X, depth=0.5, keep="layers")


def test_what_is_kept_is_kept_under_its_new_name():
    small = sc.shrink(resnet(), PICTURES, 0.5, depth=0.5, keep=["layer2.3.conv1", "layer1.3.conv1"])
    assert (small.layer1[-1].conv1.out_channels, small.layer2[-1].conv1.out_channels) == (8, 16)
    assert small.layer2[0].conv1.out_channels == 8


def test_the_optimizer_follows_and_gradients_too():
    model = seeded(Stack, 4, in_turn)
    groups = [{"params": [*model.layers[0].parameters()]}, {"params": [*model.layers[1:].parameters()]}]
    optimizer = torch.optim.Adam(groups)
    model(X).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[model.layers[3].inner.weight]["exp_avg"]
    small = sc.shrink(model, X, depth=0.5, optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 4]
    assert torch.equal(optimizer.state[small.layers[1].inner.weight]["exp_avg"], moments)
    assert len(optimizer.state) == 4
    assert torch.equal(small.layers[1].inner.weight.grad, model.layers[3].inner.weight.grad)
    before = small.layers[1].inner.weight.clone()
    small(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, small.layers[1].inner.weight)


def by_number(self, x):
    for i in range(self.depth):
        x = self.layers[i](x)
    return x


def by_another_number(self, x):
    for i in range(self.steps):
        x = self.layers[i](x)
    return x


def with_its_norm(self, x):
    for layer, norm in zip(self.layers, self.norms, strict=True):
        x = norm(layer(x))
    return x


def by_literal(self, x):
    for i in range(4):
        x = self.layers[i](x)
    return x


def with_a_skip(self, x):
    seen = []
    for layer in self.layers:
        x = layer(x)
        seen.append(x)
    return x + seen[2]


def places(self, x):
    for i, layer in enumerate(self.layers):
        x = self.norms[i](layer(x))
    return x


def all_of_them(self, x):
    seen = []
    for layer in self.layers:
        x = layer(x)
        seen.append(x)
    return tuple(seen)


@pytest.mark.parametrize("code", [by_number, by_another_number])
def test_a_number_of_blocks_follows(code):
    small = sc.shrink(seeded(Stack, 4, code), X, depth=0.5)
    assert len(small.layers) == small.depth == 2
    plan = propose(seeded(Stack, 4, code), X, depth=0.5)
    other = seeded(Stack, 4, code)
    plan.apply(other)
    assert torch.equal(other(X), small(X))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (by_literal, "without it, the forward fails .*IndexError"),
        (with_its_norm, "ValueError: zip"),
        (with_a_skip, "without it, the outputs differ"),
        (places, r"layer_norm of norms\.0\.weight"),
        (all_of_them, "3 outputs in place of 4"),
    ],
)
def test_code_that_knows_the_blocks_by_number_is_refused(code, why):
    """The norms are all alike: only that others are read tells."""
    model = seeded(Stack, 4, code)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StructureError, match=rf"only . can go: .*{why}.*(Give a sparsity|Ask for a depth)"):
        sc.shrink(model, X, depth=0.25)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert len(model.layers) == 4


class Inner(Residual):
    """A block with a list of its own, whose modules it calls by number."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x):
        return x + self.inner(self.parts[1](self.parts[0](x)))


def test_where_the_innermost_blocks_cannot_go_those_around_them_do():
    model = nn.Sequential(*(Inner() for _ in range(4)))
    assert {name.count(".") for name in names(propose(model, X, depth=0.5))} == {0}


class Aside(Stack):
    """A branch for training, off one of the blocks."""

    def __init__(self, place):
        super().__init__(4, None)
        self.aside, self.place = nn.Linear(8, 2), place

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.training and i == self.place:
                aside = self.aside(x)
        return (x, aside) if self.training else x


def test_a_branch_that_runs_in_training_only_counts():
    assert names(propose(seeded(Aside, 0), X, depth=0.5, keep="layers.0")) == ["layers.1", "layers.2"]
    with pytest.raises(StructureError, match=r"without it, in training mode, .* in place of linear of aside\.weight"):
        propose(seeded(Aside, 2), X, depth=0.25)


def test_a_last_block_may_go_where_others_may_not():
    class Ends(Stack):
        pass

    def code(self, x):
        for i, layer in enumerate(self.layers):
            x = self.norms[i](layer(x)) if i < 3 else layer(x)
        return x

    plan = propose(seeded(Ends, 4, code), X, depth=0.75)
    assert names(plan) == ["layers.3"]
    assert all("in place of" in block.held for block in plan.blocks if block.becomes and block.influence is not None)


class Placed(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.inner, self.layer_idx, self.layer_number = nn.Linear(8, 8), index, index + 1
        self.block_size, self.index = 16, 2 * index

    def forward(self, x):
        return x + self.inner(x)


def test_the_place_of_a_block_follows():
    model = nn.Sequential(*map(Placed, range(4))).eval()
    small = sc.shrink(model, X, depth=0.5)
    assert [(block.layer_idx, block.layer_number) for block in small] == [(0, 1), (1, 2)]
    (one,) = sc.shrink(model, X, depth=0.25)
    assert (one.layer_idx, one.layer_number, one.block_size) == (0, 1, 16)
    assert one.index in (0, 2, 4, 6)
    assert [block.layer_idx for block in model] == [0, 1, 2, 3]


def by_number(self, x):
    for layer, scale in zip(self.layers, self.scales.unbind(0), strict=False):
        x = layer(x * scale)
    return self.norms[0](x)


def tapped(self, x):
    first = x
    for i, layer in enumerate(self.layers):
        first = x if i == 1 else first
        x = layer(x)
    return self.norms[0](x + first)


def test_equal_weights_that_blocks_take_by_number_are_told_apart():
    model = seeded(Stack, 4, by_number)
    model.scales = nn.Parameter(torch.ones(4))
    assert names(propose(model, X, depth=0.5)) == ["layers.2", "layers.3"]
    assert (model.scales == 1).all()


def test_blocks_that_give_zeros_at_first_are_told_apart():
    model = seeded(Stack, 4, tapped)
    for p in model.layers.parameters():
        nn.init.zeros_(p)
    assert names(propose(model, X, depth=0.75)) == ["layers.1"]


def test_a_list_under_two_names():
    class Twice(Stack):
        def __init__(self):
            super().__init__(4, in_turn)
            self.same = self.layers

    model = seeded(Twice)
    plan = propose(model, X, depth=0.5)
    small = sc.shrink(model, X, depth=0.5)
    assert len(small.same) == 2
    assert {*plan.apply_state_dict(model.state_dict())} == {*small.state_dict()}


def test_several_examples_and_masks():
    model = seeded(Stack, 4, in_turn)
    assert len(sc.shrink(model, [X, X[:1]], depth=0.5).layers) == 2
    masks = {"layers.3.inner.weight": torch.zeros(8, 8, dtype=torch.bool)}
    with pytest.raises(StructureError, match="only dead units go"):
        sc.shrink(model, X, depth=0.5, masks=masks)


def test_what_cannot_be_asked():
    model = seeded(Stack, 4, in_turn)
    for depth in (0, 1, -1, 2.0, "half", True, float("nan")):
        with pytest.raises(InputError, match="give the fraction of the blocks that remains, between 0 and 1"):
            sc.shrink(model, X, depth=depth)
    with pytest.raises(StructureError, match=r"leaves all 4 blocks: it is the fraction that remains, so give 0\.75"):
        sc.shrink(model, X, depth=0.9)
    with pytest.raises(InputError, match=r"depth=0\.5 first, then shrink the result with macs="):
        sc.shrink(model, X, depth=0.5, macs=0.5)
    with pytest.raises(InputError, match="shrink with depth= first"):
        sc.shrink(model, X, 0.5, depth=0.5, score=lambda name, w: w)
    with pytest.raises(InputError, match="only blocks go: leave it out, or give a sparsity"):
        sc.shrink(model, X, depth=0.5, round_to=8)
    with pytest.raises(InputError, match="without weights that tell what blocks do"):
        sc.shrink(copy.deepcopy(model).to("meta"), X, depth=0.5)


def test_a_model_without_blocks_is_told_what_a_block_is():
    with pytest.raises(StructureError, match=r"two blocks of one class that add to what they take\. Give a sparsity"):
        sc.shrink(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), X, depth=0.5)
