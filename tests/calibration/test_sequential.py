"""Block by block: the inputs of a block are what the pruned ones before it give, wherever they are kept."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration import sequential
from secateur.errors import InputError, SecateurWarning


def prune(model, batches, solve, *, scope, settings, folder=None):
    """What the context pruned, in the model for good."""
    running = sequential.pruned(model, batches, solve, scope=scope, settings=settings, folder=folder)
    with running as (masks, tensors):
        pass
    with torch.no_grad():
        for name, tensor in tensors.items():
            scope[name].copy_(tensor)
    return masks


class Block(nn.Module):
    def __init__(self, width=12, hidden=20):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, scale, shift=None):
        return x + scale * self.down(torch.relu(self.up(x))) + (0 if shift is None else shift)


class Model(nn.Module):
    """A layer, blocks with arguments of their own, a head."""

    def __init__(self, blocks=4):
        super().__init__()
        self.first = nn.Linear(7, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(12, 5)

    def forward(self, x, bias=None):
        hidden = self.first(x)
        for at, block in enumerate(self.blocks):
            hidden = block(hidden, torch.tensor(1.0 / (at + 1)), shift=bias)
        return self.head(hidden)


def made(kind=Model):
    torch.manual_seed(0)
    return kind().eval()


def data(n=4):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(9, 7, generator=generator), "bias": torch.randn(12, generator=generator)} for _ in range(n)
    ]


class Wanda:
    """A solver that keeps half of each row, and notes what it saw."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = [], fails_at

    def __call__(self, members, forwards):
        if self.fails_at is not None and any(name.startswith(self.fails_at) for name in members):
            raise KeyboardInterrupt
        sums = dict.fromkeys(members, 0.0)

        def hook(name):
            def add(module, args):
                sums[name] = sums[name] + args[0].detach().double().square().reshape(-1, args[0].shape[-1]).sum(0)

            return add

        hooks = [m.module.register_forward_pre_hook(hook(name)) for name, m in members.items()]
        for forward in forwards():
            forward.run()
        for one in hooks:
            one.remove()
        kept = {}
        for name, member in members.items():
            weight = member.parameter.detach()
            scores = weight.abs() * sums[name].sqrt().float()
            kept[name] = weight * 1.25, scores >= scores.median(1, keepdim=True).values
        self.seen.append((list(members), sums))
        return [kept]


def pruned(model, batches=None, folder=None, solve=None, **settings):
    return prune(model, batches or data(), solve or Wanda(), scope=sc.weights(model), settings=settings, folder=folder)


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_block_sees_what_the_pruned_ones_give():
    model, solve = made(), Wanda()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    masks = pruned(model, solve=solve)
    assert [names for names, _ in solve.seen] == [
        ["first.weight"],
        *[[f"blocks.{i}.up.weight", f"blocks.{i}.down.weight"] for i in range(4)],
        ["head.weight"],
    ]
    inputs = {name: [] for name in masks}
    for name in masks:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0])
        )
    for batch in data():
        model(**batch)
    for _, sums in solve.seen:
        for name, total in sums.items():
            if ".down" not in name:  # those of a block are pruned together
                expected = torch.cat(inputs[name]).double().square().sum(0)
                torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert sc.check(model, masks) == {}
    assert list(masks) == list(sc.weights(model))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert all(p.requires_grad for p in model.parameters())


def test_on_disk_as_in_memory(tmp_path):
    one, other = made(), made()
    masks = pruned(one)
    assert pruned(other, folder=tmp_path / "run") == masks
    assert same(bits_of(one), bits_of(other))
    again = made()
    assert pruned(again, folder=tmp_path / "run", solve=Wanda(fails_at="")) == masks  # all of it is done
    assert same(bits_of(one), bits_of(again))


@pytest.mark.parametrize("place", ["first", "blocks.0", "blocks.2", "head"])
def test_a_run_that_was_interrupted_goes_on(tmp_path, place):
    whole, model = made(), made()
    masks = pruned(whole)
    before = bits_of(model)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        pruned(model, folder=tmp_path, solve=Wanda(fails_at=place))
    assert same(bits_of(model), before)
    solve = Wanda()
    assert pruned(model, folder=tmp_path, solve=solve) == masks
    assert solve.seen[0][0][0].startswith(place)
    assert same(bits_of(model), bits_of(whole))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tmp_path):
    script = Path(__file__).read_text("utf-8") + "\nKill(after=9).run(sys.argv[1])\n"
    whole = made()
    masks = pruned(whole)
    for _ in range(2):  # each process comes two sections further, of six with four forwards each
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
        assert killed.returncode == -signal.SIGKILL
    model = made()
    assert pruned(model, folder=tmp_path / "run") == masks
    assert same(bits_of(model), bits_of(whole))


class Kill(Wanda):
    """A solver whose process dies after some forwards."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def run(self, folder):
        pruned(made(), folder=folder, solve=self)

    def __call__(self, members, forwards):
        return super().__call__(members, lambda: map(self.counted, forwards()))

    def counted(self, forward):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward


@pytest.mark.parametrize("what", ["batches", "settings", "model"])
def test_a_folder_of_another_run_is_refused(tmp_path, what):
    pruned(made(), folder=tmp_path / "run")
    model = made()
    if what == "model":
        with torch.no_grad():
            model.head.bias += 1
    before = bits_of(model)
    batches = data(3) if what == "batches" else data()
    settings = {"sparsity": 0.6} if what == "settings" else {}
    with pytest.raises(InputError, match=f"another run, .*other {what}.*: give another folder"):
        pruned(model, batches, tmp_path / "run", **settings)
    assert same(bits_of(model), before)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis.tex.*give a new folder"):
        pruned(made(), folder=tmp_path)
    with pytest.raises(InputError, match="batches is empty: give some"):
        prune(made(), [], Wanda(), scope=sc.weights(made()), settings={})


def test_the_model_is_as_it_was_after_an_error():
    class Broken(Model):
        def forward(self, x, bias=None):
            if self.broken:
                raise ValueError("no")
            return super().forward(x, bias)

    model = made(Broken).train()
    model.broken = True
    before, places = bits_of(model), {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=r"does not take batch 1, a dict \{x: float32 \[9, 7\].*ValueError: no"):
        pruned(model)
    model.broken = False

    def fails(members, forwards):
        if "head.weight" in members:
            raise ValueError("never")
        return Wanda()(members, forwards)

    with pytest.raises(ValueError, match="never"):
        pruned(model, solve=fails)
    assert same(bits_of(model), before)
    assert {name: id(p) for name, p in model.named_parameters()} == places
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("change", [{"x": torch.zeros(9, 6)}, {"bias": torch.zeros(11)}], ids=["before", "in a block"])
def test_a_batch_that_the_model_does_not_take_is_told(change):
    model, batches = made(), data()
    before = bits_of(model)
    batches[2] |= change
    with pytest.raises(
        InputError,
        match=r"not take batch 3, a dict \{x: float32 .*RuntimeError: .*size of tensor.*: give each batch as",
    ):
        pruned(model, batches)
    assert same(bits_of(model), before)


def test_within_the_context_the_model_is_pruned_and_then_dense():
    model = made()
    before, expected = bits_of(model), copy.deepcopy(model)
    pruned(expected)
    with sequential.pruned(model, data(), Wanda(), scope=sc.weights(model), settings={}) as (masks, tensors):
        assert same(bits_of(model), bits_of(expected))
        assert sc.check(model, masks) == {}
        assert list(tensors) == list(masks)
    assert same(bits_of(model), before)


def test_a_model_without_blocks_is_one_block():
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    batches = [batch["x"] for batch in data()]
    solve = Wanda()
    with pytest.warns(SecateurWarning, match="the whole model is one block"):
        pruned(model, batches, solve=solve)
    assert [names for names, _ in solve.seen] == [["0.weight", "2.weight"]]


def test_weights_stay_in_their_memory_format_and_tied():
    class Tied(Model):
        def __init__(self):
            super().__init__()
            self.blocks[1].up.weight = nn.Parameter(torch.randn(12, 20).T)
            self.blocks[1].again = nn.Linear(12, 20, bias=False)
            self.blocks[1].again.weight = self.blocks[1].up.weight

    model = made(Tied)
    masks = pruned(model)
    assert model.blocks[1].again.weight is model.blocks[1].up.weight
    assert model.blocks[1].up.weight.stride() == (1, 20)
    assert sc.check(model, masks) == {}
