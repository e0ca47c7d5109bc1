"""`anabranch.testing`: what its strategies draw, what its simulator does, and how it is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from law_runs import COMMON
from schedule_runs import hold_schedule, simulations

from anabranch.compiler.recording import End, Stitch, from_json, to_json
from anabranch.dsl import ast
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.options import TAKES
from anabranch.dsl.parse import parse_text
from anabranch.runtime.events import BranchEnded, GenEnded
from anabranch.testing import (
    Machine,
    Outcome,
    Plan,
    Policy,
    Simulation,
    Trace,
    Waiting,
    adversarial_plans,
    least_pages,
    machines,
    plans,
    schedules,
    simulate,
    traces,
    verify_recording,
)

ROOT = Path(__file__).parent.parent
ROOMY = Machine(lanes=8, pages=512, page_size=4, chunk=32)


def statements(plan: Plan) -> Iterator[ast.Stmt]:
    """Every statement of a plan file, at any depth."""
    waiting = [stmt for one in plan.program.plans for stmt in one.body.stmts]
    while waiting:
        stmt = waiting.pop()
        yield stmt
        for name in stmt.__slots__:
            held = getattr(stmt, name)
            for body in held if isinstance(held, tuple) else (held,):
                block = body.body if isinstance(body, ast.Branch) else body
                if isinstance(block, ast.Block):
                    waiting.extend(block.stmts)


# --- what the strategies draw


def test_every_statement_option_and_join_is_drawn() -> None:
    """Nothing of the language is left out: statements, the options of each, types of gens, joins, functions."""
    found: set[object] = set()

    @settings(COMMON, max_examples=1500)
    @given(plans())
    def look(plan: Plan) -> None:
        found.update(("function", name) for name in plan.functions)
        found.update(("plan", option.name) for one in plan.program.plans for option in one.options)
        for stmt in statements(plan):
            found.add(type(stmt))
            kind = type(stmt).__name__.lower()
            found.update((kind, option.name) for option in getattr(stmt, "options", ()))
            match stmt:
                case ast.Branches(branches=branches):
                    found.update(("branch", option.name) for branch in branches for option in branch.options)
                case ast.Gen(options=options):
                    kinds = [option.value for option in options if option.name == "type"]
                    found.update(("type", getattr(kind, "function", getattr(kind, "id", None))) for kind in kinds)
                case ast.Write(role=role):
                    found.add(("role", role))
                case _:
                    pass
            join = getattr(stmt, "join", None)
            if join is not None:
                found.add(("join", join.value.kind, join.context.kind, join.context.positions))

    look()
    wanted: set[object] = {kind for kind in ast.Stmt.__args__ if kind is not ast.Expand}
    wanted |= {(kind, name) for kind, names in TAKES.items() if kind != "expand" for name in names}
    wanted |= {("type", name) for name in ("int", "float", "bool", "lines", "choice", "regex", "json")}
    wanted |= {("role", role) for role in ("text", "user", "system", "assistant")}
    contexts = (("drop", "max"), ("text", "max"), ("stitch", "max"), ("stitch", "sum"))
    wanted |= {("join", kind, *how) for kind in ("all", "first", "vote", "best", "quorum") for how in contexts}
    wanted |= {("function", name) for name in ("half", "first_of")}
    # One penalty tells what the other does, and a plan's own sampling options are those of its gens.
    wanted -= {("plan", name) for name in TAKES["plan"] if name not in ("max", "budget", "depth", "temperature")}
    assert not wanted - found


def test_adversarial_plans_are_of_every_shape() -> None:
    """Each of the shapes is drawn, at its extreme, and every plan compiles."""
    found: set[str] = set()

    def nesting(block: ast.Block) -> int:
        inner = [nesting(stmt.body) for stmt in block.stmts if isinstance(stmt, ast.Fork)]
        return 1 + max(inner) if inner else 0

    @settings(COMMON, max_examples=400)
    @given(adversarial_plans())
    def look(plan: Plan) -> None:
        assert parse_text(plan.text) == plan.program
        assert plan.compiled
        forks = [stmt for stmt in statements(plan) if isinstance(stmt, ast.Fork)]
        found.update(f"width {fork.width.value}" for fork in forks if isinstance(fork.width, ast.Int))
        found.add(f"depth {nesting(plan.program.plans[-1].body)}")
        found.update({"empty branch"} if any(not fork.body.stmts for fork in forks) else ())
        found.update({"empty prefix"} if isinstance(plan.program.plans[-1].body.stmts[0], ast.Fork) else ())
        found.update({"no branch"} if plan.inputs.get("n") == 0 else ())
        for fork in forks:
            found.update({"all fail"} if ast.Need(ast.Bool(False)) in fork.body.stmts else ())
            for inner in fork.body.stmts:
                if isinstance(inner, ast.Fork):
                    outer, below = (
                        (one.join or ast.Join()).context or ast.JoinContext("drop") for one in (fork, inner)
                    )
                    if outer.kind == below.kind == "stitch":
                        found.add(f"{below.positions} inside {outer.positions}")

    look()
    wanted = {"width 1", "width 1000", "depth 50", "empty branch", "empty prefix", "no branch", "all fail"}
    wanted |= {f"{one} inside {other}" for one in ("max", "sum") for other in ("max", "sum")}
    assert not wanted - found


@settings(COMMON, max_examples=150)
@given(simulations(adversarial_plans(wide=200)))
def test_adversarial_schedules_break_no_rule(simulation: Simulation) -> None:
    """The shapes on which schedules go wrong, on machines of every size."""
    hold_schedule(simulation)


@pytest.mark.parametrize("lanes", [1, 64])
def test_a_thousand_branches_and_fifty_levels(lanes: int) -> None:
    """The extremes of width and depth end in the least pool that they may run in."""
    wide = Plan.parse("main = plan() { fork(1000) { gen(max=2); } join(all, stitch(sum)); }")
    body = 'gen("b", max=2);'
    for _ in range(50):
        body = f"fork(1) {{ {body} }} join(all, stitch);"
    for plan in (wide, Plan.parse(f"main = plan() {{ {body} }}")):
        machine = Machine(lanes, 1, 4, 16)
        pages = least_pages(plan, machine)
        hold_schedule(simulate(plan, Machine(lanes, pages, 4, 16), Trace((Outcome(9),))))


def test_plans_shrink_to_small_ones() -> None:
    """What is found is shown at its smallest: here a stitch of several branches, and a fork in a branch."""
    quiet = settings(COMMON, max_examples=500)
    stitched = find(plans(), lambda plan: plan.stitches_several, settings=quiet)
    assert stitched.text.count("\n") <= 6
    assert "fork(2)" in stitched.text and not stitched.inputs
    nested = find(plans(), lambda plan: plan.nests_forks, settings=quiet)
    assert nested.text.count("\n") <= 8


@settings(COMMON, max_examples=30)
@given(st.data())
def test_machines_go_down_to_the_least_pool(data: st.DataObject) -> None:
    """`least` gives exactly what the largest of the plans needs depth first; without it there is that or more."""
    batch = data.draw(st.lists(plans(), min_size=1, max_size=2))
    tight, roomy = data.draw(machines(*batch, least=True)), data.draw(machines(*batch, least=False))
    assert tight.pages == max(least_pages(plan, tight) for plan in batch)
    assert roomy.pages > max(least_pages(plan, roomy) for plan in batch)


@settings(COMMON, max_examples=30)
@given(schedules())
def test_schedules_are_recordings_that_hold(recording: object) -> None:
    """A drawn schedule passes the verifier, also as read back from JSON and with its plans compiled anew."""
    read = from_json(to_json(recording))  # type: ignore[arg-type]
    assert verify_recording(read).runs == len(read.runs)


# --- what the simulator does


def texts(simulation: Simulation) -> dict[tuple[str, ...], object]:
    """What each thread of the first plan came to, but for those that were cut off."""
    ended = [event for event in simulation.results[0].events if isinstance(event, BranchEnded)]
    return {event.path: (event.text, event.status, event.value) for event in ended if event.status != "cancelled"}


@settings(COMMON, max_examples=150)
@given(st.data())
def test_the_machine_changes_no_token(data: st.DataObject) -> None:
    """A trace gives a thread the same tokens whatever machine, policy and plan beside it."""
    plan, other = (data.draw(plans(deadlines=False, fuel=fuel)) for fuel in (90, 30))
    script = data.draw(traces(cancels=False))
    one, two = (data.draw(machines(plan, other)) for _ in range(2))
    alone = simulate(plan, one, script, deterministic=True)
    beside = simulate([plan, other], two, script, deterministic=True, policy=data.draw(policies()), preempt="recompute")
    assert alone.results[0].value == beside.results[0].value
    here, there = texts(alone), texts(beside)
    assert () in here
    assert all(here[path] == there[path] for path in here.keys() & there.keys())


class LastFirst(Policy):
    """Youngest branches first."""

    def rank(self, waiting: Waiting) -> tuple[int, ...]:
        return (-waiting.order, -waiting.index)


def policies() -> st.SearchStrategy[Policy | None]:
    """The engine's own, and another."""
    return st.sampled_from([None, LastFirst()])


def ends(simulation: Simulation) -> list[str]:
    """How gens ended, in order."""
    return [event.end for event in simulation.results[0].events if isinstance(event, GenEnded)]


@pytest.mark.parametrize(
    ("outcome", "end", "drawn"),
    [
        (Outcome(3, "max"), "max", 9),
        (Outcome(3, "end_of_turn"), "end_of_turn", 4),
        (Outcome(0, "end_of_turn"), "end_of_turn", 1),
        (Outcome(3, "stop"), "stop", 5),
        (Outcome(3, "failed"), "failed", 3),
        (Outcome(0, "failed"), "failed", 0),
        (Outcome(30, "end_of_turn"), "max", 9),
    ],
)
def test_a_gen_ends_as_its_outcome_says(outcome: Outcome, end: str, drawn: int) -> None:
    """An outcome's length and ending are the gen's, where its `max` lets it."""
    simulation = simulate(Plan.parse('main = plan() { gen("a", max=9, stop="zq"); }'), ROOMY, Trace((outcome,)))
    assert ends(simulation) == [end]
    assert simulation.results[0].counts["tokens_decoded"] == drawn
    simulation.verify()


def test_a_gen_that_breaks_off_inside_a_character_fails_its_branch() -> None:
    """Whatever was written before it broke, half a character included: the branch fails, and the rest goes on."""
    plan = Plan.parse('main = plan() { fork(2, fallback=["none"]) { gen("a", max=9); }; gen("z", max=1); }')
    cut = [Outcome(length, "failed", content) for length in range(1, 5) for content in range(8)]
    trimmed = 0
    for outcome in cut:
        simulation = simulate(plan, ROOMY, Trace((outcome,)))
        simulation.verify()
        trimmed += simulation.results[0].counts["tokens_trimmed"]
    assert trimmed > 0


def test_equal_contents_agree() -> None:
    """Gens of one content write the same, so that branches may agree; another content writes otherwise."""
    plan = Plan.parse('main = plan() { x = fork(3) { gen("a", max=6); } join(all, drop); return(x); }')
    values = [simulate(plan, ROOMY, Trace((Outcome(9, content=content),))).results[0].value for content in (0, 1)]
    assert len(set(values[0])) == len(set(values[1])) == 1
    assert values[0] != values[1]


def test_a_trace_makes_branches_late_and_cancels_runs() -> None:
    """Time is counted in steps, so a deadline passes at the same step each time; and a run can be cut off."""
    plan = Plan.parse('main = plan() { fork(2, deadline="3s", fallback=["late"]) { gen("a", max=9); }; }')
    late = simulate(plan, ROOMY, Trace((Outcome(9),), step_s=1.0))
    assert [step.status for step in late.recording.steps if isinstance(step, End)] == ["late", "late", "ok"]
    in_time = simulate(plan, ROOMY, Trace((Outcome(9),)))
    assert all(step.status == "ok" for step in in_time.recording.steps if isinstance(step, End))
    cut = simulate(plan, ROOMY, Trace((Outcome(9),), cancel_at=2))
    assert cut.results[0].status == "cancelled"
    assert cut.num_steps <= 3
    for simulation in (late, in_time, cut):
        simulation.verify()


def test_a_simulation_refuses_what_the_engine_refuses() -> None:
    """A pool that is too small, a deadline where time may not decide, a wrong input; and traces that do not match."""
    plan = Plan.parse('main = plan() { fork(2, deadline="3s") { gen("a", max=9); }; }')
    with pytest.raises(PlanError, match="pool-too-small"):
        simulate(plan, Machine(1, 1, 1, 1))
    with pytest.raises(PlanError, match="deadline"):
        simulate(plan, ROOMY, deterministic=True)
    with pytest.raises(PlanError, match="unknown-input"):
        simulate(Plan(plan.program, {"x": 1}), ROOMY)
    with pytest.raises(ValueError, match="2 traces for 1 plans"):
        simulate(plan, ROOMY, [Trace(), Trace()])


class Patient(Policy):
    """Starts nothing, ever."""

    def holds_back(self, waiting: Waiting, free_lanes: int) -> bool:
        return True


def test_a_policy_that_starts_nothing_is_told_of() -> None:
    """A run that can never go on is an error, and no endless loop."""
    plan = Plan.parse("main = plan() { fork(2) { gen(max=1); }; }")
    with pytest.raises(RuntimeError, match="stuck"):
        simulate(plan, ROOMY, policy=Patient())


def test_winners_are_stitched_in_a_simulation() -> None:
    """The recording holds what the verifier judges by: here which segments enter the parent's view."""
    plan = Plan.parse('main = plan() { text("a"); fork(3) { gen(max=2); } join(all, stitch); gen("z", max=2); }')
    steps = simulate(plan, ROOMY).recording.steps
    assert [step.winners for step in steps if isinstance(step, Stitch)] == [(1, 2, 3)]


# --- how it is found


def python(code: str, *folders: Path) -> str:
    """What a fresh interpreter prints, with `folders` before the sources."""
    path = os.pathsep.join(map(str, [*folders, ROOT / "src"]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that tells of the entry points of pyproject.toml, as an installation does."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["hypothesis"]
    folder = tmp_path / "anabranch-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: anabranch\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (folder / "entry_points.txt").write_text(f"[hypothesis]\n{lines}")
    return tmp_path


def test_hypothesis_knows_the_types_by_itself(installed: Path) -> None:
    """`st.from_type` of a plan, a trace, a machine and a recording, without anything of ours being called."""
    code = """
from hypothesis import Phase, find, settings, strategies as st
from anabranch.testing import Machine, Plan, Recording, Trace
for kind in (Plan, Trace, Machine, Recording):
    quick = settings(database=None, deadline=None, max_examples=5, phases=[Phase.generate])
    found = find(st.from_type(kind), lambda value: True, settings=quick)
    assert type(found) is kind, found
    print(kind.__name__)
"""
    assert python(code, installed).split() == ["Plan", "Trace", "Machine", "Recording"]


def test_registration_is_cheap_and_never_in_the_way(installed: Path) -> None:
    """`import hypothesis` imports nothing heavy of ours; with a part missing it still works."""
    code = "import sys, hypothesis; print(sorted({'torch', 'numpy', 'lark', 'anabranch.runtime'} & set(sys.modules)))"
    assert python(code, installed).strip() == "[]"
    assert "anabranch.testing._trace" in python("import sys, hypothesis; print(list(sys.modules))", installed)
    missing = "import sys; sys.modules['anabranch.compiler.recording'] = None; import hypothesis; print('fine')"
    assert python(missing, installed).strip() == "fine"


def test_without_hypothesis_the_error_names_the_extra() -> None:
    """Importing `anabranch.testing` where Hypothesis is not installed says what to install."""
    code = """
import sys
sys.modules["hypothesis"] = None
try:
    import anabranch.testing
except ImportError as error:
    print(error)
"""
    assert "anabranch[testing]" in python(code)


def test_the_public_names_are_there() -> None:
    """What `__all__` lists exists and says what it is; strategies import no torch until something is simulated."""
    import inspect

    import anabranch.testing as public

    names: Sequence[str] = public.__all__
    assert all(inspect.getdoc(getattr(public, name)) for name in names)
    with pytest.raises(AttributeError, match="no attribute `nope`"):
        public.nope  # type: ignore[attr-defined]  # noqa: B018
    code = "import sys; from anabranch.testing import plans, traces; plans().validate(); print('torch' in sys.modules)"
    assert python(code).strip() == "False"
