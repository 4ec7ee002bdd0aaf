"""The collectives of a compiled program, read off its optimised HLO text: pure functions of that text."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# Devices that exchange with each other, by their places in the mesh's order; pairs for a permute.
Groups = tuple[tuple[int, ...], ...]

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The opcode is the first lower-case word before a bracket: layouts, T(8,128) and S(1), are upper-case.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_DIMS = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. An asynchronous one, in however many parts, is one."""

    name: str
    # One of KINDS.
    kind: str
    # Results on one device, as "bf16[8,128]".
    shapes: tuple[str, ...]
    # Bytes of one execution: what a device holds after a gather, an all-reduce, an exchange or a permute;
    # what it holds before a reduce-scatter; of a ragged exchange, an upper bound: the smaller of what stands
    # to be sent and what there is room for.
    bytes: int
    groups: Groups
    # Executions in one run of the program, the known trip counts of the loops around it multiplied.
    times: int
    # Whether it stands inside of a loop, and whether all those loops' trip counts are known.
    in_loop: bool
    trips_known: bool

    @property
    def group_size(self) -> int:
        """Devices that take part together; 2 for a permute, which knows pairs."""
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one execution: around a ring, or straight to the others."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        return sent_bytes(self.kind, self.bytes, self.group_size)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh that it runs along (names and sizes in the mesh's order); `("?",)` where no set
        of axes has these groups."""
        return mesh_axes(self.groups, mesh, pairs=self.kind == "collective-permute")


def sent_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that each of so many devices sends to gather, scatter or exchange `size` bytes; an all-reduce is
    a reduce-scatter and a gather (Thakur et al. 2005, "Optimization of Collective Communication")."""
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) / devices


def collectives(hlo_text: str) -> list[Collective]:
    """All collectives that a program executes, in the order of its entry computation.

    The halves of an asynchronous collective, `-start` and `-done`, count once, and so does one that the TPU
    compiler has spread over several fusions. Computations that nothing calls count nothing.
    """
    computations, entry = _computations(hlo_text)
    found: dict[tuple, Collective] = {}
    for name, times, in_loop, known in _executed(computations, entry):
        lines = computations[name]
        for instruction, shape, opcode, rest in lines:
            kind = opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # The parts of one collective share a chain.
            chain = re.search(r'chain_id="(\d+)"', rest)
            key = ("chain", chain[1]) if chain else (name, instruction)
            if key in found:
                continue
            groups = parse_groups(rest)
            shapes = _results(shape, kind, started=opcode != kind)
            size = sum(map(shape_bytes, shapes))
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                # A fusion of an all-reduce and a slice of it: TPU's form of a reduce-scatter.
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                size *= max(map(len, groups), default=1)
            elif kind == "ragged-all-to-all":
                size = min(_first_operand_bytes(lines, rest) or size, size)
            found[key] = Collective(instruction, kind, shapes, size, groups, times, in_loop, known)
    return list(found.values())


def shape_bytes(shape: str) -> int:
    """Bytes of an array such as "bf16[8,128]", its layout's padding left out."""
    match = _SHAPE.search(shape)
    if match is None:
        return 0
    bits = 8 if match[1] == "pred" else int(match[2])
    return math.prod(int(size) for size in match[3].split(",") if size) * bits // 8


def parse_groups(text: str) -> Groups:
    """The groups in an instruction's attributes, whichever of the ways they are written in.

    `replica_groups={{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, the numbers from 0 in an array of the second shape,
    transposed, then split as the first says; `mesh['a'=2,'b'=4] {'b'}`, groups along some axes of a mesh,
    whose devices may be listed as `device_ids=([4,2]T(1,0))`; `source_target_pairs={{0,1}}` of a permute.
    Empty, `{}`, for all devices: the text does not say how many.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", text):
        return tuple(
            tuple(int(n) for n in part.split(",")) for part in re.findall(r"\{([\d,\s]+)\}", match[1])
        )
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=" + _DIMS, text):
        return _rows(_iota(match[2], match[3]).reshape(_numbers(match[1])[0], -1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        listed = re.search(_DIMS, match[2])
        ids = _iota(listed[1], listed[2]) if listed else np.arange(math.prod(sizes.values()))
        chosen = re.findall(r"'([^']+)'", match[3])
        return _along(ids.reshape(tuple(sizes.values())), [list(sizes).index(name) for name in chosen])
    return ()


def mesh_axes(groups: Groups, mesh: Mapping[str, int], pairs: bool = False) -> tuple[str, ...]:
    """The axes whose lines are these groups, the fewest that fit; for pairs, those that any pair crosses."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    if pairs:
        places = [[np.unravel_index(n, ids.shape) for n in pair] for pair in groups]
        crossed = {i for a, b in places for i in range(ids.ndim) if a[i] != b[i]}
        return tuple(name for i, name in enumerate(mesh) if i in crossed)
    asked = {frozenset(group) for group in groups}
    wide = [i for i, size in enumerate(mesh.values()) if size > 1]
    if not groups:
        return tuple(list(mesh)[i] for i in wide)
    for count in range(len(wide) + 1):
        for chosen in itertools.combinations(wide, count):
            if {frozenset(group) for group in _along(ids, chosen)} == asked:
                return tuple(list(mesh)[i] for i in chosen)
    return ("?",)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in ids)


def _along(ids: np.ndarray, axes) -> Groups:
    size = math.prod(ids.shape[axis] for axis in axes)
    return _rows(np.moveaxis(ids, list(axes), range(-len(axes), 0)).reshape(-1, size))


def _results(shape: str, kind: str, started: bool) -> tuple[str, ...]:
    """The arrays that a collective gives; a started one may show its operands before them, and counters."""
    arrays = [match[0] for match in _SHAPE.finditer(shape)]
    if started and kind in ("all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        if kind == "collective-permute":
            return tuple(arrays[1:2])
        return tuple(arrays[len(arrays) // 2 :])
    return tuple(arrays)


def _first_operand_bytes(lines: list, rest: str) -> int:
    operand = re.match(r"\s*(?:\w+\[[^%]*? )?%?([\w.\-]+)", rest)
    return next((shape_bytes(shape) for name, shape, *_ in lines if operand and name == operand[1]), 0)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Each computation's instructions as (name, type, opcode, the rest of the line), and the entry's name."""
    computations, entry, lines = {}, "", []
    for line in _joined(text):
        if start := _COMPUTATION.match(line):
            lines = computations[start[2]] = []
            entry = start[2] if start[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(match.groups())
    return computations, entry or next(reversed(computations), "")


def _joined(text: str) -> Iterator[str]:
    """The lines of a program; a computation's head may be broken into several where it is long."""
    head = ""
    for line in text.splitlines():
        if head or (re.match(r"(ENTRY )?%?[\w.\-]+ \(", line) and not line.endswith("{")):
            head = f"{head} {line.strip()}" if head else line
            if line.endswith("{"):
                yield head
                head = ""
        else:
            yield line


def _executed(computations, entry: str) -> Iterator[tuple[str, int, bool, bool]]:
    """(computation, executions, whether in a loop, whether all trip counts are known), callers first."""
    waiting = [(entry, 1, False, True)]
    while waiting:
        name, times, in_loop, known = waiting.pop(0)
        if name not in computations:
            continue
        yield name, times, in_loop, known
        for _, _, opcode, rest in computations[name]:
            if opcode in ("async-update", "async-done"):
                continue
            called = _CALLED.findall(rest)
            for listed in _CALLED_LISTS.findall(rest):
                called += re.findall(r"%?([\w.\-]+)", listed)
            if opcode == "while":
                trips = _trip_count(computations, rest)
                waiting += [
                    (other, times * (trips or 1), True, known and trips is not None) for other in called
                ]
            else:
                waiting += [(other, times, in_loop, known) for other in called]


def _trip_count(computations, loop: str) -> int | None:
    """How often a loop's body runs: what the compiler has noted, else the constant that the loop's counter
    must stay below. Those of `jax.lax.scan` and `fori_loop` count from 0 by one."""
    if noted := _TRIPS.search(loop):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop)
    lines = computations.get(condition[1], []) if condition else []
    constants = {
        name: int(rest.split(")")[0])
        for name, shape, opcode, rest in lines
        if opcode == "constant" and shape.startswith("s32[]")
    }
    for _, _, opcode, rest in lines:
        below = re.match(r"\s*%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", rest)
        if opcode == "compare" and below and below[1] in constants:
            return constants[below[1]]
    return None
