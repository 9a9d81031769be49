"""Hugging Face models with fewer blocks: the config counts them, and what is saved and loaded is the same model."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import secateur as sc
from secateur.errors import StructureError
from secateur.structure import Plan, propose
from structure.pretrained import SOUND, TEXT, bart, picture, sound, texts, words

transformers = pytest.importorskip("transformers")

SIDE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {**TEXT, **SIDE, "max_position_embeddings": 40, "num_labels": 3}
LLAMA = {**TEXT, **SIDE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
GPT = {**TEXT, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 40}
VIT = {**SIDE, "image_size": 32, "patch_size": 8, "num_labels": 10}
BART = bart(32, 4, 48)
T5 = {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
SPEECH = {**BERT, **SOUND}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4}
DEEPSEEK = {
    **LLAMA,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_key_value_heads", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "num_experts_per_tok": 2,
}
BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4}


def text():
    return {"input_ids": words(10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}


def pairs():
    return texts(10)


ZOO = {  # class, its config, inputs, and what the config tells afterwards
    "llama": ("LlamaForCausalLM", LLAMA, text, {"num_hidden_layers": 2}),
    "gpt2": ("GPT2LMHeadModel", GPT, text, {"n_layer": 2}),
    "bert": ("BertForSequenceClassification", BERT, text, {"num_hidden_layers": 2}),
    "t5": ("T5ForConditionalGeneration", T5, pairs, {}),
    "vit": ("ViTForImageClassification", VIT, picture, {"num_hidden_layers": 2}),
    "roberta": ("RobertaForMaskedLM", BERT, text, {"num_hidden_layers": 2}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", BERT, text, {"num_hidden_layers": 2}),
    "opt": ("OPTForCausalLM", {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32}, text, {"num_hidden_layers": 2}),
    "bloom": ("BloomForCausalLM", BLOOM, text, {"n_layer": 2}),
    "gpt-neox": ("GPTNeoXForCausalLM", SIDE | TEXT, text, {"num_hidden_layers": 2}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        text,
        {"num_hidden_layers": 2},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**LLAMA, "sliding_window": 4}, text, {"num_hidden_layers": 2}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, text, {"num_hidden_layers": 2}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", DEEPSEEK, text, {"num_hidden_layers": 2}),
    "bart": ("BartForConditionalGeneration", BART, pairs, {}),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH, sound, {"num_hidden_layers": 2}),
    "beit": ("BeitForImageClassification", VIT, picture, {"num_hidden_layers": 2, "out_features": ["stage2"]}),
    "swin": ("SwinForImageClassification", SWIN, picture, {"num_layers": 2}),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic"},
        picture,
        {},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [3, 3], "num_stages": 2},
        picture,
        {},
    ),
}
QUICK = ("llama", "gpt2", "bert", "t5", "vit")


def built(name):
    kind, config, inputs, told = ZOO[name]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    return kind(kind.config_class(**config)).eval(), inputs(), told


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def apart(a, b, inputs):
    with torch.no_grad():
        pairs = zip(tree_leaves(dict(a(**inputs))), tree_leaves(dict(b(**inputs))), strict=True)
        return max(float((x - y).abs().max()) for x, y in pairs if isinstance(x, torch.Tensor))


def blocks(plan):
    return sum(block.becomes != "" for block in plan.blocks)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_half_of_the_blocks_are_saved_and_loaded(name, tmp_path):
    model, inputs, told = built(name)
    plan = propose(model, inputs, depth=0.5)
    small = sc.shrink(model, inputs, depth=0.5)
    assert {key: getattr(small.config, key) for key in told} == told
    gone = sum(block.becomes == "" for block in plan.blocks)
    assert gone == (len(plan.blocks) + (name == "t5")) // 2 or name in ("convnext", "resnet", "swin")
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert [*again.state_dict()] == [*small.state_dict()]
    assert apart(small, again, inputs) == 0
    if small.can_generate():  # with a cache, whose entries blocks find by their number
        given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
        options = {"max_new_tokens": 6, "do_sample": False}
        want = small.generate(**given, **options, use_cache=False)
        assert torch.equal(small.generate(**given, **options), want)
        assert torch.equal(again.generate(**given, **options), want)


def test_sides_of_an_encoder_and_decoder_are_counted_each_for_itself():
    """The first block of each side of T5 has the table of positions that the others read."""
    model, inputs, _ = built("t5")
    small = sc.shrink(model, inputs, depth=0.5, keep=["decoder.block.1", "decoder.block.2"])
    sides = len(small.encoder.block), len(small.decoder.block)
    assert sum(sides) == 4
    assert sides == (small.config.num_layers, small.config.num_decoder_layers) == (1, 3)
    assert (small.encoder.config.num_layers, small.decoder.config.num_layers) == sides
    with pytest.raises(
        StructureError, match=r"encoder\.block\.0, decoder\.block\.0: it gives a tensor .* depth of 0\.25"
    ):
        sc.shrink(model, inputs, depth=0.1)


def test_lists_of_the_config_lose_the_same_entries():
    model, inputs, _ = built("gemma2")
    small = sc.shrink(model, inputs, depth=0.5, keep=["model.layers.1", "model.layers.3"])
    assert small.config.layer_types == ["full_attention", "full_attention"]
    assert model.config.layer_types[::2] == ["sliding_attention", "sliding_attention"]


def test_a_plan_holds_the_config_and_comes_before_units():
    model, inputs, _ = built("llama")
    plan = Plan.from_json(propose(model, inputs, 0.5, depth=0.5).to_json())
    small = sc.shrink(model, inputs, 0.5, depth=0.5)
    state = plan.apply_state_dict(model.state_dict())
    other = copy.deepcopy(model)
    plan.apply(other)
    assert (other.config.num_hidden_layers, other.config.hidden_size, other.config.num_attention_heads) == (2, 16, 2)
    assert apart(other, small, inputs) < 1e-6
    again = type(model)(other.config).eval()
    again.load_state_dict(state)
    assert apart(again, small, inputs) < 1e-6


def test_a_block_whose_place_is_a_scale_stays_in_its_place():
    """GPT-2 may divide by the number of a block: what comes after one that goes would be scaled otherwise."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True)).eval()
    plan = propose(model, text(), depth=0.5)
    assert [block.becomes for block in plan.blocks] == ["transformer.h.0", "transformer.h.1", "", ""]


def test_outputs_that_tell_of_each_block_are_refused():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**BERT, output_hidden_states=True)).eval()
    with pytest.raises(StructureError, match=r"outputs in place of .* Give a sparsity"):
        sc.shrink(model, text(), depth=0.5)
