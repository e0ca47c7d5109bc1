"""Imported traces replayed by the engine: their masks and positions are those that each system publishes.

What is expected is worked out here from the trees that the generator made the traces from, by each system's own rules,
with none of the code of the plan language.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from law_runs import TOLERANCE, model, weights
from torch import Tensor
from trace_texts import DIALECTS, MOST_DEEP, MOST_WIDE, Fork, Thread, TraceText, text_of, trace_texts

from anabranch.compiler.verify_recording import verify_recording
from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.dialects import import_trace
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import print_plan
from anabranch.runtime.dense import dense_forward
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.reference import check_run, lay_out

COUNT = 70
SEED = 2

SHORT = 700
"""Tokens of a trace whose logits are compared too: the dense forward takes the square of them."""


class Expected:
    """The tokens of a trace under its system's rules: ids, positions, and what each one sees.

    Tokens stand in the order in which threads write: a parent up to its fork, each child as a whole, the parent again.
    """

    def __init__(self, trace: TraceText) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.views: list[list[int]] = []
        self.dialect = trace.dialect
        self.bos = model().tokenizer.bos_id
        self.seen, self.end = self.thread(trace.thread, [], 0)

    def write(self, text: str, view: list[int], position: int) -> tuple[list[int], int]:
        """The view and the position after `text`."""
        ids = model().tokenizer.encode([(text, False)])
        if position == 0 and self.bos is not None:
            ids = [self.bos, *ids]
        view = list(view)
        for token in ids:
            view.append(len(self.ids))
            self.ids.append(token)
            self.positions.append(position)
            self.views.append(list(view))
            position += 1
        return view, position

    def thread(self, thread: Thread, view: list[int], position: int) -> tuple[list[int], int]:
        for node in thread:
            if isinstance(node, str):
                view, position = self.write(node, view, position)
            else:
                view, position = self.fork(node, view, position)
        return view, position

    def fork(self, fork: Fork, view: list[int], position: int) -> tuple[list[int], int]:
        match self.dialect:
            case "multiverse":
                # Each path sees what is before the fork, from one position on; what follows sees all of them, and
                # stands at the largest position that one of them came to.
                joined, most = list(view), position
                for child in fork.children:
                    seen, end = self.thread(child, view, position)
                    joined += seen[len(view) :]
                    most = max(most, end)
                return joined, most
            case "threadweaver":
                # Each thread is a request that holds what is before it; the next one holds all that they wrote.
                for child in fork.children:
                    self.thread(child, view, position)
                return self.write("".join(map(text_of, fork.children)), view, position)
            case _:
                # The call is written and forgotten; each child sees its own text alone.
                self.write(fork.command, view, position)
                for child in fork.children:
                    self.thread(child, [], 0)
                return view, position

    def visible(self) -> Tensor:
        """[T, T]: row q marks what token q sees."""
        found = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for row, view in enumerate(self.views):
            found[row, view] = True
        return found


def branch_texts(thread: Thread, dialect: str) -> list[str]:
    """The text of every thread below `thread`, with what came back to it from those below: of APR nothing comes."""
    found = []
    for fork in (node for node in thread if isinstance(node, Fork)):
        if fork.command:
            found.append(fork.command)
        for child in fork.children:
            own = "".join(node for node in child if isinstance(node, str))
            found += [own if dialect == "apr" else text_of(child), *branch_texts(child, dialect)]
    return found


def imported(trace: TraceText) -> ast.Program:
    """The plan of a trace, as a file would hold it."""
    return parse_text(import_trace(trace.dialect, Source("trace", trace.text)).replace("\r\n", "\n"))


def drawing(max: int) -> ast.Gen:
    return ast.Gen(None, None, (ast.Option("max", ast.Int(max)), ast.Option("temperature", ast.Float(0.0))))


def with_draw(program: ast.Program) -> ast.Program:
    """The plan draws one token at its end."""
    *others, plan = program.plans
    stmts = (*plan.body.stmts, drawing(1))
    return replace(program, plans=(*others, replace(plan, body=replace(plan.body, stmts=stmts))))


def with_draws(program: ast.Program) -> ast.Program:
    """Every thread draws two tokens at its end."""
    plans = [replace(plan, body=_with_draws(plan.body)) for plan in program.plans]
    return replace(program, plans=tuple(plans))


def _with_draws(block: ast.Block) -> ast.Block:
    stmts: list[ast.Stmt] = []
    last: ast.Stmt = drawing(2)
    for stmt in block.stmts:
        match stmt:
            case ast.Branches(branches=branches):
                inner = tuple(replace(branch, body=_with_draws(branch.body)) for branch in branches)
                stmts.append(replace(stmt, branches=inner))
            case ast.Return():
                stmts += [last, stmt]
            case _:
                stmts.append(stmt)
    return ast.Block((*stmts, *([] if any(isinstance(stmt, ast.Return) for stmt in stmts) else [last])))


def run(program: ast.Program, page_size: int) -> RunResult:
    recorder = Recorder()
    config = EngineConfig(lanes=6, pages=4096, page_size=page_size, chunk=64, trace_logits=True)
    engine = Engine(model(), config, recorder=recorder)
    # A recording holds the text of its plan, which is to be that of this program.
    [result] = engine.run(parse_text(print_plan(program)), {})
    verify_recording(recorder.recording())
    assert result.status == "ok", result.reason
    return result


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_replay_has_the_masks_and_positions_that_are_published(dialect: str) -> None:
    """Every token of every replayed trace has the position and the view of its system, and the logits that follow."""
    shapes: Counter[str] = Counter()
    for index, trace in enumerate(trace_texts(dialect, COUNT, SEED)):
        program = with_draw(imported(trace))
        result = run(program, page_size=(16, 5, 1)[index % 3])
        found = model()
        layout = lay_out(program, None, {}, result.events, found.tokenizer, found.chat)
        expected = Expected(trace)
        visible, shifts = layout.visibility()
        count = len(expected.ids)
        assert [token.id for token in layout.tokens[:count]] == expected.ids
        assert [token.position for token in layout.tokens[:count]] == expected.positions
        assert len(layout.tokens) - count <= 1  # what was drawn
        mask = expected.visible()
        assert torch.equal(visible[:count, :count], mask)
        assert not shifts.any()
        # The engine drew from what the mask and the positions give.
        if count <= SHORT and shapes["compared"] < 12:
            [row] = result.logits
            logits = dense_forward(
                torch.tensor(expected.ids), torch.tensor(expected.positions), mask, shifts[:count, :count],
                found.decoder.config, weights(),
            )  # fmt: skip
            assert float((row.logits - logits[expected.seen[-1]]).abs().max()) <= TOLERANCE
            shapes["compared"] += 1
        # The threads wrote what the trace has.
        assert sorted(branch.text for branch in result.branches) == sorted(branch_texts(trace.thread, dialect))
        if dialect != "apr":
            assert result.value.startswith(trace.text)
        shapes[f"{trace.depth} deep"] += 1
        shapes[f"{trace.width} wide"] += 1
    assert shapes[f"{MOST_DEEP} deep"] >= 3
    assert shapes[f"{MOST_WIDE} wide"] >= 1
    assert shapes["compared"] >= 5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_thread_of_a_replay_goes_on_as_the_reference_does(dialect: str) -> None:
    """Threads that draw at their end draw from the reference's logits, in every thread that forks and joins."""
    most = 2 * SHORT if dialect == "apr" else SHORT
    short = [trace for trace in trace_texts(dialect, COUNT, SEED + 1) if trace.depth > 0 and len(trace.text) < most]
    assert any(trace.depth > 1 for trace in short[:10])
    for index, trace in enumerate(short[:10]):
        program = with_draws(imported(trace))
        result = run(program, page_size=(5, 16, 1)[index % 3])
        found = model()
        report = check_run(
            program, None, {}, result.events, found.tokenizer, found.chat, found.decoder.config, weights(),
            result.logits, tolerance=TOLERANCE,
        )  # fmt: skip
        assert report.num_rows >= len(result.branches)
