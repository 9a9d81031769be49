"""secateur.measurement.reports of sharded models: the numbers of the whole model, in all processes."""

import copy

import pytest
import torch
from torch import distributed, nn

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError, MaskError
from sharded_models import LAYOUTS, rows


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in ((4, 4, 8), (4, 4, 4)))


class Layers(nn.Module):
    """Outputs in all places that a tensor has."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(20, 32), nn.Linear(32, 17)
        self.conv, self.back = nn.Conv1d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 4, 3, groups=2)
        self.lstm, self.bilinear, self.experts = nn.LSTM(8, 8), nn.Bilinear(4, 4, 8), Experts()
        self.head, self.again = nn.Linear(17, 5), nn.Linear(17, 5)
        self.again.weight = self.head.weight
        self.register_buffer("seen", torch.zeros(3))
        self.empty = nn.Parameter(torch.zeros(0, 3))


def layers(dtype):
    torch.manual_seed(0)
    model = Layers().to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("up.weight", "back.weight", "experts.down_proj"):
                weight[:, 1::2] = 0
            weight[1:3] = 0
    return model


def same_numbers(rank, ranks):
    for at, layout in enumerate(LAYOUTS[ranks]):
        whole = layers((torch.float32, torch.bfloat16)[at % 2])
        masks = sc.prune(whole, 0.6)
        want, bare = sc.report(whole, masks), sc.report(whole)
        sharded = layout(copy.deepcopy(whole), ranks)
        assert sc.report(sharded, masks) == want
        assert sc.report(sharded) == bare
        assert want.file_bytes > 1000
        assert sum(line.dead_outputs > 0 for line in bare.lines) > 4
        theirs = sc.prune(layout(layers(torch.float32), ranks), 0.6)
        result = sc.report(sharded, theirs)
        assert result.asked == want.asked
        if rank == 0:  # alone: it waits for nobody
            told = str(result), str(theirs), theirs.counts(), theirs.sparsity, result.to_dict(), theirs["up.weight"]
            assert all(map(str, (*told, sc.weights(sharded), [*theirs.items()], theirs.shape("up.weight"))))
        distributed.barrier()
        with torch.no_grad():
            (mine,) = (p for n, p in sharded.named_parameters() if n == "up.bias")
            mine.fill_(1)  # not in the report, but in the model
        assert sc.report(sharded, masks).effective_parameters > want.effective_parameters


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_the_whole_model(ranks):
    in_a_group(ranks, same_numbers, ranks)


def not_alike(rank):
    sharded = rows(layers(torch.float32), 2)
    masks = sc.Masks({"up.weight": torch.ones(32, 20, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"process 1 has masks of up.*call it alike"):
        sc.report(sharded, masks if rank else None)
    other = sc.Masks({"up.weight": torch.ones(3, 20, dtype=torch.bool)})
    with pytest.raises((InputError, MaskError), match="another model"):
        sc.report(sharded, other if rank else masks)


def test_processes_that_do_not_ask_alike():
    in_a_group(2, not_alike)
