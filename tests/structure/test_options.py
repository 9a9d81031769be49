import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import secateur as sc
from secateur.errors import InputError, InputTypeError, MaskError, StateError, StructureError, UnknownNameError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), True, "half"])
def test_sparsity(sparsity):
    with pytest.raises(InputError, match="between 0 and 1"):
        sc.shrink(mlp(), X, sparsity)


def test_inputs():
    with pytest.raises(InputTypeError, match=r"give inputs with which model\(...\) runs"):
        sc.shrink(mlp(), torch.randn(3, 5), 0.5)
    with pytest.raises(InputTypeError, match=r"inputs is None: .*Pass a tensor"):
        sc.shrink(mlp(), None, 0.5)
    with pytest.raises(InputTypeError, match=r"inputs is an int: .*Pass a tensor"):
        sc.shrink(mlp(), 3, 0.5)
    with pytest.raises(InputError, match="give at least one example"):
        sc.shrink(mlp(), [], 0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_that_cannot_be_followed():
    with pytest.raises(InputTypeError, match=r"give an nn\.Module"):
        sc.shrink("model", X)
    with pytest.raises(InputError, match="run the model once"):
        sc.shrink(nn.LazyLinear(3), X)
    with pytest.raises(InputError, match=r"shrink model\._orig_mod"):
        sc.shrink(torch.compile(mlp()), X)
    with pytest.raises(InputError, match="0 is compiled: compile the whole model instead, after it was shrunk"):
        sc.shrink(nn.Sequential(torch.compile(nn.Linear(4, 8)), nn.Linear(8, 2)), X, 0.5)
    model = mlp()
    model.compile()
    with pytest.raises(InputError, match=r"compiled in place: shrink copy\.deepcopy\(model\)"):
        sc.shrink(model, X, 0.5)
    for scripted in (torch.jit.trace(mlp(), X), nn.Sequential(torch.jit.script(nn.Linear(4, 8)), nn.Linear(8, 2))):
        with pytest.raises(InputError, match="shrink the model it was made from"):
            sc.shrink(scripted, X, 0.5)
    with pytest.raises(InputError, match=r"shrink model\.module"):
        sc.shrink(nn.DataParallel(mlp()), X, 0.5)
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(InputError, match=r"0\.weight was made in inference mode.*make the model outside of it"):
        sc.shrink(model, X, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_models():
    with pytest.raises(InputError, match="0 is quantized: shrink the model first, then quantize it"):
        sc.shrink(torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}), X, 0.5)


def test_a_sharded_model(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            InputError, match=r"0\.weight is sharded: shrink the whole model on one process, then shard"
        ):
            sc.shrink(model, X, 0.5)
    finally:
        distributed.destroy_process_group()


def test_models_that_are_made_otherwise():
    """Graph modules, hooks, parametrizations, frozen weights, dropout that stays on, under a Pruner, in inference."""
    widths = {}
    widths["graph"] = torch.fx.symbolic_trace(mlp())
    widths["hook"] = mlp()
    widths["hook"][0].register_forward_hook(lambda module, inputs, out: out * 2)
    widths["frozen"] = mlp().requires_grad_(False)
    widths["training"] = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    pruned = mlp()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    sc.Pruner(pruned, 0.5, schedule=sc.cubic(0, 5)).attach(optimizer)
    widths["pruner"] = pruned
    for kind, model in widths.items():
        small = sc.shrink(model, X, 0.5)
        assert next(m.out_features for m in small.children() if isinstance(m, nn.Linear)) == 4, kind
        assert small.training == model.training
    with torch.inference_mode():
        assert not any(p.is_inference() for p in sc.shrink(model, X, 0.5).parameters())
    computed = mlp()
    parametrizations.weight_norm(computed[2])
    assert sc.shrink(computed, X, 0.5)[0].out_features == 4
    with pytest.raises(StateError, match=r"call its finish\(\) first"):
        sc.shrink(pruned, X, 0.5, optimizer=optimizer)


def test_what_is_of_another_model():
    masks = sc.prune(mlp(), 0.5)
    with pytest.raises(UnknownNameError, match=r"these masks are for another model: it has no 0\.weight; the nearest"):
        sc.shrink(nn.ModuleDict({"a": nn.Linear(4, 2)}), X, masks=masks)
    with pytest.raises(MaskError, match=r"these masks are for another model: 0\.weight has shape \(9, 4\)"):
        sc.shrink(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), X, masks=masks)


def test_a_target_out_of_reach_says_how_far_it_can_go_and_what_holds_it():
    with pytest.raises(StructureError, match=r"at least 0\.\d+ of the given model's remain\. What holds it: "):
        sc.shrink(mlp(), X, macs=0.001)


def test_an_optimizer_of_another_model():
    with pytest.raises(InputError, match="give the optimizer that trains this model"):
        sc.shrink(mlp(), X, optimizer=torch.optim.SGD(mlp().parameters(), 0.1))


def test_an_unknown_score():
    with pytest.raises(InputError, match="choose"):
        sc.shrink(mlp(), X, score="weight")


def test_an_unknown_option():
    with pytest.raises(InputTypeError, match=r"there is no option scores: choose macs, .*verify, stats, optimizer"):
        sc.shrink(mlp(), X, scores="magnitude")


def test_what_is_kept_must_be_there():
    with pytest.raises(UnknownNameError, match=r"keep='head' matches no tensor or module; valid names are: 0\.weight"):
        sc.shrink(mlp(), X, keep="head")
    with pytest.raises(InputError, match="none of the model's modules: give its own"):
        sc.shrink(mlp(), X, keep=nn.Linear(1, 1))
    with pytest.raises(InputTypeError, match="give names, globs or modules"):
        sc.shrink(mlp(), X, keep=[3])


@pytest.mark.parametrize("option", [{"round_to": 0}, {"min_width": 0}])
def test_widths_are_whole_numbers(option):
    with pytest.raises(InputError, match="give a number of positions, 1 or more"):
        sc.shrink(mlp(), X, 0.5, **option)


def test_an_option_that_would_choose_nothing():
    with pytest.raises(InputError, match="round_to chooses nothing where zeros say which units go: leave it out"):
        sc.shrink(mlp(), X, round_to=8)


def test_words_for_what_a_newcomer_gives():
    pruned = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(InputError, match=r"0\.weight is computed from other weights.*sc\.from_torch_prune"):
        sc.shrink(pruned, X, 0.5)
    with pytest.raises(InputError, match=r"hold NaN.*give numbers"):
        sc.shrink(mlp(), X * float("nan"), 0.5)
    with pytest.raises(InputError, match=r"\(0, 4\): give a batch of one or more"):
        sc.shrink(mlp(), X[:0], 0.5)
    with pytest.raises(StructureError, match=r"no forward reaches a weight\. .*keep the model as it is"):
        sc.shrink(nn.ReLU(), X, 0.5)
    with pytest.raises(StructureError, match=r"only dead units go.*Give a sparsity, such as 0\.5"):
        sc.shrink(mlp(), X)


def test_two_things_that_say_what_goes():
    plan = sc.structure.propose(mlp(), X, 0.5)
    with pytest.raises(InputError, match=r"sparsity and plan are given together.*give one of them"):
        sc.shrink(mlp(), X, 0.5, plan=plan)
    with pytest.raises(InputError, match="score chooses nothing where the plan says which units go: leave it out"):
        sc.shrink(mlp(), X, plan=plan, score="l2")
    with pytest.raises(InputTypeError, match=r"give what propose\(...\) returned"):
        sc.shrink(mlp(), X, plan=plan.to_json())


def test_models_whose_weights_are_elsewhere():
    model = mlp()
    model[0].to("meta")
    with pytest.raises(InputError, match=r"0\.weight has no weights here, they are offloaded: load it without"):
        sc.shrink(model, X, 0.5)
    model = mlp().to("meta")
    model[0]._hf_hook = object()
    with pytest.raises(InputError, match=r"0\.weight has no weights here.*load it without a device_map"):
        sc.shrink(model, X, 0.5, verify=False)


def test_two_tensors_in_one_memory():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    with pytest.raises(InputError, match=r"0\.weight and 1\.weight are two tensors in one memory.*the same parameter"):
        sc.shrink(model, X, 0.5)
    model = mlp()
    model.register_buffer("again", model[0].weight.data[1:])
    with pytest.raises(InputError, match="are two tensors in one memory"):
        sc.shrink(model, X, 0.5)


def test_parts_of_one_memory_that_are_apart():
    model = mlp()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    model.register_buffer("mask", torch.ones(4))
    model.register_buffer("part", model.mask[:2])
    assert sc.shrink(model, X, 0.5)[0].out_features < model[0].out_features
