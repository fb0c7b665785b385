"""What the answers are worth: objects named in "describe" answers against the truth of held-out scenes.

Speed beside an unknown quality says little, and a verifier that let wrong tokens pass would show here.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from jaxspec import demo
from jaxspec.benchmark.run import BASELINE
from jaxspec.demo.scenes import Bar
from jaxspec.demo.scoring import Score, parse_objects, score_objects
from jaxspec.drafters.drafter import Drafter
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import EngineSettings
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target

BATCH = 8


def score_answers(
    target: Target,
    drafters: Mapping[str, tuple[Drafter, TreeConfig]],
    count: int,
    seed: int,
    max_new_tokens: int,
    progress: Callable[[str, int], AbstractContextManager[Any]],
    sampling: SamplingParams = SamplingParams(temperature=0),
    **options: Any,
) -> list[dict]:
    """Precision, recall and F1 of greedy answers about `count` test scenes, per arm and kind of scene: autoregressive
    decoding first, then every drafter. `options` are further `EngineSettings`.

    An object counts where place, colour and shape are right (a bar: colour and value); `strict` also wants the size.
    """
    examples = demo.examples("test", count, seed, kinds=["describe"])
    prompts = [encode_prompt(target, each.question, (each.image,)) for each in examples]
    slots = min(BATCH, count)
    settings = EngineSettings(
        max_num_seqs=slots, max_queued_requests=count, batch_invariant=True, warm_up=False, **options
    )
    arms: dict[str, tuple[Drafter | None, TreeConfig | None]] = {BASELINE: (None, None), **drafters}
    entries, reference = [], None
    with progress("scoring", len(arms) * count) as bar:
        for name, (drafter, tree) in arms.items():
            results = []
            with Engine(target, drafter, tree, settings) as engine:
                for stream in [engine.submit(prompt, sampling, max_new_tokens) for prompt in prompts]:
                    results.append(stream.result().checked())
                    bar.advance()
            tokens = [result.tokens.tolist() for result in results]
            reference = reference or tokens
            kinds = ["chart" if isinstance(each.objects[0], Bar) else "shapes" for each in examples]
            claims = [parse_objects(result.text) for result in results]
            entries.append({
                "arm": name,
                "batch": slots,
                "identical": sum(ours == theirs for ours, theirs in zip(tokens, reference, strict=True)),
                "scenes": {
                    kind: scores(examples, claims, [kind in ("all", each) for each in kinds])
                    for kind in ("all", *sorted(set(kinds)))
                },
                "answers": [{"kind": kind, "text": result.text} for kind, result in zip(kinds, results, strict=True)],
            })  # fmt: skip
    return entries


def scores(examples: list[demo.Example], claims: list, chosen: list[bool]) -> dict:
    """Both scores over the scenes that `chosen` marks."""
    made: dict = {"scenes": sum(chosen)}
    for name, strict in (("main", False), ("strict", True)):
        each = (
            score_objects(claim, example.objects, strict)
            for example, claim, wanted in zip(examples, claims, chosen, strict=True)
            if wanted
        )
        total = sum(each, Score())
        made[name] = {"precision": total.precision, "recall": total.recall, "f1": total.f1}
    return made
