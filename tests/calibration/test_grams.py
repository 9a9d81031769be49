"""Sums over inputs: exact, shared where readers always read the same, apart where they do not."""

import pytest
import torch

from secateur.calibration.grams import Grams, Matrices, Reader, summed
from secateur.calibration.moments import Piece
from secateur.errors import NotFiniteError

Q, K = Reader(("q",), 0, 4), Reader(("k",), 0, 4)
ONE = {"q": Matrices(1, 4), "k": Matrices(1, 4)}


def rows(x):
    return lambda: [x.unsqueeze(0)]


def exact(*inputs):
    x = torch.cat(inputs).double()
    return x.T @ x


def close(gram, wanted):
    """To 1e-6 of the diagonal, as the sums are promised to be."""
    root = wanted.diagonal().sqrt()
    return ((gram[0] - wanted).abs() <= 1e-6 * torch.outer(root, root)).all()


def test_sums_are_those_of_float64():
    x = torch.randn(20_000, 40, generator=torch.Generator().manual_seed(0)) + 3
    gram, count = summed([x[:9000].unsqueeze(0), x[9000:].unsqueeze(0)])
    assert gram.dtype == torch.float64
    assert count.tolist() == [20_000]
    assert close(gram, exact(x))


def test_sums_of_many_inputs_are_whole_and_symmetric():
    x = torch.randn(2, 1500, 450, generator=torch.Generator().manual_seed(0))
    gram, count = summed([x])
    assert count.tolist() == [1500, 1500]
    assert torch.equal(gram, gram.mT)
    assert close(gram[:1], exact(x[0]))
    assert close(gram[1:], exact(x[1]))


def test_one_input_is_summed_once_for_all_that_read_it():
    grams, inputs, asked = Grams(), [torch.randn(5, 3), torch.randn(7, 3)], []
    for x in inputs:
        for reader in (Q, K):
            grams.add(reader, x, "linear", lambda x=x: asked.append(len(x)) or [x.unsqueeze(0)])
        grams.flush()
    k, q = sorted(grams.moments(ONE), key=lambda one: one.names)
    assert asked == [5, 7]
    assert q.gram is k.gram
    assert q.count is k.count
    assert q.count.tolist() == [12]
    assert close(q.gram, exact(*inputs))


def test_an_input_that_was_written_into_is_another():
    grams, x = Grams(), torch.ones(2, 3)
    grams.add(Q, x, "", rows(x))
    x += 1
    grams.add(K, x, "", rows(x))
    k, q = sorted(grams.moments(ONE), key=lambda one: one.names)
    assert q.gram is not k.gram
    assert k.gram.sum() == 4 * q.gram.sum()


def test_an_input_whose_memory_is_given_to_another_is_not_taken_for_it():
    grams = Grams()
    for reader, value in ((Q, 1.0), (K, 2.0)):
        x = torch.full((2, 3), value)
        grams.add(reader, x, "", rows(x))
        del x
    k, q = sorted(grams.moments(ONE), key=lambda one: one.names)
    assert (q.gram[0, 0, 0], k.gram[0, 0, 0]) == (2, 8)


def test_what_reads_an_input_twice_counts_it_twice():
    grams, x = Grams(), torch.ones(2, 3)
    for _ in range(2):
        grams.add(Q, x, "", rows(x))
    (q,) = grams.moments(ONE)
    assert q.count.tolist() == [4]


def test_readers_that_part_later_have_their_own_sums():
    grams, x, y = Grams(), torch.randn(4, 3), torch.randn(6, 3)
    for reader in (Q, K):
        grams.add(reader, x, "", rows(x))
    grams.add(K, y, "", rows(y))
    k, q = sorted(grams.moments(ONE), key=lambda one: one.names)
    assert close(q.gram, exact(x))
    assert close(k.gram, exact(x, y))
    assert (q.count.item(), k.count.item()) == (4, 10)


def test_what_read_alone_at_first_and_then_with_another():
    grams, inputs = Grams(), [torch.randn(n, 3) for n in (4, 5, 6)]
    for x, readers in zip(inputs, ([Q], [Q, K], [K, Q]), strict=True):
        for reader in readers:
            grams.add(reader, x, "", rows(x))
        grams.flush()
    k, q = sorted(grams.moments(ONE), key=lambda one: one.names)
    assert close(q.gram, exact(*inputs))
    assert close(k.gram, exact(*inputs[1:]))
    assert (q.count.item(), k.count.item()) == (15, 11)


def test_rows_that_overlap_are_cut_and_equal_ones_joined():
    grams, x, y = Grams(), torch.randn(4, 3), torch.randn(6, 3)
    grams.add(Reader(("w",), 0, 6), x, "", rows(x))
    grams.add(Reader(("w",), 2, 4), y, "", rows(y))
    grams.add(Reader(("w",), 4, 6), y, "", rows(y))
    first, second = grams.moments({"w": Matrices(1, 6)})
    assert first.pieces == (Piece("w", 0, 2),)
    assert second.pieces == (Piece("w", 2, 6),)
    assert close(second.gram, exact(x, y))


def test_experts_that_read_apart_are_one_with_zeros_for_those_without_tokens():
    grams, x, y = Grams(), torch.randn(4, 3), torch.randn(6, 3)
    grams.add(Reader(("w",), 0, 2), x, "", rows(x))
    grams.add(Reader(("w",), 4, 6), y, "", rows(y))
    (one,) = grams.moments({"w": Matrices(3, 2)})
    assert one.pieces == (Piece("w", 0, 6),)
    assert one.count.tolist() == [4, 0, 6]
    assert close(one.gram[2:], exact(y))
    assert not one.gram[1].any()


def test_nan_names_the_weight():
    x = torch.tensor([[1.0, float("nan")]])
    for before in ([], [torch.ones(1, 2)]):  # in the first batch, and in one that is added to others
        grams = Grams()
        for one in before:
            grams.add(Q, one, "", rows(one))
            grams.flush()
        with pytest.raises(NotFiniteError, match="inputs of q hold NaN or inf: look for them in the batches"):
            grams.add(Q, x, "", rows(x))
