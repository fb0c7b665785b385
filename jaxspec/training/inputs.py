"""What a run reads and another command makes: its absence is told before anything is loaded, with that command."""

from collections.abc import Iterator
from pathlib import Path

from jaxspec.data.answers import ABOUT
from jaxspec.recipe_files import packaged_recipes
from jaxspec.training.recipe import EMBEDDED_TARGET, Recipe

FOLDERS = ("vision_from", "target", "lm", "init_from")
"""Fields that hold what was trained before."""
SCENES = (
    "python -m jaxspec distill --data scenes --target {target} --output {output} --count 3072 --temperature 1 "
    "--sampled-share 0.5 --max-new-tokens 160 --max-length 1024"
)
"""What the embedded target's drafters learn from."""
MINUTES = 6
"""About how long that takes on two cores of a CPU."""


def check_inputs(recipe: Recipe) -> None:
    """Raises FileNotFoundError, naming the commands, where what the recipe learns from or starts from is yet to be
    made."""
    lacking = [*lacking_answers(recipe), *lacking_folders(recipe)]
    if lacking:
        raise FileNotFoundError(f"{recipe.name} reads what is not there yet: {'; '.join(lacking)}")


def lacking_answers(recipe: Recipe) -> Iterator[str]:
    answers = getattr(recipe, "answers_dir", None)
    if answers is None or getattr(recipe, "conversations", None) is not None or Path(answers, ABOUT).exists():
        return
    target = getattr(recipe, "target", None)
    if target in (*EMBEDDED_TARGET, *EMBEDDED_TARGET.values()):
        command = SCENES.format(target=target, output=answers)
        about = f"about {MINUTES} minutes on two CPU cores"
    else:
        command = f"python -m jaxspec distill --data PROMPTS --target {target} --output {answers}"
        own = packaged_recipes().get(recipe.name)
        about = f"with the prompts and limits that {own} names" if own else "PROMPTS are yours to choose"
    yield f"its target's answers in {answers}, made by `{command}` ({about})"


def lacking_folders(recipe: Recipe) -> Iterator[str]:
    packaged = packaged_recipes()
    for field in FOLDERS:
        folder = getattr(recipe, field, None)
        if field == "lm" and getattr(recipe, "init_from", None) is not None:  # which then takes its place
            continue
        if folder is None:
            continue
        path = Path(folder)
        if path.name == "export" and path.parent.name in packaged and not path.is_dir():
            yield f"its {field} {folder}, made by `python -m jaxspec train {path.parent.name}`"
