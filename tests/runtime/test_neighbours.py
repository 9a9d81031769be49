"""Which layers a forward calls directly one after the other: all that is certain, and nothing else."""

import sys

import pytest
import torch
from torch.nn import functional as F

from secateur.runtime.neighbours import neighbours

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its calls stand")

LAYERS = frozenset({"q", "k", "v"})


def found(forward):
    """The names, and the numbers that are read in between."""
    return [(" ".join(one.names), *sorted(one.numbers)) for one in neighbours(forward.__code__, LAYERS)]


class Views:
    def bert(self, x, mask=None, **others):
        shape = (*x.shape[:-1], -1, self.size)
        q = self.q(x).view(*shape).transpose(1, 2)
        k = self.k(x).view(*shape).transpose(1, 2)
        v = self.v(x).view(*shape).transpose(1, 2)
        if mask is not None:
            k, v = mask(k, v)
        return q, k, v

    def sizes(self, x):
        n, t, c = x.shape
        q = self.q(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)
        k: torch.Tensor = self.k(x)
        k = k.reshape(x.shape[0], -1, 4) * self.scale
        q, k = q.contiguous(), k + q
        v = self.v(x).unflatten(-1, (self.heads, -1))
        return q, k, v

    def at_once(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return F.scaled_dot_product_attention(q, k, v)

    def arguments(self, x):
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    def blocks(self, x, y):
        if y is None:
            with torch.no_grad():
                q, k = self.q(x), self.k(x)
        else:
            for _ in range(2):
                q = self.q(x)
                k, v = self.k(y), self.v(y)
                q = q + v
        return q, k

    def reuses(self, x):
        q = self.q(x)
        x = self.k(x)
        return q, x


def test_what_stands_together():
    assert found(Views.bert) == [("q k v",)]
    assert found(Views.sizes) == [("q k v", "heads", "scale")]
    assert found(Views.at_once) == found(Views.arguments) == [("q k v",)]
    assert found(Views.blocks) == [("q k",), ("k v",)]
    assert found(Views.reuses) == [("q k",)]


class Places:
    def same(self, x, y):
        if y is None:
            a, b = self.q(x), self.k(x)
        else:
            a, b = self.q(y), self.k(y)
        return a, b


def test_the_same_layers_in_two_places_are_found_once_with_both():
    (one,) = neighbours(Places.same.__code__, LAYERS)
    assert [len(offsets) > 1 for offsets in one.offsets] == [True, True]
    assert not one.offsets[0] & one.offsets[1]


X = torch.zeros(1)


class Not:
    def writes(self, x):
        q = self.q(x)
        x.add_(1)
        return q, self.k(x)

    def writes_to_a_view(self, x):
        q = self.q(x).view(-1)
        y = x
        y += 1
        return q, self.k(x)

    def item(self, x):
        q = self.q(x)
        x[0] = 0
        return q, self.k(x)

    def with_an_argument(self, x):
        q = self.q(x).copy_(x.zero_())
        return q, self.k(x)

    def out(self, x, y):
        return torch.add(self.q(x), 1, out=x), self.k(x)

    def binds(self, x, y):
        q = self.q(x)
        x = y
        return q, self.k(x)

    def binds_in_between(self, x, y):
        q = self.q(x).view((x := y).shape)
        return q, self.k(x)

    def another(self, x, y):
        return self.q(x), self.k(y), self.v(x)

    def calls(self, x):
        q = self.q(x)
        print(q)
        return q, self.k(x)

    def through_a_module(self, x):
        return self.norm(self.q(x)), self.k(x)

    def through_an_object(self, x, shape):
        return self.q(x).view(shape.of(x)), self.k(x)

    def a_method_of_an_object(self, x, y):
        return self.q(x), y.view(1), self.k(x)

    def maybe(self, x, y):
        q = self.q(x) if y else None
        return q, self.k(x)

    def or_not(self, x, y):
        return y and self.q(x), y or self.k(x)

    def in_a_loop(self, x):
        return [one(x) for one in (self.q, self.k)]

    def later(self, x):
        return lambda: (self.q(x), self.k(x))

    def with_more(self, x):
        return self.q(x, 1), self.k(input=x)

    def another_self(self, x, y):
        q = self.q(x)
        self = y
        return q, self.k(x)

    def of_another(self, x, y):
        return y.q(x), y.k(x)

    def a_global(self):
        return self.q(X), self.k(X)

    def itself(self):
        return self.q(self), self.k(self)

    def waits(self, x):
        q = self.q(x)
        yield q
        yield self.k(x)

    def twice(self, x):
        return self.q(x), self.q(x)

    def sets(self, x):
        self.last = self.q(x)
        return self.k(x)

    def leaves(self, x):
        q = self.q(x)
        assert q.sum().mul_(x.zero_()) == 0
        return self.k(x)

    def around(self, x):
        q = self.q(x)
        with self.lock(x):
            return q, self.k(x)


def test_what_does_not():
    forwards = [one for name, one in vars(Not).items() if not name.startswith("__")]
    assert len(forwards) == 26
    for forward in forwards:
        assert found(forward) == [], forward.__name__


def test_at_most_sixteen_and_nothing_without_source():
    names = [f"n{i}" for i in range(18)]
    space = {}
    text = f"def forward(self, x):\n    return {', '.join(f'self.{name}(x)' for name in names)}\n"
    exec(text, space)
    assert neighbours(space["forward"].__code__, frozenset(names)) == ()

    def many(self, x):
        return (
            *(self.a(x), self.b(x), self.c(x), self.d(x), self.e(x), self.f(x), self.g(x), self.h(x), self.i(x)),
            *(self.j(x), self.k(x), self.m(x), self.n(x), self.o(x), self.p(x), self.q(x), self.r(x), self.s(x)),
        )

    assert [len(one.names) for one in neighbours(many.__code__, frozenset("abcdefghijkmnopqrs"))] == [16, 2]
