"""secateur.distributed: alone nothing happens; together arrays add up and text spreads."""

import os
import socket

import numpy as np
import pytest
import torch
from torch import multiprocessing

from secateur import distributed

TEXTS = ["", "/a/place/.out.tmp", "grüße \u4f60\u597d", "x" * 4096]


def test_alone():
    array = np.arange(3)
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.total(array) is array
    assert array.tolist() == [0, 1, 2]
    assert [distributed.from_first(text) for text in TEXTS] == TEXTS


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        assert (distributed.rank(), distributed.size()) == (rank, 2)
        for dtype in (np.int64, np.float64, np.float32, np.uint8):
            array = np.array([[1, 2], [3, 4]], dtype) * (rank + 1)
            assert distributed.total(array) is array
            assert array.tolist() == [[3, 6], [9, 12]]
            assert array.dtype == dtype
        many = np.full(1 << 20, 2**40 + rank)
        assert (distributed.total(many) == 2**41 + 1).all()
        for text in TEXTS:
            assert distributed.from_first(text if rank == 0 else "of no account") == text
    finally:
        torch.distributed.destroy_process_group()
    with open(f"{folder}/{rank}", "w") as file:
        file.write("done")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
