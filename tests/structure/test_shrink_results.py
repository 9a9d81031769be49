"""What shrink gives goes wherever an ordinary model goes; each rank gets the same; a crash changes nothing."""

import copy
import io
import pickle

import pytest
import torch
from torch import distributed, nn

import secateur as sc
from models import MODELS, Mlp, Tagger, build, example
from processes import in_a_group
from secateur.structure import Plan, propose


@pytest.fixture(scope="module", params=MODELS)
def small(request):
    model = build(request.param).eval()
    return sc.shrink(model, example(model), 0.5)


def same(model, other):
    with torch.no_grad():
        return torch.allclose(model(example(model)), other(example(model)), atol=1e-5)


def test_it_can_be_copied_pickled_and_saved(small):
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
        assert same(small, again)
        assert again.state_dict().keys() == small.state_dict().keys()


def test_it_trains(small):
    model = copy.deepcopy(small).train()
    optimizer = torch.optim.Adam(model.parameters())
    model(example(model)).sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The tensor attribute.*_flat_weights")  # said of a dense LSTM too
def test_it_is_exported(small):
    assert same(small, torch.export.export(small, (example(small),)).module())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_compiled(small):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert same(small, torch.compile(small, fullgraph=True, backend="aot_eager"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = build(Mlp).eval()
    small = sc.shrink(model, example(model), 0.5)
    torch.onnx.export(small, (example(small),), tmp_path / "m", dynamo=True, verbose=False, external_data=False)
    shapes = [tuple(one.dims) for one in onnx.load(tmp_path / "m").graph.initializer]
    assert tuple(next(m for m in small.modules() if isinstance(m, nn.Linear)).weight.shape) in shapes


def test_hooks_stay():
    model, calls = build(Mlp).eval(), []
    model.register_forward_hook(lambda module, inputs, out: calls.append(tuple(out.shape)))
    next(model.parameters()).register_hook(lambda grad: grad * 0)
    small = sc.shrink(model, example(model), 0.5)
    calls.clear()
    small(example(small))
    assert len(calls) == 1
    assert model._forward_hooks.keys() == small._forward_hooks.keys()


@pytest.mark.parametrize("at", [1, 3])
def test_a_crash_in_the_middle_leaves_the_model(interrupted, at):
    model = build(Tagger).eval()
    optimizer = torch.optim.Adam(model.parameters())
    model(example(model)).sum().backward()
    optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    interrupted(at)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        sc.shrink(model, example(model), 0.5, optimizer=optimizer)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.state_dict()["state"].keys() == state["state"].keys()


def _shrink_on_a_rank(rank):
    model = build(Tagger).eval()
    inputs = example(model)
    own = propose(model, inputs, 0.5)
    sent = [own.to_json() if rank == 0 else None]
    distributed.broadcast_object_list(sent)
    assert Plan.from_json(sent[0]) == Plan.from_json(own.to_json())  # proposed by each rank by itself
    small = sc.shrink(model, inputs, plan=Plan.from_json(sent[0]))
    Plan.from_json(sent[0]).apply(model)
    for mine, again in zip(small.parameters(), model.parameters(), strict=True):
        first = mine.detach().clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, mine)
        assert torch.equal(first, again)
    wrapped = nn.parallel.DistributedDataParallel(small.train())
    wrapped(inputs).sum().backward()


def test_ranks_get_the_same_model_by_a_plan_that_is_sent_or_alone():
    in_a_group(2, _shrink_on_a_rank)
