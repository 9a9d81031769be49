"""2:4 Linear layers of CUDA, on a CPU that is taken for a GPU: torch's kernel and the clock are replaced.

What the GPU itself computes is in tests/test_gpu.py.
"""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, StateError
from secateur.runtime import check_weights, linears, semi_structured, trust_weights, tuning
from secateur.runtime.kernel_plans import Gain
from secateur.runtime.semi_structured import SemiStructuredLinear
from sparse_models import fake_times

X = torch.randn(3, 5, 64, dtype=torch.bfloat16)


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64, bias=False), nn.GELU(), nn.Linear(64, 8))
    sc.prune(model, 0.5, pattern="2:4", scope=sc.weights(model, skip=["4"]))
    return model.to(dtype)


class Kernel:
    """Stands for torch's conversion: makes a dense tensor, times a factor, and counts."""

    def __init__(self):
        self.made, self.factor, self.error = [], 1.0, None

    def __call__(self, weight):
        if self.error:
            raise self.error
        self.made.append(weight * self.factor)
        return self.made[-1]


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", made)
    monkeypatch.setattr(SemiStructuredLinear, "device", "cpu")
    monkeypatch.setattr(linears.SparseLinear, "device", "another")
    return made


def kinds(model):
    return [type(module).__name__ for module in model if isinstance(module, nn.Linear)]


def test_layers_that_are_2_4_run_on_torchs_kernel(kernel, sparse_wins):
    model = net()
    fast = sc.accelerate(model, X)
    assert kinds(fast) == ["SemiStructuredLinear", "SemiStructuredLinear", "Linear"]
    assert fast.plan.sparse == ("0", "2")
    assert fast.plan.layers[2].reason == "more than two of four weights along the inputs are not zero"
    calls = len(kernel.made)
    with torch.inference_mode():
        assert torch.equal(fast(X), model(X))
        assert torch.equal(fast(X[0, 0]), model(X[0, 0]))
        assert fast(X[:0]).shape == (0, 5, 8)
        fast[0]._packed.zero_()  # that it is used
        assert not torch.equal(fast(X), model(X))
    assert len(kernel.made) == calls


def test_the_slower_stays_dense(kernel, monkeypatch):
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0) if name == "2" else (1.0, 1.0))
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fast = sc.accelerate(net(), X)
    assert kinds(fast) == ["Linear", "SemiStructuredLinear", "Linear"]
    assert fast.plan.layers[0].reason == "not faster"


def test_the_state_is_the_dense_one_and_dense_gives_the_plain_model(kernel, sparse_wins):
    model = net()
    fast = sc.accelerate(model, X)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in model.state_dict().items())
    plain = sc.dense(fast)
    assert [type(one) for one in plain.modules()] == [type(one) for one in model.modules()]
    assert [sorted(vars(one)) for one in plain.modules()] == [sorted(vars(one)) for one in model.modules()]
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_copies_make_their_own_tensor_anew(kernel, sparse_wins):
    fast = sc.accelerate(net(), X)
    for one in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert one[0]._packed is not fast[0]._packed
        assert any(one[0]._packed is made for made in kernel.made)
        assert torch.equal(one(X), fast(X))
        one[2].weight.mul_(2)
        with pytest.raises(StateError, match=r"2 have changed(.|\n)*sc\.accelerate\(sc\.dense\(fast\)"):
            one(X)


def test_a_copy_where_torch_has_no_kernel_is_dense(kernel, sparse_wins):
    model = net()
    fast = sc.accelerate(model, X)
    kernel.error = RuntimeError("no such kernel")
    again = copy.deepcopy(fast)
    assert again[0]._packed is None
    assert torch.equal(again(X), model(X).detach())


def test_moves(kernel, sparse_wins):
    model = net()
    fast = sc.accelerate(model, X).half()
    assert torch.equal(fast(X.half()), copy.deepcopy(model).half()(X.half()).detach())
    assert fast[0]._packed.dtype is torch.float16
    fast.float()  # for which there is no kernel
    assert fast[0]._packed is None
    assert torch.equal(fast(X.float()), sc.dense(fast)(X.float()).detach())


def test_weights_that_change_are_noticed(kernel, sparse_wins):
    fast = sc.accelerate(net(), X)
    check_weights(fast)
    fast[0].weight.data.mul_(2)  # which torch does not count
    with pytest.raises(StateError, match=r"weights of 0 have changed(.|\n)*sc\.dense\(fast\)"):
        check_weights(fast)
    fast[0].weight.data.div_(2)
    trust_weights(fast, False)
    fast(X)
    fast[0].weight.add_(0)  # written, and the same
    fast(X)
    fast.load_state_dict({name: value * 2 for name, value in fast.state_dict().items()})
    with pytest.raises(StateError, match=r"have changed(.|\n)*sc\.dense\(fast\)"):
        fast(X)


def test_gradients_are_refused_and_other_inputs_run_dense(kernel, sparse_wins):
    model = net()
    fast = sc.accelerate(model, X)
    with pytest.raises(StateError, match=r"sc\.dense\(fast\)"):
        fast(X.clone().requires_grad_())
    fast[0]._packed = None
    assert torch.equal(torch.vmap(fast)(X), torch.vmap(model)(X).detach())
    with pytest.raises(RuntimeError, match="dtype"):
        fast(X.float())
    with pytest.raises(RuntimeError, match="shapes"):
        fast(X[..., :32])


def test_inputs_that_are_not_finite_run_dense_if_asked(kernel, sparse_wins):
    fast = sc.accelerate(net(), X, check_inputs=True)
    fast[0]._packed.zero_()
    x = X[0].clone()
    used = fast[0](x)
    x[0, 0] = torch.inf
    assert not torch.equal(fast[0](x)[1:], used[1:])


def test_a_kernel_that_computes_something_else_is_not_used(kernel, sparse_wins):
    kernel.factor = 1.02
    fast = sc.accelerate(net(), X)
    assert kinds(fast) == ["Linear"] * 3
    assert fast.plan.layers[0].reason == "torch's 2:4 kernel gives other numbers than the dense one"


def test_what_torch_refuses_is_the_reason(kernel, sparse_wins):
    kernel.error = RuntimeError("both sizes must be multiples of 128\nand more")
    reasons = [layer.reason for layer in sc.accelerate(net(), X).plan.layers]
    assert reasons[:2] == ["torch has no 2:4 kernel for it: both sizes must be multiples of 128"] * 2


@pytest.mark.parametrize("factor", [1.1, 1.001])
def test_the_output_of_the_model_is_checked(kernel, sparse_wins, monkeypatch, factor):
    plain = SemiStructuredLinear.forward  # right on the unit matrix, with which the kernel is checked
    monkeypatch.setattr(
        SemiStructuredLinear, "forward", lambda self, x: plain(self, x) * (factor if self._choices else 1)
    )
    fast = sc.accelerate(net(), X)
    assert bool(fast.plan.sparse) is (factor == 1.001)
    if factor == 1.1:
        assert kinds(fast) == ["Linear"] * 3
        assert fast.plan.layers[0].reason.startswith("the output differs by 0.")
        assert fast.plan.layers[0].reason.endswith("of its largest number, above 0.03")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_stay_dense(kernel, sparse_wins, dtype):
    plan = sc.accelerate(net(dtype), X.to(dtype)).plan
    assert plan.layers[0].reason == f"weight is {dtype} on cpu, and the kernels are for float16 and bfloat16 on CUDA"


def test_other_layers_stay_as_they_are_and_say_why(kernel, sparse_wins):
    model = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1, dtype=torch.bfloat16), *net())
    sc.prune(model, 0.9, scope=sc.weights(model, only=["0"]))
    fast = sc.accelerate(model, X)
    assert fast.plan.sparse == ("1", "3")
    assert fast.plan.layers[0].reason == ("weight is torch.bfloat16 on cpu, and the kernels are for float32 on the CPU")
    assert type(fast[0]) is nn.Conv1d


def test_the_plan_knows_the_gpu(kernel, sparse_wins, monkeypatch):
    monkeypatch.setattr(tuning, "gpus", lambda model: "NVIDIA H200")
    plan = sc.accelerate(net(), X).plan
    assert "GPU: NVIDIA H200; sparse there: torch's semi-structured (2:4) products" in str(plan)
    kept = json.loads(json.dumps(plan.to_dict()))
    assert sc.accelerate(net(), X, plan=kept).plan == plan
    monkeypatch.setattr(tuning, "gpus", lambda model: "")
    with pytest.raises(InputError, match=r"threads on NVIDIA H200, and this is(.|\n)*Leave plan out"):
        sc.accelerate(net(), X, plan=kept)
    del kept["gpu"]  # of an earlier version
    assert sc.accelerate(net(), X, plan=kept).plan.sparse == plan.sparse


def test_the_dtype_is_part_of_what_a_plan_is_for(kernel, sparse_wins):
    plan = sc.accelerate(net(), X).plan
    with pytest.raises(InputError, match="Leave plan out"):
        sc.accelerate(net(torch.float16), X.half(), plan=plan)


@pytest.mark.parametrize("place", [(0, 0), (31, 63), (7, 1)])
def test_two_of_four(place):
    weight = net()[0].weight.detach().clone()
    assert semi_structured.two_of_four(weight)
    row, group = place[0], place[1] // 4
    weight[row, 4 * group : 4 * group + 4] = torch.tensor([1.0, 0.0, torch.nan, 2.0])
    assert not semi_structured.two_of_four(weight)
    assert not semi_structured.two_of_four(torch.zeros(4, 6))


def test_a_graph_is_dense(kernel, sparse_wins):
    fast = sc.accelerate(net(), X)
    fast[0]._packed.zero_()  # which no graph reads
    program = torch.export.export(fast, (X,))
    assert torch.equal(program.module()(X), net()(X).detach())
