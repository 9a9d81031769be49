"""secateur.doctor: facts about the machine, and what is slow on it and why."""

import dataclasses
import json
import os
import platform
import sys

import numpy
import pytest
import torch

from secateur import doctor
from secateur.doctor import Facts, diagnose
from secateur.runtime import native
from secateur.support import machine

HEALTHY = Facts(
    secateur="0.1.0",
    python="3.12.1",
    torch="2.9.0",
    numpy="2.0.0",
    safetensors="0.5.0",
    platform="Linux",
    cpu="A CPU",
    cpu_flags=("avx2", "fma"),
    torch_isa="AVX2",
    kernels="avx2",
    generates=True,
    physical_cores=4,
    allowed_cores=4,
    torch_threads=4,
    mkl=True,
    onednn=True,
    denormals_flushed=True,
    debug_builds=(),
    cuda_build=None,
    devices=("cpu",),
    extras={"plot": "3.8.0"},
)


def findings(**changes):
    """What is found beyond the one thing that is always true."""
    always, *rest = doctor._findings(dataclasses.replace(HEALTHY, **changes))
    assert "dense kernels do not skip zeros" in always.what
    return [str(finding) for finding in rest]


def test_the_facts_are_those_of_this_machine():
    facts = diagnose().facts
    assert facts.torch == torch.__version__
    assert facts.numpy == numpy.__version__
    assert facts.python == platform.python_version()
    assert facts.torch_threads == torch.get_num_threads()
    assert facts.torch_isa == torch.backends.cpu.get_cpu_capability()
    assert 1 <= facts.allowed_cores <= os.cpu_count()
    assert facts.cpu
    assert facts.devices[0] == "cpu"
    assert facts.debug_builds == (("Python",) if hasattr(sys, "gettotalrefcount") else ())


def test_nothing_is_found_where_all_is_well():
    assert findings() == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"torch_threads": 8}, "8 threads on the 4 cores it may use", "torch.set_num_threads(4), or OMP_NUM_THREADS=4"),
        ({"torch_isa": "DEFAULT"}, "this CPU has AVX2, and torch uses DEFAULT", "unset ATEN_CPU_CAPABILITY"),
        ({"torch_isa": "DEFAULT", "cpu_flags": ()}, "no vector instructions", "newer CPU"),
        ({"kernels": None}, "native kernels are missing: sc.accelerate falls back", "where there is a C++17 compiler"),
        ({"kernels": "portable"}, "use no vector instructions", "unset SECATEUR_ISA"),
        ({"kernels": "avx512", "generates": False}, "lets no memory be made executable", "MemoryDenyWriteExecute=no"),
        ({"mkl": False, "onednn": False}, "without MKL and oneDNN", "pytorch.org"),
        ({"debug_builds": ("torch",)}, "torch is a debug build", "release build of torch"),
        ({"denormals_flushed": False}, "denormal numbers", "torch.set_flush_denormal(True)"),
        ({"cuda_build": "12.8"}, "CUDA 12.8 and sees no device", "nvidia-smi"),
        ({"extras": {"plot": None}}, "'plot' is not installed", 'pip install "secateur[plot]"'),
    ],
)
def test_each_finding_has_its_remedy(changes, what, remedy):
    (found,) = findings(**changes)
    said, _, advice = found.partition(" -> ")
    assert what in said
    assert remedy in advice


def test_portable_kernels_are_the_best_for_a_cpu_without_vectors():
    assert findings(kernels="portable", cpu_flags=()) == []


def test_the_kernels_in_use_are_told(monkeypatch):
    assert diagnose().facts.kernels == native.isa()
    monkeypatch.setenv("SECATEUR_LIBRARY", "")  # as if they had not been built
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert diagnose().facts.kernels is None
    assert "the native kernels are missing" in str(diagnose())


def test_a_gpu_that_is_seen_is_no_finding():
    assert findings(cuda_build="12.8", devices=("cpu", "cuda:0 H100")) == []


def test_too_many_threads_are_seen_here():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(os.cpu_count() + 1)
        assert f"torch.set_num_threads({diagnose().facts.allowed_cores})" in str(diagnose())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")
def test_the_denormal_mode_is_seen_and_left_alone():
    assert not diagnose().facts.denormals_flushed
    try:
        torch.set_flush_denormal(True)
        assert diagnose().facts.denormals_flushed
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor._quota(tmp_path) == cores


def test_a_quota_lowers_the_cores_allowed(monkeypatch):
    monkeypatch.setattr(doctor, "_quota", lambda: None)
    assert doctor._allowed_cores() >= 1
    for quota, cores in [(1, 1), (10**6, doctor._allowed_cores())]:
        monkeypatch.setattr(doctor, "_quota", lambda quota=quota: quota)
        assert doctor._allowed_cores() == cores


def test_without_cpuinfo_there_is_still_a_diagnosis(monkeypatch):
    monkeypatch.setattr(machine, "cpuinfo", list)
    monkeypatch.setattr(doctor, "cpuinfo", list)
    facts = diagnose().facts
    assert (facts.physical_cores, facts.cpu_flags) == (None, ())
    assert facts.cpu


def test_a_table_a_dict_and_markdown():
    found = diagnose()
    assert torch.__version__ in str(found)
    assert "allowed cores" in str(found)
    assert found.markdown().startswith("**secateur doctor**\n\n| fact")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["facts"]["torch"] == torch.__version__
    assert plain["findings"][0].keys() == {"what", "remedy"}
