"""`python -m jaxspec generate`: a question about a picture, and what speculation did for the answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxspec import demo
from jaxspec.benchmark.identity import choice_margin, first_difference
from jaxspec.benchmark.measure import (
    MAX_STOLEN,
    Answer,
    Arm,
    Question,
    Timing,
    interleaved,
    speedup,
    warm_up,
)
from jaxspec.benchmark.report import number
from jaxspec.cli.options import ModelOptions, PenaltyOptions, TreeOptions, load_named_drafter
from jaxspec.cli.output import (
    ACCEPTED_STYLE,
    coloured,
    show_applied,
    show_warning,
    table,
    waiting,
)
from jaxspec.colours import TokenColours
from jaxspec.generator import Generator, Result
from jaxspec.media import open_image
from jaxspec.speculation.params import SAMPLING_ONLY, SamplingParams
from jaxspec.targets.target import Target
from jaxspec.video import Video

AUTOREGRESSIVE, SPECULATIVE = "autoregressive", "speculative"
RUNS, PATIENCE = 3, 3
COLUMNS = (
    "",
    "tokens",
    "time to first token, ms",
    "decode tokens/s",
    "speed-up",
    "mean acceptance length (with bonus)",
    "mean accepted draft tokens (without)",
    "identical tokens",
)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer a question about pictures, with and without speculation.

    Without options: the embedded model and its ViSpec drafter describe the packaged picture.
    """

    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH")] = ()
    """A picture. The packaged one by default, with the embedded target or without a prompt."""
    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH")] = ()
    """A video or an animated picture, for targets that read them. Video files need PyAV:
    `pip install 'jaxspec-vlm[video]'`."""
    prompt: str | None = None
    """The question; "Describe the picture." by default."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions()
    drafter: Annotated[str | None, tyro.conf.arg(metavar="METHOD|PATH|REPO")] = None
    """A method of the embedded model (vispec, its default, eagle2, eaglevlm, massv, medusa, specvlm), lookup (for any
    target), a folder or a repo id. Another target without a drafter decodes autoregressively."""
    tree: Annotated[TreeOptions, tyro.conf.arg(name="")] = TreeOptions()
    temperature: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """0 is greedy. Of sampling, what is not given is what the target's generation_config.json says, else greedy."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Of sampling; 0 is off. For the tree see tree-top-k."""
    min_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    penalties: Annotated[PenaltyOptions, tyro.conf.arg(name="")] = PenaltyOptions()
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="0..20")] = None
    """Also list the log-probability of every token, with so many of the most probable ones."""
    seed: int = 0
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """A text that ends the answer."""
    max_new_tokens: int = 256
    stream: bool = True
    """Show the answer as it comes."""
    save_svg: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also draw what was printed."""

    def run(self, console: Console, arguments: list[str]) -> None:
        del arguments
        given = {name: value for name in SAMPLING_ONLY if (value := getattr(self, name)) is not None}
        given |= self.penalties.given
        sampling = SamplingParams(**given, seed=self.seed, stop=self.stop, logprobs=self.logprobs)
        name = ("vispec" if self.model.embedded else None) if self.drafter is None else self.drafter
        if name is None and self.tree.given:
            raise ValueError("a tree needs a drafter: give --drafter")
        if name is None and self.model.quantize_drafter:
            raise ValueError("quantize-drafter needs a drafter: give --drafter")
        paths = self.image or self.default_images()
        pictures = [open_image(path, f"image {index}") for index, path in enumerate(paths, 1)]
        images = (*pictures, *map(Video.open, self.video))
        default = f"Describe the {'video' if self.video else 'picture'}."
        question = Question(default if self.prompt is None else self.prompt, images)
        with waiting(console, "loading ..."):
            target = self.model.load()
            drafter = load_named_drafter(name, target, self.model.quantize_drafter) if name is not None else None
            options: dict[str, Any] = {
                "max_length": self.model.max_length,
                "generation_config": self.model.generation_config,
            }
            generator = Generator(target, **options)
            show_applied(generator.generation_defaults, sampling.from_folder(generator.generation_defaults))
            sampling = sampling.resolved(generator.generation_defaults)
            arms = [self.arm(AUTOREGRESSIVE, generator)]
            if drafter:
                tree = self.tree.applied(drafter.tree)
                generator = Generator(target, drafter, tree, **options)
                arms.append(self.arm(SPECULATIVE, generator))
        show_question(console, [*paths, *self.video], question)
        with waiting(console, "compiling ..."):
            warm_up(arms, [question], dataclasses.replace(sampling, logprobs=None))
        result = self.show_answer(console, generator, question, sampling)
        if result.logprobs is not None:
            console.print(logprobs_table(console, target.tokenizer, result))
            sampling = dataclasses.replace(sampling, logprobs=None)
        with waiting(console, "measuring ..."):
            asked = {arm.name: arm.asked(question, sampling) for arm in arms}
            answers, stolen, _ = interleaved(asked, RUNS, PATIENCE)
        console.print(
            table(console, COLUMNS, [self.row(arm.name, answers, target, question, sampling) for arm in arms])
        )
        if max(stolen) > MAX_STOLEN:
            console.print(
                f"The host of this virtual machine took up to {max(stolen):.0%} of it: the times are too long."
            )
        if drafter is None:
            console.print("No drafter was given (--drafter): autoregressive decoding only.")
        else:
            show_warning(console, generator.acceptance_warning)
        if self.save_svg:
            console.save_svg(self.save_svg, title="python -m jaxspec generate")

    def default_images(self) -> tuple[Path, ...]:
        question_given = self.prompt is not None and not self.model.embedded
        return () if self.video or question_given else (demo.picture_path(),)

    def arm(self, name: str, generator: Generator) -> Arm:
        return Arm.of(name, generator, self.max_new_tokens)

    def show_answer(
        self, console: Console, generator: Generator, question: Question, sampling: SamplingParams
    ) -> Result:
        """The answer, with the draft's share in colour."""
        colours = TokenColours()
        request = question.prompt, question.images, sampling, self.max_new_tokens
        if self.stream and not self.save_svg:  # a drawing needs whole lines
            result = None
            for piece in generator.stream(*request):
                colours.add(piece.text_ends, piece.accepted)
                console.print(coloured(colours.split(piece.text)), end="", soft_wrap=True)
                result = piece.result
            assert result is not None  # the last piece carries it
        else:
            result = generator.generate(*request)
            colours.add(result.text_ends, result.accepted)
            console.print(coloured(colours.split(result.text)), end="", soft_wrap=not self.save_svg)
        console.print("\n")
        if generator.drafter:
            legend = f"{int(result.accepted.sum())} of {len(result.tokens)} tokens came from the drafter"
            if console.color_system and not console.no_color:
                console.print(
                    Text.assemble((ACCEPTED_STYLE, ACCEPTED_STYLE), f": {legend}; the others from the target.")
                )
            else:
                console.print(f"{legend}, the others from the target.")
        return result

    def row(
        self,
        name: str,
        answers: Mapping[str, Sequence[Answer]],
        target: Target,
        question: Question,
        sampling: SamplingParams,
    ) -> list[str]:
        """What the table says of the arm of that name."""
        timing, baseline = Timing.of(answers[name]), Timing.of(answers[AUTOREGRESSIVE])
        stats, identical = answers[name][0].stats, "-"
        if name != AUTOREGRESSIVE:
            reference = answers[AUTOREGRESSIVE][0].tokens
            position = first_difference(answers[name][0].tokens, reference)
            identical = "yes"
            if position is not None:
                margin = choice_margin(target, question, sampling, reference, position)
                identical = f"no: first at {position}, top-2 margin {margin:.2g}"
        return [
            name,
            str(timing.tokens),
            number(1000 * timing.time_to_first_token, 1),
            number(timing.decode_tokens_per_second, 1),
            number(speedup([baseline], [timing])),
            number(stats.mean_acceptance_length),
            number(stats.mean_accepted_draft_tokens),
            identical,
        ]


def logprobs_table(console: Console, tokenizer: Any, result: Result) -> Table:
    """Every token with its log-probability, and the most probable ones in its place."""
    logprobs = result.logprobs
    assert logprobs is not None

    def spelt(token: int) -> str:
        return repr(tokenizer.decode([token]))

    rows = [
        [spelt(token), f"{own:.3f}", *(f"{spelt(each)} {value:.3f}" for each, value in zip(ids, values, strict=True))]
        for token, own, ids, values in zip(
            result.tokens, logprobs.token_logprobs, logprobs.top_ids, logprobs.top_logprobs, strict=True
        )
    ]
    alternatives = [f"top {place}" for place in range(1, logprobs.top_ids.shape[1] + 1)]
    return table(console, ["token", "log-probability", *alternatives], rows)


def show_question(console: Console, paths: Sequence[str | Path], question: Question) -> None:
    for path, image in zip(paths, question.images, strict=True):
        if isinstance(image, Video):
            size = f"{len(image.frames)} frames, {image.fps:.3g} per second"
        else:
            size = f"{image.width} x {image.height} pixels"
        console.print(f"{Path(path).name}, {size}", style="dim", markup=False)
    console.print(question.prompt, style="bold", markup=False)
    console.print()
