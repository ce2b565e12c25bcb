"""Bytes moved and kernels run by a compiled program, loops times their length.

    work = count(jax.jit(f).lower(x).compile().as_text())

XLA's own analysis (`compiled.cost_analysis()["bytes accessed"]`) counts the body of a loop once, as
it does for FLOPs. Here the optimised program is read: every kernel (a fusion, a matrix product, a
copy ...) reads its operands and writes its result; a slice, a gather and an update in place move
only what they touch; the body of a loop counts as often as XLA says it runs, and once where XLA
does not know (`unknown_loops`), of a conditional the branch that moves most. What stays in a cache
between two kernels is counted all the same: on a CPU these are bytes between cores and caches.
"""

import math
import re
from dataclasses import dataclass

SIZES = {"pred": 1, "bf16": 2, "token": 0}  # others have their bits in their name
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) .*\{$")


@dataclass(frozen=True)
class Work:
    """What one call of a program does."""

    bytes: int = 0
    kernels: int = 0
    unknown_loops: int = 0  # places in the program, counted as if they ran once

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.unknown_loops + other.unknown_loops,
        )


@dataclass(frozen=True)
class _Instruction:
    name: str
    size: int  # bytes of the result
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def count(text: str) -> Work:
    """Count a whole program, given as the text of its optimised HLO.

    Raises:
        ValueError: the text is no such program.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("text is no optimised HLO program: it has no ENTRY")
    return _Counter(computations).computation(entry)


def _size(shape: str) -> int:
    """Bytes of a shape, or of all in a tuple of shapes."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        bits = re.search(r"\d+", kind)
        each = SIZES[kind] if kind in SIZES else max(int(bits[0]) // 8, 1) if bits else 0
        total += each * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _close(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            rest = line[found.end() :]
            end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            opening = rest.index("(")
            closing = _close(rest, opening)
            operands = tuple(re.findall(r"%[\w.\-]+", rest[opening:closing]))
            op, attributes = rest[:opening], rest[closing:]
            current.append(
                _Instruction(found[2], _size(shape), op, operands, attributes, bool(found[1]))
            )
    return computations, entry


class _Counter:
    def __init__(self, computations: dict[str, list[_Instruction]]):
        self.computations = computations
        self.sizes = {i.name: i.size for body in computations.values() for i in body}
        self.known: dict[str, Work] = {}

    def computation(self, name: str) -> Work:
        if name not in self.known:
            total = Work()
            for instruction in self.computations[name]:
                total += self.instruction(instruction)
            self.known[name] = total
        return self.known[name]

    def instruction(self, i: _Instruction) -> Work:
        if i.op in FREE:
            return Work()
        if i.op == "while":
            (body,) = re.findall(r"body=(%[\w.\-]+)", i.attributes)
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
            once = self.computation(body)
            n = int(times[1]) if times else 1
            return Work(once.bytes * n, once.kernels * n, once.unknown_loops + (not times))
        if i.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
            names = (
                branches[1]
                if branches
                else " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", i.attributes))
            )
            works = [self.computation(n) for n in re.findall(r"%[\w.\-]+", names)]
            return max(works, key=lambda work: (work.bytes, work.kernels))
        if i.op in ("call", "async-start"):
            (callee,) = re.findall(r"(?:to_apply|calls)=(%[\w.\-]+)", i.attributes)
            return self.computation(callee)
        if i.op == "fusion":
            (callee,) = re.findall(r"calls=(%[\w.\-]+)", i.attributes)
            return Work(self.fusion(i, self.computations[callee]), 1)
        return Work(self.moved(i), 1)

    def moved(self, i: _Instruction) -> int:
        """Bytes of an instruction that is a kernel of its own."""
        sizes = [self.sizes.get(name, 0) for name in i.operands]
        if i.op in ("dynamic-slice", "slice"):
            return 2 * i.size
        if i.op == "dynamic-update-slice":
            return 2 * sizes[1]
        if i.op == "gather":
            return 2 * i.size + sizes[1]
        if i.op == "scatter":
            return 2 * sum(sizes[2:]) + sizes[1]
        return i.size + sum(sizes)

    def fusion(self, i: _Instruction, body: list[_Instruction]) -> int:
        """Bytes of a fusion: of each operand what is used, and what is written."""
        by_name = {inner.name: inner for inner in body}
        alias = {}  # a bitcast is what it is of
        for inner in body:
            name = inner.operands[0] if inner.op == "bitcast" else inner.name
            alias[inner.name] = alias.get(name, name)
        total = 0
        for parameter in (inner for inner in body if inner.op == "parameter"):
            touched = 0
            for user in body:
                places = [alias.get(o) for o in user.operands]
                if parameter.name not in places or user.op == "bitcast":
                    continue
                first_only = places.index(parameter.name) == 0 and places.count(parameter.name) == 1
                if user.op in ("dynamic-slice", "slice", "gather") and first_only:
                    touched += user.size
                elif user.op in ("dynamic-update-slice", "scatter") and first_only:
                    continue  # in place
                else:
                    touched = parameter.size
                    break
            total += min(touched, parameter.size)
        (root,) = (inner for inner in body if inner.root)
        outputs = root.operands if root.op == "tuple" else (root.name,)
        for name in outputs:
            written = by_name[alias.get(name, name)]
            if written.op == "dynamic-update-slice":
                total += self.sizes[written.operands[1]]
            elif written.op == "scatter":
                total += sum(self.sizes[o] for o in written.operands[2:])
            else:
                total += written.size
        return total
