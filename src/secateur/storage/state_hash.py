"""The identity of a state: one hash of its names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from secateur.errors import FileError
from secateur.storage.dtypes import name_of, words_of
from secateur.storage.stored import Alias, Stored


class StateHash:
    """SHA-256 of a state: of the names, dtypes, shapes and bytes of its tensors, whatever their order."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}

    def add(self, tensor: Stored, digest: str) -> None:
        """Add a tensor, with the SHA-256 of its bytes (row-major, little-endian)."""
        shape = ",".join(map(str, tensor.shape))
        self._tensors[tensor.name] = f"{name_of(tensor.dtype)} {shape} {digest}\n"

    def passing(self, tensor: Stored, count: int) -> Iterator[Tensor]:
        """Yield the pieces of a tensor, and add it when they are through; a tied one is no part of the state."""
        digest = hashlib.sha256()
        for piece in tensor.pieces(count):
            digest.update(words_of(piece).data)
            yield piece
        if not isinstance(tensor, Alias):
            self.add(tensor, digest.hexdigest())

    def require(self, sha256: str | None, file: Path) -> None:
        """See that the state is the one that was saved.

        Raises:
            FileError: it is another.
        """
        if self.hexdigest() != sha256:
            raise FileError(f"{file}: what it decodes to is not what was saved: copy or download it again")

    def hexdigest(self) -> str:
        """Return the SHA-256 of the lines `name dtype shape digest`, sorted by name."""
        lines = (f"{name} {rest}" for name, rest in sorted(self._tensors.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
