"""What the web page shows of an answer while it comes, and of two answers side by side: HTML, made of numbers and
escaped text alone."""

import dataclasses
import html
import math
import time
from collections.abc import Sequence

import numpy as np

from jaxspec.colours import TokenColours, as_html, attributes
from jaxspec.generator import Piece, Result
from jaxspec.metrics import Acceptance, emitted_per_round
from jaxspec.serving.requests import Served

CSS = """
.panels { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }
.panel, .verdict, .sentence { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 14px;
  background: var(--block-background-fill); color: var(--body-text-color); }
.panel { display: flex; flex-direction: column; gap: 10px; min-width: 0; }
.panel h3 { margin: 0; font-size: 15px; font-weight: 600; display: flex; flex-wrap: wrap; gap: 2px 10px;
  justify-content: space-between; align-items: baseline; }
.panel h3 small { font-weight: 400; font-size: 12px; opacity: 0.75; }
.answer { min-height: 7.5em; font-size: 16px; line-height: 1.75; overflow-wrap: anywhere; }
.hint { opacity: 0.75; font-size: 14px; line-height: 1.5; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(102px, 1fr)); gap: 10px; margin: 0;
  border-top: 1px solid var(--border-color-primary); padding-top: 10px; }
.numbers div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.numbers dt { font-size: 12px; line-height: 1.3; opacity: 0.75; }
.numbers dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 0 2px 10px; }
.legend span { padding: 0 5px; }
.verdict { margin-top: 12px; line-height: 1.5; }
.verdict strong { font-size: 17px; }
.sentence { border-left: 4px solid #c77700; line-height: 1.5; margin-bottom: 12px; }
"""
WAITING = "waiting for the first token ..."
ENDS = {
    "stop": "complete",
    "length": "ended by the limit of tokens",
    "cancelled": "stopped",
    "error": "ended by an error",
}
"""What the page calls a finish_reason."""


@dataclasses.dataclass
class Panel:
    """One answer on its way.

    Attributes:
      title: what stands above it.
      drafting: whether a drafter takes part.
      depth: most draft tokens that a round can accept.
      note: what is said in place of an answer that has not begun.
      tree: what the engine drafted of late, "none" where that pays most.
    """

    title: str
    drafting: bool
    depth: int
    note: str = WAITING
    tree: str = ""
    colours: TokenColours = dataclasses.field(default_factory=TokenColours)
    written: list[str] = dataclasses.field(default_factory=list)  # HTML, piece by piece
    result: Result | None = None
    served: Served | None = None
    first: tuple[float, int] | None = None  # when tokens came first, and how many
    latest: float = 0.0

    def add(self, piece: Piece, served: Served | None) -> None:
        """Take in the next piece; `served` comes with the last."""
        self.latest = time.perf_counter()
        self.colours.add(piece.text_ends, piece.accepted)
        self.written.append(as_html(self.colours.split(piece.text)))
        if self.first is None and self.colours.ends:
            self.first = self.latest, len(self.colours.ends)
        self.result, self.served = piece.result, served

    @property
    def tokens(self) -> int:
        return len(self.colours.ends)

    @property
    def tokens_per_second(self) -> float:
        """After the first token: so far, in the end by the engine's clock. nan where there is nothing to divide."""
        if self.served is not None:
            return ratio(self.tokens - 1, self.served.total_seconds - self.served.first_token_seconds)
        if self.first is None:
            return math.nan
        return ratio(self.tokens - self.first[1], self.latest - self.first[0])

    @property
    def acceptance(self) -> Acceptance:
        """Of the rounds so far."""
        if self.result is not None:
            return self.result.stats
        return Acceptance.from_histogram(emitted_per_round(np.array(self.colours.accepted[1:], bool), self.depth + 1))

    @property
    def complete(self) -> bool:
        """Whether it has ended by itself."""
        return self.result is not None and self.result.finish_reason in ("stop", "length")

    def html(self) -> str:
        """The answer so far with its numbers."""
        state = "answering ..." if self.tokens else self.note
        if self.result is not None:
            state = ENDS.get(self.result.finish_reason, self.result.finish_reason)
        first = math.nan if self.served is None else 1000 * self.served.first_token_seconds
        numbers = [
            ("decode tokens/s", number(self.tokens_per_second, 0)),
            ("tokens", str(self.tokens)),
            ("time to first token, ms", number(first, 0)),
        ]
        if self.drafting:
            acceptance = self.acceptance
            numbers += [
                ("mean acceptance length (with bonus)", number(acceptance.mean_acceptance_length)),
                ("mean accepted draft tokens (without)", number(acceptance.mean_accepted_draft_tokens)),
                ("latest draft tree (depth / top k / tokens)", html.escape(self.tree or "–")),
            ]
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers)
        error = "" if self.result is None or self.result.error is None else sentence(self.result.error)
        return (
            f'<section class="panel" data-state="{"over" if self.result is not None else "running"}">'
            f"<h3>{html.escape(self.title)} <small>{html.escape(state)}</small></h3>"
            f'<div class="answer">{"".join(self.written)}</div>{error}<dl class="numbers">{cells}</dl></section>'
        )


def beside(panels: Sequence[Panel]) -> str:
    """Panels with a legend; what two of them come to, once both are over."""
    legend = LEGEND if any(panel.drafting for panel in panels) else ""
    shown = "".join(panel.html() for panel in panels)
    return f'{legend}<div class="panels">{shown}</div>{verdict(*panels) if len(panels) == 2 else ""}'


def verdict(speculative: Panel, autoregressive: Panel) -> str:
    """Whether two answers that ended by themselves have the same token ids, and how much faster the first one came."""
    if not (speculative.complete and autoregressive.complete):
        return ""
    assert speculative.result is not None and autoregressive.result is not None
    ours, theirs = speculative.result.tokens, autoregressive.result.tokens
    if np.array_equal(ours, theirs):
        said = f"<strong>Identical:</strong> both answers have the same {len(ours)} token ids."
    else:
        shorter = min(len(ours), len(theirs))
        differing = np.flatnonzero(ours[:shorter] != theirs[:shorter])
        place = int(differing[0]) if len(differing) else shorter
        said = f"<strong>Not identical:</strong> the answers first differ at token {place} (a near-tie in rounding?)."
    speedup = ratio(speculative.tokens_per_second, autoregressive.tokens_per_second)
    return (
        f'<div class="verdict" role="status">{said}<br><strong>Speed-up {number(speedup)}</strong> '
        f"in decode tokens/s ({number(speculative.tokens_per_second, 0)} against "
        f"{number(autoregressive.tokens_per_second, 0)}), the two one after the other in this server.</div>"
    )


def sentence(text: str) -> str:
    """An error, as a sentence."""
    text = text.strip().rstrip(".")
    return f'<div class="sentence" role="alert">{html.escape(text[:1].upper() + text[1:])}.</div>'


def hint(text: str) -> str:
    """What stands where no answer is yet."""
    return f'<section class="panel"><div class="answer hint">{html.escape(text)}</div></section>'


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def ratio(over: float, under: float) -> float:
    return over / under if under > 0 and over > 0 else math.nan


LEGEND = (
    f'<div class="legend"><span {attributes(True)}>accepted draft tokens</span>'
    f"<span {attributes(False)}>the target's own tokens</span></div>"
)
