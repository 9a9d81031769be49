"""Everything ends plain: files and pickles read where secateur cannot be imported."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import torch

import secateur as sc
from models import MODELS, Mlp, Tagger, build, copies, example, same, train


def pruned_in_training(kind, steps=4):
    model = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(start=0, stop=3))
    pruner.attach(optimizer)
    train(model, optimizer, steps)
    return model, optimizer, pruner


def test_a05_pickle(tmp_path, elsewhere):
    for kind in MODELS:
        model, _, _ = pruned_in_training(kind)
        model.eval()
        assert b"secateur" not in ForkingPickler.dumps(copy.deepcopy(model)).tobytes()  # read by children only: below
        (tmp_path / f"{kind.__name__}.pkl").write_bytes(pickle.dumps(model))
        torch.save({"x": example(model), "y": model(example(model))}, tmp_path / f"{kind.__name__}.pt")
    elsewhere(
        "import pickle, torch, models\n"
        "for kind in models.MODELS:\n"
        "    expected = torch.load(f'{kind.__name__}.pt')\n"
        "    with open(f'{kind.__name__}.pkl', 'rb') as file:\n"
        "        model = pickle.load(file)\n"
        "    assert type(model) is kind\n"
        "    assert torch.equal(model(expected['x']), expected['y'])\n"
    )


def _answers(model, x, results):
    results.put(model(x).tolist())


def test_a05_multiprocessing_with_the_forking_pickler():
    model, _, _ = pruned_in_training(Tagger)
    with torch.no_grad():
        context = torch.multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        worker = context.Process(target=_answers, args=(model, example(model), results))
        worker.start()
        told = results.get()
        worker.join()
        assert worker.exitcode == 0
        assert told == model(example(model)).tolist()


def test_a06_weights_only(tmp_path, elsewhere):
    for kind in MODELS:
        model, optimizer, pruner = pruned_in_training(kind)
        masks = pruner.finish()
        model.eval()
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
        for name, state in saved.items():
            torch.save(state, tmp_path / f"{kind.__name__}.{name}")
        torch.save({"x": example(model), "y": model(example(model))}, tmp_path / f"{kind.__name__}.expected")
        masks.save(tmp_path / f"{kind.__name__}.safetensors")
    elsewhere(
        "import torch, models\n"
        "from safetensors.torch import load_file\n"
        "for kind in models.MODELS:\n"
        "    names = ('model', 'optimizer', 'pruner', 'expected')\n"
        "    state, *_, expected = (torch.load(f'{kind.__name__}.{n}', weights_only=True) for n in names)\n"
        "    load_file(f'{kind.__name__}.safetensors')\n"
        "    model = kind().eval()\n"
        "    model.load_state_dict(state, strict=True)\n"
        "    assert torch.equal(model(expected['x']), expected['y'])\n"
    )


def test_a08_optimizer_resumes_where_the_library_is_not(tmp_path, elsewhere):
    model, optimizer, pruner = pruned_in_training(Tagger)
    names = [n for n, _ in model.named_parameters()]
    state = {n: optimizer.state[p] for n, p in model.named_parameters()}
    kept = {name: pruner.masks[name] for name in pruner.masks}
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "names": names,
            "by name": copy.deepcopy(state),
            "kept": kept,
        },
        tmp_path / "checkpoint.pt",
    )
    elsewhere(
        "import torch, models\n"
        "saved = torch.load('checkpoint.pt', weights_only=True)\n"
        "model = models.Tagger()\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)\n"
        "model.load_state_dict(saved['model'], strict=True)\n"
        "optimizer.load_state_dict(saved['optimizer'])\n"
        "assert [n for n, _ in model.named_parameters()] == saved['names']\n"
        "for n, p in model.named_parameters():\n"
        "    for key in ('exp_avg', 'exp_avg_sq', 'step'):\n"
        "        assert models.same(optimizer.state[p][key], saved['by name'][n][key]), n\n"
        "for step in range(4, 7):\n"
        "    models.train(model, optimizer, 1, first=step)\n"
        "    for n, mask in saved['kept'].items():\n"
        "        model.get_parameter(n).data.masked_fill_(~mask, 0)\n"
        "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, 'resumed.pt')\n"
    )
    train(model, optimizer, 3, first=4)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert same(resumed["model"], model.state_dict())
    assert same(resumed["optimizer"]["state"], optimizer.state_dict()["state"])


def test_a08_and_where_it_is(tmp_path, elsewhere):
    model, optimizer, pruner = pruned_in_training(Mlp, steps=2)
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], tmp_path / "checkpoint.pt")
    elsewhere(
        "import torch, models, secateur as sc\n"
        "model = models.build(models.Mlp, seed=7)\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)\n"
        "pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(start=0, stop=3))\n"
        "states = torch.load('checkpoint.pt', weights_only=True)\n"
        "for one, state in zip((model, optimizer, pruner), states):\n"
        "    one.load_state_dict(state)\n"
        "pruner.attach(optimizer)\n"
        "models.train(model, optimizer, 3, first=2)\n"
        "pruner.finish()\n"
        "torch.save([model.state_dict(), optimizer.state_dict()['state'], pruner.state_dict()], 'resumed.pt')\n",
        secateur=True,
    )
    train(model, optimizer, 3, first=2)
    pruner.finish()
    mine = [copies(model), optimizer.state_dict()["state"], pruner.state_dict()]
    theirs = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert same(list(mine[0].items()), [(n, t) for n, t in theirs[0].items()])
    assert same(mine[1:], theirs[1:])
