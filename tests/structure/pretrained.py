"""Configs and inputs of small models of transformers."""

import torch

WORDS = 97
TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SOUND = {
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}


def bart(width, layers, inner):
    """The config of an encoder and a decoder, of so many layers each, with four heads."""
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _side(layers, inner)}
    last = {"max_position_embeddings": 40, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    return {**TEXT, "d_model": width, **sides, **last}


def _side(layers, inner):
    return ("layers", layers), ("attention_heads", 4), ("ffn_dim", inner)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def words(length):
    return torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(length))


def texts(length):
    return {"input_ids": words(length), "decoder_input_ids": words(7)}


def picture():
    return {"pixel_values": drawn(2, 3, 32, 32)}


def sound():
    return {"input_values": drawn(2, 800)}
