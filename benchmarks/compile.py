"""How long plans take to compile: `python benchmarks/compile.py`.

Prints the seconds of each stage, from text to a verified schedule, and checks the figures that must not depend on
`max` and on loop counts.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.parse import parse_text

BODY = 'w = gen("Think: ", max=100); a = gen("Answer: ", type=int, max=12); return(a);'
STAGES = ("parse", "compile", "bounds", "record", "verify")


def fork(width: int, body: str = BODY) -> str:
    """A vote of `width` branches."""
    return (
        f'p = plan(q: text(100)) {{ user("#{{q}}"); x = fork({width}) {{ {body} }} join(vote(a), stitch); return(x); }}'
    )


def nest() -> str:
    """10 x 10 x 100 branches."""
    return f"""
p = plan(q: text(100)) {{
  user("#{{q}}");
  x = fork(10) {{
    y = fork(10) {{ z = fork(100) {{ {BODY} }} join(vote(a), drop); return(z); }} join(all, stitch);
    t = gen("So ", max=5);
    return(t);
  }} join(all, drop);
  return(x);
}}
"""


def distinct(width: int) -> str:
    """`width` branches, each written out with a prompt and limits of its own."""
    branches = " ".join(
        f'b{i} = branch("Way {i}.") {{ {BODY.replace("max=100", f"max={50 + i % 100}")} }};' for i in range(width)
    )
    return f'p = plan(q: text(100)) {{ user("#{{q}}"); x = fork() {{ {branches} }} join(vote(a), drop); return(x); }}'


def loops(rounds: int) -> str:
    """A loop in a loop in 100 branches."""
    inner = 'c = gen("c", max=5); r = fork(3) { g = gen(max=4); }; t = gen("t", max=2);'
    return f"""
p = plan() {{
  x = fork(100) {{ loop({rounds}) {{ loop({rounds}) {{ {inner} }}; }}; return(1); }} join(all, drop);
  return(x);
}}
"""


PLANS: dict[str, Callable[[], str]] = {
    "fork of 1,000": lambda: fork(1_000),
    "fork of 10,000": lambda: fork(10_000),
    "fork of 100,000": lambda: fork(100_000),
    "10 x 10 x 100 nest": nest,
    "1,000 distinct branches": lambda: distinct(1_000),
    "10,000 distinct branches": lambda: distinct(10_000),
    "max=100,000": lambda: fork(1_000, BODY.replace("max=100", "max=100000")),
    "max=1,000,000,000": lambda: fork(1_000, BODY.replace("max=100", "max=1000000000")),
    "loops of 3": lambda: loops(3),
    "loops of 1,000,000": lambda: loops(1_000_000),
}


def measure(text: str) -> tuple[dict[str, float], int]:
    """Seconds by stage, and how many steps the schedule has."""
    machine = Machine(pages=10**15)
    times = [perf_counter()]
    program = parse_text(text)
    times.append(perf_counter())
    compiled = compile_plan(program)
    times.append(perf_counter())
    bounds = compiled.bounds_on(machine)
    times.append(perf_counter())
    schedule = record(bounds)
    times.append(perf_counter())
    verify_schedule(schedule, bounds)
    times.append(perf_counter())
    return {stage: times[i + 1] - times[i] for i, stage in enumerate(STAGES)}, len(schedule.steps)


def main() -> None:
    """Print the table."""
    parse_text(fork(1))  # the grammar is built once, and is no part of a plan's time
    print(f"| plan | {' | '.join(STAGES)} | all, s | steps |")
    print(f"| --- {'| ---: ' * (len(STAGES) + 2)}|")
    for name, text in PLANS.items():
        seconds, steps = measure(text())
        cells = " | ".join(f"{seconds[stage]:.3f}" for stage in STAGES)
        print(f"| {name} | {cells} | {sum(seconds.values()):.2f} | {steps:,} |", flush=True)


if __name__ == "__main__":
    main()
