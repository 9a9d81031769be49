import pytest

from secateur.structure.cut import sliced


@pytest.fixture
def interrupted(monkeypatch):
    """Lets a cut be interrupted at one of its slices."""

    def interrupt(at):
        calls = iter(range(1, 100))

        def slices(tensor, dims):
            if next(calls) == at:
                raise KeyboardInterrupt("stop")
            return sliced(tensor, dims)

        monkeypatch.setattr("secateur.structure.cut.sliced", slices)

    return interrupt
