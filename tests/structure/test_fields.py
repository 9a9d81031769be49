import torch

from secateur.structure.fields import along, blend, labels, lead, misfit, squeeze, support


def test_squeeze_finds_where_labels_vary():
    f = along(torch.arange(1, 4), 3, 1)
    assert support(squeeze(f.expand(2, 3, 5))) == {1}
    assert squeeze(torch.zeros(2, 3)) is None


def test_labels_are_exact_beyond_2_to_the_24():
    assert labels(along(torch.tensor([2**24 + 1, 2**40 + 1]), 1, 0)).tolist() == [2**24 + 1, 2**40 + 1]


def test_the_parts_of_a_concatenation_are_one_field():
    a, b = torch.tensor([1.0, 2, 0, 0]), torch.tensor([0.0, 0, 3, 4])
    assert [f.tolist() for f in blend([a, b])] == [[1, 2, 3, 4]]
    assert len(blend([a, a])) == 2


def test_lead_adds_dimensions_in_front():
    assert lead(torch.ones(2, 3), 4).shape == (1, 1, 2, 3)


def test_fields_that_vary_alike_fit_best():
    rows, columns = along(torch.arange(1, 4), 2, 0), along(torch.arange(1, 6), 2, 1)
    assert misfit(rows, rows) == 0 < misfit(rows, columns)
