"""Which characters of an answer came from the draft, for whoever shows it: a terminal, a web page, a notebook."""

import html
from collections.abc import Iterable, Sequence

CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    code: 0x2421 for code in range(0x7F, 0xA0)
}
DRAFT, OWN = "#2f8fd0", "#c77700"
"""Blue for tokens of the draft, orange for the target's own: a pair that the colour-blind can tell apart, readable on
white and on black."""
UNDERLINES = {True: "solid", False: "dotted"}
"""Of tokens from the draft and of the others: the colours' meaning once more, without colour."""


class TokenColours:
    """Says which characters of a growing text came from accepted draft tokens: a character belongs to the token that
    completes it. Pieces are cut from the text itself, so they join to it exactly."""

    def __init__(self) -> None:
        self.ends: list[int] = []  # characters that are complete after each token
        self.accepted: list[bool] = []
        self.shown = self.owner = 0  # characters given out, and the token that the latest of them belongs to

    def add(self, text_ends: Iterable[int], accepted: Iterable[bool]) -> None:
        """The next tokens, as a `Piece` or `Result` tells of them."""
        self.ends += map(int, text_ends)
        self.accepted += map(bool, accepted)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The next piece of the text as runs of (characters, from the draft)."""
        runs: list[tuple[str, bool]] = []
        for position, character in enumerate(text, self.shown):
            while self.owner < len(self.ends) - 1 and self.ends[self.owner] <= position:
                self.owner += 1
            drafted = bool(self.accepted) and self.accepted[self.owner]
            if runs and runs[-1][1] == drafted:
                runs[-1] = (runs[-1][0] + character, drafted)
            else:
                runs.append((character, drafted))
        self.shown += len(text)
        return runs


def visible(text: str) -> str:
    """Control characters but newline and tab as pictures of themselves: a model must not steer what shows its text."""
    return text.translate(CONTROL_PICTURES)


def as_html(runs: Sequence[tuple[str, bool]]) -> str:
    """The runs of `TokenColours.split` as spans, each in its colour and underlined in its way; the text is escaped."""
    return "".join(f"<span {attributes(drafted)}>{html.escape(visible(part))}</span>" for part, drafted in runs)


def attributes(drafted: bool) -> str:
    """Class and style of a span."""
    colour = DRAFT if drafted else OWN
    style = f"background:{colour}33;border-bottom:2px {UNDERLINES[drafted]} {colour};white-space:pre-wrap"
    return f'class="{"draft" if drafted else "own"}" style="{style}"'
