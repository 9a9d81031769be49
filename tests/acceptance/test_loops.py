"""The loops and optimizers of other libraries, as they are: exact counts, zeros that stay, adapters left alone."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import secateur as sc
from models import Mlp, build, k, loss, zeros

STEPS = 12
EXAMPLES = [{"input_ids": [i % 7 + 1, i % 5 + 1, i % 3 + 1, 2], "labels": i % 2} for i in range(32)]


@pytest.fixture(autouse=True)
def alone():
    """Accelerate keeps what it found of the machine for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


def trainer(model, folder, optimizer=None, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )
    return Trainer(model, arguments, train_dataset=EXAMPLES, optimizers=(optimizer, None))


def exact(pruner, model, sparsity=0.9):
    """The schedule counted the steps of the optimizer, and the zeros are those asked for."""
    assert pruner.steps == STEPS
    assert pruner.finish().pruned == zeros(sc.weights(model)) == k(sparsity, pruner.masks.size)


@pytest.mark.parametrize(("given", "options"), [(True, {"score": "taylor", "allocation": "erk"}), (False, {})])
def test_a10_trainer_that_accumulates_gradients(tmp_path, given, options):
    model = bert()
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) if given else None
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(2, STEPS - 1, every=4), **options)
    pruner.attach(*[optimizer] * given)
    try:
        trainer(model, tmp_path, optimizer).train()
        exact(pruner, model)
    finally:
        pruner.detach()
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a9_trainer_that_resumes(tmp_path):
    """Of its own checkpoint and the state of the pruner: bit for bit the run that went through."""
    whole, states = bert(), {}

    class Keeping(torch.optim.AdamW):
        def step(self, closure=None):
            states[pruner.steps] = pruner.state_dict()
            return super().step(closure)

    def run(model, folder, **resumed):
        nonlocal pruner
        pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(2, STEPS - 1, every=3))
        optimizer = Keeping(model.parameters(), lr=1e-2)
        if resumed:
            pruner.load_state_dict(states[7])
        pruner.attach(optimizer)
        trainer(model, folder, optimizer, save_strategy="steps", save_steps=7).train(**resumed)
        exact(pruner, model)
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    pruner = None
    through = run(whole, tmp_path)
    again = run(bert(), tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(again[name], weight) for name, weight in through.items())


def test_a72_accelerate_that_accumulates_gradients():
    model, accelerator = build(Mlp), Accelerator(gradient_accumulation_steps=3, cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(0, STEPS))
    pruner.attach(optimizer)
    for step in range(3 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, step))
            optimizer.step()
            optimizer.zero_grad()
    exact(pruner, model)


@pytest.mark.parametrize("kind", [AdamWScheduleFree, SGDScheduleFree])
def test_a74_schedule_free(kind):
    """Its eval() moves the weights to an average, train() back."""
    model = build(Mlp)
    optimizer = kind(model.parameters(), lr=0.01)
    optimizer.train()
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(0, STEPS - 2, every=3))
    pruner.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        if step in (4, 8):  # as a loop that validates
            optimizer.eval()
            assert sc.check(model, pruner.masks) == {}
            optimizer.train()
    exact(pruner, model)
    for change in (optimizer.eval, optimizer.train, optimizer.eval):
        change()
        assert sc.check(model, pruner.masks) == {}


def adapted(base, steps=3):
    """PEFT's adapters, trained for a while."""
    model = get_peft_model(base, LoraConfig(target_modules=["query", "value"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(input_ids=torch.tensor([[1, 2, step]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a24_adapters_merged_into_a_pruned_base():
    base = bert()
    masks = sc.prune(base, 0.9)
    before = {name: weight.detach().clone() for name, weight in sc.weights(base).items()}
    merged = adapted(base).merge_and_unload()
    full = {name: weight.detach().clone() for name, weight in sc.weights(merged).items()}
    back = sc.check(merged, masks)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in back} == {"query", "value"}
    changes = sc.remask(merged, masks)
    assert zeros(sc.weights(merged)) == masks.pruned == k(0.9, masks.size)
    for name, weight in sc.weights(merged).items():
        assert torch.equal(weight, torch.where(masks[name], full[name], 0))
        assert torch.equal(weight, before[name]) == (name not in back)  # what was learnt is in what is kept
        lost = (full[name] - weight).norm() / full[name].norm()
        assert changes[name] == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a77_peft_trains_its_adapters_over_a_pruned_base():
    base = bert()
    masks = sc.prune(base, 0.9)
    model = adapted(base)
    assert not [name for name in sc.weights(model) if "lora_" in name]
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    assert zeros(sc.weights(model)) == masks.pruned
