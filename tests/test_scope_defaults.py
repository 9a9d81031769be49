"""secateur.scope: what people mean by "the model": types of other packages, wrappers, shared memory."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.anatomy import Layout
from secateur.errors import InputError, InputTypeError, SecateurWarning

# models of other packages


def tiny(name, **settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
MODELS = {  # some of the tensors in scope, with their layouts
    "GPT2": (
        GPT2,
        {"transformer.h.0.attn.c_attn.weight": Layout("io"), "transformer.h.0.mlp.c_proj.weight": Layout("io")},
    ),
    "Mixtral": (
        {**DECODER, "num_local_experts": 4},
        {
            "model.layers.0.mlp.experts.gate_up_proj": Layout("goi"),
            "model.layers.0.mlp.experts.down_proj": Layout("goi"),
            "lm_head.weight": Layout(),
        },
    ),
    "Qwen3Moe": (
        {**DECODER, "num_experts": 4, "moe_intermediate_size": 8},
        {"model.layers.0.mlp.experts.gate_up_proj": Layout("goi")},
    ),
    "GptOss": (
        {**DECODER, "num_local_experts": 4, "layer_types": ["full_attention"]},
        {
            "model.layers.0.mlp.experts.gate_up_proj": Layout("gio"),
            "model.layers.0.mlp.experts.down_proj": Layout("gio"),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a69_the_weights_of_a_transformer_are_in_scope(name):
    settings, some = MODELS[name]
    model = tiny(name, **settings)
    scope = sc.weights(model)  # no warning
    assert {key: scope.members[key].layout for key in some} == some
    assert not [key for key in scope if "embed" in key or "wte" in key or "norm" in key or "bias" in key]
    rest = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n not in scope}
    assert sum(n for name, n in rest.items() if "embed" not in name and "wte" not in name) < 0.1 * scope.size
    masks = sc.prune(model, 0.9)
    assert masks.pruned == (9 * scope.size + 5) // 10


def test_a69_a_head_that_is_tied_stays_dense_and_the_scope_says_it():
    scope = sc.weights(tiny("GPT2", **GPT2))
    assert scope.left_out["transformer.wte.weight"] == "Embedding, tied to lm_head.weight, is not pruned by default"


def test_a69_graphs():
    geometric = pytest.importorskip("torch_geometric.nn")
    model = nn.ModuleDict(
        {
            "gcn": geometric.GCNConv(16, 8),
            "gat": geometric.GATConv(8, 8, heads=2),
            "rgcn": geometric.RGCNConv(8, 8, num_relations=3),
            "hetero": geometric.HeteroLinear(8, 4, num_types=3),
        }
    )
    members = sc.weights(model).members
    assert {name: member.layout for name, member in members.items()} == {
        "gcn.lin.weight": Layout(),
        "gat.lin.weight": Layout(),
        "rgcn.weight": Layout("gio"),
        "rgcn.root": Layout("io"),
        "hetero.weight": Layout("gio"),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own
def test_a77_adapters_are_left_out_and_the_layers_below_are_in():
    peft = pytest.importorskip("peft")
    plain = tiny("GPT2", **GPT2)
    names = list(sc.weights(plain))
    targets = {"target_modules": ["c_attn"]}
    configs = [
        peft.LoraConfig(**targets, fan_in_fan_out=True),
        peft.LoraConfig(**targets, fan_in_fan_out=True, use_dora=True),
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
        peft.VeraConfig(**targets, fan_in_fan_out=True),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
    ]
    for config in configs:
        model = peft.get_peft_model(copy.deepcopy(plain), config)
        scope = sc.weights(model)
        own = [name.removeprefix("base_model.").removeprefix("model.").replace(".base_layer", "") for name in scope]
        assert own == names, config
        assert all(not p.requires_grad for p in scope.values())
        assert "an adapter" in scope.left_out.values()


def test_a77_what_is_saved_with_the_adapter_takes_the_place_of_its_original():
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x))

    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    scope = sc.weights(model)
    assert [name.removeprefix("base_model.model.") for name in scope] == [
        "body.base_layer.weight",
        "head.modules_to_save.default.weight",
    ]
    assert scope.left_out["base_model.model.head.original_module.weight"] == "replaced by its adapter"


# layers of one's own


class WeightDrop(nn.Module):
    """As in AWD-LSTM: the recurrent matrix is kept outside the LSTM, in various ways."""

    def __init__(self, layer, name="weight_hh_l0", inside=False, registered=False):
        super().__init__()
        self.module, self.name, self.registered = layer, name, registered
        raw = nn.Parameter(getattr(layer, name).data)
        self.holder = [layer if inside else self]
        delattr(layer, name)
        self.holder[0].register_parameter(f"{name}_raw", raw)
        self.place(raw.detach().clone())

    def place(self, weight):
        if self.registered:
            self.module._parameters[self.name] = weight
        else:
            setattr(self.module, self.name, weight)

    def forward(self, x):
        self.place(F.dropout(self.holder[0].get_parameter(f"{self.name}_raw"), 0.5, self.training))
        return self.module(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_a69_what_a_weight_drop_keeps_is_pruned(inside, registered):
    model = nn.Sequential(WeightDrop(nn.LSTM(3, 4), inside=inside, registered=registered)).eval()
    scope = sc.weights(model)
    raw = "0.module.weight_hh_l0_raw" if inside else "0.weight_hh_l0_raw"
    assert set(scope) == {raw, "0.module.weight_ih_l0"}
    assert "a weight is computed from it" in str(scope)
    sc.prune(model, 0.5, allocation="uniform")
    model(torch.ones(2, 1, 3))
    assert int((model[0].module.weight_hh_l0 == 0).sum()) == 32
    if registered:
        assert scope.left_out["0.module.weight_hh_l0"] == f"computed from {raw}"


def test_a69_a_weight_drop_of_a_linear_layer():
    model = nn.Sequential(nn.Linear(3, 3), WeightDrop(nn.Linear(3, 4), "weight"))
    assert set(sc.weights(model)) == {"0.weight", "1.weight_raw"}
    assert set(sc.weights(model, skip="1")) == {"0.weight"}


class Sized(nn.Module):
    def __init__(self, shape, **sizes):
        super().__init__()
        vars(self).update(sizes)
        self.weight = nn.Parameter(torch.ones(shape))


def test_a69_a_module_that_tells_its_sizes_is_a_layer():
    model = nn.Sequential(
        Sized((3, 4), in_features=4, out_features=3),
        Sized((4, 3), in_features=4, out_features=3),
        Sized((2, 4, 3), in_channels=4, out_channels=3),
        Sized((2, 3, 4), input_size=4, output_size=3),
    )
    assert [m.layout.dims for m in sc.weights(model).members.values()] == ["oi", "io", "gio", "goi"]


class Own(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.core = nn.Parameter(torch.randn(shape))


def test_a69_a_large_share_that_stays_dense_is_told():
    model = nn.Sequential(nn.Linear(10, 10), Own(20, 5))
    told = (
        r"50\.00 % of the model's weights stay dense.*1\.core \(Own, 100 weights\).*"
        r"scope=sc\.weights\(model, also=\['1\.core'\]\).*skip=\['1\.core'\]"
    )
    for verb in (sc.weights, lambda m: sc.prune(m, 0.5), lambda m: sc.Pruner(m, 0.5)):
        with pytest.warns(SecateurWarning, match=told):
            verb(model)
    assert list(sc.weights(model, also=["1.core"])) == ["0.weight", "1.core"]
    assert list(sc.weights(model, also="1")) == ["0.weight", "1.core"]
    assert list(sc.weights(model, also=Own, skip="0")) == ["1.core"]
    assert list(sc.weights(model, skip="1.core")) == ["0.weight"]
    assert sc.prune(model, 0.5, scope=sc.weights(model, also=Own)).pruned == 100


@pytest.mark.parametrize(
    "quiet",
    [
        lambda: Own(5),
        lambda: Own(5, 1, 1),
        lambda: nn.LayerNorm((10, 10)),
        lambda: nn.Embedding(50, 10),
        lambda: Own(2, 2),
    ],
)
def test_a69_vectors_norms_embeddings_and_little_things_are_no_news(quiet):
    assert list(sc.weights(nn.Sequential(nn.Linear(10, 10), quiet()))) == ["0.weight"]


def test_a69_a_learned_input_is_no_weight():
    model = nn.Sequential(nn.Linear(10, 10))
    for name in ("cls_token", "position_embeddings", "pos_embed", "query_tokens"):
        model.register_parameter(name, nn.Parameter(torch.ones(1, 9, 9)))
    assert list(sc.weights(model)) == ["0.weight"]


def test_the_share_of_the_model():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Embedding(12, 4))
    scope = sc.weights(model)
    assert scope.parameters == 64
    assert str(scope).endswith("16 weights in scope, 25.00 % of the 64 parameters of the model")


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class StandardisedInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("kind", [Standardised, StandardisedInside])
def test_a_forward_of_its_own_is_remarked(kind):
    model = nn.Sequential(kind(3, 4, 3), nn.Conv2d(4, 4, 3))
    first, second = (line for line in str(sc.weights(model)).splitlines() if " in " in line and "weight " in line)
    assert f"{kind.__name__}; has a forward of its own" in first
    assert "forward" not in second


# memory


def test_a71_one_piece_of_memory_counts_once():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    model[1].weight.data = model[0].weight.data.t()
    model[2].weight.data = model[0].weight.data
    scope = sc.weights(model)
    assert scope.size == 128
    assert scope.members["0.weight"].aliases == ("1.weight", "2.weight")
    for sparsity in (0.5, 0.75):
        masks = sc.prune(model, sparsity, score="random")
        assert [int((layer.weight == 0).sum()) for layer in model] == [128 * sparsity] * 3
        assert masks.size == 128
    assert list(sc.weights(model, only="1")) == ["0.weight"]


def test_a71_an_embedding_in_the_same_memory_is_an_embedding():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    assert list(sc.weights(model)) == ["2.weight"]


def test_a71_pieces_that_overlap_are_refused_by_name():
    numbers = torch.randn(30, 8)
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(8, 4))
    model[0].weight.data, model[1].weight.data = numbers[:20], numbers[10:]
    before = numbers.clone()
    told = (
        r"1\.weight shares some of its numbers in memory with 0\.weight.*clone\(\).*skip=\['0\.weight', '1\.weight'\]"
    )
    for verb in (sc.weights, lambda m: sc.prune(m, 0.5)):
        with pytest.raises(InputError, match=told):
            verb(model)
    assert torch.equal(numbers, before)
    assert list(sc.weights(model, skip=["0.weight", "1.weight"])) == ["2.weight"]


def test_a71_neighbours_in_memory_are_no_overlap():
    rows, columns = torch.randn(20, 8), torch.randn(8, 20)
    model = nn.Sequential(*(nn.Linear(8, 10) for _ in range(2)), *(nn.Linear(10, 8) for _ in range(2)))
    model[0].weight.data, model[1].weight.data = rows[:10], rows[10:]
    model[2].weight.data, model[3].weight.data = columns[:, :10], columns[:, 10:]
    assert sc.prune(model, 0.5).pruned == 160


@pytest.mark.parametrize(
    "data", [torch.randn(1, 4).expand(3, 4), torch.randn(6).as_strided((3, 4), (1, 1))], ids=["expanded", "windows"]
)
def test_a71_one_number_that_stands_for_many_is_refused(data):
    layer = nn.Linear(4, 3)
    layer.weight.data = data
    with pytest.raises(InputError, match=r"several weights of \S*weight share one place in memory.*contiguous\(\)"):
        sc.weights(layer)


# wrappers


def test_scripted_and_traced_models_are_refused_before_anything_else():
    plain = nn.Sequential(nn.Linear(4, 4))
    masks = sc.prune(copy.deepcopy(plain), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(plain), torch.jit.trace(plain, torch.ones(1, 4))
    for model in (scripted, traced):
        for verb in (sc.weights, lambda m: sc.prune(m, 0.5)):
            with pytest.raises(InputTypeError, match=r"prune the model it was made from.*masks\.apply\(model\)"):
                verb(model)
        masks.apply(model)
        assert sc.check(model, masks) == {}
        assert sc.report(model, masks).got == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_layer_within_a_plain_model():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
    assert list(sc.weights(model)) == ["0.0.weight", "1.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    for _ in range(2):
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    assert pruner.finish().pruned == 12
    assert sc.report(model).got == 0.5
    with pytest.raises(
        InputError, match=r"nothing in this model is pruned with torch\.nn\.utils\.prune: use it as it is"
    ):
        sc.from_torch_prune(model)


def test_wrappers_of_other_packages_go_by_their_names():
    for package, name, place in [
        ("lightning", "_FabricModule", "_original_module"),
        ("deepspeed", "DeepSpeedEngine", "module"),
        ("opacus", "GradSampleModule", "_module"),
    ]:
        wrapper = type(name, (nn.Module,), {"__module__": f"{package}.inside"})()
        wrapper.add_module(place, nn.Sequential(nn.Linear(2, 2)))
        assert list(sc.weights(wrapper)) == ["0.weight"]


def test_fsdp_is_refused_by_name():
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    wrapper.add_module("inner", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"the model is wrapped by FullyShardedDataParallel.*prune before wrapping"):
        sc.weights(wrapper)
