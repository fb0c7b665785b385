"""What an engine tells of itself."""

import dataclasses

from jaxspec.serving.caches import CacheUse


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine did so far, and does now; totals count from its start."""

    running: int  # requests that are being answered
    waiting: int  # in the queue
    slots: int
    drafts: int = 0  # rounds of a row with a draft
    draft_tokens: int = 0  # most draft tokens that these could have accepted
    accepted_tokens: int = 0  # draft tokens that they accepted
    accepted_at_position: tuple[int, ...] = ()  # entry i: rounds in which at least i + 1 draft tokens were accepted
    rounds: int = 0  # of a row, with drafts or without
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)  # finish_reason -> requests
    images: CacheUse = CacheUse()
    prefixes: CacheUse = CacheUse()
    compilations: int = 0
    tree: str = ""  # what the latest rounds drafted: depth/top_k/total_tokens, or none
    costs: tuple[tuple[int, str, float, float], ...] = ()  # slots, tree, seconds a round, tokens a round

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per round, the bonus token included; of rounds with a draft."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else float("nan")
