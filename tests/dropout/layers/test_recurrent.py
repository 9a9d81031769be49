"""Recurrent dropout: equal to a loop over the steps, on the fused layers of a model that stays itself."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import secateur as sc
from secateur.dropout import noise
from secateur.dropout.layers.recurrent import RecurrentDropout, in_one_piece, recurrent
from secateur.dropout.learned import variational
from secateur.errors import InputError, InputTypeError, StateError

RATES = {"weight": 0.2, "input": 0.3, "hidden": 0.4}
LAYERS = {
    "LSTM": lambda: nn.LSTM(5, 6, 2, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(5, 6, 2, proj_size=3),
    "LSTM, plain": lambda: nn.LSTM(5, 6, bias=False),
    "GRU": lambda: nn.GRU(5, 6, 2, bidirectional=True),
    "RNN": lambda: nn.RNN(5, 6, 3),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0])


TOKENS = torch.arange(28).view(7, 4) % 20


def cell(mode, weights, x, h, c, kept):
    """One step, with `kept` as the mask on h where matrices multiply it."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    a, b = x @ w_ih.T + b_ih, (h * kept) @ w_hh.T + b_hh
    if mode == "RNN_TANH":
        return (a + b).tanh(), c
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        return (1 - z) * (n + r * hn).tanh() + z * h, c
    i, f, g, o = (a + b).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else h @ w_hr.T), c


def loop(rnn, x, hidden=None, inputs=None, weight=None):
    """All steps in Python; masks by the name of the weight that they belong to."""
    hidden, inputs, weight = hidden or {}, inputs or {}, weight or {}
    for layer in range(rnn.num_layers):
        outputs = []
        for end in ("", "_reverse") if rnn.bidirectional else ("",):
            names = [f"{kind}_l{layer}{end}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
            weights = [getattr(rnn, name, None) for name in names]
            weights[1] = weights[1] * weight.get(names[1], 1)
            weights[2:4] = [torch.zeros(()) if bias is None else bias for bias in weights[2:4]]
            h, c = x.new_zeros(x.shape[1], weights[1].shape[1]), x.new_zeros(x.shape[1], rnn.hidden_size)
            steps = []
            for step in (x * inputs.get(names[0], 1)).flip(0) if end else x * inputs.get(names[0], 1):
                h, c = cell(rnn.mode, weights, step, h, c, hidden.get(names[1], 1))
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if end else steps))
        x = torch.cat(outputs, -1)
    return x


class Seen(TorchFunctionMode):
    """The inputs and weights with which the kernel of a recurrent layer is called."""

    def __init__(self, rnn):
        super().__init__()
        self.names = rnn._flat_weights_names
        rnn.register_forward_pre_hook(self.enter, prepend=True)
        rnn.register_forward_hook(self.leave)

    def enter(self, module, args):
        self.__enter__()

    def leave(self, module, args, output):
        self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            self.x, packed = args[0], isinstance(args[3], (list, tuple))
            self.sizes = args[1] if packed else None
            self.weights = dict(zip(self.names, args[3 if packed else 2], strict=True))
        return func(*args, **(kwargs or {}))

    def mask(self, rnn, name):
        return (self.weights[name] / getattr(rnn, name)).detach()

    def column(self, rnn, name, rate):
        mask = self.mask(rnn, name)
        torch.testing.assert_close(mask, mask[:1].expand_as(mask))  # the same for all gates
        for value in mask[0].tolist():
            assert value == 0 or value == pytest.approx(1 / (1 - rate))
        return mask[0]


@pytest.fixture(params=list(LAYERS))
def rnn(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def gradients(rnn, output):
    return torch.autograd.grad(output.square().sum(), list(rnn.parameters()))


# ---- what is computed -------------------------------------------------------------------------------------------


def test_hidden_is_a_loop_with_a_mask_on_h(rnn):
    recurrent(rnn, hidden=0.4)
    seen, x = Seen(rnn), torch.randn(7, 3, 5, dtype=torch.double)
    output, _ = rnn(x)
    names = [name for name in rnn._flat_weights_names if "weight_hh" in name]
    masks = {name: seen.column(rnn, name, 0.4) for name in names}
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == len(masks)  # each its own
    for name in set(rnn._flat_weights_names) - set(names):
        assert seen.weights[name] is getattr(rnn, name)
    looped = loop(rnn, x, hidden=masks)
    torch.testing.assert_close(output, looped)
    assert not torch.allclose(output, loop(rnn, x))
    torch.testing.assert_close(gradients(rnn, output), gradients(rnn, looped))


def test_weight_drops_single_weights(rnn):
    recurrent(rnn, weight=0.2)
    seen, x = Seen(rnn), torch.randn(7, 3, 5, dtype=torch.double)
    output, _ = rnn(x)
    masks = {name: seen.mask(rnn, name) for name in rnn._flat_weights_names if "weight_hh" in name}
    for mask in masks.values():
        assert mask.unique().tolist() == [0, pytest.approx(1.25)]
        assert len({tuple(row.tolist()) for row in mask}) > 1
    looped = loop(rnn, x, weight=masks)
    torch.testing.assert_close(output, looped)
    torch.testing.assert_close(gradients(rnn, output), gradients(rnn, looped))


def test_input_drops_the_inputs_of_every_layer(rnn):
    recurrent(rnn, input=0.3)
    seen, x = Seen(rnn), torch.randn(7, 30, 5, dtype=torch.double)
    output, _ = rnn(x)
    first = (seen.x / x)[0]
    torch.testing.assert_close((seen.x / x), first.expand_as(x))  # the same at every step
    assert len({tuple(row.tolist()) for row in first}) > 10  # another for each sequence
    masks = dict.fromkeys(("weight_ih_l0", "weight_ih_l0_reverse"), first)
    upper = [name for name in rnn._flat_weights_names if "weight_ih" in name and "_l0" not in name]
    masks |= {name: seen.column(rnn, name, 0.3) for name in upper}
    for name in upper:  # both directions read the same
        torch.testing.assert_close(masks[name], masks[name.removesuffix("_reverse")])
    looped = loop(rnn, x, inputs=masks)
    torch.testing.assert_close(output, looped)
    torch.testing.assert_close(gradients(rnn, output), gradients(rnn, looped))


def test_the_masked_weights_have_the_mean_of_the_plain_ones():
    torch.manual_seed(0)
    rnn = nn.GRU(5, 6, 2)
    recurrent(rnn, **RATES)
    seen, masks, first = Seen(rnn), [], []
    for _ in range(4000):
        rnn(torch.ones(1, 2, 5))
        masks.append(torch.cat([seen.mask(rnn, name).flatten() for name in ("weight_hh_l0", "weight_ih_l1")]))
        first.append(seen.x)
    for values in (masks, first):
        mean = torch.stack(values).mean(0)
        assert (mean - 1).abs().max() < 0.08


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_of_all_shapes(batch_first):
    torch.manual_seed(0)
    rnn = nn.LSTM(40, 6, batch_first=batch_first)
    recurrent(rnn, input=0.5)
    seen = Seen(rnn)
    rnn(torch.ones(4, 3, 40))
    time = 1 if batch_first else 0
    assert torch.equal(seen.x, seen.x.narrow(time, 0, 1).expand_as(seen.x))
    assert len({tuple(row.tolist()) for row in seen.x.select(time, 0)}) == seen.x.shape[1 - time]
    output, _ = rnn(torch.ones(4, 40))
    assert output.shape == (4, 6)
    assert (seen.x == seen.x[0]).all()
    packed = pack_sequence([torch.ones(n, 40) for n in (2, 5, 3)], enforce_sorted=False)
    output, _ = rnn(packed)
    order = torch.tensor([1, 2, 0])  # the longest first
    padded, lengths = pad_packed_sequence(PackedSequence(seen.x, seen.sizes, order, order.argsort()))
    assert lengths.tolist() == pad_packed_sequence(output)[1].tolist() == [2, 5, 3]
    for i, length in enumerate(lengths):
        assert (padded[:length, i] == padded[0, i]).all()
    assert len({tuple(row.tolist()) for row in padded[0]}) == 3


def test_inputs_given_by_name_and_first_states():
    torch.manual_seed(0)
    rnn = nn.GRU(5, 6)
    recurrent(rnn, input=0.9)
    torch.manual_seed(1)
    first, _ = rnn(torch.ones(2, 3, 5), torch.ones(1, 3, 6))
    torch.manual_seed(1)
    second, _ = rnn(hx=torch.ones(1, 3, 6), input=torch.ones(2, 3, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, rnn.eval()(torch.ones(2, 3, 5), torch.ones(1, 3, 6))[0])


def test_embedding_drops_words_wherever_they_stand():
    torch.manual_seed(0)
    words = nn.Embedding(1000, 4, padding_idx=0)
    recurrent(words, embedding=0.3)
    tokens = torch.cat([torch.arange(1000), torch.arange(1000)]).view(2, 1000)
    output = words(tokens)
    assert torch.equal(output[0], output[1])
    gone = (output[0] == 0).all(1)
    assert torch.equal(gone, (output[0] == 0).any(1))
    assert abs(float(gone[1:].float().mean()) - 0.3) < 0.05
    torch.testing.assert_close(output[0][~gone], words.weight[~gone] / 0.7)
    output.sum().backward()
    assert torch.equal((words.weight.grad == 0).all(1)[1:], gone[1:])
    assert torch.equal(words(input=tokens) == words.eval()(tokens), (words.weight == 0)[tokens])


# ---- the model stays itself -------------------------------------------------------------------------------------


def test_names_identities_and_types_stay():
    model = Tagger()
    before = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    keys, types, weights = list(model.state_dict()), [type(m) for m in model.modules()], model.lstm._flat_weights
    handle = recurrent(model, embedding=0.1, **RATES)
    for _ in range(2):
        model(TOKENS).sum().backward()
        assert [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()] == before
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == types
        assert model.lstm._flat_weights is weights
        assert all(w is p for w, p in zip(weights, model.lstm.parameters(), strict=True))
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    handle.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_eval_does_nothing_unless_samples_are_taken():
    torch.manual_seed(0)
    model = Tagger().eval()
    plain, state = model(TOKENS), torch.get_rng_state()
    recurrent(model, embedding=0.1, **RATES)
    assert torch.equal(model(TOKENS), plain)
    assert torch.equal(torch.get_rng_state(), state)
    token = noise.SAMPLING.set(True)
    try:
        assert not torch.equal(model(TOKENS), plain)
    finally:
        noise.SAMPLING.reset(token)
    assert torch.equal(model(TOKENS), plain)


def test_masks_follow_the_seed():
    torch.manual_seed(0)
    model = Tagger()
    recurrent(model, embedding=0.1, **RATES)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(TOKENS))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_copies_have_the_dropout_and_can_lose_it():
    model = Tagger()
    handle = recurrent(model, embedding=0.1, **RATES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(twin(TOKENS), twin(TOKENS))
        other = RecurrentDropout.of(twin)
        assert other is not handle
        assert str(other) == str(handle)
        other.remove()
        assert torch.equal(twin(TOKENS), twin(TOKENS))
        assert torch.equal(twin(TOKENS), model.eval()(TOKENS))
        assert not torch.equal(model.train()(TOKENS), model(TOKENS))
    assert RecurrentDropout.of(model) is handle


def test_an_error_leaves_nothing_behind():
    model = nn.LSTM(5, 6)
    recurrent(model, hidden=0.5)
    weights = model._flat_weights
    with pytest.raises(RuntimeError, match="input_size"):
        model(torch.ones(2, 3, 4))
    assert model._flat_weights is weights
    plain = nn.LSTM(5, 6)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(torch.ones(2, 3, 5))[0], plain(torch.ones(2, 3, 5))[0])
    assert torch._C._len_torch_function_stack() == 0


def test_parameters_may_be_replaced():
    torch.manual_seed(0)
    model = nn.LSTM(5, 6)
    recurrent(model, hidden=0.5)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 5)
    assert (torch.func.functional_call(model, zeros, x)[0] == 0).all()
    sums = set()
    for _ in range(9):
        ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        sums.add(torch.func.functional_call(model, ones, x)[0].sum().item())
    assert len(sums) > 1  # with masks
    assert (model(x)[0] != 0).any()
    model.load_state_dict(zeros, assign=True)
    assert (model(x)[0] == 0).all()
    assert all(w is p for w, p in zip(model._flat_weights, model.parameters(), strict=True))


@pytest.mark.parametrize("learned_first", [False, True])
def test_beside_learned_rates(learned_first):
    model = nn.LSTM(5, 6)
    attach = [lambda: variational(model, n_data=10, warmup=1), lambda: recurrent(model, hidden=0.5, input=0.5)]
    for each in attach if learned_first else attach[::-1]:
        each()
    weights = model._flat_weights
    for _ in range(2):
        model(torch.randn(2, 3, 5))[0].sum().backward()
        assert model._flat_weights is weights
        assert all(w is p for w, p in zip(weights, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_models_have_it():
    torch.manual_seed(0)
    model = Tagger()
    recurrent(model, embedding=0.1, **RATES)
    compiled = torch.compile(model, backend="eager")  # torch.compile does not look into recurrent layers
    for seed in range(2):
        torch.manual_seed(seed)
        plain = model(TOKENS)
        torch.manual_seed(seed)
        assert torch.equal(compiled(TOKENS), plain)
    model.eval()
    assert torch.equal(compiled(TOKENS), model(TOKENS))


def test_zeros_stay_zeros_with_a_pruner():
    torch.manual_seed(0)
    model = Tagger()
    recurrent(model, embedding=0.1, **RATES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
        for name, parameter in sc.weights(model).items():
            assert (parameter[~pruner.masks[name]] == 0).all()
    pruner.finish()
    weights = list(sc.weights(model).values())
    assert sum(int((w == 0).sum()) for w in weights) == math.floor(0.9 * sum(w.numel() for w in weights) + 0.5)


def test_weights_in_one_piece():
    like = nn.LSTM(3, 4)
    sizes = [p.numel() for p in like.parameters()]
    order = [2, 0, 3, 1]  # cuDNN has an order of its own
    pieces = torch.zeros(sum(sizes)).split([sizes[i] for i in order])
    with torch.no_grad():
        for i, piece in zip(order, pieces, strict=True):
            parameter = list(like.parameters())[i]
            parameter.set_(piece.view_as(parameter))
    parameters = list(like.parameters())
    masked = [torch.randn_like(p).requires_grad_() for p in parameters]
    found = in_one_piece(masked, parameters)
    for tensor, wanted, parameter in zip(found, masked, parameters, strict=True):
        assert torch.equal(tensor, wanted)
        assert tensor.storage_offset() == parameter.storage_offset()
        assert tensor.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
    assert found[0].untyped_storage().nbytes() == 4 * sum(sizes)
    sum(tensor.square().sum() for tensor in found).backward()
    for tensor in masked:
        torch.testing.assert_close(tensor.grad, 2 * tensor.detach())
    apart = list(nn.LSTM(3, 4).parameters())
    assert all(a is b for a, b in zip(in_one_piece(masked, apart), masked, strict=True))


# ---- the handle, and refusals -----------------------------------------------------------------------------------


def test_the_handle_says_what_is_where():
    handle = recurrent(Tagger(), hidden=0.25, weight=0.1, embedding=0.5)
    lines = str(handle).splitlines()
    assert lines[2].split() == ["words", "Embedding", "embedding", "0.5"]
    assert lines[3].split() == ["lstm", "LSTM", "weight", "0.1,", "hidden", "0.25"]
    assert repr(handle) == "RecurrentDropout(on 2 modules)"
    handle.remove()
    assert "removed" in str(handle)
    assert repr(handle) == "RecurrentDropout(removed)"
    with pytest.raises(StateError, match="to put it in again"):
        handle.remove()


def test_twice_is_refused_until_the_first_is_removed():
    model = Tagger()
    handle = recurrent(model, hidden=0.25)
    with pytest.raises(StateError, match=re.escape("call remove() on its handle first")):
        recurrent(model, embedding=0.1)
    handle.remove()
    with pytest.raises(StateError, match="put it in with"):
        RecurrentDropout.of(model)
    recurrent(model, hidden=0.5, embedding=0.1)


@pytest.mark.parametrize(
    ("make", "rates", "error", "remedy"),
    [
        (Tagger, {"hidden": 1.0}, InputError, "hidden is 1.0: give a rate"),
        (Tagger, {"hidden": 0.5, "input": -0.1}, InputError, "input is -0.1: give a rate"),
        (Tagger, {"weight": None}, InputTypeError, "weight is None: give a rate"),
        (Tagger, {}, InputError, "all rates are 0.* give one, such as hidden=0.25"),
        (lambda: nn.Linear(2, 2), {"weight": 0.1}, InputError, "weight=0.1: leave that out.* made of: Linear"),
        (lambda: nn.LSTM(2, 2), {"weight": 0.1, "embedding": 0.2}, InputError, "embedding=0.2: leave it out"),
        (lambda: nn.EmbeddingBag(4, 2), {"embedding": 0.2}, InputError, "embedding=0.2: leave it out"),
        (lambda: nn.LSTMCell(2, 2), {"hidden": 0.2}, InputError, "hidden=0.2: leave that out"),
        (
            lambda: parametrizations.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            {"hidden": 0.1},
            InputError,
            "plain first",
        ),
        (lambda: "model", {"hidden": 0.1}, InputTypeError, "expected a torch.nn.Module"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(make, rates, error, remedy):
    model = make()
    with pytest.raises(error, match=remedy):
        recurrent(model, **rates)
    if isinstance(model, nn.Module):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
