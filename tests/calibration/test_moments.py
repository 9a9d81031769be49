"""Tensors laid side by side, and taken apart again."""

import torch

from secateur.calibration.moments import Moments, Piece, titles


def test_a_matrix_taken_apart_is_what_it_was_made_of():
    tensors = {"a": torch.arange(48.0).view(4, 3, 2, 2), "b": torch.arange(30.0).view(6, 5)}
    pieces = Piece("a", 0, 4), Piece("b", 2, 6)
    found = Moments(pieces, torch.zeros(2, 17, 17), torch.ones(2))
    matrix = found.matrix(tensors)
    assert matrix.shape == (2, 2, 17) == (found.groups, 2, found.inputs)
    assert matrix[1, 0].tolist() == [*range(24, 36), *range(20, 25)]
    parts = found.parts(matrix, {name: tensor.shape for name, tensor in tensors.items()})
    assert [piece for piece, _ in parts] == [*pieces]
    assert found.names == ("a", "b")
    assert parts[0][1].equal(tensors["a"])
    assert parts[1][1].equal(tensors["b"][2:6])


def test_titles_have_rows_only_where_names_come_twice():
    pieces = [(Piece("a", 0, 4), Piece("b", 0, 4)), (Piece("a", 4, 6), Piece("b", 4, 6)), (Piece("c", 0, 2),)]
    assert titles(pieces) == ["a[0:4] + b[0:4]", "a[4:6] + b[4:6]", "c"]
