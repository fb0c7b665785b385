"""The host half of a target family: what its prompts are made of, in numpy.

A family is a config (what its folder says), a model (what runs on the device) and an adapter. This one knows how images
are marked in a text and in its tokens, how a processor's outputs become layouts of images, how their pixels go into the
tower and which positions tokens have. It holds no parameters, and the model knows nothing of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from jaxspec.targets.contract import TargetConfig
from jaxspec.targets.images import ImageLayout, Images, stack_entries, table_index

Layout = TypeVar("Layout", bound=ImageLayout)


@dataclasses.dataclass(frozen=True)
class PromptAdapter(Generic[Layout]):
    """That of a family that reads only text; the others' are subclasses, each with its own kind of config."""

    config: TargetConfig

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for image features; the first stands for those of an image. None in a family that reads only
        text."""
        return ()

    @property
    def video_token_id(self) -> int | None:
        """That of the ids which stands for videos, where the family reads them."""
        return None

    @property
    def shared_features(self) -> int:
        """How many features at the beginning of the table belong to no image."""
        return 0

    @property
    def processor_settings(self) -> dict[str, Any]:
        """What the folder's processor (or the image processor in it) must be set to, so that it writes as many image
        tokens as there are features: attributes by the names that its files give them."""
        return {}

    def image_mark(self, processor: Any) -> str | None:
        """What marks an image in the text that the processor reads; None where the family reads none."""
        return processor.image_token if self.image_token_ids else None

    def video_mark(self, processor: Any) -> str | None:
        """The same for a video."""
        return None if self.video_token_id is None else processor.video_token

    def lay_out(self, inputs: Mapping[str, Any]) -> list[Layout]:
        """The images of a processor's outputs, in reading order. Raises ValueError for pixels of a shape that the tower
        does not read."""
        return []

    def collate(self, layouts: Sequence[Layout]) -> Any:
        """The pixels of several images as the tower reads them."""
        return stack_entries(layouts)

    def is_image(self, input_ids: np.ndarray) -> np.ndarray:
        """Where image features stand: bool, in the shape of the ids."""
        return np.isin(input_ids, self.image_token_ids)

    def place(self, layouts: Sequence[Layout], input_ids: np.ndarray) -> Images[np.ndarray] | None:
        """The images, in reading order, at the image tokens of ids `[B, S]`; None where there are no images.

        Raises ValueError where there are not as many tokens as the images have; `check_images` tells images apart.
        """
        if not layouts:
            return None
        is_image = self.is_image(input_ids)
        marks, tokens = int(is_image.sum()), sum(layout.tokens for layout in layouts)
        if marks != tokens:
            raise ValueError(f"the prompts have {marks} image tokens, the images {tokens}")
        starts = self.shared_features + np.cumsum([0, *(layout.table_size for layout in layouts)])
        table = [table_index(each, start) for each, start in zip(layouts, starts, strict=False)]
        index, ids = np.zeros(is_image.shape, np.int32), np.full(is_image.shape, len(layouts), np.int32)
        index[is_image] = np.concatenate(table)
        ids[is_image] = np.repeat(np.arange(len(layouts)), [layout.tokens for layout in layouts])
        ids = np.where(is_image, ids - ids.min(axis=1, keepdims=True), -1)
        return Images(self.collate(layouts), index, ids)

    def position_ids(self, input_ids: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray | None:
        """Positions i32 `[3, S]` of one prompt where they are not 0, 1, 2, ..; the token after it stands at their
        largest plus 1."""
        return None
