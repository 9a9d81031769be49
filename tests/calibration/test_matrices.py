"""Matrices of a model with what they read; drafts beside it; and tensors that are written to only for a while."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.matrices import Draft, masked, matrices, opened, restored
from secateur.calibration.moments import Moments, Piece
from secateur.calibration.solvers.curvature import Curvature
from secateur.errors import InputError, InputTypeError, NotFiniteError, SecateurWarning


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"cell": nn.LSTMCell(3, 5), "head": nn.Linear(5, 4)})


def moments(*pieces, inputs, groups=1):
    x = torch.randn(50, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Moments(pieces, (x.T @ x).expand(groups, -1, -1).clone(), torch.full((groups,), 50))


JOINT = moments(Piece("cell.weight_ih", 0, 20), Piece("cell.weight_hh", 0, 20), inputs=8)
HEAD = moments(Piece("head.weight", 0, 4), inputs=5)


def test_side_by_side():
    model = net()
    joint, head = matrices(sc.weights(model), [JOINT, HEAD])
    assert (joint.name, joint.size) == ("cell.weight_ih + cell.weight_hh", 160)
    assert joint.weights_of("cell.weight_ih") == 60
    cell = model["cell"]
    assert torch.equal(joint.weights()[0], torch.cat([cell.weight_ih, cell.weight_hh], 1))
    assert head.curvature is not joint.curvature


def test_the_loss_is_the_error_of_the_outputs():
    model = net()
    head = matrices(sc.weights(model), [HEAD])[0]
    x = torch.linalg.cholesky(HEAD.gram[0]).T.float()  # x^T x is the Gram matrix
    dense = model["head"].weight.detach()
    other = dense * torch.tensor([1.0, 0, 1, 0, 1])
    expected = ((other - dense) @ x.T).square().sum() / (dense @ x.T).square().sum()
    assert head.loss(other[None]) == pytest.approx(float(expected), rel=0.05)  # but for the damping
    assert head.loss(dense[None]) == 0


def test_one_curvature_for_one_input():
    model = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 3)])
    shared = moments(Piece("0.weight", 0, 4), inputs=5)
    other = Moments((Piece("1.weight", 0, 3),), shared.gram, shared.count)
    one, two = matrices(sc.weights(model), [shared, other])
    assert one.curvature is two.curvature


@pytest.mark.parametrize(("name", "columns"), [("cell.weight_ih", slice(0, 3)), ("cell.weight_hh", slice(3, 8))])
def test_one_side_alone(name, columns):
    found = matrices(sc.weights(net(), only=[name]), [JOINT])[0]
    assert found.moments.names == (name,)
    assert torch.equal(found.curvature.matrix, Curvature(JOINT.gram[:, columns, columns]).matrix)


def test_rows_without_moments():
    part = moments(Piece("head.weight", 0, 3), inputs=5)
    assert matrices(sc.weights(net()), [part]) == []


def test_draft_and_back():
    model = net()
    scope = sc.weights(model)
    before = {name: p.detach().clone() for name, p in scope.items()}
    draft = Draft()
    for matrix in matrices(scope, [JOINT, HEAD]):
        kept = matrix.weights() > 0
        draft.put(matrix, matrix.weights() * 2 * kept, kept)
    with restored(scope):
        draft.write(scope)
        for name, parameter in scope.items():
            assert torch.equal(parameter, 2 * before[name].clamp_min(0))
    assert all(torch.equal(parameter, before[name]) for name, parameter in scope.items())
    masks = draft.masks(scope)
    assert list(masks) == list(scope)
    assert all(torch.equal(masks[name], before[name] > 0) for name in masks)


def test_what_has_no_statistics_is_masked():
    model = net()
    scope = sc.weights(model)
    masks = sc.Masks({name: p > 0 for name, p in scope.items()})
    with pytest.warns(SecateurWarning, match=r"head\.weight has no statistics"):
        draft = masked(scope, masks, matrices(scope, [JOINT]))
    assert list(draft.weights) == ["head.weight"]
    assert torch.equal(draft.weights["head.weight"], scope["head.weight"].clamp_min(0))


def test_refused():
    model = net()
    with pytest.raises(InputTypeError, match=r"sc\.calibrate"):
        opened(model, {})
    stats = sc.calibrate(nn.Linear(5, 4), [torch.randn(20, 5)])
    with pytest.raises(InputError, match="another model"):
        opened(model, stats)
    broken = Moments(HEAD.pieces, HEAD.gram * torch.nan, HEAD.count)
    with pytest.raises(NotFiniteError, match=r"head\.weight.*NaN or inf"):
        matrices(sc.weights(model), [broken])
    turning = nn.ModuleDict({"head": nn.Linear(5, 4, dtype=torch.complex64)})
    with pytest.raises(InputTypeError, match=r"head\.weight is complex.*leave it out"):
        matrices(sc.weights(turning), [HEAD])
