"""Models of Hugging Face's transformers, with random weights."""

import torch

from structure.architectures import architecture


def _quiet(config):
    """No dropout."""
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return config


ENDS = {"bos_token_id": 0, "eos_token_id": 1}


def tokens():
    return {"input_ids": torch.randint(0, 60, (2, 7))}


@architecture
def pretrained_vit(w):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": w(32), "num_attention_heads": w(4), "intermediate_size": w(64)}
    config = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4, num_labels=10)
    return ViTForImageClassification(_quiet(config)), {"pixel_values": torch.randn(2, 3, 16, 16)}


@architecture
def pretrained_bert(w):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": w(32), "num_attention_heads": w(4), "intermediate_size": w(64)}
    config = BertConfig(**sizes, vocab_size=60, num_hidden_layers=2, max_position_embeddings=16, num_labels=3)
    return BertForSequenceClassification(_quiet(config)), tokens()


@architecture
def pretrained_gpt2(w):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": w(32), "n_head": w(4), "n_inner": w(64)}
    config = GPT2Config(**sizes, vocab_size=60, n_positions=16, n_layer=2, use_cache=False, **ENDS)
    return GPT2LMHeadModel(_quiet(config)), tokens()


@architecture(limit=1e-6)  # norms in single precision, whatever the model's
def pretrained_llama(w):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": w(4), "num_key_value_heads": w(2)}
    sizes = {"hidden_size": w(32), "intermediate_size": w(64), **heads}
    config = LlamaConfig(**sizes, vocab_size=60, num_hidden_layers=2, head_dim=8, use_cache=False)
    return LlamaForCausalLM(_quiet(config)), tokens()
