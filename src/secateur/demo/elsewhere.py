"""Load the pruned model where there is no secateur, and see that it is the same to the last bit.

The demo runs this script in a process of its own, and leaves a copy in its run folder, to be run again:

    python secateur-demo/elsewhere.py
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class LSTMClassifier(nn.Module):
    """The plain model, written out anew: nothing about it is special."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n, 8, 8]` to logits `[n, 10]`."""
        _, (last, _) = self.lstm(images)
        logits: Tensor = self.head(last[-1])
        return logits


def main(folder: Path) -> None:
    """Predict the test images with the weights in `folder`; write one line of JSON to stdout."""
    sys.modules["secateur"] = None  # type: ignore[assignment]  # `import secateur` fails now, installed or not
    try:
        import secateur  # noqa: F401
    except ImportError:
        importable = False
    else:
        importable = True

    torch.set_num_threads(1)  # as the demo: other ways to cut a sum may round it otherwise
    weights = load_file(folder / "pruned.safetensors")
    model = LSTMClassifier(hidden=weights["lstm.weight_hh_l0"].shape[1]).eval()
    model.load_state_dict(weights)
    test = load_file(folder / "test.safetensors")
    with torch.no_grad():
        logits = model(test["images"])
    found = {
        "secateur_importable": importable,
        "same_bits": torch.equal(logits.view(torch.int32), test["logits"].view(torch.int32)),
        "accuracy": float((logits.argmax(1) == test["labels"]).double().mean()),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
