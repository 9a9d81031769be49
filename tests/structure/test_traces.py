import pytest
import torch
from torch import nn

from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.cut import twin
from secateur.structure.policy import Policy
from secateur.structure.traces import Otherwise, Trace, fingerprint

assert rules


def test_a_print_tells_the_length_and_differs_with_the_tensor():
    t = torch.randn(3 << 18)[: (3 << 18) - 5]
    for v in (t, t[:7], t[:0]):
        count, length, *sums = fingerprint(v)
        assert count == v.numel()
        assert length == pytest.approx(float(v.norm()), rel=1e-4)
        assert len(sums) == 3
    other = t.clone()
    other[[0, 1 << 18]] = t[[1 << 18, 0]]  # the same places of two chunks
    assert abs(fingerprint(other)[2] - fingerprint(t)[2]) > 1e-3
    assert fingerprint(torch.arange(5)) == (0,) * 5


def test_the_least_number_of_a_type_is_left_out():
    t = torch.tensor([3.0, torch.finfo(torch.float32).min, float("-inf"), 4.0])
    assert fingerprint(t)[1] == 5


def test_the_random_numbers_of_all_chunks_differ():
    """A sum of two chunks that are each other's negative is not zero."""
    t = torch.randn(1 << 18)
    assert abs(fingerprint(torch.cat([t, -t]))[2]) > 1


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop = nn.Linear(4, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.a(x))


def test_a_trace_follows_the_calls_of_a_run():
    model, x = Drops().eval(), torch.randn(3, 4)
    run = capture(twin(model), [((x,), {})], Policy()).runs[0]
    trace = Trace(run, [[(3, 8)], [(3, 8)]]).of(model, ((x,), {}))
    assert trace.at == len(run.calls) == len(trace.prints)
    assert torch.equal(trace.out[0], model(x))
    with pytest.raises(Otherwise, match=r"gives \[\(3, 8\)\], expected \[\(3, 7\)\]"):
        Trace(run, [[(3, 7)], None]).of(model, ((x,), {}))
    with pytest.raises(Otherwise, match="linear instead of the end"):
        Trace(run, [None, None]).of(nn.Sequential(model, nn.Linear(8, 2)), ((x,), {}))


def test_nothing_is_dropped_in_training_mode():
    model, x = Drops(), torch.randn(3, 4)
    run = capture(twin(model), [((x,), {})], Policy()).runs[0]
    run = type(run)(run.arguments, True, run.calls)
    assert torch.equal(Trace(run).of(model, ((x,), {})).out[0], model.a(x))
