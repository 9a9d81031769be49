"""attach(): several optimizers, foreach, fused, compiled steps, LBFGS, GradScaler, steps inside backward; by hand."""

import pytest
import torch

import secateur as sc
from models import Mlp, Net, Tagger, build, copies, k, loss, same, train, zeros

FAMILIES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def pruner_for(model, stop=6, **options):
    return sc.Pruner(model, 0.9, schedule=sc.cubic(0, stop, every=2), **options)


def finished(pruner, model):
    masks = pruner.finish()
    assert masks.pruned == zeros(sc.weights(model)) == k(0.9, masks.size)
    assert sc.check(model, masks) == {}
    return masks


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_foreach_and_fused(family, kind):
    make, options = FAMILIES[family]
    model = build(Net)
    optimizer = make(model.parameters(), **options, **{kind: True})
    pruner = pruner_for(model)
    pruner.attach(optimizer)
    for step in range(8):
        train(model, optimizer, 1, first=step)
        assert sc.check(model, pruner.masks) == {}
    assert pruner.steps == 8
    finished(pruner, model)


def test_several_at_once():
    model = build(Tagger)
    body = torch.optim.Adam(model.lstm.parameters(), lr=0.01)
    head = torch.optim.SGD([*model.head.parameters(), *model.embed.parameters()], lr=0.05, momentum=0.9)
    pruner = pruner_for(model)
    pruner.attach(body, head)
    for step in range(8):
        for optimizer in (body, head):
            optimizer.zero_grad()
        loss(model, step).backward()
        head.step()
        assert pruner.steps == step  # a step is complete when both have stepped
        assert sc.check(model, pruner.masks) == {}
        body.step()
        assert pruner.steps == step + 1
        assert sc.check(model, pruner.masks) == {}
    finished(pruner, model)
    for optimizer in (body, head):
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks


def test_one_of_several_holds_nothing_that_is_pruned():
    model = build(Tagger)
    main = torch.optim.Adam([*model.lstm.parameters(), *model.head.parameters()], lr=0.01)
    rest = torch.optim.SGD(model.embed.parameters(), lr=0.05)
    pruner = pruner_for(model)
    pruner.attach(main, rest)
    for step in range(8):
        model.zero_grad()
        loss(model, step).backward()
        main.step()
        if step % 3 == 0:
            rest.step()
    assert pruner.steps == 8
    finished(pruner, model)


def test_parameter_groups_added_later_and_gradient_accumulation():
    model = build(Tagger)
    optimizer = torch.optim.Adam([{"params": model.lstm.parameters()}, {"params": model.head.parameters(), "lr": 0.1}])
    pruner = pruner_for(model)
    pruner.attach(optimizer)
    optimizer.add_param_group({"params": model.embed.parameters()})
    for step in range(16):
        loss(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.steps == 8
    finished(pruner, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_step(family):
    torch._dynamo.reset()
    make, options = FAMILIES[family]
    model, plain = build(Mlp), build(Mlp)
    optimizer, its_optimizer = make(model.parameters(), **options), make(plain.parameters(), **options)
    pruner, its_pruner = pruner_for(model), pruner_for(plain)
    pruner.attach(optimizer)
    its_pruner.attach(its_optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(8):
        optimizer.zero_grad()
        loss(model, step).backward()
        compiled()
        assert sc.check(model, pruner.masks) == {}
        assert pruner.steps == step + 1
    train(plain, its_optimizer, 8)
    assert finished(pruner, model) == its_pruner.finish()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_compiled_model_keeps_its_own_names():
    torch._dynamo.reset()
    model = build(Mlp)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.01)
    pruner = pruner_for(compiled)
    pruner.attach(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        out = compiled(model.example(torch.Generator().manual_seed(step)))
        out.square().mean().backward()
        optimizer.step()
    masks = finished(pruner, model)
    assert list(masks) == ["first.weight", "second.weight"]
    x = model.example(torch.Generator().manual_seed(0))
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe"}])
def test_lbfgs(options):
    model = build(Mlp)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, **options)
    pruner = pruner_for(model)
    pruner.attach(optimizer)
    for step in range(8):
        train(model, optimizer, 1, first=step)
        assert sc.check(model, pruner.masks) == {}
        assert pruner.steps == step + 1
    finished(pruner, model)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    model = build(Mlp)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    pruner = pruner_for(model)
    pruner.attach(optimizer)
    for step in range(9):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, step)
        scaler.scale(value).backward()
        if step == 3:  # an overflow: the scaler skips this step
            model.first.weight.grad[0, 0] = float("inf")
            before = copies(model)
        scaler.step(optimizer)
        scaler.update()
        assert sc.check(model, pruner.masks) == {}
        if step == 3:
            now = copies(model)
            kept = {n: pruner.masks[n] if n in pruner.masks else torch.ones_like(t, dtype=bool) for n, t in now.items()}
            assert all(same(now[n][kept[n]], before[n][kept[n]]) for n in now)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    finished(pruner, model)


@pytest.mark.parametrize("first", ["pruner", "optimizers"])
def test_optimizer_in_backward(first):
    model = build(Tagger)
    pruner = pruner_for(model)

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    if first == "pruner":
        pruner.attach()
    optimizers = {p: torch.optim.Adam([p], lr=0.01) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    if first == "optimizers":
        pruner.attach()
    try:
        for number in range(8):
            loss(model, number).backward()
            assert pruner.steps == number + 1
            assert sc.check(model, pruner.masks) == {}
        before = pruner.masks
        finished(pruner, model)
        for name, weight in sc.weights(model).items():
            remembered = optimizers[weight].state[weight]["exp_avg"]
            assert remembered.shape == before.shape(name)
    finally:
        pruner.detach()


def test_the_global_hook_minds_its_own_model():
    model, other = build(Mlp), build(Mlp, seed=1)
    pruner = pruner_for(model)
    pruner.attach()
    try:
        train(other, torch.optim.SGD(other.parameters(), lr=0.05), 5)
        assert pruner.steps == 0
        assert zeros(sc.weights(other)) == 0
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 8)
        finished(pruner, model)
        steps = pruner.steps
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 1)
        assert pruner.steps == steps  # finish() lets go
    finally:
        pruner.detach()


def test_by_hand():
    model, plain = build(Tagger), build(Tagger)
    optimizer, its_optimizer = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain))
    pruner, its_pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(1, 6)), sc.Pruner(plain, 0.9, schedule=sc.cubic(1, 6))
    its_pruner.attach(its_optimizer)
    for step in range(8):
        train(model, optimizer, 1, first=step)
        pruner.step()
        assert sc.check(model, pruner.masks) == {}
    train(plain, its_optimizer, 8)
    assert finished(pruner, model) == its_pruner.finish()
    assert same(copies(model), copies(plain))


def test_gradients_masked_before_clipping():
    model = build(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    loss(model).backward()
    free = {n: w.grad.clone() for n, w in sc.weights(model).items()}
    pruner.mask_gradients()
    for name, weight in sc.weights(model).items():
        assert torch.equal(weight.grad, torch.where(pruner.masks[name], free[name], 0))
    rest = [model.first.bias.grad, model.second.bias.grad]
    kept = [free[n][pruner.masks[n]] for n in free]
    expected = torch.cat([g.flatten() for g in (*rest, *kept)]).norm()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)


def test_gradient_scores_are_fed_by_the_optimizer():
    model = build(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(1, 7, every=2), score="taylor")
    pruner.attach(optimizer)
    train(model, optimizer, 8)
    finished(pruner, model)


def test_gradient_scores_see_the_gradients_of_a_closure():
    """`step(closure)` makes the gradients inside the step: the same ones must be seen as in a plain loop."""
    sums = []
    for way in ("plain", "closure"):
        model = build(Mlp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = sc.Pruner(model, 0.9, schedule=sc.linear(5, 10), score="taylor")
        pruner.attach(optimizer)
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                value = loss(model, step)
                value.backward()
                return value

            if way == "plain":
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        sums.append(pruner.state_dict()["sums"])
    assert same(sums[0], sums[1])
