import numpy as np

from secateur.structure.units import Ledger, components


def test_united_labels_are_one_group():
    ledger = Ledger()
    a, b = ledger.new(3), ledger.new(3)
    ledger.unite(a, b, "add")
    root, held = ledger.solve()
    assert root[a].tolist() == root[b].tolist() == [1, 2, 3]
    assert set(held) == {0}


def test_a_hold_reaches_the_whole_group_and_keeps_its_first_reason():
    ledger = Ledger()
    a, b = ledger.new(2), ledger.new(2)
    ledger.unite(a, b, "add")
    assert ledger.hold(b[:1], "an output")
    ledger.hold(a[:1], "later")
    root, held = ledger.solve()
    assert held == {0: "no unit", int(root[a[0]]): "an output"}


def test_what_meets_no_unit_is_held():
    ledger = Ledger()
    a = ledger.new(2)
    ledger.unite(a, np.array([0, 0]), "add")
    assert all("belong to no unit" in ledger.solve()[1][i] for i in (1, 2))


def test_nothing_to_hold():
    assert not Ledger().hold(np.zeros(3, np.int64), "padding")


def test_one_row_needs_no_balance():
    ledger = Ledger()
    ledger.balance(np.array([[1, 2]]), "view")
    assert ledger.blocks == []


def test_labels_beyond_2_to_the_24_stay_apart():
    ledger = Ledger()
    ledger.size = 2**24 + 1
    a, b = ledger.new(2), ledger.new(2)
    ledger.unite(a, b, "add")
    ((low, high),) = ledger._pairs
    assert low.tolist() == [2**24 + 1, 2**24 + 2]
    assert high.tolist() == [2**24 + 3, 2**24 + 4]


def test_a_multiple_is_noted_once():
    ledger = Ledger()
    units = ledger.new(8)
    assert ledger.multiple(units, 4, "config")
    assert not ledger.multiple(units, 4, "config")
    assert ledger.multiple(units, 2, "config")


def test_mass_is_the_mean():
    ledger = Ledger()
    a, b = ledger.new(2, 4.0), ledger.new(2, 8.0)
    assert (ledger.mass(a), ledger.mass(np.concatenate([a, b]))) == (4.0, 6.0)


def test_components_match_a_slow_search():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 30, (2, 25))
        slow = np.arange(30)
        for _ in range(30):
            for i, j in zip(a, b, strict=True):
                slow[i] = slow[j] = min(slow[i], slow[j])
        assert components(30, a, b).tolist() == slow.tolist()
