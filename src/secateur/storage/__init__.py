"""Files: packed ones that are really smaller, and checkpoints that are larger than memory.

| module | what is in it |
|---|---|
| `archive` | `save` a model's state to a packed file, `load` it back |
| `conversion` | `pack` and `unpack` checkpoints, file by file, folder by folder |
| `pretrained` | the same for folders of Hugging Face models |
| `pruning` | prune a checkpoint larger than memory |
| `calibrated`, `mapped` | prune one with data, block by block; a model whose weights stay in their files |
| `shrinking` | cut one by a plan of `shrink` |
| `checkpoints`, `torch_files` | what a checkpoint holds, of whatever form; `inspect` |
| `sharing` | how several processes share a checkpoint |
| `reading`, `writing`, `state_hash` | the packed format: the file read and written, the identity of what it holds |
| `rounding` | weights brought to whole steps by what is known of the inputs |
| `container`, `coding` | the safetensors around it, the blocks within |
| `stored`, `dtypes`, `contents` | a tensor in a file; how its numbers are stored; the facts that tables show of it |
"""

from secateur.storage.archive import load, save
from secateur.storage.conversion import pack, unpack
from secateur.storage.pretrained import load_pretrained, save_pretrained
from secateur.storage.pruning import Recipe, prune_checkpoint
from secateur.storage.shrinking import shrink_checkpoint

__all__ = [
    "Recipe",
    "load",
    "load_pretrained",
    "pack",
    "prune_checkpoint",
    "save",
    "save_pretrained",
    "shrink_checkpoint",
    "unpack",
]
