"""Packed files taken apart and put together again with every checksum right: what no accident makes."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKED = ":packed-by-secateur"


def crc(data):
    return f"{zlib.crc32(data):08x}"


@dataclass
class Forgery:
    """A packed file: the metadata and the slots of its header, its manifest, its bytes after the header."""

    metadata: dict
    slots: dict
    manifest: dict
    data: bytearray

    @classmethod
    def of(cls, path):
        whole = Path(path).read_bytes()
        origin = 8 + int.from_bytes(whole[:8], "little")
        slots = json.loads(whole[8:origin])
        metadata = slots.pop("__metadata__")
        return cls(metadata, slots, json.loads(metadata["secateur"]), bytearray(whole[origin:]))

    @property
    def tensors(self):
        return self.manifest["tensors"]

    def slot(self, name):
        """The slot in which a tensor lies."""
        return self.slots[name if name in self.slots else name + PACKED]

    def place(self, name):
        return slice(*self.slot(name)["data_offsets"])

    def blob(self, name):
        return bytes(self.data[self.place(name)])

    def splice(self, name, blob):
        """Put other bytes where a tensor lies; its shape in the header and what lies behind it move along."""
        old, slot = self.place(name), self.slot(name)
        self.data[old] = blob
        longer = len(blob) - (old.stop - old.start)
        for other in self.slots.values():
            start, stop = other["data_offsets"]
            if start >= old.stop and other is not slot:
                other["data_offsets"] = [start + longer, stop + longer]
        slot["data_offsets"] = [old.start, old.start + len(blob)]
        if slot["dtype"] == "U8":
            slot["shape"] = [len(blob)]

    def repair(self):
        """Make the checksum of each tensor right."""
        for name, entry in self.tensors.items():
            if isinstance(entry, list) and len(entry) == 5 and (name in self.slots or name + PACKED in self.slots):
                entry[4] = crc(self.blob(name))

    def save(self, path, *, text=None, sealed=True):
        """Write the file; `text` stands for the manifest instead of its own JSON."""
        text = json.dumps(self.manifest, ensure_ascii=False, separators=(",", ":")) if text is None else text
        self.metadata["secateur"] = text
        if sealed:
            self.metadata["secateur.crc32"] = crc(text.encode())
        header = json.dumps({"__metadata__": self.metadata, **self.slots}, ensure_ascii=False).encode()
        header = header.ljust(-(-len(header) // 8) * 8)
        Path(path).write_bytes(len(header).to_bytes(8, "little") + header + self.data)
        return path
