"""A predicted time, from a model of the chip that has two speeds: bytes and multiplications a second.

    a call takes bytes / bytes_per_s + flops / flops_per_s + overhead
    bytes = the weights, once, and every visible page of KV, once however many lanes see it
    flops = 2 x parameters x rows

It knows no cache, no overlap of the two and no attention arithmetic, and it takes the schedule's worst-case lengths. It
is good for comparing plans on one chip, and within a factor of about two for a time: an estimate, and shown as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from anabranch.compiler.profile import pages_of
from anabranch.compiler.schedule import (
    Alias,
    Choose,
    Decode,
    Flush,
    Free,
    Part,
    Prefill,
    Repeat,
    Schedule,
    Step,
    Stitch,
    members,
    size,
)


@dataclass(frozen=True, slots=True)
class Chip:
    """What a step costs on one machine.

    bytes_per_s: of weights and KV that a call streams; flops_per_s: of its matrix products
    call_overhead_s: of a call whatever is in it
    source: the measurement that the figures come from
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    call_overhead_s: float
    source: str


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder as the cost model sees it. weight_bytes: read by each call; kv_bytes_per_token: K and V, all layers."""

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int


# Fitted to a decode loop measured before this engine was written: SmolLM2 in fp32 on a 1,024-token shared prefix gave
# 20 / 93 / 203 tokens a second at 1 / 8 / 32 branches, so 50 / 86 / 158 ms a call; the model gives 54 / 78 / 160.
CPU = Chip(
    name="2-core x86-64 AVX2",
    bytes_per_s=11.7e9,
    flops_per_s=7.9e10,
    call_overhead_s=1e-3,
    source="a decode loop on SmolLM2-135M fp32",
)

SMOLLM2 = ModelShape(num_parameters=134_515_008, weight_bytes=538_060_032, kv_bytes_per_token=2 * 30 * 3 * 64 * 4)


def predict_seconds(schedule: Schedule, model: ModelShape = SMOLLM2, chip: Chip = CPU) -> float:
    """Seconds that the schedule takes on `chip`: see the module for what is left out."""
    return _Walk(schedule, model, chip).steps(schedule.steps)


class _Walk:
    """Goes through a schedule; `held`: tokens in every segment that is not freed, each of which a call reads once."""

    def __init__(self, schedule: Schedule, model: ModelShape, chip: Chip) -> None:
        self.model = model
        self.chip = chip
        self.page_size = schedule.machine.page_size
        self.tokens: dict[int, int] = {0: 0}
        self.segment: dict[int, int] = {0: 0}
        self.held = 0

    def steps(self, steps: Sequence[Step]) -> float:
        total = 0.0
        for step in steps:
            match step:
                case Alias(lanes=lanes, segments=segments):
                    for lane, segment in zip(members(lanes), members(segments), strict=True):
                        self.segment[lane], self.tokens[segment] = segment, 0
                case Prefill(parts=parts, beside=beside) | Flush(parts=parts, beside=beside):
                    rows = sum(part.rows * size(part.lanes) for part in parts)
                    self._grow(parts, isinstance(step, Prefill), 0)
                    total += self._call(rows, 0 if beside else 1)
                case Decode(parts=parts, at_most=at_most, beside=beside):
                    rows = sum(size(part.lanes) for part in parts)
                    # The mean over the calls: what they read grows evenly.
                    before = self.held
                    self._grow(parts, False, at_most)
                    after, self.held = self.held, (before + self.held) // 2
                    total += at_most * self._call(rows, 0 if beside else 1)
                    self.held = after
                case Stitch(lane=lane, segment=segment):
                    self.segment[lane], self.tokens[segment] = segment, 0
                case Free(segments=segments):
                    self.held -= sum(self.tokens.pop(segment, 0) for segment in members(segments))
                case Repeat(rounds=rounds, steps=inner):
                    before, first = self.held, self.steps(inner)
                    growth = max(0, self.held - before)
                    # Later rounds read what earlier ones left, half of it on average.
                    total += rounds * (first + self._reads(growth * (rounds - 1) // 2) / self.chip.bytes_per_s)
                    self.held = before + growth * rounds
                case Choose(arms=arms, merged=merged):
                    total += max(self.steps(arm) for arm in arms)
                    for moved in merged:
                        self.tokens.setdefault(moved.segment, 0)
                case _:
                    assert_never(step)
        return total

    def _grow(self, parts: Sequence[Part], feeds: bool, times: int) -> None:
        for part in parts:
            more = times + (part.rows + part.draws if feeds else 0)
            for lane in members(part.lanes):
                segment = self.segment.get(lane)
                if segment is not None:
                    self.tokens[segment] = self.tokens.get(segment, 0) + more
            self.held += more * size(part.lanes)

    def _reads(self, tokens: int) -> int:
        return pages_of(max(0, tokens), self.page_size) * self.page_size * self.model.kv_bytes_per_token

    def _call(self, rows: int, calls: int) -> float:
        """Seconds of a call with `rows` rows; of its rows alone where it is part of the call before."""
        chip, model = self.chip, self.model
        read = calls * (model.weight_bytes + self._reads(self.held))
        flops = 2 * model.num_parameters * rows
        return read / chip.bytes_per_s + flops / chip.flops_per_s + calls * chip.call_overhead_s
