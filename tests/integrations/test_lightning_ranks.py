"""PruningCallback where two processes train one LightningModule: exact counts, equal masks."""

import os

import pytest
import torch

from processes import as_torchrun


def train(folder, kind):
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.set_num_threads(1)
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    import secateur as sc
    from secateur.integrations.lightning import PruningCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

        def training_step(self, batch, at):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), batch_size=4)
    model = Module()
    pruning = {
        "taylor": {"schedule": sc.cubic(0.1, 0.6), "score": "taylor"},
        "rigl": {"score": "random", "regrow": sc.regrow.rigl(every=2)},
        "ac_dc": {"schedule": sc.schedules.ac_dc(0.1, 0.8, every=3)},
    }
    pruner = sc.Pruner(model, 0.9, allocation="erk", **pruning[kind])
    shown = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2, "default_root_dir": folder}
    Trainer(callbacks=[PruningCallback(pruner)], **options, **shown).fit(model, loader)
    state = {"bits": pruner.state_dict()["bits"], "steps": pruner.steps, "model": model.state_dict()}
    torch.save(state, f"{folder}/{os.environ['RANK']}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["taylor", "rigl", "ac_dc"])
def test_both_ranks_have_the_same_masks(tmp_path, kind):
    done = as_torchrun(2, train, str(tmp_path), kind)
    assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["steps"] == other["steps"] == 16  # half of the 16 batches of each epoch
    for part in ("bits", "model"):
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
    zeros = sum(int((one["model"][name] == 0).sum()) for name in one["bits"])
    assert zeros == round(0.9 * sum(one["model"][name].numel() for name in one["bits"]))
