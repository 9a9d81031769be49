"""Hugging Face models: what shrink gives is what save_pretrained and from_pretrained give back."""

import logging

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import secateur as sc
from secateur.structure import Plan, propose
from structure.pretrained import SOUND, TEXT, WORDS, bart, drawn, picture, sound, texts, words

transformers = pytest.importorskip("transformers")

SIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BERT = {**TEXT, **SIDE, "max_position_embeddings": 40, "num_labels": 3}
LLAMA = {**TEXT, **SIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
VIT = {**SIDE, "image_size": 32, "patch_size": 8, "num_labels": 10}
BART = bart(64, 2, 128)
SPEECH = {**BERT, **SOUND}
WHISPER = {
    **BART,
    "num_mel_bins": 14,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


LITTLE = pytest.mark.filterwarnings("ignore:only 0")  # the outputs of an encoder are its width, which stays


def text():
    return {"input_ids": words(12)}


def pairs():
    return texts(12)


def clip():
    sides = {"text_config": {**SIDE, **TEXT, "max_position_embeddings": 16}}
    return transformers.CLIPConfig(
        **sides, vision_config={**SIDE, "image_size": 32, "patch_size": 8}, projection_dim=32
    )


ZOO = {  # class of the model, its config, inputs, and what share of the weights is left of half of all units
    "bert": ("BertForSequenceClassification", BERT, text, 0.3),
    "roberta": ("RobertaForMaskedLM", BERT, text, 0.3),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": WORDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 40},
        text,
        0.3,
    ),
    "albert": ("AlbertForMaskedLM", {**BERT, "embedding_size": 32}, text, 0.3),
    "electra": ("ElectraForSequenceClassification", {**BERT, "embedding_size": 32}, text, 0.3),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        text,
        0.3,
    ),
    "mpnet": ("MPNetForSequenceClassification", BERT, text, 0.3),
    "gpt2": ("GPT2LMHeadModel", GPT, text, 0.3),
    "gpt-j": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, text, 0.3),
    "gpt-neox": ("GPTNeoXForCausalLM", {**LLAMA, "num_key_value_heads": None}, text, 0.3),
    "opt": (
        "OPTForCausalLM",
        {**BERT, "ffn_dim": 128, "word_embed_proj_dim": 64},
        text,
        0.3,
    ),
    "llama": ("LlamaForCausalLM", LLAMA, text, 0.3),
    "mistral": ("MistralForCausalLM", {**LLAMA, "head_dim": 16, "sliding_window": 8}, text, 0.3),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, text, 0.3),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}, text, 0.3),
    "phi3": ("Phi3ForCausalLM", LLAMA, text, 0.3),
    "phi": ("PhiForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}, text, 0.31),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        text,
        0.3,
    ),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, text, 0.3),
    # embeddings are scaled by the root of the width, so that stays; as does that of T5, whose outputs are
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 16}, text, 0.6),
    "t5": (
        "T5ForConditionalGeneration",
        {**TEXT, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        pairs,
        0.6,
    ),
    "bart": ("BartForConditionalGeneration", BART, pairs, 0.3),
    "whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        lambda: {"input_features": drawn(2, 14, 40), "decoder_input_ids": words(7)},
        0.3,
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH, sound, 0.3),
    "hubert": ("HubertForCTC", SPEECH, sound, 0.3),
    "vit": ("ViTForImageClassification", VIT, picture, 0.31),
    "deit": ("DeiTForImageClassification", VIT, picture, 0.31),
    "dinov2": ("Dinov2ForImageClassification", VIT, picture, 0.3),  # no forward reaches its mask token
    "beit": ("BeitForImageClassification", {**VIT, "use_relative_position_bias": True}, picture, 0.31),
    "swin": (
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
        picture,
        0.3,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "num_labels": 10},
        picture,
        0.3,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
            "num_labels": 5,
        },
        picture,
        0.3,
    ),
    "clip": ("CLIPModel", clip, lambda: {"input_ids": words(12), **picture()}, 0.31),
}
QUICK = ("bert", "llama", "convnext")


def built(name):
    kind, config, inputs, left = ZOO[name]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    config = config() if callable(config) else kind.config_class(**config)
    return kind(config).eval(), inputs(), left


def weights(model):
    return sum(p.numel() for p in model.parameters())


def apart(a, b, inputs):
    with torch.no_grad():
        pairs = zip(tree_leaves(dict(a(**inputs))), tree_leaves(dict(b(**inputs))), strict=True)
        return max(
            float((x - y).abs().max()) for x, y in pairs if isinstance(x, torch.Tensor) and x.is_floating_point()
        )


@pytest.fixture(autouse=True)
def quiet():
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if bars:
        transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_a_saved_model_loads_as_the_same_function(name, tmp_path):
    model, inputs, left = built(name)
    small = sc.shrink(model, inputs, 0.5)
    assert weights(small) < left * weights(model)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert {k: t.shape for k, t in again.state_dict().items()} == {k: t.shape for k, t in small.state_dict().items()}
    assert apart(small, again, inputs) < 1e-5
    if small.can_generate():
        given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(small.generate(**given, **options), again.generate(**given, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sparsity", "left"),
    [
        ("llama", 0.3, 0.5),  # the width is a multiple of the heads
        ("llama", 0.7, 0.15),
        ("falcon", 0.3, 0.6),  # rows of heads of queries, one of keys and one of values
        ("falcon", 0.7, 0.12),
        ("mixtral", 0.3, 0.4),  # and of 16 bytes
        ("segformer", 0.3, 0.5),  # a whole ratio of two widths
        ("segformer", 0.7, 0.2),
        ("dinov2", 0.7, 0.1),
        ("vit", 0.7, 0.11),  # 4 heads of 19 // 4 have the size of 1 head of 16
        ("beit", 0.3, 0.6),  # the first forward fills a cache
    ],
)
def test_sizes_that_a_config_ties(name, sparsity, left, tmp_path):
    model, inputs, _ = built(name)
    small = sc.shrink(model, inputs, sparsity)
    assert weights(small) < left * weights(model)
    small.save_pretrained(tmp_path)
    assert apart(small, type(small).from_pretrained(tmp_path).eval(), inputs) < 1e-5


def tiny(**changes):
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=WORDS, **config, **changes)).eval()


class Tagger(nn.Module):
    """A model of the user's around one of transformers."""

    def __init__(self):
        super().__init__()
        self.bert, self.head = tiny(), nn.Linear(32, 3)

    def forward(self, input_ids):
        return self.head(self.bert(input_ids).last_hidden_state.relu() + self.bert(input_ids).pooler_output[:, None])


@pytest.mark.slow
def test_a_model_inside_another_one(tmp_path):
    model = Tagger().eval()
    small = sc.shrink(model, words(12), 0.5)
    assert (small.bert.config.hidden_size, model.bert.config.hidden_size) == (16, 32)
    small.bert.save_pretrained(tmp_path)
    assert apart(small.bert, transformers.BertModel.from_pretrained(tmp_path), text()) < 1e-5


@LITTLE
def test_a_plan_holds_the_config():
    model = tiny()
    plan = Plan.from_json(propose(model, text(), 0.5).to_json())
    plan.apply(model)
    assert model.config.intermediate_size == 24
    assert model.config.hidden_size == 32  # an output has that width


@LITTLE
def test_heads_stay_where_a_config_ties_their_number_to_a_width_that_stays():
    small = sc.shrink(tiny(), text(), 0.5)
    assert small.encoder.layer[0].attention.self.query.out_features == 32


def test_a_width_that_follows_from_another_by_default_may_change_alone():
    torch.manual_seed(0)
    gpt = {**GPT, "n_head": 2, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt)).eval()
    small = sc.shrink(model, text(), params=0.6)
    assert weights(small) / weights(model) == pytest.approx(0.6, abs=0.01)
    assert (model.config.n_inner, model.config.n_embd) == (None, 64)
    again = type(small)(small.config)
    again.load_state_dict(small.state_dict())
    assert small.config.n_inner == small.transformer.h[0].mlp.c_fc.weight.shape[1] != 4 * small.config.n_embd


@LITTLE
def test_other_numbers_of_the_user_stay():
    model = tiny(hidden_dropout_prob=0.3)
    model.encoder.layer[0].output.dropout.p = 0.25
    small = sc.shrink(model, text(), 0.5)
    assert (small.config.hidden_dropout_prob, small.encoder.layer[0].output.dropout.p) == (0.3, 0.25)


@LITTLE
def test_a_model_that_its_config_does_not_make_is_left_to_its_owner():
    model = tiny()
    model.encoder.layer[0].intermediate.dense = nn.Linear(32, 40)
    model.encoder.layer[0].output.dense = nn.Linear(40, 32)
    small = sc.shrink(model, text(), 0.5)
    assert small.encoder.layer[0].intermediate.dense.out_features == 20
    assert small.config.intermediate_size == 48


def test_where_configs_are_in_the_way_of_most_the_owner_is_told_to_save_the_plan():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.FNetConfig(vocab_size=WORDS, max_position_embeddings=20, **sizes)
    torch.manual_seed(0)
    model = transformers.FNetForSequenceClassification(config).eval()
    with pytest.warns(sc.errors.SecateurWarning, match="Save the plan"):
        small = sc.shrink(model, text(), 0.5)
    assert weights(small) < 0.6 * weights(model)


@LITTLE
def test_what_transformers_says_of_a_config_is_not_said_again(caplog):
    model = tiny(bos_token_id=500)  # beyond the vocabulary: transformers warns once
    logging.getLogger("transformers").propagate = True
    caplog.clear()
    try:
        sc.shrink(model, text(), 0.5)
    finally:
        logging.getLogger("transformers").propagate = False
    assert caplog.messages == []


@pytest.mark.parametrize(("sparsity", "heads"), [(0.3, 8), (0.7, 4)])
def test_a_width_that_the_old_number_of_heads_does_not_divide(sparsity, heads):
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=96,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    small = sc.shrink(model, {"pixel_values": torch.randn(1, 3, 16, 16)}, sparsity)
    assert small.config.num_attention_heads == heads
    assert type(model)(small.config).load_state_dict(small.state_dict())
