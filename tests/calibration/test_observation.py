"""Statistics of a model: what is summed, what is held out, what is refused; the model stays as it was."""

import warnings

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.observation import completed
from secateur.errors import InputError, InputTypeError, NotFiniteError, SecateurWarning


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)

    def forward(self, x, attention_mask=None):
        x = self.norm(self.drop(x).mT).mT
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


def batches(count=10, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, 6, generator=generator) for _ in range(count)]


def exact(inputs):
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
    return x.T @ x


def test_layers_with_one_input_share_one_matrix():
    stats = sc.calibrate(Attention(), batches())
    assert [one.names for one in stats.moments] == [("q.weight",), ("k.weight",), ("v.weight",), ("out.weight",)]
    q, k, v, out = stats.moments
    assert q.gram is k.gram is v.gram
    assert out.gram is not q.gram
    assert stats.of("out.weight") == [out]
    assert "k.weight" in str(stats)
    assert "q.weight" in str(stats).splitlines()[3]  # the same input as


def test_every_fifth_batch_is_held_out():
    model, data = nn.Linear(6, 3), batches(11)
    stats = sc.calibrate(model, iter(data))
    assert [x is y for x, y in zip(stats.held, [data[4], data[9]], strict=True)] == [True, True]
    assert stats.checks is stats.held
    used = [x for i, x in enumerate(data) if i not in (4, 9)]
    torch.testing.assert_close(stats.moments[0].gram[0], exact(used), rtol=1e-6, atol=1e-5)
    assert stats.moments[0].count.tolist() == [9 * 20]


def test_batches_that_were_held_out_come_into_the_sums_in_the_end():
    model, data = nn.Sequential(nn.GRU(6, 8, batch_first=True)), batches(11)
    stats = sc.calibrate(model, data)
    before, whole = [one.gram.clone() for one in stats.moments], completed(model, stats)
    assert [one.count.tolist() for one in whole.moments] == [[11 * 20]] * 2
    torch.testing.assert_close(whole.moments[0].gram[0, :6, :6], exact(data), rtol=1e-6, atol=1e-5)
    assert len(whole.runs["0"]) == 11
    assert all(torch.equal(one.gram, gram) for one, gram in zip(stats.moments, before, strict=True))
    assert completed(model, sc.calibrate(model, data[:4])).moments[0].count.tolist() == [4 * 20]


def test_of_few_batches_none_is_held_out():
    data = batches(4)
    stats = sc.calibrate(nn.Linear(6, 3), data)
    assert stats.held == []
    assert all(x is y for x, y in zip(stats.checks, data, strict=True))
    assert stats.moments[0].count.tolist() == [80]


def test_batches_of_each_kind_are_told_alike():
    model, x = Attention().eval(), batches(1)[0]
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[0, 3:] = 0
    found = [sc.calibrate(model, [one]).of("q.weight")[0] for one in ((x, mask), {"x": x, "attention_mask": mask})]
    assert found[0].count.tolist() == [18]
    assert torch.equal(found[0].gram, found[1].gram)


def test_the_model_is_as_it_was_also_after_an_error():
    model = Attention().train()
    model.drop.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    sc.calibrate(model, batches())
    with pytest.raises(InputError, match="does not take batch 2"):
        sc.calibrate(model, [batches(1)[0], torch.zeros(3, 2, 5)])
    assert model.training
    assert not model.drop.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_a_loss_are_scores():
    model, data = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), batches(3)
    stats = sc.calibrate(model, data, loss=lambda model, x: model(x).square().mean())
    wanted = {name: torch.zeros_like(w) for name, w in sc.weights(model).items()}
    for x in data:
        model.zero_grad()
        model(x).square().mean().backward()
        for name, total in wanted.items():
            total += model.get_parameter(name).grad.square()
    model.zero_grad()
    torch.testing.assert_close(stats.gradients, wanted)
    assert sc.prune(model, 0.5, score=stats.gradients).pruned == 14
    assert stats.moments[0].count.tolist() == [60]


def test_layers_that_no_batch_reaches_are_told_of():
    model = Attention()
    model.extra = nn.Linear(3, 3)
    with pytest.warns(SecateurWarning, match=r"extra.weight .*skip=\['extra.weight'\]"):
        stats = sc.calibrate(model, batches())
    assert stats.of("extra.weight") == []


def test_too_few_samples_are_told_of():
    with pytest.warns(SecateurWarning, match="of weight 4 for 6.*give more batches"):
        sc.calibrate(nn.Linear(6, 2), [torch.randn(4, 6)])


def test_statistics_of_another_model_are_refused():
    stats = sc.calibrate(nn.Linear(6, 3), batches())
    stats.require(nn.Linear(6, 3))
    with pytest.raises(InputError, match=r"another model: weight has shape .3, 6. in them and has shape .4, 6."):
        stats.require(nn.Linear(6, 4))
    with pytest.raises(InputError, match=r"is not there in this model; call sc\.calibrate"):
        stats.require(nn.Sequential(nn.Linear(6, 3)))


def test_bad_batches():
    model = nn.Linear(6, 3)
    with pytest.raises(InputError, match=r"no batch came: give .*a generator runs only once"):
        sc.calibrate(model, iter([]))
    with pytest.raises(InputError, match=r"batch 1, a tuple \(float32 \[4, 5, 6\], int64 \[4\]\).*without labels"):
        sc.calibrate(model, [(batches(1)[0], torch.arange(4))])
    with pytest.raises(NotFiniteError, match="the inputs of weight hold NaN"):
        sc.calibrate(model, [torch.full((9, 6), float("nan"))])
    with pytest.raises(InputTypeError, match="inputs is a list"):
        sc.calibrate(model, [[batches(1)[0]]])
    with pytest.raises(InputError, match="no batch reached a weight"):
        sc.calibrate(Unread(), batches(1))


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return x


def test_a_loss_without_gradients_is_refused():
    model = nn.Linear(6, 3).requires_grad_(False)
    with pytest.raises(InputError, match=r"frozen.*requires_grad_"):
        sc.calibrate(model, batches(1), loss=lambda model, x: model(x).sum())


def test_compiled_parts_are_seen():
    model = nn.Sequential(nn.Linear(6, 4), torch.compile(nn.Linear(4, 4), backend="eager"))
    stats = sc.calibrate(model, batches(1))
    assert [one.names for one in stats.moments] == [("0.weight",), ("1._orig_mod.weight",)]


def test_half_precision_is_summed_in_full():
    model, x = nn.Linear(6, 3).bfloat16(), batches(1)[0].bfloat16()
    (moments,) = sc.calibrate(model, [x]).moments
    torch.testing.assert_close(moments.gram[0], exact([x]), rtol=1e-6, atol=1e-5)


def test_weights_that_are_not_here_or_not_real_are_refused():
    with pytest.raises(InputError, match=r"weight is on the meta device"):
        sc.calibrate(nn.Linear(6, 3, device="meta"), batches(1))
    with pytest.raises(InputError, match=r"weight is complex: leave it out, scope=sc\.weights"):
        sc.calibrate(nn.Linear(6, 3, dtype=torch.complex64), batches(1))


def test_another_input_for_each_batch_of_a_generator():
    stats = sc.calibrate(nn.Linear(6, 3), (torch.full((8, 6), float(n)) for n in range(1, 4)))
    assert stats.moments[0].gram.unique().tolist() == [8 * (1 + 4 + 9)]


def test_nothing_is_warned_of_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sc.calibrate(Attention(), batches())


def test_padding_that_the_model_itself_tells_its_attention_of():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.head = nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids == 0))

    batches = [torch.randint(1, 9, (6, 7)) * (torch.arange(7) < torch.randint(3, 8, (6, 1))) for _ in range(4)]
    stats = sc.calibrate(Model(), batches)
    assert {one.count.item() for one in stats.moments} == {sum(int((ids != 0).sum()) for ids in batches)}


def test_padding_in_models_with_positions_first_of_which_a_part_is_in_scope():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x, src_key_padding_mask=x[..., 0].T == 0))

    x = torch.randn(5, 5, 8)  # as many positions as examples, so that the shape tells nothing
    x[3:, 1, 0] = 0
    model = Model()
    stats = sc.calibrate(model, [x], scope=sc.weights(model, only=["head.weight"]))
    with torch.no_grad():
        read = model.eval().encoder(x, src_key_padding_mask=x[..., 0].T == 0)[x[..., 0] != 0].double()
    torch.testing.assert_close(stats.moments[0].gram[0], read.T @ read, rtol=1e-4, atol=1e-4)
