"""`--speculative-config`: which drafter speculates and how, as JSON with the names that vLLM and SGLang made known."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxspec.checkpoints.hub import EMBEDDED
from jaxspec.checks import shown
from jaxspec.demo import EMBEDDED_DRAFTERS
from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.drafters.registry import METHODS
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target

NONE = "none"
TREE_NAMES = {
    "depth": "depth",
    "num_steps": "depth",
    "top_k": "top_k",
    "eagle_topk": "top_k",
    "total_tokens": "total_tokens",
    "num_draft_tokens": "total_tokens",
    "noise_weight": "noise_weight",
}
"""What a key is called in `TreeConfig`; of two names for one thing the second is SGLang's."""
KEYS = ("method", "model", "num_speculative_tokens", *TREE_NAMES, "adaptive")


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """What is asked for; made by `parse`, of which it has the errors.

    Attributes:
      method: of `METHODS`, "none" for autoregressive decoding, or None for whatever `model` holds.
      model: folder or repo id of the drafter; None for the embedded drafter of the method.
      tree: fields of `TreeConfig` that replace the drafter's own.
      chain: draft tokens of a chain, instead of a tree.
      adaptive: whether only as much is drafted as pays at the moment.
    """

    method: str | None = None
    model: str | None = None
    tree: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chain: int | None = None
    adaptive: bool = True

    @classmethod
    def default(cls, target: str) -> "SpeculativeConfig":
        """What applies where nothing is said: the embedded target speculates with its ViSpec drafter, others do not."""
        return cls("vispec") if target == EMBEDDED else cls(NONE)

    @classmethod
    def parse(cls, text: str) -> "SpeculativeConfig":
        """From JSON: an object, or null for autoregressive decoding. Raises ValueError for what it cannot be, unknown
        keys by name."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"speculative-config is not JSON: {error}; got {shown(text)}") from None
        if raw is None:
            return cls(NONE)
        if not isinstance(raw, dict):
            raise ValueError(
                f'speculative-config must be a JSON object such as {{"method": "vispec"}}, got {shown(raw)}'
            )
        if unknown := [key for key in raw if key not in KEYS]:
            raise ValueError(f"speculative-config has unknown keys: {', '.join(unknown)}; known: {', '.join(KEYS)}")
        given = {key: value for key, value in raw.items() if value is not None}
        for key in ("method", "model"):
            if not isinstance(given.get(key, ""), str):
                raise ValueError(f"speculative-config: {key} must be a string, got {shown(given[key])}")
        adaptive = given.get("adaptive", True)
        if not isinstance(adaptive, bool):
            raise ValueError(f"speculative-config: adaptive must be true or false, got {shown(adaptive)}")
        method, model = given.get("method"), given.get("model")
        if method is not None and method not in (*METHODS, NONE):
            raise ValueError(f"speculative-config: method {method!r} is not known; known: {', '.join(METHODS)}, {NONE}")
        tree, chain = tree_of(given), given.get("num_speculative_tokens")
        if tree and chain is not None:
            raise ValueError("speculative-config: num_speculative_tokens makes a chain; give it or a tree, not both")
        if method == NONE and len(given) > 1:
            others = ", ".join(key for key in given if key != "method")
            raise ValueError(f"speculative-config: with method {NONE!r} nothing else can be given, got {others}")
        if method is None and model is None:
            raise ValueError("speculative-config needs a method, a model or both")
        return cls(method, model, tree, chain, adaptive)

    def with_tree(self, fields: Mapping[str, Any]) -> "SpeculativeConfig":
        """The same with fields of the tree that were given elsewhere. Raises ValueError where they say something else
        than it does, or there is nothing that drafts trees."""
        if not fields:
            return self
        names = " and ".join(fields)
        if self.method == NONE:
            raise ValueError(f"{names} of a tree needs a drafter: give speculative-config a method or a model")
        if self.chain is not None:
            raise ValueError(f"{names} of a tree and num_speculative_tokens in speculative-config, a chain: give one")
        for name, value in fields.items():
            if self.tree.get(name, value) != value:
                said = f"{name} is {shown(value)}, but {shown(self.tree[name])} in speculative-config"
                raise ValueError(f"{said}; give it once")
        return dataclasses.replace(self, tree={**self.tree, **fields})

    def load(
        self, target: Target, embedded: bool, quantize: str | None = None
    ) -> tuple[Drafter | None, TreeConfig | None]:
        """The drafter with its tree, for a loaded target; (None, None) for autoregressive decoding. `embedded`: whether
        the target is the one that ships with the package, which has drafters by the method's name. `quantize` is as of
        `load_drafter`.

        Raises ValueError or FileNotFoundError where there is no such drafter, it is of another method or target, or it
        cannot draft such a tree.
        """
        if self.method == NONE:
            return None, None
        name = self.model
        if name is None:
            name = str(self.method)
            if METHODS[name].without_folder is None:
                if not embedded:
                    raise ValueError(f'speculative-config: method "{name}" needs a model: a folder or repo id')
                if name not in EMBEDDED_DRAFTERS:
                    raise ValueError(f'speculative-config: the embedded target has no "{name}" drafter')
                name = f"{EMBEDDED}:{name}"
        drafter = load_drafter(name, target, quantize=quantize)
        if self.method is not None and drafter.method != self.method:
            raise ValueError(f'speculative-config: {name} is a "{drafter.method}" drafter, not a "{self.method}" one')
        try:
            if self.chain is not None:
                return drafter, TreeConfig.chain(self.chain, noise_weight=drafter.tree.noise_weight)
            return drafter, dataclasses.replace(drafter.tree, **self.tree)
        except ValueError as error:
            raise ValueError(f"speculative-config: {error}") from None


def tree_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tree; each under one of its names. Raises ValueError for two."""
    tree: dict[str, Any] = {}
    for key, field in TREE_NAMES.items():
        if key in given:
            if field in tree:
                raise ValueError(f"speculative-config: {key} is another name of {field}; give one of them")
            tree[field] = given[key]
    return tree
