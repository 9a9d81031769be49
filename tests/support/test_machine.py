"""secateur.support.machine: the processor, and versions."""

from importlib import metadata

from secateur.support import machine


def test_cpuinfo_of_one_socket_with_hyperthreads(tmp_path):
    one = "processor\t: {}\nmodel name\t: A: CPU\nphysical id\t: 0\ncore id\t\t: {}\nflags\t\t: fpu avx2"
    (tmp_path / "cpuinfo").write_text("\n\n".join(one.format(i, i // 2) for i in range(4)) + "\n\n")
    cpu = machine.cpuinfo(tmp_path / "cpuinfo")
    assert len(cpu) == 4
    assert machine.first_of(cpu, "model name") == "A: CPU"
    assert machine.first_of(cpu, "Features") is None
    assert machine.cpuinfo(tmp_path / "nothing") == []


def test_the_version_when_secateur_is_not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert machine.secateur_version() == "0+unknown"
