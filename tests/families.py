"""A small random target of every family with its processor, without files."""

import functools

import jax
import numpy as np
import transformers
from flax import nnx

from benchmarks.random_target import GEMMA_TEMPLATE, QWEN_TEMPLATE
from jaxspec import Target
from jaxspec.checkpoints.names import abstract
from jaxspec.demo.processor import CHAT_TEMPLATE, wrapped_tokenizer
from jaxspec.targets.processors import QwenProcessor, TextProcessor
from jaxspec.targets.registry import family_of

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
LAYER_TYPES = ["sliding_attention", "full_attention"]
PREFERRED = slice(300, 304)
"""A few tokens win most choices, so that a draft head that knows nothing is right at times."""

small_tokenizer = functools.partial(wrapped_tokenizer, 300)


def llava_next():
    tokenizer = small_tokenizer()
    size = {"height": 24, "width": 24}
    image_processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size=size, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]]
    )
    processor = transformers.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP, image_size=24, patch_size=8),
        text_config=transformers.MistralConfig(**TEXT, vocab_size=len(tokenizer), sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    return config, processor


def qwen2_5_vl():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]}
    )
    image_processor = transformers.Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64
    )
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return config, QwenProcessor(
        tokenizer, image_processor, QWEN_TEMPLATE, {"shortest_edge": 256, "longest_edge": 4096}
    )


def gemma3():
    tokenizer = small_tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>")
    image_processor = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(
        image_processor, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4
    )
    config = transformers.Gemma3Config(
        vision_config={**CLIP, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        text_config={
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "sliding_window": 6,
            "layer_types": LAYER_TYPES,
            "query_pre_attn_scalar": 8,
        },
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def text_only(config_type, **options):
    def build():
        tokenizer = small_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}A:"
        return config_type(**TEXT, vocab_size=len(tokenizer), **options), TextProcessor(tokenizer)

    return build


FAMILIES = {
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3,
    "llama": text_only(transformers.LlamaConfig),
    "qwen2": text_only(transformers.Qwen2Config),
    "qwen3": text_only(transformers.Qwen3Config, head_dim=8),
    "gemma3_text": text_only(
        transformers.Gemma3TextConfig,
        head_dim=8,
        sliding_window=6,
        layer_types=LAYER_TYPES,
        tie_word_embeddings=False,
    ),
}


def family_target(name: str, **options) -> Target:
    """The family's target, with `options` of its transformers config changed."""
    hf_config, processor = FAMILIES[name]()
    for key, value in options.items():
        setattr(hf_config, key, value)
    family = family_of(hf_config)
    config = family.config_from_hf(hf_config)
    graph, state = nnx.split(abstract(lambda rngs: family.model(config, rngs=rngs)))
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if values.ndim > 1:
            return (values / leaf.shape[0] ** 0.5).astype(np.float32)
        return (0.2 * values + ("scale" in jax.tree_util.keystr(path))).astype(np.float32)

    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
    language, text = model.language_model, config.text
    language.embed_tokens.embedding[...] *= text.vocab_size**0.5 / text.embedding_scale  # entries near 1 after `embed`
    for layer in language.layers:  # what is said depends on all that was said before
        layer.self_attn.q_proj.kernel[...] *= 3.0
        layer.self_attn.o_proj.kernel[...] *= 4.0
    if language.lm_head is not None:
        language.lm_head.kernel[...][:, PREFERRED] *= 4.0
    model = jax.tree.map(jax.numpy.asarray, model)
    return Target(model, family.adapter(config), processor, None, (processor.tokenizer.eos_token_id,))
