"""A small text model of the embedded target's family, for MASSV to start from: it learns the text of the target's
answers and never sees a picture. Its export is an ordinary Hugging Face `LlamaForCausalLM` folder.
"""

import dataclasses
from pathlib import Path

import numpy as np
import transformers
from flax import nnx

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.data.answers import AnswerSource
from jaxspec.data.records import Example
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.processors import load_tokenizer
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.reading import read_prompts
from jaxspec.targets.registry import family_of, read_config, save_model
from jaxspec.targets.text import TextModel, TextTargetConfig
from jaxspec.training.held_out import held_out_of, pipelines
from jaxspec.training.losses import next_token_loss
from jaxspec.training.recipe import Recipe, Task


@dataclasses.dataclass(frozen=True)
class SmallLanguageModelRecipe(Recipe):
    """A Llama with the target's tokenizer."""

    target: str = "demo"
    answers_dir: str = "runs/demo_answers"
    validation_records: int = 128
    """The first answers of the set are held out, the same ones as of drafters."""
    hidden_size: int = 128
    intermediate_size: int = 344
    num_layers: int = 2
    num_heads: int = 4
    save_dtype: str = "float16"

    def hf_config(self, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


class TextEncoder:
    """Records of an `AnswerSource` without their pictures: image tokens are left out, the answer is what to learn."""

    def __init__(self, adapter: PromptAdapter, target_adapter: PromptAdapter) -> None:
        self.adapter, self.target_adapter = adapter, target_adapter

    def length(self, record: dict) -> int:
        """How many tokens `encode_record` will give."""
        return len(self.encode_record(record).loss_mask)

    def encode_record(self, record: dict) -> Example:
        prompt, answer = np.asarray(record["prompt_ids"]), np.asarray(record["answer_ids"])
        prompt = prompt[~self.target_adapter.is_image(prompt)]
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        return Example(EncodedPrompt(ids, []), np.arange(len(ids)) >= len(prompt))


def language_model_task(recipe: SmallLanguageModelRecipe) -> Task:
    """The text of self-distilled answers, and a fresh Llama."""
    folder = resolve_folder(recipe.target)
    target_config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    hf_config = recipe.hf_config(tokenizer)
    config = TextTargetConfig.from_hf(hf_config)
    graph, params = nnx.split(TextModel(config, rngs=nnx.Rngs(recipe.seed)))
    family = family_of(target_config)
    encoder = TextEncoder(PromptAdapter(config), family.adapter(family.config_from_hf(target_config)))
    answers = AnswerSource(recipe.answers_dir).records
    training, validation = pipelines(recipe, answers, held_out_of(recipe.validation_records, answers), encoder)

    def loss(params, constants, batch, key):
        model = nnx.merge(graph, params)
        features = read_prompts(model, batch["prompts"]).features
        return next_token_loss(model.language_model, features, batch["prompts"].input_ids, batch["loss_mask"])

    def export(params, folder: Path, about: dict) -> None:
        files = recipe.folder / "tokenizer"
        tokenizer.save_pretrained(files)
        save_model(nnx.merge(graph, params), hf_config, files, folder, recipe.save_dtype)

    return Task(
        params=params,
        constants=None,
        loss=loss,
        batches=training.batches,
        validation=validation,
        export=export,
        shortfall=training.shortfall,
    )
