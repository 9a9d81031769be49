"""More zeros where they cost the whole model less."""

import torch
from torch import nn

import secateur as sc
from secateur.calibration import levels
from secateur.calibration.contest import Judge
from secateur.calibration.matrices import Draft, matrices
from secateur.calibration.supports import selector
from secateur.calibration.ways import fast


class Unequal(nn.Module):
    """Of two branches one matters hundred times as much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.much = nn.Linear(16, 16, bias=False)
        self.little = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.much(x) + self.little(x) / 100


def test_what_matters_less_loses_more():
    model = Unequal()
    stats = sc.calibrate(model, [torch.randn(64, 16) for _ in range(5)])
    scope = sc.weights(model)
    parts = matrices(scope, stats.moments)
    judge, done = Judge(model, stats, scope, None), []

    def solve(part, zeros):
        select = selector(part.moments, part.shapes, part.weights(), zeros, within="row")
        return part, *fast(part.weights(), part.curvature, select)

    def quality(solutions):
        draft = Draft()
        for solution in solutions:
            draft.put(*solution)
        return judge.of(draft, "some")

    even = dict.fromkeys(parts, 128)
    counts = levels.zeros(even, solve, quality, done.append)
    assert sum(counts.values()) == 256
    assert counts[parts[0]] < 80
    assert counts[parts[1]] > 176
    assert len(done) == levels.measurements(parts)
