import torch
from torch import nn

from secateur.structure import shrink
from secateur.structure.attributes import Edit, Edits


def test_edits_are_taken_back():
    space = {"a": 1}
    edits = Edits()
    edits.set(Edit("m", ("a",), space), 2)
    mark = len(edits)
    edits.set(Edit("m", ("a",), space), 3)
    assert [(a.module, a.keys, a.value) for a in edits.listed()] == [("m", ("a",), 3)]
    edits.undo(mark)
    assert space == {"a": 2}
    edits.undo()
    assert space == {"a": 1}


class Split(nn.Module):
    """Keeps its sizes in a list, a dict and an object."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(8, 3)
        self.parts, self.config = [4, 8], {"sizes": {"heads": 2, "each": 4}}

    def forward(self, x):
        gate, value = self.a(x).split(self.parts, -1)
        sizes = self.config["sizes"]
        return self.b((value.view(-1, sizes["heads"], sizes["each"]) * gate.view(-1, 1, sizes["each"])).flatten(1))


def test_sizes_in_lists_and_dicts_follow():
    torch.manual_seed(0)
    model = Split().eval()
    small = shrink(model, torch.randn(5, 4), 0.5)
    assert sum(small.parts) == small.a.out_features < 12
    assert model.parts == [4, 8]
    assert small(torch.randn(2, 4)).shape == (2, 3)


class Literal(nn.Module):
    """The size stands in the code: nothing can follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).view(-1, 8) * 2).relu())


def test_a_size_in_the_code_holds_its_axis():
    torch.manual_seed(0)
    small = shrink(Literal().eval(), torch.randn(5, 4), 0.5)
    assert (small.a.out_features, small.b.out_features) == (8, 4)


class Equal(nn.Module):
    """The width, and a length that happens to be the same number, in one tuple."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.sizes = nn.Linear(4, 8), nn.Linear(8, 3), (8, 8)

    def forward(self, x):
        h = self.a(x[:, : self.sizes[0]])
        return self.b(h.view(-1, self.sizes[1]).relu())


def test_of_equal_numbers_that_which_is_the_size_follows():
    torch.manual_seed(0)
    assert shrink(Equal().eval(), torch.randn(5, 3, 4), 0.5).sizes == (8, 4)


class Heads(nn.Module):
    """A softmax over each head, so that heads go whole."""

    def __init__(self):
        super().__init__()
        self.heads, self.a, self.b = 4, nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.b(self.a(x).view(-1, self.heads, 4).softmax(-1).flatten(1))


def test_modules_of_one_class_follow_to_different_values():
    torch.manual_seed(0)
    model = nn.Sequential(Heads(), Heads(), Heads(), nn.Linear(6, 3)).eval()
    with torch.no_grad():  # dead: nothing reads these heads
        model[0].b.weight[:, 12:] = 0
        model[1].b.weight[:, 8:] = 0
        model[2].b.weight[:, 12:] = 0
    assert [m.heads for m in shrink(model, torch.randn(5, 6))[:3]] == [3, 2, 3]
