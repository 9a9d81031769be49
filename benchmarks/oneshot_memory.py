"""How much memory pruning block by block takes, for benchmarks/oneshot.py; run in a process of its own.

    python benchmarks/oneshot_memory.py [--folder]

Prints the peak of the memory that is the process's own (not that of mapped files), over what it was with the model and
the batches there, in units of the weights of one block. The model is a Llama of width 1,024 with random weights. With
`--folder` what the batches bring to a block is on disk, else in memory; it is counted.

Tensors that are freed go back to the system at once, as those of a wider model do by themselves: malloc keeps what is
smaller than 32 MB, which is nearly all at this width. `--kept` leaves it so, and counts what it keeps.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import threading
from pathlib import Path

import torch

import secateur as sc
from secateur.calibration.by_blocks import Task, prune_by_blocks

BLOCKS, BATCHES, SHAPE = 3, 8, (4, 256)
_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


class Peak(threading.Thread):
    """Looks at the memory of this process many times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, own_bytes())

    def stop(self) -> None:
        self._done.set()
        self.join()


def own_bytes() -> int:
    """Anonymous memory that is resident: what is allocated, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if "--kept" not in sys.argv:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=BLOCKS, num_attention_heads=16, vocab_size=2000
    )
    model = LlamaForCausalLM(config).eval()
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    batches = [{"input_ids": torch.randint(2000, SHAPE)} for _ in range(BATCHES)]
    with torch.no_grad():
        model(**batches[0])
    gc.collect()
    before, peak = own_bytes(), Peak()
    with tempfile.TemporaryDirectory() as folder:
        peak.start()
        prune_by_blocks(
            model, batches, Task(0.7), scope=sc.weights(model, skip="lm_head"),
            folder=folder if "--folder" in sys.argv else None,
        )  # fmt: skip
        peak.stop()
    print((peak.most - before) / block)


if __name__ == "__main__":
    main()
