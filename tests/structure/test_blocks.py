import pytest
import torch
from torch import nn

from secateur.errors import MaskError
from secateur.structure.blocks import Block, Renaming, check_names, lists, moved_up, put_back, take_out

BLOCKS = [Block("net.0", "net.0"), Block("net.1", ""), Block("net.2", "net.1")]


def model():
    return nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))})


def test_names_move_up_and_back():
    renaming = Renaming(BLOCKS)
    assert [renaming(n) for n in ("net.2.weight", "net.1.weight", "net.10.weight", "head.weight", "net.2")] == [
        "net.1.weight",
        None,
        "net.10.weight",
        "head.weight",
        "net.1",
    ]
    assert renaming.before("net.1.weight") == "net.2.weight"
    assert Renaming([])("a.b") == Renaming([]).before("a.b") == "a.b"


def test_the_list_may_be_the_model_itself():
    blocks = [Block("0", ""), Block("1", "0")]
    assert Renaming(blocks)("1.weight") == "0.weight"
    assert list(lists(blocks)) == [""]
    check_names(["0.weight", "1.weight"], blocks)


def test_each_series_of_names_is_counted_for_itself():
    names = ["encoder.stem", "encoder.layer_0", "encoder.layer_1", "encoder.down", "encoder.layer_2"]
    new = moved_up(names, [False, True, False, False, False])
    assert new == ["encoder.stem", "", "encoder.layer_0", "encoder.down", "encoder.layer_1"]


def test_modules_are_taken_out_and_put_back():
    net = model()
    last = net["net"][2]
    taken = take_out(net, BLOCKS)
    assert len(net["net"]) == 2
    assert net["net"][1] is last
    assert net["net"](torch.zeros(1, 2)).shape == (1, 2)
    put_back(taken)
    assert list(net["net"]._modules) == ["0", "1", "2"]
    assert net["net"][2] is last


@pytest.mark.parametrize("other", [nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2))}), nn.Linear(2, 2)])
def test_another_list_is_refused(other):
    with pytest.raises(MaskError, match=r"net has . modules, .* list of 3: apply it to a copy"):
        take_out(other, BLOCKS)


def test_a_state_dict_with_other_blocks_is_refused():
    state = model().state_dict()
    check_names(state, BLOCKS)
    with pytest.raises(MaskError, match=r"there is a net\.3, .*: apply it to a copy"):
        check_names([*state, "net.3.weight"], BLOCKS)
    with pytest.raises(MaskError, match=r"there is no net\.1: apply it to a copy"):
        check_names(["net.0.weight"], BLOCKS)
