"""From masks to smaller shapes: exactly what is dead already goes."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, MaskError, StructureError, UnknownNameError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)
    return nn.Sequential(*layers).eval()


def widths(model):
    return [m.out_features for m in model if isinstance(m, nn.Linear)]


def test_rows_that_are_pruned_go():
    model = mlp()
    masks = sc.prune(model, {"0.weight": 0.5, "2.weight": 0.5}, pattern="rows")
    small = sc.shrink(model, X, masks=masks)
    assert widths(small) == [4, 3, 2]
    assert torch.allclose(small(X), model(X), atol=1e-6)


def test_masks_of_a_model_whose_weights_are_still_there():
    model, pruned = mlp(), mlp()
    masks = sc.prune(pruned, {"0.weight": 0.5}, pattern="rows")
    before = model[0].weight.clone()
    small = sc.shrink(model, X, masks=dict(masks))
    assert widths(small) == [4, 6, 2]
    assert torch.allclose(small(X), pruned(X), atol=1e-6)
    assert torch.equal(model[0].weight, before)
    small[2].weight.data += 1
    assert torch.equal(model[2].weight, mlp()[2].weight)


def test_unstructured_pruning_ends_here():
    model = mlp()
    masks = sc.prune(model, 0.8)
    small = sc.shrink(model, X, masks=masks)
    assert widths(small) != widths(model)
    assert torch.allclose(small(X), model(X), atol=1e-6)


def test_a_model_with_dead_units_needs_no_amount():
    model = mlp()
    model[2].weight.data[:, 5] = 0
    assert widths(sc.shrink(model, X)) == [7, 6, 2]


def test_layers_of_equal_size_lose_as_many():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.head = nn.LSTM(4, 8, 2, bias=False), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.r(x)[0])

    model = Net().eval()
    gates = {"r.weight_ih_l0": 3, "r.weight_hh_l0": 3, "r.weight_ih_l1": 5, "r.weight_hh_l1": 5}
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in gates}
    for name, n in gates.items():
        masks[name].view(4, 8, -1)[:, :n] = False
    assert sc.shrink(model, torch.randn(5, 2, 4), masks=masks).r.hidden_size == 5


def test_an_optimizer_goes_on_from_masks():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    masks = sc.prune(model, {"0.weight": 0.5}, pattern="rows", optimizer=optimizer)
    small = sc.shrink(model, X, masks=masks, optimizer=optimizer)
    assert optimizer.state[small[0].weight]["momentum_buffer"].shape == (4, 4)
    optimizer.step()


def test_nothing_dead_is_an_error():
    with pytest.raises(StructureError, match=r"Give a sparsity, such as 0\.5"):
        sc.shrink(mlp(), X)


def test_masks_and_a_sparsity():
    with pytest.raises(InputError, match="give one of them"):
        sc.shrink(mlp(), X, 0.5, masks={})


def test_masks_of_another_model():
    with pytest.raises(UnknownNameError, match="nearest names are"):
        sc.shrink(mlp(), X, masks={"1.weight": torch.ones(8, 4, dtype=torch.bool)})
    with pytest.raises(MaskError, match="these masks are for another model"):
        sc.shrink(mlp(), X, masks={"0.weight": torch.ones(8, 5, dtype=torch.bool)})


def test_a_model_that_is_wrapped():
    with pytest.raises(InputError, match=r"shrink model\.module"):
        sc.shrink(nn.DataParallel(mlp()), X)
