"""The peers of benchmarks/runtime.py, each run in an environment of its own, with torch eager as the yardstick.

    ENVIRONMENT/bin/python benchmarks/runtime_peers.py NAME REQUEST.json

Prints one line of JSON for each case and regime. Every peer is told to use one core, is warmed up, gets its input
without a copy where it offers that, and is checked against eager before it is timed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime_cases import Case, Fan, Side, flat, goal_cases, in_turn, ratios, relative_error, yardstick

Call = Callable[[], Any]

LOSSY = "int8"  # sides whose name has this are not held to the accuracy of float32

# ---- engines that read ONNX -------------------------------------------------------------------------------------


def onnxruntime(case: Case, model: nn.Module, file: str) -> dict[str, Call]:
    import onnxruntime as ort

    def session(path: str) -> Call:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        binding, x = made.io_binding(), case.example().numpy()
        binding.bind_ortvalue_input(made.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(x))
        outputs = []
        for output in made.get_outputs():
            value = ort.OrtValue.ortvalue_from_shape_and_type([int(n) for n in output.shape], "float32")
            binding.bind_ortvalue_output(output.name, value)
            outputs.append(value)

        def call() -> list[Any]:
            made.run_with_iobinding(binding)
            return outputs

        return lambda: [torch.from_numpy(value.numpy()) for value in call()] if checking else call()

    found = {"dense": session(file)}
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantized = tempfile.mkdtemp(dir=Path(file).parent) + "/int8.onnx"
        quantize_dynamic(file, quantized, weight_type=QuantType.QInt8, per_channel=True)
        found["dynamic int8"] = session(quantized)
    except Exception as error:
        print(f"no int8: {error}", file=sys.stderr)
    return found


def openvino(case: Case, model: nn.Module, file: str) -> dict[str, Call]:
    import openvino as ov

    one_core = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip

    held: list[object] = []  # the engine reads the input's memory, but does not hold it

    def request(**more: float) -> Call:
        made = ov.Core().compile_model(file, "CPU", {**one_core, **more}).create_infer_request()
        x = case.example()
        made.set_input_tensor(0, ov.Tensor(x.numpy(), shared_memory=True))
        held.append(x)

        def call() -> list[Any]:
            made.infer(share_outputs=True)
            return [made.get_output_tensor(i).data for i in range(len(made.model_outputs))] if checking else held

        return call

    return {"dense": request(), "sparse weights": request(CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.5)}


def deepsparse(case: Case, model: nn.Module, file: str) -> dict[str, Call]:
    os.environ |= {"NM_DISABLE_ANALYTICS": "1", "NM_BIND_THREADS_TO_CORES": "1"}
    from deepsparse import Engine

    x = case.example().numpy()
    engine = Engine(file, batch_size=len(x), num_cores=1)
    if engine.fraction_of_supported_ops == 0:
        raise RuntimeError("runs none of this model's operators itself")
    return {"sparse": lambda: engine.run([x], val_inp=False)}


# ---- MKL's inspector-executor -----------------------------------------------------------------------------------


class Description(ctypes.Structure):
    """matrix_descr of mkl_spblas.h: a general matrix."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


AS_IS, ROW_MAJOR, COLUMN_MAJOR = 10, 101, 102
CALLS = 100_000  # expected, tells the inspector to take its time


class Matrix:
    """A sparse matrix of MKL with hints for products with n columns in one layout (n = 1: with a vector)."""

    def __init__(self, lib: ctypes.CDLL, dense: Tensor, n: int, layout: int) -> None:
        self.lib, self.n, self.layout = lib, n, layout
        csr = dense.to_sparse_csr()
        self.rows, self.columns = dense.shape
        self.values = csr.values().contiguous()
        self.starts = csr.crow_indices().to(torch.int32)
        self.indices = csr.col_indices().to(torch.int32)
        self.handle, self.description = ctypes.c_void_p(), Description(20, 0, 0)
        start = self.starts.data_ptr()
        self.check(lib.mkl_sparse_s_create_csr(
            ctypes.byref(self.handle), 0, self.rows, self.columns, pointer(start), pointer(start + 4),
            pointer(self.indices.data_ptr()), pointer(self.values.data_ptr())))  # fmt: skip
        if n == 1:
            self.check(lib.mkl_sparse_set_mv_hint(self.handle, AS_IS, self.description, CALLS))
        else:
            self.check(lib.mkl_sparse_set_mm_hint(self.handle, AS_IS, self.description, layout, n, CALLS))
        self.check(lib.mkl_sparse_optimize(self.handle))

    @staticmethod
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"MKL returned status {status}")

    def product(self, x: Tensor, y: Tensor, keep: float) -> Callable[[], object]:
        """y = W x + keep * y, with all arguments made beforehand."""
        start = (AS_IS, ctypes.c_float(1), self.handle, self.description)
        into, end = pointer(x.data_ptr()), (ctypes.c_float(keep), pointer(y.data_ptr()))
        if self.n == 1:
            return partial(self.lib.mkl_sparse_s_mv, *start, into, *end)
        ld = (self.n, self.n) if self.layout == ROW_MAJOR else (self.columns, self.rows)
        return partial(self.lib.mkl_sparse_s_mm, *start, self.layout, into, self.n, ld[0], *end, ld[1])


pointer = ctypes.c_void_p
alive: list[object] = []  # what MKL only has pointers to


def mkl(case: Case, model: nn.Module, file: str) -> dict[str, Call]:
    """The product alone ("core"), and with bias and layout, as `F.linear` wants it: the better of two ways."""
    os.environ["MKL_THREADING_LAYER"] = "SEQUENTIAL"
    lib = ctypes.CDLL(str(next((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))))
    layers = list(model.layers) if hasattr(model, "layers") else list(model)  # type: ignore[call-overload, arg-type]
    kinds = {type(layer) for layer in layers}
    point_wise = kinds == {nn.Conv2d} and all(layer.kernel_size == (1, 1) for layer in layers)
    if kinds != {nn.Linear} and not point_wise:
        raise RuntimeError("has matrix products only")
    x, chained = case.example(), not isinstance(model, Fan)
    alive.append(x)
    n = x[0, 0].numel() if point_wise else len(x)
    if n == 1:
        ways = {"layout": ROW_MAJOR}
    elif point_wise:
        ways = {"core": ROW_MAJOR, "layout": ROW_MAJOR}
    else:
        ways = {"core": ROW_MAJOR, "layout, column-major": COLUMN_MAJOR, "layout, transposing": ROW_MAJOR}
    if n == 1:
        ways["core"] = ROW_MAJOR

    def way(name: str, layout: int) -> Call:
        core, flip, feature_major = name == "core", name.endswith("transposing"), layout == ROW_MAJOR and n > 1
        turned = torch.empty(x.shape[-1], n) if flip else None
        into = x.reshape(-1, n) if point_wise else x.T.contiguous() if core and feature_major else x
        steps, outs, matrices = [], [], []
        for layer in layers:
            matrix = Matrix(lib, layer.weight.detach().flatten(1), n, layout)
            y = torch.empty((matrix.rows, n) if feature_major else (n, matrix.rows))
            bias = (layer.bias.detach()[:, None] if feature_major else layer.bias.detach()).expand_as(y)
            out = torch.empty(n, matrix.rows) if flip else y
            product = matrix.product(into if turned is None else turned, y, 0.0 if core else 1.0)
            steps.append((into, y, bias, out, product))
            outs.append(out)
            matrices.append(matrix)
            into = out if chained else into

        def call() -> list[Tensor]:
            for source, y, bias, out, product in steps:
                if turned is not None:
                    turned.copy_(source.T)
                if not core:
                    y.copy_(bias)
                product()
                if flip:
                    out.copy_(y.T)
            return outs[-1:] if chained else outs

        alive.extend(matrices)
        return call

    return {name: way(name, layout) for name, layout in ways.items()}


# ---- all of it --------------------------------------------------------------------------------------------------

PEERS = {"onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse, "mkl": mkl}
TOLERANCE = 1e-3
checking = True


def measure(name: str, case: Case, asked: dict[str, Any], rounds: dict[str, int]) -> None:
    global checking
    model = case.model()
    model.load_state_dict(torch.load(asked["state"], weights_only=True))
    eager = yardstick(case, case_model(case, asked))
    checking = True
    calls = PEERS[name](case, model, asked["onnx"])
    reference, errors = flat(eager()), {}
    for side, call in calls.items():
        if side == "core":
            call()  # leaves out what would make it right
            continue
        errors[side] = relative_error(call(), reference)
        if errors[side] > TOLERANCE and LOSSY not in side:
            raise RuntimeError(f"{side}: is wrong by {errors[side]:.2g}")
    checking = False
    for regime in case.goals:
        seconds = in_turn({"eager": Side(eager), **{side: Side(call) for side, call in calls.items()}}, regime,
                          rounds[regime])  # fmt: skip
        found = ratios(seconds)
        for side, error in errors.items():
            found[side]["error"] = error
        print(json.dumps({"id": asked["id"], "regime": regime, "eager": min(seconds["eager"]), "sides": found}),
              flush=True)  # fmt: skip


def case_model(case: Case, asked: dict[str, Any]) -> nn.Module:
    model = case.model()
    model.load_state_dict(torch.load(asked["state"], weights_only=True))
    return model


def main() -> None:
    name, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    cases = {case.id: case for case in goal_cases()}
    with torch.inference_mode():
        for asked in request["cases"]:
            print(json.dumps({"id": asked["id"], "begun": True}), flush=True)
            try:
                measure(name, cases[asked["id"]], asked, request["rounds"])
            except Exception as error:
                cannot = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                print(json.dumps({"id": asked["id"], "cannot": cannot}), flush=True)


if __name__ == "__main__":
    main()
