"""What the answers are worth: objects named in "describe" answers against the truth of held-out scenes.

Speed beside an unknown quality says little, and a verifier that let wrong tokens pass would show here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from jaxspec import demo
from jaxspec.demo.scenes import Bar
from jaxspec.demo.scoring import Score, parse_objects, score_objects
from jaxspec.generator import Generator
from jaxspec.speculation.params import SamplingParams

BATCH = 8


def score_answers(
    generators: dict[str, Generator],
    count: int,
    seed: int,
    max_new_tokens: int,
    progress: Callable[[str, int], AbstractContextManager[Any]],
    sampling: SamplingParams = SamplingParams(temperature=0),
) -> list[dict]:
    """Precision, recall and F1 of greedy answers about `count` test scenes, per generator and kind of scene.

    An object counts where place, colour and shape are right (a bar: colour and value); `strict` also wants the size.
    """
    examples = demo.examples("test", count, seed, kinds=["describe"])
    entries, reference = [], None
    with progress("scoring", len(generators) * -(-count // BATCH)) as bar:
        for name, generator in generators.items():
            results = []
            for start in range(0, count, BATCH):
                batch = examples[start : start + BATCH]
                # The last batch is filled up: another batch size would be another program.
                full = [*batch, *batch[-1:] * (BATCH - len(batch))]
                prompts, images = [each.question for each in full], [(each.image,) for each in full]
                answers = generator.generate_batch(prompts, images, sampling, max_new_tokens)
                results += [answer.checked() for answer in answers[: len(batch)]]
                bar.advance()
            tokens = [result.tokens.tolist() for result in results]
            reference = reference or tokens
            kinds = ["chart" if isinstance(each.objects[0], Bar) else "shapes" for each in examples]
            claims = [parse_objects(result.text) for result in results]
            entries.append({
                "arm": name,
                "batch": BATCH,
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
