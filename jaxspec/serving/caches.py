"""What an engine keeps to read prompts faster: tables of images, and prompts that were read before. Both are bounded in
bytes; what was not used for longest goes first."""

import dataclasses
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.speculation.prefill import Read, rewind
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.chunks import image_ids_of
from jaxspec.targets.prompts import EncodedPrompt

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

log = logging.getLogger(__name__)
LEAST_PREFIX = 16
"""Prefixes of fewer tokens are not worth a program of their own."""


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """How a cache is used; counts are since its start."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    bytes: int = 0
    limit: int = 0  # bytes


class ByteCache(Generic[Key, Value]):
    """Values by key, of at most `limit` bytes together. One thread uses it, any may ask for `use`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._bytes = 0

    def get(self, key: Key) -> Value | None:
        """What is there under this key, which counts as a hit or a miss."""
        with self._lock:
            found = self._values.get(key)
            self._hits, self._misses = self._hits + (found is not None), self._misses + (found is None)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes, unless it is larger than the cache."""
        with self._lock:
            self._drop(key)
            if size > self.limit:
                return
            self._values[key] = value, size
            self._bytes += size
            while self._bytes > self.limit:
                self._drop(next(iter(self._values)))

    def drop(self, key: Key) -> None:
        """Forget it, if it is there."""
        with self._lock:
            self._drop(key)

    def keys(self) -> list[Key]:
        with self._lock:
            return list(self._values)

    def use(self) -> CacheUse:
        with self._lock:
            return CacheUse(self._hits, self._misses, len(self._values), self._bytes, self.limit)

    def _drop(self, key: Key) -> None:
        _, size = self._values.pop(key, (None, 0))
        self._bytes -= size


class Prefixes:
    """Prompts that were read, for others that begin alike: the same tokens, and at the places of images the same
    images. What a family reads in both directions (Gemma3's images) is taken whole or not at all."""

    def __init__(self, adapter: PromptAdapter, limit: int) -> None:
        self.adapter = adapter
        self._reads: ByteCache[bytes, Read] = ByteCache(limit)  # by the bytes of `content_of`
        self._told = False

    @property
    def limit(self) -> int:
        """Bytes."""
        return self._reads.limit

    def find(self, prompt: EncodedPrompt) -> tuple[Read | None, int]:
        """What was read of the longest beginning that is known, to be gone on from (it may be consumed), and how many
        tokens that is: fewer than the prompt has. None and 0 where it is not worth it."""
        if not self.limit:
            return None, 0
        content = content_of(self.adapter, prompt)
        best, length = b"", 0
        for key in self._reads.keys():  # noqa: SIM118
            common = common_length(np.frombuffer(key, np.int64), content)
            if common > length:
                best, length = key, common
        length = self._usable(prompt, min(length, len(content) - 1))
        found = self._reads.get(best if length >= LEAST_PREFIX else b"")
        if found is None:
            return None, 0
        lengths = jnp.full((1,), length, jnp.int32)
        return rewind(jax.tree.map(jnp.copy, found), lengths), length

    def keep(self, prompt: EncodedPrompt, read: Read) -> None:
        """Keep a prompt that has been read whole; `read` is not to be consumed any more. Another that it goes on from
        is dropped."""
        content, size = content_of(self.adapter, prompt), nbytes(read)
        if size > self.limit and not self._told:
            self._told = True
            log.warning(
                "a prompt of %d tokens takes %d MiB and is not kept for others that begin alike: what is kept may take "
                "%d MiB (prefix_cache_bytes)",
                len(content), size / 2**20, self.limit / 2**20,
            )  # fmt: skip
        for key in self._reads.keys():  # noqa: SIM118
            known = np.frombuffer(key, np.int64)
            if common_length(known, content) == len(known):
                self._reads.drop(key)
        self._reads.put(content.tobytes(), read, size)

    def use(self) -> CacheUse:
        return self._reads.use()

    def _usable(self, prompt: EncodedPrompt, length: int) -> int:
        """Where reading may go on: not within an image that must be read whole."""
        if not self.adapter.config.reads_images_whole:
            return length
        ids = image_ids_of(self.adapter, prompt)
        while 0 < length < len(ids) and ids[length] >= 0 and ids[length - 1] == ids[length]:
            length -= 1
        return length


def content_of(adapter: PromptAdapter, prompt: EncodedPrompt) -> np.ndarray:
    """I64 `[S]`: what stands at each place, a token or a piece of an image; equal where nothing differs."""
    content = prompt.input_ids.astype(np.int64)
    ids = image_ids_of(adapter, prompt)
    for number, layout in enumerate(prompt.images):
        digest = hashlib.blake2b(layout.key.encode(), digest_size=7).digest()
        places = np.flatnonzero(ids == number)
        content[places] = -1 - (int.from_bytes(digest) + np.arange(len(places)))
    return content


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the first elements are the same."""
    shorter = min(len(one), len(other))
    differing = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differing[0]) if len(differing) else shorter


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
