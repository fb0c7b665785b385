"""transformers' LLaVA-7B with random weights on the same card, autoregressive: the same prompt, image and dtype.

JAX runs nothing here: the card is torch's alone.
"""

import importlib.metadata
import importlib.util
import os
import statistics
from functools import partial

from benchmarks.gpu_parts.part import BEFORE, BEHIND, Part, taking_turns, timed

NEW = 48


def measure(part: Part) -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        part.left_out.append(f"transformers on this card: {', '.join(missing)} is not installed")
        return
    import torch

    device = "cpu" if part.tiny else "cuda"
    if not part.tiny and not torch.cuda.is_available():
        part.left_out.append("transformers on this card: torch finds no GPU")
        return
    part.about |= {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "torch_device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    model = random_llava(part.tiny, device)
    cost = 1.0
    for batch in (1, 8):
        before = part.passed
        part.trying(f"transformers, batch {batch}", cost, partial(generate, part, model, batch, device))
        cost = part.passed - before


def random_llava(tiny: bool, device: str):
    """Published sizes, weights as transformers draws them."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    os.environ["JAX_PLATFORMS"] = "cpu"
    from benchmarks.published import LLAVA_7B, TOY
    from jaxspec.targets.text import published_text_config

    sizes = TOY if tiny else LLAVA_7B
    vision = sizes.vision
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        text_config=published_text_config(sizes.text, "llama"),
        image_token_index=sizes.image_token_id,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def generate(part: Part, model, batch: int, device: str) -> None:
    """Seconds of `generate` of one token, and of more of them: the difference is what a step takes."""
    import torch

    config = model.config
    image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    ids = torch.randint(0, config.image_token_index, (batch, BEFORE + image + BEHIND), device=device)
    ids[:, BEFORE : BEFORE + image] = config.image_token_index
    size = config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=model.dtype)

    def run(new: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        if out.shape[1] != ids.shape[1] + new:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} tokens were generated instead of {new}")
        if device == "cuda":
            torch.cuda.synchronize()

    new = 8 if part.tiny else NEW
    run(2)
    arms = taking_turns([lambda: timed(partial(run, 1), 1)[0], lambda: timed(partial(run, 1 + new), 1)[0]], 3)
    first, whole = map(statistics.median, arms)
    part.add(
        "transformers",
        shape="llava-7b",
        batch=batch,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(config, "_attn_implementation", "")),
        step_ms=1e3 * (whole - first) / new,
        prefill_ms=1e3 * first,
    )
