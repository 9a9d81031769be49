import torch
from torch import nn

from secateur.structure.cut import twin
from secateur.structure.residuals import candidates, innermost, nested, passed_by

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Adds(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.norm, self.inner, self.post = nn.LayerNorm(8), nn.Linear(8, 8), post

    def forward(self, x):
        return self.norm(x + self.inner(x)) if self.post else x + self.inner(self.norm(x)).relu()


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.inner(x))


class Chain(nn.Module):
    """Calls its layers one after the other, in a way that a test says."""

    def __init__(self, layers, step=lambda layer, x: layer(x)):
        super().__init__()
        self.layers, self.step = nn.ModuleList(layers), step

    def forward(self, x):
        for layer in self.layers:
            x = self.step(layer, x)
        return x


def found(model, x=X):
    return {path: [one.why for one in every] for path, every in candidates(model.eval(), [((x,), {})]).items()}


def test_blocks_that_add_by_themselves():
    assert found(Chain([Adds(), Adds()])) == {"layers": ["", ""]}
    assert found(nn.Sequential(Adds(True), Adds(True))) == {"": ["", ""]}


def test_layers_of_torch():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    assert found(encoder) == {"layers": ["", "", ""]}


def test_branches_that_the_code_around_adds():
    chain = Chain([Branch(), Branch()], lambda layer, x: x + layer(x))
    assert found(Chain([Branch(), Branch()], lambda layer, x: x + layer(x) * layer.inner.bias)) == {"layers": ["", ""]}
    (one, _) = candidates(chain.eval(), [((X,), {})])["layers"]
    assert not one.forms["layers.0"].adds
    pairs = Chain([nn.ModuleList([Branch(), Branch()]) for _ in range(3)], lambda two, x: two[1](x + two[0](x)) + x)
    assert found(pairs) == {"layers": ["", "", ""]}


def test_what_is_no_block():
    assert found(Chain([Branch(), Branch()])) == {}
    assert found(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))) == {}
    assert found(Chain([Branch(), Branch()], lambda layer, x: x * layer(x))) == {}
    assert found(Chain([Adds(), Branch()])) == {}  # the only one of its class
    assert found(Chain([Branch(), Branch()], lambda layer, x: layer(x) + layer.inner.bias)) == {}
    assert found(Chain([Branch(), Branch()], lambda layer, x: (y := layer(x)) + layer.inner(y))) == {}


def test_other_modules_of_the_list_say_why_they_stay():
    every = found(nn.Sequential(nn.Linear(8, 8), Adds(), nn.ReLU(), Adds()))[""]
    assert every[1::2] == ["", ""]
    assert "does not add" in every[0]


def test_of_lists_within_lists_the_innermost_counts():
    every = found(nn.Sequential(nn.Sequential(Adds(), Adds()), nn.Sequential(Adds(), Adds())))
    assert list(innermost(every)) == ["0", "1"]
    assert nested("0", every)
    assert not nested("0", innermost(every))


class Pair(nn.Module):
    """Gives a tuple, as blocks of transformers do."""

    def __init__(self, extra):
        super().__init__()
        self.inner, self.extra = nn.Linear(8, 8), extra

    def forward(self, x, bias):
        new = self.inner(x)
        return x + new, {"input": bias, "none": None, "new": new, "text": "text", "module": self.inner}[self.extra]


class Biased(nn.Module):
    def __init__(self, extra, read):
        super().__init__()
        self.layers, self.read = nn.ModuleList([Pair(extra), Pair(extra)]), read

    def forward(self, x):
        bias = x.mean()
        for layer in self.layers:
            x, extra = layer(x, bias)
            bias = extra if self.read else bias
        return x * bias if self.read else x


def test_blocks_that_give_a_tuple():
    for extra in ("input", "none", "new", "text"):
        assert found(Biased(extra, False)) == {"layers": ["", ""]}, extra
    assert found(Biased("input", True)) == {"layers": ["", ""]}
    assert found(Biased("new", True)) == {"layers": ["", "it gives a tensor beside its result, which others read"]}
    assert found(Biased("module", False)) == {}


def test_a_block_that_is_passed_by_gives_what_it_takes():
    for model in (Biased("input", True), Chain([Branch(), Branch()], lambda layer, x: x + layer(x))):
        copy = twin(model.eval())
        every = candidates(model, [((X,), {})])["layers"]
        want = X * X.mean() if isinstance(model, Biased) else X
        with passed_by(copy, every):
            assert torch.equal(copy(X), want)
        assert torch.equal(copy(X), model(X))


def test_a_block_that_is_used_in_two_ways_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Adds(), Adds()])

        def forward(self, x):
            a, b = self.layers
            return b(a(x=a(x)))

    assert found(Both()) == {"layers": ["it is used in several ways", ""]}


def test_a_block_that_an_example_does_not_call_stays():
    def step(layer, x):
        return layer(x) if x.shape[0] > 2 or layer.post else x

    every = found(Chain([Adds(), Adds(True)], step))
    assert every == {"layers": ["no forward of the examples calls it", ""]}
