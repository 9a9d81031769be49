"""PruningCallback where two processes train one model: exact counts, equal masks, resume."""

import os

import pytest
import torch

from processes import as_torchrun

STEPS = 12
EXAMPLES = [{"input_ids": [i % 7 + 1, i % 5 + 1, i % 3 + 1, 2], "labels": i % 2} for i in range(48)]


def train(folder, kind, last, resume):
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.set_num_threads(1)
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    import secateur as sc
    from secateur.integrations.transformers import PruningCallback

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))
    pruning = {
        "movement": {"schedule": sc.cubic(0.1, 0.6, every=2), "score": "movement"},
        "rigl": {"score": "random", "regrow": sc.regrow.rigl(every=2)},
        "ac_dc": {"schedule": sc.schedules.ac_dc(0.1, 0.8, every=3)},
    }
    pruner = sc.Pruner(model, 0.9, allocation="erk", **pruning[kind])
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        save_steps=5,
        learning_rate=1e-2,
    )
    Trainer(model, arguments, train_dataset=EXAMPLES, callbacks=[PruningCallback(pruner)]).train(
        resume_from_checkpoint=resume
    )
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.save({"bits": pruner.state_dict()["bits"], "model": state}, f"{folder}/{last}-{os.environ['RANK']}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["movement", "rigl", "ac_dc"])
def test_both_ranks_have_the_same_masks_and_go_on(tmp_path, kind):
    for last, resume in (("whole", False), ("again", str(tmp_path / "checkpoint-5"))):
        done = as_torchrun(2, train, str(tmp_path), kind, last, resume)
        assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:]
    found = [torch.load(tmp_path / f"{last}-{rank}.pt") for last in ("whole", "again") for rank in (0, 1)]
    for other in found[1:]:
        for part in ("bits", "model"):
            assert all(torch.equal(tensor, other[part][name]) for name, tensor in found[0][part].items())
    zeros = sum(int((found[0]["model"][name] == 0).sum()) for name in found[0]["bits"])
    assert zeros == round(0.9 * sum(found[0]["model"][name].numel() for name in found[0]["bits"]))
