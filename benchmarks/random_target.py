"""A Hugging Face folder of random weights, of a size worth timing: what a speed needs of a model without its training.

    python benchmarks/random_target.py runs/random/llava --family llava --hidden-size 1024 --layers 8

The tokenizer is the embedded model's, in a vocabulary of the usual size; the processor is the family's own. The folder
loads with `jaxspec.load_target` and with transformers.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers
import tyro
from flax import nnx

from jaxspec.checkpoints.names import parameter_paths
from jaxspec.demo.processor import CHAT_TEMPLATE, wrapped_tokenizer
from jaxspec.targets.registry import family_of, save_model

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}"
    "{% else %}{{ '<|vision_start|><|' + content['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA_TEMPLATE = CHAT_TEMPLATE.replace("<image>\\n", "<start_of_image>")


@dataclasses.dataclass(frozen=True)
class RandomTarget:
    """What to write."""

    folder: Annotated[Path, tyro.conf.Positional]
    family: Literal["llava", "llava_next", "qwen2_5_vl", "gemma3"] = "llava"
    hidden_size: int = 1024
    intermediate_size: int = 2816
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    vocab_size: int = 32000
    vision_hidden_size: int = 512
    vision_layers: int = 6
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    @property
    def text(self) -> dict:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 8192,
        }

    @property
    def vision(self) -> dict:
        return {
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": 4 * self.vision_hidden_size,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_hidden_size // 64,
        }

    def write(self) -> int:
        """Writes the folder; returns the number of parameters."""
        config, save_processor = getattr(self, self.family)()
        family = family_of(config)
        graph, state = nnx.split(nnx.eval_shape(lambda: family.model(family.config_from_hf(config), rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(self.seed)

        def draw(leaf):
            if len(leaf.shape) < 2:
                return jnp.ones(leaf.shape, self.dtype)
            values = rng.standard_normal(leaf.shape, np.float32) / leaf.shape[0] ** 0.5
            return jnp.asarray(values, self.dtype)

        model = nnx.merge(graph, jax.tree.map(draw, state))
        processor = self.folder.with_name(self.folder.name + ".processor")
        save_processor(processor)
        save_model(model, config, processor, self.folder, jnp.dtype(self.dtype))
        return sum(leaf.size for leaf in parameter_paths(model).values())

    def llava(self):
        tokenizer = wrapped_tokenizer()
        image_processor = transformers.CLIPImageProcessor(size=336, crop_size=336)
        processor = transformers.LlavaProcessor(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
        )  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**self.vision, image_size=336, patch_size=14),
            text_config=transformers.LlamaConfig(**self.text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        return config, processor.save_pretrained

    def llava_next(self):
        tokenizer = wrapped_tokenizer()
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        processor = transformers.LlavaNextProcessor(
            transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=pinpoints
            ),
            tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
            num_additional_image_tokens=1,
        )  # fmt: skip
        config = transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**self.vision, image_size=336, patch_size=14),
            text_config=transformers.LlamaConfig(**self.text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=pinpoints,
        )
        return config, processor.save_pretrained

    def gemma3(self):
        tokenizer = wrapped_tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>")
        processor = transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size={"height": 896, "width": 896}),
            tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=256,
        )  # fmt: skip
        config = transformers.Gemma3Config(
            vision_config={**self.vision, "image_size": 896, "patch_size": 14, "vision_use_head": False},
            text_config={
                **self.text,
                "head_dim": self.hidden_size // self.heads,
                "query_pre_attn_scalar": self.hidden_size // self.heads,
                "sliding_window": 512,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        return config, processor.save_pretrained

    def qwen2_5_vl(self):
        tokenizer = wrapped_tokenizer()
        marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.chat_template = QWEN_TEMPLATE
        head_dim = self.hidden_size // self.heads
        config = transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": self.vision_layers,
                "hidden_size": self.vision_hidden_size,
                "intermediate_size": 4 * self.vision_hidden_size,
                "num_heads": self.vision_hidden_size // 64,
                "fullatt_block_indexes": [self.vision_layers - 1],
                "out_hidden_size": self.hidden_size,
            },
            text_config={
                **self.text,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3],
                },
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )

        def save(folder: Path) -> None:
            tokenizer.save_pretrained(folder)
            transformers.Qwen2VLImageProcessor().save_pretrained(folder)

        return config, save


if __name__ == "__main__":
    wanted = tyro.cli(RandomTarget, description=__doc__)
    print(f"{wanted.folder}: {wanted.write() / 1e6:.0f} million parameters")
