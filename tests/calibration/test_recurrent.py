"""What recurrent layers read: [x, h(t-1)], as a loop over the steps computes it."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from secateur.calibration.recurrent import Run, cell, directions, moments, passed, run, turned
from secateur.errors import InputTypeError, NotFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = {
    "lstm": lambda: nn.LSTM(3, 5, 2),
    "lstm without bias": lambda: nn.LSTM(3, 5, bias=False),
    "lstm both ways": lambda: nn.LSTM(3, 5, 2, bidirectional=True),
    "lstm projected": lambda: nn.LSTM(3, 6, 2, proj_size=4, bidirectional=True),
    "gru": lambda: nn.GRU(3, 5, 2, bidirectional=True),
    "gru without bias": lambda: nn.GRU(3, 5, bias=False),
    "rnn": lambda: nn.RNN(3, 5, 2),
    "rnn relu": lambda: nn.RNN(3, 5, nonlinearity="relu", bidirectional=True),
}


def made(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind]().eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unrolled(direction, x, state):
    """[x, h(t-1)] of each step, one step after another, for the weights of one direction."""
    w = direction.tensors
    h, c = state[0], state[-1]
    for x_t in x:
        yield x_t, h
        gates = x_t @ w["weight_ih"].T + w.get("bias_ih", 0.0)
        own = h @ w["weight_hh"].T + w.get("bias_hh", 0.0)
        if direction.kind == "LSTM":
            i, f, g, o = (gates + own).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            h = h @ w["weight_hr"].T if "weight_hr" in w else h
        elif direction.kind == "GRU":
            (r, z, n), (hr, hz, hn) = gates.chunk(3, 1), own.chunk(3, 1)
            z = (z + hz).sigmoid()
            h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
        else:
            h = (gates + own).tanh() if direction.kind == "RNN_TANH" else (gates + own).relu()


def begun(module, sequences, seed):
    layers = module.num_layers * (1 + module.bidirectional)
    hidden = noise(layers, sequences, module.proj_size or module.hidden_size, seed=seed)
    return (hidden, noise(layers, sequences, module.hidden_size, seed=seed + 1)) if module.mode == "LSTM" else (hidden,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_reads_its_input_and_its_state_of_a_step_before(kind):
    module = made(kind)
    one = Run(noise(7, 4, 3), torch.tensor([7, 7, 7, 7]), begun(module, 4, 1))
    for direction in directions(module, "net")[0]:
        x = one.input.flip(0) if direction.reverse else one.input
        state = tuple(part[direction.index] for part in one.state)
        expected = torch.stack([torch.cat(pair, 1) for pair in unrolled(direction, x, state)]).flatten(0, 1)
        found = passed(direction, one.input, one).read(direction)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_passes_of_all_layers_give_what_the_module_gives(kind):
    module = made(kind)
    x, state = noise(7, 4, 3), begun(module, 4, 1)
    expected, _ = module(x, state if module.mode == "LSTM" else state[0])
    one = run(module, (x, state if module.mode == "LSTM" else state[0]), {})
    for layer in directions(module, ""):
        x = torch.cat([passed(direction, x, one).output for direction in layer], -1)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_name_each_weight_once(kind):
    module = made(kind)
    found = moments(module, "net", [run(module, (noise(7, 4, 3),), {})])
    rows = {}
    for one in found:
        assert one.gram.dtype == torch.float64
        assert one.count.tolist() == [28]
        for name, start, stop in one.pieces:
            rows.setdefault(name, []).extend(range(start, stop))
    weights = {f"net.{name}": p for name, p in module.named_parameters() if p.ndim == 2}
    assert rows == {name: list(range(len(p))) for name, p in weights.items()}
    for one in found:
        assert one.inputs == sum(weights[name].shape[1] for name in one.names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_gives_the_moments_of_its_sequences_one_by_one(kind):
    module = made(kind)
    sequences = [noise(n, 3, seed=n) for n in (3, 7, 5)]
    alone = [run(module, (one,), {}) for one in sequences]  # unbatched
    packed = run(module, (pack_sequence(sequences, enforce_sorted=False),), {})
    assert packed.lengths.tolist() == [3, 7, 5]
    for a, b in zip(moments(module, "", alone), moments(module, "", [packed]), strict=True):
        assert a.pieces == b.pieces
        assert torch.equal(a.count, b.count)
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter():
    module = made("lstm both ways")
    x = noise(7, 3, 3)
    lengths = torch.tensor([3, 7, 5])
    wild = x.masked_fill(torch.arange(7)[:, None, None] >= lengths[:, None], 1e4)
    for a, b in zip(*(moments(module, "", [Run(one, lengths)]) for one in (x, wild)), strict=True):
        torch.testing.assert_close(a.gram, b.gram)


def test_batch_first_states_and_keywords_are_read():
    module = nn.GRU(3, 5, batch_first=True)
    x, hidden = noise(4, 7, 3), noise(1, 4, 5)
    found = run(module, (), {"hx": hidden, "input": x})
    assert torch.equal(found.input, x.transpose(0, 1))
    assert torch.equal(found.state[0], hidden)
    packed = pack_padded_sequence(x, torch.tensor([7, 2, 3, 7]), batch_first=True, enforce_sorted=False)
    found = run(module, (packed, hidden), {})
    assert found.input.shape == (7, 4, 3)
    assert found.lengths.tolist() == [7, 2, 3, 7]
    assert torch.equal(found.state[0], hidden)


def test_an_unbatched_state_is_one_sequence():
    module = nn.LSTM(3, 5)
    found = run(module, (noise(7, 3), (noise(1, 5), noise(1, 5))), {})
    assert found.input.shape == (7, 1, 3)
    assert [one.shape for one in found.state] == [(1, 1, 5)] * 2


def test_an_input_that_is_no_tensor_is_refused():
    with pytest.raises(InputTypeError, match="the input of LSTM is a list: give a tensor"):
        run(nn.LSTM(3, 5), ([1.0],), {})


def test_the_n_gate_of_a_gru_reads_the_state_that_the_reset_gate_lets_through():
    module = made("gru without bias")
    module.weight_ih_l0.data[:5], module.weight_hh_l0.data[:5] = 0.0, 0.0  # r is one half, always
    both, last = moments(module, "", [Run(noise(7, 4, 3), torch.full((4,), 7))])
    weighted = torch.tensor([1.0] * 3 + [0.5] * 5, dtype=torch.float64)
    torch.testing.assert_close(last.gram, both.gram * weighted * weighted[:, None])
    assert [(piece.start, piece.stop) for piece in (both.pieces[0], last.pieces[0])] == [(0, 10), (10, 15)]


def test_what_projects_reads_the_units():
    module = made("lstm projected")
    one = Run(noise(7, 4, 3), torch.full((4,), 7), begun(module, 4, 1))
    for direction in directions(module, "")[0]:
        made_now = passed(direction, one.input, one)
        units = made_now.read(direction)[1]
        torch.testing.assert_close(
            units @ direction.tensors["weight_hr"].T, made_now.samples(made_now.after), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("module", "kind", "parts"),
    [
        (nn.LSTMCell(3, 5), "LSTM", 1),
        (nn.GRUCell(3, 5, bias=False), "GRU", 2),
        (nn.RNNCell(3, 5), "RNN_TANH", 1),
        (nn.RNNCell(3, 5, nonlinearity="relu"), "RNN_RELU", 1),
    ],
)
def test_a_cell_is_read_like_a_layer(module, kind, parts):
    direction = cell(module, "cell")
    assert direction.kind == kind
    assert len(direction.parts) == parts
    assert [piece.name for piece in direction.parts[0]] == ["cell.weight_ih", "cell.weight_hh"]
    x, h = noise(6, 3), noise(6, 5, seed=1)
    assert torch.equal(direction.read(x, h)[0], torch.cat([x, h], 1))


def test_a_matrix_goes_back_where_it_was():
    for direction in directions(made("lstm projected"), "a")[0] + directions(made("gru"), "b")[1]:
        changed = direction
        for pieces in direction.parts:
            changed = changed.replaced(pieces, 2 * direction.matrix(pieces))
        for role, tensor in direction.tensors.items():
            assert torch.equal(changed.tensors[role], tensor if role.startswith("bias") else 2 * tensor)


def test_turning_round_twice_changes_nothing_and_leaves_the_padding_behind():
    x = noise(5, 2, 3)
    lengths = torch.tensor([5, 3])
    once = turned(x, lengths)
    assert torch.equal(once[:3, 1], x[:3, 1].flip(0))
    assert torch.equal(once[3:, 1], x[3:, 1])
    assert torch.equal(turned(once, lengths), x)


def test_nan_is_told_with_the_weights_that_read_it():
    x = noise(7, 4, 3)
    x[2, 1] = float("nan")
    with pytest.raises(NotFiniteError, match=r"net\.weight_ih_l0, net\.weight_hh_l0 hold NaN or inf: look for them"):
        moments(made("lstm"), "net", [Run(x, torch.full((4,), 7))])


def test_the_module_and_random_numbers_stay_as_they_are():
    module = made("lstm both ways").train()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    moments(module, "", [run(module, (noise(7, 4, 3),), {})])
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
