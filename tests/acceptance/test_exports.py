"""The pruned model goes wherever the dense one goes: compile, export, jit, ONNX, quantize, fuse."""

import io
import warnings

import pytest
import torch
from torch import nn

import secateur as sc
from models import MODELS, Attention, Mlp, Net, Tagger, build, example, k, train


def pruned(kind):
    model = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(0, 3), allocation="uniform")
    pruner.attach(optimizer)
    train(model, optimizer, 4)
    return model.eval()  # still attached: any moment will do


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, {(w.category, str(w.message)) for w in caught}


@pytest.mark.parametrize("kind", MODELS)
def test_a39_compile_fullgraph(kind):
    def compiled(model):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):  # else a dense LSTM is refused as well
            return torch.compile(model, fullgraph=True, backend="aot_eager")(example(model))

    dense, model = build(kind).eval(), pruned(kind)
    with torch.no_grad():
        _, expected = warned(lambda: compiled(dense))
        out, seen = warned(lambda: compiled(model))
    assert seen <= expected
    assert torch.allclose(out, model(example(model)), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Attention])  # jit.script refuses it dense
def test_a39_jit(kind):
    dense, model = build(kind).eval(), pruned(kind)
    plain, expected = warned(lambda: torch.jit.script(dense))
    scripted, seen = warned(lambda: torch.jit.script(model))
    assert seen <= expected
    assert torch.allclose(scripted(example(model)), model(example(model)), atol=1e-6)
    operations = [[node.kind() for node in one.inlined_graph.nodes()] for one in (plain, scripted)]
    assert operations[0] == operations[1]
    assert list(scripted.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_a39_export(kind):
    dense, model = build(kind).eval(), pruned(kind)
    plain, expected = warned(lambda: torch.export.export(dense, (example(dense),)))
    exported, seen = warned(lambda: torch.export.export(model, (example(model),)))
    assert seen <= expected
    operations = [str(node.target) for node in exported.graph.nodes]
    assert operations == [str(node.target) for node in plain.graph.nodes]
    assert not [op for op in operations if "mask" in op or "aten.mul" in op]
    assert list(exported.state_dict) == list(plain.state_dict)
    assert list(exported.constants) == list(plain.constants)
    assert torch.allclose(exported.module()(example(model)), model(example(model)), atol=1e-5)


@pytest.mark.parametrize("kind", [Mlp, Net])
def test_a39_onnx(kind, tmp_path):

    def size(model, name):
        torch.onnx.export(model, (example(model),), tmp_path / name, dynamo=True, verbose=False, external_data=False)
        return (tmp_path / name).stat().st_size

    dense, model = build(kind).eval(), pruned(kind)
    expected, dense_warnings = warned(lambda: size(dense, "dense.onnx"))
    got, seen = warned(lambda: size(model, "model.onnx"))
    assert got == expected
    assert seen <= dense_warnings
    import onnx

    nodes = [[node.op_type for node in onnx.load(tmp_path / n).graph.node] for n in ("dense.onnx", "model.onnx")]
    assert nodes[0] == nodes[1]
    assert "Mul" not in nodes[1]


@pytest.mark.parametrize("kind", [Mlp, Tagger])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a40_quantize_right_after_prune(kind):
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("this torch has no engine for int8")
    model = build(kind).eval()
    masks = sc.prune(model, 0.9)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)
    out = quantized(example(model))
    assert out.shape == model(example(model)).shape
    found = 0
    for name in masks:
        prefix, attribute = name.rsplit(".", 1)
        layer = quantized.get_submodule(prefix)
        weight = (layer.weight() if attribute == "weight" else layer.get_weight()[attribute]).int_repr()
        assert not bool(weight[~masks[name]].any()), name
        found += int((weight == 0).sum())
    assert found >= masks.pruned == k(0.9, masks.size)


@pytest.mark.slow  # torchao is no part of the test extra: transformers imports it wherever it is, which takes seconds
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a40_torchao_right_after_prune(name):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao (0.18 was tried)")
    model = build(Mlp).eval()
    masks = sc.prune(model, 0.9)
    dense = model(example(model))
    quantization.quantize_(model, getattr(quantization, name)())
    assert torch.allclose(model(example(model)), dense, atol=0.05)
    found = 0
    for name in masks:
        weight = model.get_parameter(name).qdata
        assert weight.dtype == torch.int8
        assert not bool(weight[~masks[name]].any()), name
        found += int((weight == 0).sum())
    assert found >= masks.pruned == k(0.9, masks.size)


def test_a40_fuse_conv_and_bn_right_after_prune():
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = build(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    masks = sc.prune(model, 0.7)
    model.eval()
    x = example(model)
    fused = fuse_conv_bn_eval(model.conv, model.norm)
    assert torch.allclose(fused(x), model.norm(model.conv(x)), atol=1e-5)
    assert not bool(fused.weight[~masks["conv.weight"]].any())


def test_a39_a_scripted_model_saves_and_loads():
    model = pruned(Mlp)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, example(model)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert torch.equal(loaded(example(model)), model(example(model)))
