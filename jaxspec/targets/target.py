"""A loaded target: the model of a Hugging Face folder together with its processor."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.checkpoints.tensors import read_folder
from jaxspec.quantization import check_scheme
from jaxspec.quiet import quiet
from jaxspec.sharding import checked_mesh
from jaxspec.splitting import mesh_of
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.generation import GenerationDefaults, stop_tokens
from jaxspec.targets.images import Images
from jaxspec.targets.processors import check_processor, read_processor
from jaxspec.targets.prompts import prompts_of, stack_prompts
from jaxspec.targets.registry import family_of, load_model, read_config

DTYPES = ("float32", "bfloat16", "float16")


class Target:
    """Made by `load_target`. `model` holds the parameters and `adapter` is its family's host half; everything else is
    about the folder it came from and how it was read."""

    def __init__(
        self,
        model: VisionLanguageModel,
        adapter: PromptAdapter,
        processor: Any,
        path: Path | None,
        stop_token_ids: tuple[int, ...],
        generation_defaults: GenerationDefaults = GenerationDefaults(),
        quantize: str | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.processor = processor
        self.path = path
        self.stop_token_ids = stop_token_ids
        self.generation_defaults = generation_defaults
        self.quantize = quantize
        self._fingerprint: str | None = None

    @property
    def config(self) -> TargetConfig:
        return self.model.config

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that its parameters lie on, if it is on several devices."""
        return mesh_of(nnx.state(self.model))

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def fingerprint(self) -> str | None:
        """Names the weights: a hash over every tensor's name, shape, dtype and first values in the files, read once.
        None for a target that came from no folder."""
        if self.path is None or self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, array in sorted(read_folder(self.path).items()):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array.reshape(-1)[:256]).tobytes())
        self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def logits(self, inputs: Mapping[str, Any]) -> jax.Array:
        """Logits f32 `[B, S, V]` of a forward pass without cache.

        `inputs` is what the Hugging Face processor returns with `return_tensors="np"`: `input_ids` `[B, S]`, and
        `attention_mask` `[B, S]` (padding on either side) and its image arrays where there are any.
        Logits at padded positions mean nothing.

        Raises ValueError for a row without tokens, tokens outside the embedding, and images that have not as many
        tokens as features.
        """
        prompts = prompts_of(self.adapter, inputs, self.tokenizer if self.processor else None)
        shape = np.asarray(inputs["input_ids"]).shape
        batch = stack_prompts(self.adapter, prompts, shape[1])
        logits = full_logits(self.model, batch.input_ids, batch.lengths, batch.images, batch.position_ids)
        mask = np.asarray(inputs.get("attention_mask", np.ones(shape))).astype(bool)
        # Without their padding the tokens of a row stand at its beginning.
        places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return jnp.take_along_axis(logits, jnp.asarray(places)[..., None], axis=1)


@jax.jit
def full_logits(
    model: VisionLanguageModel,
    input_ids: jax.Array,
    lengths: jax.Array,
    images: Images[jax.Array] | None = None,
    position_ids: jax.Array | None = None,
) -> jax.Array:
    """Logits f32 `[B, S, V]` of right-padded prompts i32 `[B, S]`; positions i32 `[3, B, S]` where the family has its
    own."""
    image_ids = None if images is None else images.ids
    return model.unembed(model.prefill(model.embed(input_ids, images), lengths, image_ids, position_ids)[0])


def load_target(
    path_or_repo_id: str | Path,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
) -> Target:
    """A target from a Hugging Face folder, or from the hub by repo id.

    `dtype` is that of parameters and computation (logits are always float32). With a `mesh`
    (`jaxspec.sharding.decoding_mesh`) the parameters are split over its `fsdp` and `tensor` axes, and whatever decodes
    with the target does so on all of its devices. `quantize="int8"` makes the text model's matrices int8 while they are
    read, with a float scale for each output channel (docs/QUANTIZATION.md): half the memory of bfloat16.

    Raises FileNotFoundError where there is no such folder, ValueError for an unsupported model_type, weights that are
    quantised in the files, adapters and other formats (by name), a mesh with other axes or whose `tensor` does not
    divide the heads, tensors that do not fit the config (listed at once) or are not finite in `dtype`, and a processor
    that does not fit it. The folder's sampling defaults are kept in `generation_defaults`, for a `Generator` to apply;
    warns once of those that it has no parameter for.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_scheme(quantize)
    mesh = checked_mesh(mesh)
    path = resolve_folder(path_or_repo_id)
    hf_config = read_config(path)
    defaults = GenerationDefaults.read(path)
    model = load_model(path, jnp.dtype(dtype), mesh, quantize)
    with quiet("transformers"):  # it warns that torchvision is missing; its PIL image processors are the ones we want
        family = family_of(hf_config)
        processor = read_processor(family.load_processor, path, family.images)
        adapter = family.adapter(model.config)
        check_processor(processor, adapter)
    stop_token_ids = stop_tokens(path, hf_config, processor.tokenizer)
    if warning := defaults.warning():
        warnings.warn(warning, stacklevel=2)
    return Target(model, adapter, processor, path, stop_token_ids, defaults, quantize)
