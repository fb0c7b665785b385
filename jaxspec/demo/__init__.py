"""The demo: rendered scenes with known truth, and the small models trained on them that ship with the package.

The library has no demo branch: this package only draws pictures, words questions and knows where the files are.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Collection

from PIL import Image

from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.scenes import Bar, SceneObject, render
from jaxspec.demo.scoring import objects_of

_FOLDER = pathlib.Path(__file__).parent

EMBEDDED_DRAFTERS = ("eagle2", "eaglevlm", "massv", "medusa", "specvlm", "vispec")
"""The methods that a drafter of the embedded target ships for; as a folder each is called `demo:METHOD`."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture with one question.

    Attributes:
      image: RGB picture, 288 x 288 pixels.
      question: the question in plain English, without a chat template.
      answer: a true answer; other wordings are true as well.
      objects: the scene's objects in raster order, or its bars from left to right.
      kind: "describe", "count", "compare", "locate" or "read".
    """

    image: Image.Image
    question: str
    answer: str
    objects: list[SceneObject | Bar]
    kind: str


def examples(split: str, n: int, seed: int = 0, kinds: Collection[str] | None = None) -> list[Example]:
    """The first `n` examples of a split: the first question about each scene.

    Args:
      split: "train", "validation" or "test"; no two splits share a scene's seed.
      n: how many examples.
      seed: with 0 these are the scenes of the `jaxspec_scenes` data set; any other seed gives fresh ones.
      kinds: keeps only these kinds of question, and goes on through the split until there are `n`.

    Raises:
      ValueError: unknown split or kind.
    """
    known = {"describe", "count", "compare", "locate", "read"}
    if kinds is not None and (not kinds or not set(kinds) <= known):
        raise ValueError(f"kinds must be among {', '.join(sorted(known))}; got {sorted(kinds)!r}.")
    found: list[Example] = []
    for index in itertools.count():
        if len(found) >= n:
            break
        scene, turns = numbered_scene(split, index, seed)
        turn = turns[0]
        if kinds is None or turn.kind in kinds:
            found.append(Example(render(scene), turn.question, turn.answer, objects_of(scene), turn.kind))
    return found


def target_path() -> pathlib.Path:
    """Folder of the embedded target, an ordinary Hugging Face LLaVA-1.5 folder. Wherever a folder can stand it is also
    called `demo`."""
    return _existing(_FOLDER / "weights" / "target")


def drafter_path(method: str) -> pathlib.Path:
    """Folder of the embedded drafter of that method, also called `demo:METHOD`.

    Raises:
      FileNotFoundError: there is none for the method.
    """
    if method not in EMBEDDED_DRAFTERS:
        raise FileNotFoundError(
            f"the embedded model has no drafter {method!r}: there are "
            f"{', '.join(f'demo:{each}' for each in EMBEDDED_DRAFTERS)} (train.py trains others)"
        )
    return _existing(_FOLDER / "weights" / method)


def picture_path() -> pathlib.Path:
    """The packaged example picture."""
    return _existing(_FOLDER / "pictures" / "scene.png")


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} belongs to the package and is not there: install jaxspec-vlm again")
    return path
