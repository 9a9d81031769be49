"""A64: a state_dict with weight_orig / weight_mask, and a live model pruned that way, load as a plain model."""

import torch
from torch import nn
from torch.nn.utils import prune

from secateur.torch_prune import from_torch_prune, plain_state_dict


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states + self.attention(states, states, states)[0])


def pruned_the_old_way():
    torch.manual_seed(0)
    model = Tagger().eval()
    pairs = [(model.lstm, name) for name in model.lstm._flat_weights_names]
    pairs += [(model.attention, "in_proj_weight"), (model.attention.out_proj, "weight"), (model.head, "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.6)
    prune.l1_unstructured(model.head, "weight", 0.5)  # a PruningContainer
    prune.ln_structured(model.head, "weight", 1, n=2, dim=0)
    prune.random_unstructured(model.embed, "weight", 0.3)
    return model


def is_plain(model):
    fresh = Tagger()
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a64_a_saved_state_dict_loads_into_a_plain_model(tmp_path):
    old = pruned_the_old_way()
    tokens = torch.arange(14).view(2, 7)
    torch.save(old.state_dict(), tmp_path / "old.pt")

    model = Tagger().eval()
    model.load_state_dict(plain_state_dict(torch.load(tmp_path / "old.pt", weights_only=True)), strict=True)
    is_plain(model)
    assert torch.equal(model(tokens), old(tokens))


def test_a64_a_live_model_becomes_plain_and_trains_on():
    model = pruned_the_old_way()
    tokens = torch.arange(14).view(2, 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model(tokens).detach()

    masks = from_torch_prune(model)
    is_plain(model)
    assert torch.equal(model(tokens), before)
    assert 0.5 < masks.sparsity < 0.7

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, weights[name]) for name, p in model.named_parameters() if p.grad.any())
