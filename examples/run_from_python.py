"""Run a plan from Python: a host function, several inputs in one batch, and the events as they come.

python examples/run_from_python.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys

import anabranch

PLAN = """
add = plan(a: int, b: int) {
  user("What is #{a} plus #{b}?");
  guess = fork(3, fallback=0) {
    n = gen("It is ", type=int, max=6, temperature=0.8);
    off = distance(n, a + b);
    need(off < 50);
    return(n);
  } join(first(1), stitch);
  return(guess);
}
"""


def distance(x: int, y: int) -> int:
    """How far a guess is off. A plan may call it, since it is registered below."""
    return abs(x - y)


async def main(model: str) -> None:
    """Run the plan on two inputs and print each gen as it ends."""
    engine = anabranch.Engine(anabranch.load(model))
    functions = {"distance": distance}
    program = anabranch.parse_text(PLAN, "add.plan")

    results = engine.run(program, [{"a": 17, "b": 25}, {"a": 4, "b": 5}], functions=functions)
    for result in results:
        print(result.status, result.value, result.counts["tokens_aliased"], "tokens aliased")

    async for event in engine.stream(program, {"a": 17, "b": 25}, functions=functions, seed=1):
        print(event.input_index, event.event)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2"))
