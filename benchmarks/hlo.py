"""What a compiled program does with memory and network, read from XLA's text: bytes of a loop, copies, collectives.

    program = parse(compiled.as_text())
    body = program.loop()                       # of the loop that moves most
    sum(each.bytes for each in program.traffic(body))

`cost_analysis` counts every operand of every instruction, wherever it lies. Here only what lies in main memory counts
(on TPU a layout with S(1) is VMEM), once where a prefetch brings it in, and slices and updates in place count what they
touch. That is what a round has to move at least, in the program as it is scheduled.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
FREE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"),
    *("iota", "optimization-barrier", "opt-barrier", "get-dimension-size", "domain"),
}
"""Instructions that move nothing."""
MOVING = {"copy", "transpose", "bitcast", "reshape", "convert", "broadcast", "parameter", "constant", "tuple"}
"""What a fusion that only moves an array elsewhere is made of."""
UPDATES = ("dynamic-update-slice", "scatter")
"""Instructions that write into their first operand."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # as XLA writes it, with layouts
    op: str
    operands: tuple[str, ...]
    arguments: str  # the operands as written
    attributes: str
    is_root: bool

    @property
    def label(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def kernel(self) -> str:
        """The name of the Pallas kernel that it is, "" for anything else."""
        is_kernel = self.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes
        return self.name.rstrip("0123456789.") if is_kernel else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        return tuple(name for part in CALLED.findall(self.attributes) for name in NAME.findall(part))


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that an instruction reads from main memory and writes to it."""

    bytes: float
    instruction: Instruction


def arrays_of(shape: str) -> list[tuple[float, bool]]:
    """Of each array in a shape its bytes, and whether it lies in main memory."""
    found = []
    for dtype, dims, layout in SHAPE.findall(shape):
        count = 1
        for size in filter(None, dims.split(",")):
            count *= int(size)
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        found.append((count * bits / 8, "S(" not in layout))
    return found


def bytes_of(shape: str, anywhere: bool = False) -> float:
    """Bytes of a shape in main memory, or `anywhere`."""
    return sum(size for size, main in arrays_of(shape) if main or anywhere)


def dims_of(shape: str) -> tuple[int, ...]:
    """The dimensions of the first array in a shape."""
    found = SHAPE.search(shape)
    return tuple(int(size) for size in found.group(2).split(",") if size) if found else ()


class Program:
    """Computations by name, each a list of instructions in the order in which they run."""

    def __init__(self, computations: dict[str, list[Instruction]], entry: str) -> None:
        self.computations, self.entry = computations, entry
        self.by_name = {name: {each.name: each for each in lines} for name, lines in computations.items()}

    def reachable(self, computation: str) -> Iterator[str]:
        """The computation and all that it runs, however deep; of branches the one that `traffic` counts."""
        waiting, seen = [computation], set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            yield name
            for each in self.computations[name]:
                waiting += [self.cheapest(each)] if each.op == "conditional" else each.called

    def cheapest(self, conditional: Instruction) -> str:
        """The branch that moves least: what a batch takes that asks for nothing special."""
        return min(conditional.called, key=self.moved_by)

    def loop(self) -> str:
        """The body of the loop that moves most bytes a time. Raises ValueError where there is none."""
        bodies = {
            body: self.moved_by(body)
            for lines in self.computations.values()
            for each in lines
            if each.op == "while"
            for body in re.findall(r"body=%([\w.\-]+)", each.attributes)
        }
        if not bodies:
            raise ValueError("the program has no loop")
        return max(bodies, key=bodies.__getitem__)

    def moved_by(self, computation: str) -> float:
        """Bytes of one run of a computation."""
        return sum(each.bytes for each in self.traffic(computation))

    def traffic(self, computation: str) -> list[Moved]:
        """What each instruction of a computation moves. A loop within counts as often as XLA knows that it runs, else
        once; of branches the cheapest counts."""
        return [Moved(self._moved(computation, each), each) for each in self.computations[computation]]

    def _moved(self, computation: str, each: Instruction) -> float:
        if each.op in FREE or each.op.endswith(("-done", "-update")):
            return 0.0
        if each.op == "while":
            body = re.findall(r"body=%([\w.\-]+)", each.attributes)[0]
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.attributes)
            return self.moved_by(body) * (int(trips.group(1)) if trips else 1)
        if each.op == "conditional":
            return self.moved_by(self.cheapest(each))
        if each.op == "call":
            return sum(self.moved_by(called) for called in each.called)
        if each.op.endswith("-start"):
            # (there, here, ..) of one array: a prefetch reads what it brings, a copy within main memory counts twice.
            (first, first_main), *rest = arrays_of(each.shape) or [(0.0, False)]
            second, second_main = rest[0] if rest else (first, first_main)
            return min(first, second) * (first_main + second_main)
        estimate = re.search(r'"bytes_accessed":"?(\d+)', each.attributes) if each.op == "custom-call" else None
        if estimate:
            return float(estimate.group(1))  # of a kernel that says what it reads of its operands
        return self._written(computation, each) + self._read(computation, each)

    def _read(self, computation: str, each: Instruction) -> float:
        siblings, total = self.by_name[computation], 0.0
        inner = self.computations.get(each.called[0]) if each.op == "fusion" and each.called else None
        for place, operand in enumerate(each.operands):
            source = siblings.get(operand)
            if source is None:
                continue
            size = bytes_of(source.shape)
            if inner is not None:
                size = min(size, self._touched(inner, place, size))
            elif place == 0 and each.op in ("dynamic-slice", "gather", "slice"):
                size = min(size, bytes_of(each.shape, anywhere=True))
            elif place == 0 and each.op in ("dynamic-update-slice", "scatter"):
                size = 0.0
            total += size
        return total

    @staticmethod
    def _touched(inner: list[Instruction], place: int, size: float) -> float:
        """What a fusion reads of its operand number `place`: slices of it, if it looks at nothing else."""
        own = [each.name for each in inner if each.op == "parameter" and int(each.arguments) == place]
        names, total = set(own), 0.0
        for each in inner:
            used = [operand for operand in each.operands if operand in names]
            if not used:
                continue
            if each.op == "bitcast":
                names.add(each.name)
            elif each.op in ("dynamic-slice", "gather", "slice") and each.operands[0] in names:
                total += bytes_of(each.shape, anywhere=True)
            elif not (each.op in ("dynamic-update-slice", "scatter") and each.operands[0] in names):
                return size
        return total

    def _written(self, computation: str, each: Instruction) -> float:
        size = bytes_of(each.shape)
        if each.op == "dynamic-update-slice":
            return min(size, bytes_of(self.by_name[computation][each.operands[1]].shape, anywhere=True))
        if each.op == "scatter":
            return min(size, bytes_of(self.by_name[computation][each.operands[-1]].shape, anywhere=True))
        if each.op != "fusion" or not each.called:
            return size
        inner = self.by_name[each.called[0]]
        root = next(line for line in inner.values() if line.is_root)
        outputs = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
        total = 0.0
        for (whole, main), output in zip(arrays_of(each.shape), outputs, strict=False):
            while output.op in ("bitcast", "copy", "convert") and output.operands[0] in inner:
                output = inner[output.operands[0]]
            if output.op in ("dynamic-update-slice", "scatter"):
                update = inner[output.operands[1 if output.op == "dynamic-update-slice" else -1]]
                whole = min(whole, bytes_of(update.shape, anywhere=True))
            total += whole * main
        return total

    def copies(self, computation: str, least: float) -> list[Moved]:
        """Arrays of `least` bytes and more that a computation (without the loops in it) only lays out anew or moves
        within main memory: copies, transposes, and fusions of nothing else. Prefetches are none of these."""
        found = []
        for each in self.computations[computation]:
            arrays = arrays_of(each.shape)
            moves = each.op in ("copy", "transpose")
            if each.op == "copy-start":
                moves = all(main for _, main in arrays[:2])
            elif each.op == "fusion" and each.called:
                moves = {line.op for line in self.computations[each.called[0]]} <= MOVING
            source = self.by_name[computation].get(each.operands[0]) if each.operands else None
            if moves and source is not None and min(arrays[0][0], bytes_of(source.shape, anywhere=True)) >= least:
                found.append(Moved(arrays[0][0], each))
        return found

    def origin(self, computation: str, each: Instruction) -> Instruction:
        """What an instruction makes a copy of: an argument or a loop's result, or whatever computed it."""
        siblings, source = self.by_name[computation], each
        while (place := self._passed_on(computation, source)) is not None:
            if source.operands[place] not in siblings:
                break
            source = siblings[source.operands[place]]
        return source

    def is_held(self, computation: str, each: Instruction) -> bool:
        """Whether that is an argument of the computation or what a loop carries: weights, a cache, and not something
        that was computed just before."""
        source = self.origin(computation, each)
        if source.op == "get-tuple-element":
            holder = self.by_name[computation].get(source.operands[0])
            return holder is None or holder.op in ("parameter", "while", "opt-barrier", "optimization-barrier")
        return source.op == "parameter"

    def _passed_on(self, computation: str, each: Instruction) -> int | None:
        """Which operand an instruction hands on, laid out anew, moved or updated in place; None where it computes."""
        if not each.operands or each.kernel:
            return None
        if each.op in ("copy", "bitcast", "transpose", "custom-call") or each.op.endswith(("-start", "-done")):
            return 0  # a custom call that is no kernel joins slices
        if each.op in UPDATES:
            return 0
        if each.op != "fusion" or not each.called:
            return None
        inner = self.by_name[each.called[0]]
        if {line.op for line in inner.values()} <= MOVING:
            return 0
        line = next(line for line in inner.values() if line.is_root)
        while line.op in ("bitcast", "copy", *UPDATES) and line.operands[0] in inner:
            line = inner[line.operands[0]]
        return int(line.arguments) if line.op == "parameter" else None

    def kernels(self, computation: str) -> dict[str, int]:
        """How many Pallas kernels of each name one run of a computation has."""
        found: dict[str, int] = {}
        for each in self._kernel_calls(computation):
            found[each.kernel] = found.get(each.kernel, 0) + 1
        return found

    def read_by_kernels(self, computation: str, capacity: int) -> float:
        """Bytes of the caches `[B, Hkv, S, Dh]` of `capacity` positions that kernels are given, part of `moved_by`,
        which counts operands whole: a kernel that skips what is not filled reads as much at most."""
        return sum(
            bytes_of(source.shape)
            for name, each in self._kernel_calls_by(computation)
            for operand in each.operands
            if (source := self.by_name[name].get(operand)) and dims_of(source.shape)[2:3] == (capacity,)
        )

    def _kernel_calls(self, computation: str) -> list[Instruction]:
        return [each for _, each in self._kernel_calls_by(computation)]

    def _kernel_calls_by(self, computation: str) -> list[tuple[str, Instruction]]:
        reached = list(self.reachable(computation))
        return [(name, each) for name in reached for each in self.computations[name] if each.kernel]

    def collectives(self, computation: str) -> dict[str, tuple[int, float]]:
        """How many of each kind one run of a computation has, and the bytes of their larger side on one chip."""
        found: dict[str, tuple[int, float]] = {}
        for name in self.reachable(computation):
            for each in self.computations[name]:
                kind = each.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                shapes = [each.shape, *(self.by_name[name][o].shape for o in each.operands if o in self.by_name[name])]
                size = max((part for shape in shapes for part, _ in arrays_of(shape)), default=0.0)
                count, total = found.get(kind, (0, 0.0))
                found[kind] = count + 1, total + size
        return found


def parse(text: str) -> Program:
    """The program that `Compiled.as_text()` writes out."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and "->" in line:
                current = header.group(2)
                computations[current] = []
                entry = current if header.group(1) else entry
        elif current is not None and (instruction := parse_line(line)):
            computations[current].append(instruction)
    return Program(computations, entry)


def parse_line(line: str) -> Instruction | None:
    """One instruction; None for a line that is none."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    op, _, _ = rest.partition("(")
    end = closing(rest[len(op) :]) + len(op)
    arguments, attributes = rest[len(op) + 1 : end], rest[end + 1 :]
    operands = tuple(NAME.findall(arguments))
    return Instruction(head.group(2), shape, op, operands, arguments, attributes, bool(head.group(1)))


def closing(text: str) -> int:
    """Where the bracket that `text` begins with is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket in {text[:80]!r}")
