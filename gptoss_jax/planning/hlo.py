"""Parses the collectives of a compiled program from its optimized HLO text."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# Groups of communicating devices, by their index in the mesh; pairs for a permute.
Groups = tuple[tuple[int, ...], ...]

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The opcode is the first lower-case word before a bracket: layouts, T(8,128) and S(1), are upper-case.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# How libtpu writes a collective across slices: what its hosts send to each other.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_DIMS = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction; an asynchronous one counts once, regardless of its number of parts."""

    name: str
    # One of KINDS.
    kind: str
    # Results on one device, as "bf16[8,128]".
    shapes: tuple[str, ...]
    # Bytes per device and execution: of the input of a reduce-scatter, of the output of any other collective.
    # For a ragged all-to-all, an upper bound: the smaller of operand and output.
    bytes: int
    groups: Groups
    # Executions per run of the program: the product of the trip counts of the enclosing loops.
    times: int
    # False if the trip count of a loop is unknown; the loop is then counted once.
    trips_known: bool
    # True for a transfer to other slices, over the data-center network; it has no groups, and `bytes` are
    # those that it sends.
    across_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one execution."""
        if self.kind == "collective-permute" or self.across_slices:
            return float(self.bytes)
        return bytes_sent(self.kind, self.bytes, max(map(len, self.groups), default=1))

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (sizes by name, in order) that the groups run along; `("?",)` if none do."""
        return mesh_axes(self.groups, mesh, pairs=self.kind == "collective-permute")


def bytes_sent(kind: str, size: float, devices: int) -> float:
    """Returns the bytes that each device of a group sends in a collective of `size` bytes, around a ring or
    directly (Thakur et al. 2005, "Optimization of Collective Communication"). An all-reduce is a
    reduce-scatter and an all-gather."""
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) / devices


def collectives(hlo_text: str) -> list[Collective]:
    """Returns all collectives that a program executes, callers before callees.

    The halves of an asynchronous collective, `-start` and `-done`, count once, and so does one that the TPU
    compiler has spread over several fusions. A collective across slices is one inside each slice, and a
    transfer between slices. Computations that are never called count nothing.
    """
    computations, entry = _computations(hlo_text)
    found: dict[tuple, Collective] = {}
    for name, times, trips_known in _executions(computations, entry):
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind == "send" and (transfer := _MEGASCALE.search(instruction.rest)):
                kind, size = transfer[1].lower().replace("_", "-"), shape_bytes(instruction.shape)
                shapes = tuple(match[0] for match in [_SHAPE.search(instruction.shape)] if match)
                found[name, instruction.name] = Collective(
                    instruction.name, kind, shapes, size, (), times, trips_known, across_slices=True
                )
                continue
            if kind not in KINDS:
                continue
            # The parts of one collective share a chain.
            chain = re.search(r'chain_id="(\d+)"', instruction.rest)
            key = ("chain", chain[1]) if chain else (name, instruction.name)
            if key in found:
                continue
            groups, shapes = parse_groups(instruction.rest), _results(instruction, kind)
            size = sum(map(shape_bytes, shapes))
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                # The TPU form of a reduce-scatter: an all-reduce and a slice of it, fused.
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                size *= max(map(len, groups), default=1)
            elif kind == "ragged-all-to-all":
                size = min(_first_operand_bytes(computations[name], instruction.rest) or size, size)
            found[key] = Collective(instruction.name, kind, shapes, size, groups, times, trips_known)
    return list(found.values())


def shape_bytes(shape: str) -> int:
    """Bytes of an array such as "bf16[8,128]", without its layout's padding."""
    match = _SHAPE.search(shape)
    if match is None:
        return 0
    bits = 8 if match[1] == "pred" else int(match[2])
    return math.prod(int(size) for size in match[3].split(",") if size) * bits // 8


def parse_groups(text: str) -> Groups:
    """Returns the groups in an instruction's attributes, in any of their notations.

    `replica_groups={{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, an iota of the second shape, transposed, then
    reshaped to the first; `mesh['a'=2,'b'=4] {'b'}`, groups along some axes of a mesh, whose devices may be
    given as `device_ids=([4,2]T(1,0))`; `source_target_pairs={{0,1}}` of a permute. Empty, `{}`, for all
    devices: the text does not say how many.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", text):
        return tuple(_integers(group) for group in re.findall(r"\{([\d,\s]+)\}", match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=" + _DIMS, text):
        return _as_groups(_iota(match[2], match[3]).reshape(_integers(match[1])[0], -1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        listed = re.search(_DIMS, match[2])
        ids = _iota(listed[1], listed[2]) if listed else np.arange(math.prod(sizes.values()))
        axes = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", match[3])]
        return _groups_along(ids.reshape(tuple(sizes.values())), axes)
    return ()


def mesh_axes(groups: Groups, mesh: Mapping[str, int], pairs: bool = False) -> tuple[str, ...]:
    """Returns the smallest set of mesh axes with these groups; for pairs, all axes that any pair crosses."""
    names, sizes = list(mesh), tuple(mesh.values())
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if pairs:
        indices = [[np.unravel_index(device, sizes) for device in pair] for pair in groups]
        return tuple(name for i, name in enumerate(names) if any(a[i] != b[i] for a, b in indices))
    wide = [i for i, size in enumerate(sizes) if size > 1]
    if not groups:
        return tuple(names[i] for i in wide)
    wanted = {frozenset(group) for group in groups}
    for axes in itertools.chain(*(itertools.combinations(wide, n) for n in range(len(wide) + 1))):
        if {frozenset(group) for group in _groups_along(ids, axes)} == wanted:
            return tuple(names[i] for i in axes)
    return ("?",)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(order)) if order else ids


def _as_groups(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.tolist()))


def _groups_along(ids: np.ndarray, axes: Sequence[int]) -> Groups:
    size = math.prod(ids.shape[axis] for axis in axes)
    return _as_groups(np.moveaxis(ids, list(axes), range(-len(axes), 0)).reshape(-1, size))


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    # Operands and attributes.
    rest: str


Computations = dict[str, list[_Instruction]]


def _computations(text: str) -> tuple[Computations, str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    # A long computation header is split into several lines.
    head = re.compile(r"^(?:ENTRY )?%?[\w.\-]+ \(.*?\{$", re.MULTILINE | re.DOTALL)
    text = head.sub(lambda match: " ".join(match[0].split()), text)
    computations: Computations = {}
    lines: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = computations[start[2]] = []
            entry = start[2] if start[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(_Instruction(*match.groups()))
    return computations, entry or next(reversed(computations), "")


def _executions(computations: Computations, entry: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (computation, executions, True if all trip counts of its enclosing loops are known), callers
    first."""
    waiting = [(entry, 1, True)]
    while waiting:
        name, times, known = waiting.pop(0)
        if name not in computations:
            continue
        yield name, times, known
        for instruction in computations[name]:
            if instruction.opcode in ("async-update", "async-done"):
                continue
            called = _CALLED.findall(instruction.rest)
            for listed in _CALLED_LISTS.findall(instruction.rest):
                called += re.findall(r"%?([\w.\-]+)", listed)
            trips = _trip_count(computations, instruction.rest) if instruction.opcode == "while" else 1
            waiting += [(callee, times * (trips or 1), known and trips is not None) for callee in called]


def _trip_count(computations: Computations, loop: str) -> int | None:
    """Returns the trip count of a loop: the compiler's annotation, or the constant upper bound of its
    counter. Counters of `jax.lax.scan` and `fori_loop` start at 0 and increase by one."""
    if noted := _TRIP_COUNT.search(loop):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {
        one.name: int(one.rest.split(")")[0])
        for one in instructions
        if one.opcode == "constant" and one.shape.startswith("s32[]")
    }
    for one in instructions:
        limit = re.match(r"\s*%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", one.rest)
        if one.opcode == "compare" and limit and limit[1] in constants:
            return constants[limit[1]]
    return None


def _results(instruction: _Instruction, kind: str) -> tuple[str, ...]:
    """Arrays that a collective returns. The `-start` of most lists its operands first, and counters last."""
    shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
    arrays = [match[0] for match in _SHAPE.finditer(shape)]
    if instruction.opcode != kind and kind != "all-reduce":
        # Several operands form a separate tuple.
        operands = len(_SHAPE.findall(shape.partition(")")[0])) if shape.startswith("((") else 1
        arrays = [array for array in arrays[operands:] if array != "u32[]"]
    return tuple(arrays)


def _first_operand_bytes(instructions: list[_Instruction], rest: str) -> int:
    operand = re.match(r"\s*(?:\w+\[[^%]*? )?%?([\w.\-]+)", rest)
    return next((shape_bytes(one.shape) for one in instructions if operand and one.name == operand[1]), 0)
