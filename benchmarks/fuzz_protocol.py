"""Fuzzes the parser of requests (`suanli.serving.codec.parse`) with bodies that are nearly valid.

    nice -n 19 python benchmarks/fuzz_protocol.py [--cases 1000000] [--seed 1] [--out records/…/fuzz_protocol.json]

A case is a valid request, JSON or binary, of any datatype, that was changed one to four times: bits flipped, cut short,
spliced with another, a piece repeated or lost, a number replaced by an unexpected one, a JSON value by one of another
type, the length of a BYTES element or of the header by a wrong one. The parser must either return tensors whose shapes,
datatypes and data agree, and which can be sent back, or refuse with one sentence (`Refusal`, 400). Anything else is a
failure: it is printed with its seed and its bytes, and the exit code is 1.

The cases of a seed are the same everywhere: case N of seed S is `case(S, N)`. Not covered are sockets and HTTP headers
(the tests of the server cover those), and there is no coverage guidance.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suanli.serving.codec import parse, render
from suanli.serving.protocol import DATATYPES, InferRequest, InferResponse, Refusal, Tensor, join_bytes

EVERY = 50_000  # cases, between two lines of progress
SLOW_MS = 500.0  # of CPU; a case that takes longer is a failure: bodies have at most some kilobytes
SIZES = (0, 1, 2, 4, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**40)
NUMBERS = [
    *(str(n).encode() for n in SIZES), *(str(-n).encode() for n in SIZES[1:]), b"1e999", b"-1e999", b"1e-999", b"1.5",
    b"NaN", b"Infinity", b"-Infinity", b"-0", b"00", b"1_0", b"0x10", b"9" * 5000, b"true", b"null", b'"1"', b"[]",
    b"{}", b"[[1]]",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**40, 0.5, 1e308, "", "a", "\ud800", "\0", "FP32", "UINT8",
    "BYTES", "x" * 3000, [], [[]], [[[]]], [1], [[1], [2, 3]], [None], [True], ["a"], [1, "a"], [10**400], {}, {"a": 1},
    [0, 2**62, 2**62], [0, 10**40], [0] * 9, {"binary_data_size": 1}, {"binary_data_size": -1}, {"binary_data": True},
]  # fmt: skip

Body = tuple[bytes, int | None]  # and where its JSON ends


# --- valid requests ---


def valid() -> list[Body]:
    """Requests of every datatype, JSON nested and flat, and binary, with all that the extensions add."""
    bodies: list[Body] = []
    for datatype, dtype in DATATYPES.items():
        array = np.arange(12).astype(dtype).reshape(2, 3, 2)
        flat: dict[str, Any] = {"name": "a", "datatype": datatype, "shape": [2, 3, 2], "data": array.ravel().tolist()}
        bodies.append(whole([flat]))
        bodies.append(whole([flat | {"data": array.tolist()}], id="7", outputs=[{"name": "b"}]))
        bodies.append(whole([flat], [array.tobytes()], parameters={"binary_data_output": True, "timeout": 1000}))
    strings = [b"", b"a", b"\xff\0\xfe", "算力".encode(), bytes(300)]
    text = {"name": "t", "datatype": "BYTES", "shape": [5]}
    bodies.append(whole([text], [join_bytes(strings)], id="8"))
    bodies.append(whole([text | {"data": ["", "a", "b", "算力", '\n\\"']}]))
    pair = [text, {"name": "e", "datatype": "FP32", "shape": [0, 4]}, {"name": "s", "datatype": "INT64", "shape": []}]
    wanted = [{"name": "o", "parameters": {"binary_data": True, "classification": 3}}, {"name": "p"}]
    bodies.append(whole(pair, [join_bytes(strings), b"", bytes(8)], outputs=wanted))
    for datatype in ("INT32", "BYTES"):  # an empty tensor may have any shape with a 0
        empty = {"name": "e", "datatype": datatype, "shape": [3, 0, 5], "data": []}
        bodies += [whole([empty]), whole([empty], [b""])]
    bodies.append((bytes(range(256)), 0))
    return bodies


def whole(inputs: list[dict[str, Any]], raws: list[bytes] | None = None, **more: Any) -> Body:
    if raws is None:
        return json.dumps({"inputs": inputs} | more).encode(), None
    sized = [
        {key: value for key, value in tensor.items() if key != "data"} | {"parameters": {"binary_data_size": len(raw)}}
        for tensor, raw in zip(inputs, raws, strict=True)
    ]
    head = json.dumps({"inputs": sized} | more).encode()
    return head + b"".join(raws), len(head)


VALID = valid()


# --- changes ---

Change = Callable[[random.Random, bytes, "int | None"], Body]


def flip(chance: random.Random, body: bytes, header: int | None) -> Body:
    changed = bytearray(body or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed), header


def cut(chance: random.Random, body: bytes, header: int | None) -> Body:
    return body[: chance.randrange(len(body) + 1)], header


def splice(chance: random.Random, body: bytes, header: int | None) -> Body:
    other, length = chance.choice(VALID)
    spliced = body[: chance.randrange(len(body) + 1)] + other[chance.randrange(len(other) + 1) :]
    return spliced, chance.choice((header, length))


def repeat(chance: random.Random, body: bytes, header: int | None) -> Body:
    start = chance.randrange(len(body) + 1)
    end = min(len(body), start + chance.choice((1, 2, 4, 16, 64, 1024)))
    return body[:end] + body[start:end] * chance.choice((1, 1, 2, 50)) + body[end:], header


def lose(chance: random.Random, body: bytes, header: int | None) -> Body:
    start = chance.randrange(len(body) + 1)
    return body[:start] + body[start + chance.choice((1, 1, 2, 4, 16)) :], header


def add(chance: random.Random, body: bytes, header: int | None) -> Body:
    start = chance.choice((len(body), chance.randrange(len(body) + 1)))
    return body[:start] + chance.randbytes(chance.choice((1, 1, 3, 4, 8))) + body[start:], header


def number(chance: random.Random, body: bytes, header: int | None) -> Body:
    """One number of the JSON becomes another; the header stays right, so that the parser gets as far as it can."""
    end = len(body) if header is None else header
    places = list(re.finditer(rb"-?\d+(?:\.\d+)?", body[:end]))
    if not places:
        return body, header
    place = chance.choice(places)
    head = body[: place.start()] + chance.choice(NUMBERS) + body[place.end() : end]
    return head + body[end:], None if header is None else len(head)


def value(chance: random.Random, body: bytes, header: int | None) -> Body:
    """One value of the JSON, at any depth, is replaced, removed or repeated."""
    end = len(body) if header is None else header
    try:
        content = json.loads(body[:end])
    except (ValueError, RecursionError):
        return body, header
    places = _places(content)
    if not places:
        return body, header
    holder, key = chance.choice(places)
    way = chance.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * chance.choice((1, 2, 70))
    elif way == 2 and isinstance(holder, dict):
        holder[chance.choice(("data", "shape", "name", "datatype", "parameters", "inputs", "id", "zz"))] = holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    try:
        head = json.dumps(content).encode()
    except (ValueError, RecursionError):  # a value that contains itself
        return body, header
    return head + body[end:], None if header is None else len(head)


def _places(content: Any) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    rest = [content]
    while rest and len(places) < 500:
        holder = rest.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        places += [(holder, key) for key in keys]
        rest += [holder[key] for key in keys]
    return places


def length(chance: random.Random, body: bytes, header: int | None) -> Body:
    """Four bytes after the JSON become a wrong size."""
    start = header or 0
    if len(body) - start < 4:
        return body, header
    at = start + 4 * chance.randrange((len(body) - start) // 4)
    size = chance.choice((*SIZES[:12], len(body) - at - 4, len(body) - at - 3))
    return body[:at] + (size % 2**32).to_bytes(4, "little") + body[at + 4 :], header


def lie(chance: random.Random, body: bytes, header: int | None) -> Body:
    near = (header or 0) + chance.choice((-1, 1, -4, 4))
    return body, chance.choice(
        (None, 0, -1, near, near, len(body), len(body) + 1, chance.randrange(len(body) + 1), 2**40)
    )


def nest(chance: random.Random, body: bytes, header: int | None) -> Body:
    """A value becomes a deeply nested one."""
    end = len(body) if header is None else header
    at = body.find(b":", chance.randrange(max(end, 1)), end) + 1
    deep = chance.choice((2, 9, 500, 990, 1000, 5000))
    head = body[:at] + chance.choice((b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep)) + body[at:end]
    return head + body[end:], None if header is None else len(head)


CHANGES: tuple[Change, ...] = (
    flip, cut, splice, repeat, lose, add, number, number, number, value, value, value, value, length, lie, nest,
)  # fmt: skip


BLIND = (flip, cut, splice, repeat, lose, add)


def case(seed: int, n: int) -> Body:
    chance = random.Random(f"{seed}/{n}")
    body, header = chance.choice(VALID)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        change = chance.choice(CHANGES)
        if (
            change in BLIND and chance.random() < 0.7
        ):  # most changes break the JSON, so change what follows it more often
            start = header if header is not None and 0 < header < len(body) else len(body)
            tail, _ = change(chance, body[start:], None)
            body = body[:start] + tail
        else:
            body, header = change(chance, body, header)
        body = body[:100_000]
    return body, header


# --- what must be true ---


class Broken(Exception):
    """The parsed request contradicts itself."""


def agrees(request: InferRequest) -> None:
    """Raises Broken for tensors whose parts don't agree, or that can't be sent back."""
    if not request.inputs or not isinstance(request.id, str | None):
        raise Broken("no inputs, or an id that is no text")
    for tensor in request.inputs:
        if isinstance(tensor.data, list):
            fits = tensor.datatype == "BYTES" and len(tensor.data) == math.prod(tensor.shape)
            if not fits or any(type(element) is not bytes for element in tensor.data):
                raise Broken(f"{tensor.name}: {len(tensor.data)} elements of {tensor.datatype} {tensor.shape}")
        elif tensor.data.dtype != DATATYPES[tensor.datatype] or tensor.data.shape != tensor.shape:
            raise Broken(f"{tensor.name}: {tensor.data.dtype} {tensor.data.shape} for {tensor.datatype} {tensor.shape}")
    answer = InferResponse(id=request.id, model_name="m", model_version="1", outputs=request.inputs)
    for binary in (False, True):
        parts, head = render(answer, InferRequest(inputs=request.inputs, binary_output=binary))
        if binary and head is not None and request.inputs[0].name:  # that of a raw body has none
            body = b"".join(parts).replace(b'"outputs":', b'"inputs":', 1)
            try:
                back = parse(body, head - 1)
            except Refusal as error:
                raise Broken(f"what was answered is refused: {error.message}") from error
            same(request.inputs, back.inputs)


def same(sent: tuple[Tensor, ...], back: tuple[Tensor, ...]) -> None:
    for one, other in zip(sent, back, strict=True):
        equal = one.data == other.data if isinstance(one.data, list) else one.data.tobytes() == other.data.tobytes()  # type: ignore[union-attr]
        if (one.name, one.datatype, one.shape) != (other.name, other.datatype, other.shape) or not equal:
            raise Broken(f"{one.name} came back as another")


@dataclass
class Outcomes:
    """The outcomes of the cases."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by sentence, without what it quotes of the case
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_ms: float = 0.0
    longest_message: int = 0

    @property
    def cases(self) -> int:
        return self.accepted + self.refused.total() + len(self.failures)

    def add(self, seed: int, n: int) -> None:
        body, header = case(seed, n)
        started = time.thread_time()
        wrong = None
        try:
            request = parse(body, header)
            agrees(request)
        except Refusal as error:
            self.longest_message = max(self.longest_message, len(error.message))
            if error.status != 400 or not error.message.endswith((".", "]")) or len(error.message) > 2000:
                wrong = f"Refusal({error.status}, {error.message[:300]!r})"
            reason = sentence(error.message)
        except Exception as error:  # noqa: BLE001  # that none comes is what is tested
            wrong = repr(error)[:500]
        else:
            reason = None
        ms = 1e3 * (time.thread_time() - started)
        self.slowest_ms = max(self.slowest_ms, ms)
        if wrong is None and ms > SLOW_MS:
            wrong = f"took {ms:.0f} ms"
        if wrong is not None:
            self.failures.append({"seed": seed, "case": n, "header": header, "why": wrong, "body": body[:2000].hex()})
        elif reason is None:
            self.accepted += 1
        else:
            self.refused[reason] += 1


def sentence(message: str) -> str:
    """A message without what it quotes."""
    if message.startswith("The body is not JSON"):
        return "The body is not JSON: …"
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", message)
    text = re.sub(r"(?<=, not ).*|(?<= is ).*(?=; )", "…", text)
    return re.sub(r"\[[^\]]*\]|-?\d+(\.\d+)?", "N", text)[:120]


def fuzz(cases: int, seed: int, report: Callable[[Outcomes], None] = lambda _: None) -> Outcomes:
    """Cases 0 to `cases` of a seed; `report` is called now and then."""
    outcomes = Outcomes()
    for n in range(cases):
        outcomes.add(seed, n)
        if (n + 1) % EVERY == 0:
            report(outcomes)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the file that gets the outcome as JSON")
    args = parser.parse_args()
    started, used = time.perf_counter(), time.process_time()

    def report(outcomes: Outcomes) -> None:
        rate = outcomes.cases / (time.perf_counter() - started)
        print(f"{outcomes.cases:>10,} cases, {rate:,.0f} a second, {outcomes.accepted:,} accepted, "
              f"{outcomes.refused.total():,} refused, {len(outcomes.failures)} failures", flush=True)  # fmt: skip

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(args.cases, args.seed, report)
    if args.cases % EVERY:
        report(outcomes)
    for failure in outcomes.failures[:20]:
        print(json.dumps(failure))
    values = {
        "benchmark": "fuzz_protocol",
        "command": ["python", *sys.argv],
        "cases": outcomes.cases,
        "seed": args.seed,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "cases_per_s": outcomes.cases / (time.perf_counter() - started),
        "accepted": outcomes.accepted,
        "refused": outcomes.refused.total(),
        "failures": outcomes.failures,
        "slowest_ms": outcomes.slowest_ms,
        "longest_message": outcomes.longest_message,
        "memory_grown_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "sentences": dict(outcomes.refused.most_common()),
        "environment": _environment(),
    }
    print(f"slowest case {outcomes.slowest_ms:.1f} ms; {len(outcomes.refused)} different sentences")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if outcomes.failures else 0


def _environment() -> Mapping[str, Any]:
    from suanli.machine import device

    return device.environment(device.detect("cpu"))


if __name__ == "__main__":
    sys.exit(main())
