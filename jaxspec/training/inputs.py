"""What a run reads and another command makes: its absence is told before anything is loaded, with that command."""

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
MINUTES = 10
"""About how long that takes on two cores of a CPU."""


def check_inputs(recipe: Recipe) -> None:
    """Raises FileNotFoundError where what the recipe starts from, or learns from, has not been made yet."""
    packaged = packaged_recipes()
    for field in FOLDERS:
        folder = getattr(recipe, field, None)
        if folder is None or (field == "lm" and recipe.init_from is not None):  # which then takes its place
            continue
        path = Path(folder)
        if path.name == "export" and path.parent.name in packaged and not path.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}, the {field} of {recipe.name}; it is made by: "
                f"python -m jaxspec train {path.parent.name}"
            )
    answers = getattr(recipe, "answers_dir", None)
    if answers is None or getattr(recipe, "conversations", None) is not None or Path(answers, ABOUT).exists():
        return
    if recipe.target in (*EMBEDDED_TARGET, *EMBEDDED_TARGET.values()):
        command = SCENES.format(target=recipe.target, output=answers)
        about = f"about {MINUTES} minutes on two CPU cores"
    else:
        command = f"python -m jaxspec distill --data PROMPTS --target {recipe.target} --output {answers}"
        own = packaged.get(recipe.name)
        about = f"with the prompts and limits that {own} names" if own else "PROMPTS are yours to choose"
    raise FileNotFoundError(
        f"no answers of the target in {answers}, which {recipe.name} learns from; they are made by: {command} ({about})"
    )
