"""transformers' own greedy `generate` as an arm of the benchmark. The only place of the library that imports torch."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from jaxspec.benchmark.measure import WARM_UPS, Arm
from jaxspec.detokenizer import detokenize
from jaxspec.media import open_image
from jaxspec.metrics import GenerationStats
from jaxspec.prompting import normalise_messages
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.target import Target

NAME = "transformers generate"


@dataclasses.dataclass(frozen=True)
class TransformersAnswer:
    tokens: np.ndarray  # i32 [n]
    text: str
    stats: GenerationStats


class Clock:
    """A streamer that notes when the first token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        del value
        self.times.append(time.perf_counter())  # the prompt first, then token by token

    def end(self) -> None:
        pass


def transformers_arm(
    target: Target, dtype: str, max_new_tokens: int, sampling: SamplingParams = SamplingParams()
) -> tuple[Arm, dict]:
    """The arm, and what a report must say about it. It decodes greedily, with the repetition penalty and the fewest
    tokens of `sampling`. Raises ValueError where torch is not installed, and for penalties that `generate` does not
    have."""
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            raise ValueError(f"transformers' generate has no {name}, which the folder sets to {value:g}")
    try:
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig
    except ImportError as error:
        raise ValueError(
            "--transformers compares with transformers' models, which need torch; install it with: "
            "pip install 'jaxspec-vlm[test]'"
        ) from error
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(target.path, dtype=getattr(torch, dtype)).to(device).eval()
    # In place of the folder's own, which may ask for what no other arm has.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=float(sampling.repetition_penalty),
        min_new_tokens=sampling.min_tokens,
        eos_token_id=list(target.stop_token_ids) or None,
        pad_token_id=0,
    )

    def run(question, limit: int) -> TransformersAnswer:
        messages, images = normalise_messages(question.prompt, list(question.images))
        text = target.processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [open_image(image) for image in images]
        inputs = target.processor(text=[text], images=pictures or None, return_tensors="pt").to(device)
        inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        clock = Clock()
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=limit, streamer=clock)
        ended = time.perf_counter()
        prompt_tokens = inputs["input_ids"].shape[1]
        tokens = output[0, prompt_tokens:].cpu().numpy().astype(np.int32)
        first = clock.times[1]
        stats = GenerationStats.of(
            [len(tokens) - 1],
            prompt_tokens=prompt_tokens,
            generated_tokens=len(tokens),
            prefill_seconds=first - started,
            decode_seconds=ended - first,
        )
        return TransformersAnswer(tokens, detokenize(target.tokenizer, tokens), stats)

    arm = Arm(
        NAME,
        answer=lambda question, sampling: run(question, max_new_tokens),
        warm_up=lambda question, sampling: run(question, min(max_new_tokens, WARM_UPS)),
    )
    about = {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype),
    }
    return arm, about
