"""The engine with a script in the place of the model, so that what a simulation checks is what runs.

Scheduler, pages, contexts, the addresses that attention reads, joins and recorder are the engine's own. Replaced are
the decoder, which computes nothing, the choice of a token, which a trace makes, and the clock, which counts steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from anabranch.compiler.recording import Recording
from anabranch.compiler.scheduler import Machine, Policy
from anabranch.compiler.sizes import ModelSizes
from anabranch.compiler.verify_recording import Report, verify_recording
from anabranch.runtime.attention import Block, StepAttention
from anabranch.runtime.chat import read_chat
from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.constrain import Constraints
from anabranch.runtime.context import Context
from anabranch.runtime.drawing import DrawRow
from anabranch.runtime.engine import Engine, EngineConfig, Run, RunResult, _Work
from anabranch.runtime.generation import encode_bytes
from anabranch.runtime.model import Attend, Decoder
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.pages import KvStore
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.tasks import Draw, Task
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.testing._plan import Plan
from anabranch.testing._trace import Outcome, Trace

Preempt: TypeAlias = Literal["swap", "recompute", "never"]

MAX_CONTEXT = 1 << 16


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulation came to.

    plans, results: in order
    recording: what the engine did
    num_steps: steps of the engine; num_preempted: how often a thread had to give its pages up
    has_waited: something waited, for pages or by the policy's will, while a lane was free
    """

    plans: tuple[Plan, ...]
    results: tuple[RunResult, ...]
    recording: Recording
    num_steps: int
    num_preempted: int
    has_waited: bool

    def verify(self) -> Report:
        """Hold the recording against every rule of the verifier. Raises ScheduleFault.

        The bound on steps is for runs in which no lane stands idle while something waits, and is held against those.
        """
        sizes = None if self.has_waited else model_sizes()
        return verify_recording(self.recording, sizes=sizes, compiled=[plan.compiled for plan in self.plans])


def simulate(
    plans: Plan | Sequence[Plan],
    machine: Machine,
    traces: Trace | Sequence[Trace] | None = None,
    *,
    policy: Policy | None = None,
    deterministic: bool = False,
    preempt: Preempt = "swap",
    prefix_cache: bool = True,
    seed: int = 0,
) -> Simulation:
    """Run plans together in one batch on a machine, the model's part played by traces, until all have ended.

    traces: one for all plans, or one for each
    policy: who gets a lane, and who is preempted; the engine's own when None
    deterministic: joins close by tokens decoded and not by time; a plan with a deadline is refused
    preempt, prefix_cache: as in `EngineConfig`
    seed: takes part in which outcome of its trace a gen takes
    Raises PlanError if a plan or its inputs are wrong or can never fit the machine, and RuntimeError if nothing can run
    while plans are left.
    """
    batch = [plans] if isinstance(plans, Plan) else list(plans)
    given = Trace() if traces is None else traces
    scripts = [given] * len(batch) if isinstance(given, Trace) else list(given)
    if len(scripts) != len(batch):
        raise ValueError(f"{len(scripts)} traces for {len(batch)} plans")
    recorder = Recorder()
    config = EngineConfig(
        lanes=machine.lanes,
        pages=machine.pages,
        page_size=machine.page_size,
        chunk=machine.chunk,
        deterministic=deterministic,
        preempt=preempt,
        prefix_cache=prefix_cache,
    )
    step_s = max((script.step_s for script in scripts), default=0.0)
    engine = _Simulator(config, policy, recorder, step_s)
    runs: list[Run] = []
    for plan, script in zip(batch, scripts, strict=True):
        # A deterministic engine has more to refuse than what was looked at when the plan was compiled.
        compiled = plan.compiled if not deterministic else engine.compile(plan.program, functions=tuple(plan.functions))
        runs.append(engine.submit(compiled, plan.inputs, seed=seed, functions=plan.functions))
        engine.scripts[runs[-1]] = script
    cancellable = [(run, script.cancel_at) for run, script in engine.scripts.items() if script.cancel_at is not None]
    while any(run.result is None for run in runs):
        for run, step in cancellable:
            if engine.num_steps >= step:
                engine.cancel(run)
        engine.step()
    results = tuple(run.result for run in runs if run.result is not None)
    recording = recorder.recording()
    return Simulation(tuple(batch), results, recording, engine.num_steps, engine.num_preempted, engine.has_waited)


class _Simulator(Engine):
    """step_s: how long a step takes."""

    def __init__(self, config: EngineConfig, policy: Policy | None, recorder: Recorder, step_s: float) -> None:
        super().__init__(simulated_model(), config, policy=policy, recorder=recorder)
        self.constraints = _constraints()
        self.sizes = model_sizes()
        self.scripts: dict[Run, Trace] = {}
        self.has_waited = False
        self._step_s = step_s
        self._slept_s = 0.0

    def clock(self) -> float:
        return self._slept_s + self.num_steps * self._step_s

    def sleep(self, seconds: float) -> None:
        self._slept_s += seconds

    def _start(self) -> None:
        super()._start()
        if not self.has_waited and len(self.scheduler.seated) < self.machine.lanes:
            self.has_waited = self.scheduler.has_waiting

    def _attention(self, blocks: Sequence[Block]) -> StepAttention:
        assert isinstance(self.store, KvStore)
        return _Addresses(self.store, self.model.decoder.config, blocks, self.model.decoder.dtype)

    def _sample(self, sampling: Sequence[tuple[_Work, Context, Tensor]]) -> None:
        for work, _, _ in sampling:
            if work.draw is not None:
                outcome = self._outcome(work.task, work.draw)
                if outcome.ending == "failed" and work.draw.generation.drawn >= outcome.length:
                    work.draw.generation.cut("failed", "the trace breaks it here")
        super()._sample(sampling)

    def _draw(self, rows: Sequence[DrawRow], tasks: Sequence[Task]) -> list[tuple[int, float]]:
        tokens = [
            self._token(row.request, row.mask, self._outcome(task, row.request))
            for row, task in zip(rows, tasks, strict=True)
        ]
        return [
            (token, self.logprob(row.logits, token) if row.request.wants_logprobs else 0.0)
            for token, row in zip(tokens, rows, strict=True)
        ]

    def _outcome(self, task: Task, request: Draw) -> Outcome:
        outcomes = self.scripts[task.run].outcomes
        low, high = request.key
        return outcomes[zlib.crc32(request.node.site.encode(), low ^ high) % len(outcomes)]

    def _token(self, request: Draw, mask: Tensor | None, outcome: Outcome) -> int:
        """The token that the trace has for this draw."""
        words = _words()
        index = request.generation.drawn
        past = index - outcome.length
        wanted = zlib.crc32(b"%d %d" % (outcome.content, index))
        if mask is None:
            if past >= 0 and outcome.ending == "end_of_turn":
                return words.end_of_turn
            stops = request.node.spec.stop
            if past >= 0 and outcome.ending == "stop" and stops:
                written = words.spelt(stops[0])
                if past < len(written):
                    return written[past]
            return words.text[wanted % len(words.text)]
        allowed, may_end = words.allowed(mask)
        if may_end and (past >= 0 or not allowed):
            return words.end_of_turn
        return allowed[wanted % len(allowed)]


class _Addresses(StepAttention):
    """What the kernels of a step are told to read, and no more than that: nothing is rotated, and nothing attends."""

    def _finish(self) -> None:
        pass


class _Decoder:
    """In the place of a decoder: logits are looked up by the token and its position, so no order changes them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.packed = True
        self.num_logits = config.vocab_size
        generator = np.random.Generator(np.random.PCG64(0))
        self._rows = torch.from_numpy(generator.standard_normal((64, config.vocab_size), dtype=np.float32))

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, logit_rows: Tensor, shapes: None = None
    ) -> Tensor:
        """[num_rows, vocab_size], as `Decoder.forward`."""
        return self._rows[(token_ids[logit_rows] * 7 + positions[logit_rows]) % len(self._rows)]

    def fixed_shapes(self) -> None:
        """Rows are looked up one by one, so no shape changes them."""


class _Words:
    """The tokens that a trace writes with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelt: dict[str, list[int]] = {}
        self._allowed: dict[bytes, tuple[list[int], bool]] = {}
        self._ends = sorted(tokenizer.eos_ids)
        self.end_of_turn = self._ends[0]
        # Few words, so that texts, votes and stops agree now and then; the last is the first half of a character.
        self.text = [self.spelt(word)[0] for word in ("a", "e", "1", " the", "\n", "yes", ". ", "é")]
        self.text.append(tokenizer.encode([("Ã", False)])[0])

    def spelt(self, text: str) -> list[int]:
        found = self._spelt.get(text)
        if found is None:
            found = self._spelt[text] = encode_bytes(self._tokenizer, text.encode())
        return found

    def allowed(self, mask: Tensor) -> tuple[list[int], bool]:
        """The tokens of a packed mask but for those that end a turn, and whether one of these is in it."""
        packed = mask.numpy()
        key = packed.tobytes()
        found = self._allowed.get(key)
        if found is None:
            tokens = np.flatnonzero(np.unpackbits(packed.view(np.uint8), bitorder="little")).tolist()
            found = [token for token in tokens if token not in self._ends], any(t in self._ends for t in tokens)
            self._allowed[key] = found
        return found


@cache
def simulated_model() -> LoadedModel:
    """The byte tokenizer and its chat template around a decoder that computes nothing."""
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        architecture="llama",
        hidden_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=2,
        vocab_size=tokenizer.vocab_size,
        max_context=MAX_CONTEXT,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        sliding_window=(None,),
        bos_id=tokenizer.bos_id,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
    )
    decoder = cast(Decoder, _Decoder(config))
    return LoadedModel(decoder, tokenizer, read_chat(tokenizer, "simulated"), "simulated", "simulated")


@cache
def model_sizes() -> ModelSizes:
    """How text becomes tokens in a simulation."""
    model = simulated_model()
    return ModelSizes(model.tokenizer, model.chat)


@cache
def _constraints() -> Constraints:
    return Constraints(simulated_model().tokenizer)


@cache
def _words() -> _Words:
    return _Words(simulated_model().tokenizer)
