"""What a grammar costs the host: compiling one, and the masks of a tree in every round.

    python benchmarks/grammar.py [--tokenizer FOLDER] [--nodes 1 8 30] [--answers 4]

Walks through random answers under a schema; at every token there is a random tree whose drafts the grammar allows (the
dearest case: each node takes a mask), and `Matcher.tree` is timed. Milliseconds of wall time of one thread. Without a
folder the tokenizer is the embedded model's.
"""

import argparse
import statistics
import time

import numpy as np
import transformers

from jaxspec.demo import target_path
from jaxspec.serving.grammar import Grammars
from jaxspec.serving.matcher import Matcher, members
from jaxspec.speculation.tree import NO_TOKEN

SHAPE = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue", "yellow", "purple", "orange"]},
        "shape": {"enum": ["circle", "square", "triangle", "star"]},
        "size": {"type": "number", "minimum": 0, "maximum": 100},
        "note": {"type": "string", "maxLength": 40},
    },
    "required": ["color", "shape", "size", "note"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "shapes": {"type": "array", "items": SHAPE, "minItems": 3, "maxItems": 3},
        "many": {"type": "boolean"},
    },
    "required": ["shapes", "many"],
    "additionalProperties": False,
}
DEPTH = 7


def random_parents(rng: np.random.Generator, nodes: int) -> np.ndarray:
    """i32 `[nodes]`, of a tree of depth `DEPTH` at most."""
    parents, depths = np.zeros(nodes, np.int32), np.zeros(nodes, np.int32)
    for node in range(1, nodes):
        parents[node] = rng.choice(np.flatnonzero(depths[:node] < DEPTH))
        depths[node] = depths[parents[node]] + 1
    return parents


def random_drafts(rng: np.random.Generator, matcher: Matcher, root: int, parents: np.ndarray) -> np.ndarray:
    """Tokens i32 `[nodes]` that the grammar allows, level by level; siblings differ."""
    tokens = np.full(len(parents), NO_TOKEN, np.int32)
    tokens[0] = root
    for _ in range(DEPTH):
        _, allowed = matcher.tree(tokens, parents, refill=False)
        for node in range(1, len(parents)):
            if tokens[node] == NO_TOKEN and tokens[parents[node]] != NO_TOKEN:
                siblings = tokens[1:][parents[1:] == parents[node]].tolist()
                left = [token for token in members(allowed[parents[node]]) if token not in siblings]
                tokens[node] = rng.choice(left) if left else NO_TOKEN
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(target_path()))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 30])
    parser.add_argument("--answers", type=int, default=4)
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {}

    def timed(name: str, function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        times.setdefault(name, []).append(1000 * (time.perf_counter() - started))
        return result

    timed("the tokenizer, once", grammars.json_object)
    grammar = timed("compiling the schema", grammars.json_schema, SCHEMA)
    for _ in range(options.answers):
        matcher, root = timed("a matcher", grammar.matcher), -1
        while not matcher.ended:
            for nodes in options.nodes if root >= 0 else ():
                parents = random_parents(rng, nodes)
                drafts = random_drafts(rng, matcher, root, parents)
                timed(f"a tree of {nodes}", matcher.tree, drafts, parents)
            root = int(rng.choice(members(matcher.start())))
            matcher.accept([root])
    print(f"{len(tokenizer)} tokens")
    for name, taken in times.items():
        print(f"{name:24} {statistics.median(taken):8.3f} ms (most {max(taken):.3f}, {len(taken)} times)")


if __name__ == "__main__":
    main()
