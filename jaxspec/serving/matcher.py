"""One answer on its way through a grammar: which tokens may follow it, and each node of a tree of drafts.

    matcher = grammar.matcher()
    first = matcher.start()                          # what the answer may begin with
    matcher.accept(tokens)                           # what was committed since the last look, the root included
    tokens, allowed = matcher.tree(tokens, parents)  # drafts that follow the grammar, masks of what may follow them

The tree is walked depth first: a node's token is consumed, the mask of what may follow is written, and when its
descendants are done it is rolled back. Masks decide what the target may choose (`sampling.allow`), so an answer does
not depend on the drafts. Drafts decide only how fast it comes: those that the grammar forbids can never be accepted,
and where it leaves little choice their places are filled with what it does allow.
"""

import dataclasses
from collections.abc import Callable, Sequence

import llguidance
import numpy as np

from jaxspec.speculation.tree import NO_TOKEN

ALL = np.uint32(2**32 - 1)
FOLLOWED, RESTORED = 4, 32
"""How often the parser may give up until drafts of the answer are not followed any more, and until it fails."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A target's tokens as a grammar sees them."""

    tokenizer: llguidance.LLTokenizer
    size: int  # of the target's logits
    stop_token_ids: tuple[int, ...]  # the target's own; the first is what llguidance allows where a grammar may end
    text: np.ndarray  # u32 [W], tokens that are there and not special
    lacking: frozenset[int]  # bytes that no token spells alone

    @property
    def words(self) -> int:
        """W."""
        return self.text.size

    def bits(self, tokens: Sequence[int]) -> np.ndarray:
        """u32 `[W]` with the bits of these tokens set, of those that the target has."""
        bits = np.zeros(self.words, np.uint32)
        for token in tokens:
            if 0 <= token < self.size:
                bits[token // 32] |= np.uint32(1 << token % 32)
        return bits


class Matcher:
    """The state of one row; made by `Grammar.matcher`, used by one thread.

    Args:
      state: of the compiled grammar, at its beginning.
      compiled: gives another that shares nothing with it.
      vocabulary: of the target.
      stop_token_ids: which tokens end the answer, the target's own among them. They are allowed exactly where the
        grammar may end (and where one is plain text, where that may stand); nothing follows them.
    """

    def __init__(
        self,
        state: llguidance.LLMatcher,
        compiled: Callable[[], llguidance.LLMatcher],
        vocabulary: Vocabulary,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self._state, self._compiled, self._vocabulary = state, compiled, vocabulary
        self._stops = frozenset(stop_token_ids)
        self._ends = vocabulary.bits(stop_token_ids)
        self._said: list[int] = []
        self._restored = 0
        self.ended = False
        """Whether a stop token was accepted."""

    def start(self) -> np.ndarray:
        """The tokens that may come next: u32 `[W]`, bit t % 32 of word t // 32 for token t; at least one.

        Raises RuntimeError where there is none, or llguidance gives up: the grammar is too complex there.
        """
        if self.ended:
            return self._ends.copy()
        mask = self._mask()
        if mask is None:
            self._restore()
            mask = self._mask()
        if mask is None:
            raise RuntimeError(f"the grammar allows no token after {len(self._said)} tokens: {self._problem()}")
        return mask

    def accept(self, tokens: np.ndarray | Sequence[int]) -> None:
        """The answer goes on with these tokens.

        Raises RuntimeError for a token that the grammar forbids, which no mask has let through, and for one behind the
        end.
        """
        for token in np.asarray(tokens, np.int64).tolist():
            stops = token in self._stops
            if self.ended:
                raise RuntimeError(f"token {token} follows the end of an answer under a grammar")
            if not self._consumes(token, stops):
                self._restore()
                if not self._consumes(token, stops):
                    raise RuntimeError(f"the grammar forbids token {token} after {len(self._said)} tokens")
            self._said.append(token)
            self.ended = stops

    def tree(self, tokens: np.ndarray, parents: np.ndarray, refill: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Drafts that follow the grammar, and what may follow each of them.

        Args:
          tokens: i32 `[N]`, of a tree whose root is the last token accepted; `NO_TOKEN` where there is no draft.
          parents: i32 `[N]`, smaller than the node's own number.
          refill: whether nodes whose token is forbidden, and those without, may get another one; not in a round that
            is to do without drafts (`DecodeState.alone`).

        Returns:
          tokens i32 `[N]`, of the same tree, siblings different; allowed u32 `[N, W]`, at least one for each node.
          Behind a node that is no draft, or a stop token, everything is: nothing of it can be accepted.

        Raises RuntimeError as `start` does, about the root.
        """
        tokens, parents = np.array(tokens, np.int32), np.asarray(parents).tolist()
        allowed = np.full((len(tokens), self._vocabulary.words), ALL)
        allowed[0] = self.start()
        if self.ended or len(tokens) == 1:
            return tokens, allowed
        walk = _Walk(tokens, parents, refill)
        if self._restored >= FOLLOWED:
            walk.forget(walk.children[0])
            return tokens, allowed
        todo = walk.follow(0, allowed[0])
        while todo:
            node = todo.pop()
            if node < 0:  # all below ~node is done
                self._state.rollback(1)
                continue
            if int(tokens[node]) in self._stops:
                walk.forget(walk.children[node])
                continue
            mask = self._mask() if self._state.try_consume_tokens([int(tokens[node])]) == 1 else None
            if mask is None:  # a branch in which the parser gives up, and then is of no more use
                self._restore()
                walk.forget([node, *(each for each in todo if each >= 0)])
                break
            allowed[node] = mask
            todo += [~node, *walk.follow(node, mask)]
        return tokens, allowed

    def _mask(self) -> np.ndarray | None:
        """What may come next; None where nothing may."""
        raw = np.frombuffer(self._state.compute_bitmask(), np.uint32)
        if self._state.is_error():
            return None
        mask = raw[: self._vocabulary.words] & self._vocabulary.text
        if is_set(raw, self._vocabulary.stop_token_ids[0]):
            mask |= self._ends
        return mask if mask.any() else None

    def _problem(self) -> str:
        """Why nothing may come next."""
        said = self._state.get_error().strip().splitlines()
        return said[0] if said and not said[0].startswith("<") else "no token of the target spells what must follow"

    def _consumes(self, token: int, stops: bool) -> bool:
        """Whether the token may come next; the state is the one after it, unless it ends the answer."""
        return (stops and self._state.is_accepting()) or self._state.try_consume_tokens([token]) == 1

    def _restore(self) -> None:
        """The state anew, from what was accepted: an error stays in a state and in all that share its lexer. It
        takes as long as all of the answer did, so it may not happen at every token."""
        self._restored += 1
        if self._restored > RESTORED:
            raise RuntimeError(f"the grammar is too complex after {len(self._said)} tokens")
        self._state = self._compiled()
        for token in self._said:
            self._state.try_consume_tokens([token])


class _Walk:
    """The drafts of a tree while they are made to follow a grammar."""

    def __init__(self, tokens: np.ndarray, parents: Sequence[int], refill: bool) -> None:
        self.tokens, self.refill = tokens, refill
        self.children: list[list[int]] = [[] for _ in parents]
        self.height = [0] * len(parents)
        for node in range(len(parents) - 1, 0, -1):
            self.children[parents[node]].append(node)
            self.height[parents[node]] = max(self.height[parents[node]], self.height[node] + 1)

    def follow(self, node: int, mask: np.ndarray) -> list[int]:
        """Gives the children of a node tokens that its mask allows, or none; those with one.

        Where no more tokens are allowed than there are children, all are drafted. So text that must follow goes down
        the tree, for there llguidance allows one token, the tokenizer's own next. The deepest child comes first.
        """
        children = self.children[node]
        used = {token for child in children if is_set(mask, token := int(self.tokens[child]))}
        free = [child for child in children if int(self.tokens[child]) not in used]
        self.forget(free)
        if free and self.refill and np.bitwise_count(mask).sum() <= len(children):
            new = [token for token in members(mask) if token not in used]
            for child, token in zip(sorted(free, key=lambda child: -self.height[child]), new, strict=False):
                self.tokens[child] = token
        return [child for child in children if self.tokens[child] != NO_TOKEN]

    def forget(self, nodes: Sequence[int]) -> None:
        """No drafts there and below."""
        nodes = list(nodes)
        while nodes:
            node = nodes.pop()
            self.tokens[node] = NO_TOKEN
            nodes += self.children[node]


def is_set(mask: np.ndarray, token: int) -> bool:
    """Whether a mask u32 `[W]` has the token."""
    return 0 <= token < 32 * mask.size and bool(int(mask[token // 32]) >> token % 32 & 1)


def members(mask: np.ndarray) -> list[int]:
    """The tokens of a mask u32 `[W]`, in order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
