"""Layouts of runs whose events are written by hand: positions, views, texts, and events that contradict the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from anabranch.dsl.parse import parse_text
from anabranch.dsl.spec import Value
from anabranch.runtime.chat import RawChat, read_chat
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, HostCalled, Joined, Path, RunEnded
from anabranch.runtime.layout import Layout
from anabranch.runtime.reference import ReferenceMismatch, lay_out
from anabranch.runtime.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = read_chat(TOKENIZER, "random")


def path(text: str) -> Path:
    return tuple(text.split("/")) if text else ()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode([(text, False)]))


def gen(where: str, site: str, text: str, value: Value = None, **changes: Any) -> GenEnded:
    fields: dict[str, Any] = {"ids": ids(text), "drawn": len(ids(text)), "text": text, "end": "max"}
    fields |= changes
    return GenEnded(path(where), site, None, value=text if value is None else value, **fields)


def branch(where: str, text: str, value: Value, status: Any = "ok") -> list[Event]:
    return [BranchStarted(path(where)), BranchEnded(path(where), status, text, value, "", 0)]


def joined(where: str, site: str, ok: Sequence[int], winners: Sequence[int], value: Value, failed: str = "") -> Joined:
    return Joined(path(where), site, tuple(ok), tuple(winners), value, failed)


def run(plan: str, *events: Event | list[Event], inputs: dict[str, Value] | None = None, raw: bool = True) -> Layout:
    flat = [event for item in events for event in (item if isinstance(item, list) else [item])]
    program = parse_text(plan)
    return lay_out(program, None, inputs or {}, flat, TOKENIZER, RawChat() if raw else CHAT)


def shown(layout: Layout, segment: int) -> str:
    return TOKENIZER.decode(layout.tokens[t].id for t in layout.segments[segment].tokens).decode()


def seen_by(layout: Layout, token: int) -> list[tuple[str, int]]:
    """(text, distance) of each key that the token sees, in order of the list."""
    visible, shifts = layout.visibility()
    q = layout.tokens[token].position
    return [
        (TOKENIZER.decode([key.id]).decode() or "^", q - key.position - int(shifts[token, k]))
        for k, key in enumerate(layout.tokens)
        if visible[token, k]
    ]


def last_token(layout: Layout, text: str) -> int:
    """The last token of the list that reads `text`."""
    return max(i for i, token in enumerate(layout.tokens) if TOKENIZER.decode([token.id]) == text.encode())


TWO = """
main = plan() {
  text("P");
  x = fork(2) { y = gen(max=3); return(y); } join(all, JOIN);
  z = gen("Q", max=1);
  return(x);
}
"""


def two(join: str, winners: Sequence[int]) -> Layout:
    return run(
        TWO.replace("JOIN", join),
        branch("x[0]", "ab", "ab"),
        branch("x[1]", "cdk", "cdk"),
        gen("x[0]", "y", "ab"),
        gen("x[1]", "y", "cdk"),
        joined("", "x", [0, 1], winners, ["ab", "cdk"]),
        gen("", "z", "!"),
    )


def test_drop_goes_on_at_the_fork() -> None:
    """After `drop` the parent sees what it saw before the fork, at the position where it stood."""
    layout = two("drop", [])
    assert seen_by(layout, last_token(layout, "!")) == [("^", 3), ("P", 2), ("Q", 1), ("!", 0)]


def test_siblings_start_at_one_position_and_do_not_see_each_other() -> None:
    """Each branch goes on from the parent's last token, whatever its siblings wrote."""
    layout = two("drop", [])
    assert seen_by(layout, last_token(layout, "b")) == [("^", 3), ("P", 2), ("a", 1), ("b", 0)]
    assert seen_by(layout, last_token(layout, "k")) == [("^", 4), ("P", 3), ("c", 2), ("d", 1), ("k", 0)]


def test_text_writes_the_branches_again() -> None:
    """After `text` the parent sees the branches' text as its own, in branch order."""
    layout = two("text", [0, 1])
    keys = seen_by(layout, last_token(layout, "!"))
    assert [text for text, _ in keys] == ["^", "P", "a", "b", "c", "d", "k", "Q", "!"]
    assert [distance for _, distance in keys] == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_stitch_max_goes_on_at_the_largest_end() -> None:
    """Under `stitch(max)` the branches' tokens overlap in position, and none is written twice."""
    layout = two("stitch", [0, 1])
    keys = seen_by(layout, last_token(layout, "!"))
    assert keys == [("^", 6), ("P", 5), ("a", 4), ("b", 3), ("c", 4), ("d", 3), ("k", 2), ("Q", 1), ("!", 0)]


def test_stitch_sum_lays_the_branches_end_to_end() -> None:
    """Under `stitch(sum)` the second branch is shifted by the length of the first, and the keys do not move."""
    layout = two("stitch(sum)", [0, 1])
    keys = seen_by(layout, last_token(layout, "!"))
    assert keys == [("^", 8), ("P", 7), ("a", 6), ("b", 5), ("c", 4), ("d", 3), ("k", 2), ("Q", 1), ("!", 0)]
    assert layout.tokens[last_token(layout, "c")].position == layout.tokens[last_token(layout, "a")].position


def test_shifts_of_nested_stitches_add() -> None:
    """A segment stitched twice has the sum of both shifts in the outermost view."""
    layout = run(
        """
        main = plan() {
          text("P");
          x = fork() {
            a = branch("A") { };
            b = branch("B") { i = fork(2) { y = gen(max=2); } join(all, stitch(sum)); };
          } join(all, stitch(sum));
          z = gen("Q", max=1);
        }
        """,
        branch("x[a]", "A", "A"),
        branch("x[b]", "Bcdkl", "Bcdkl"),
        branch("x[b]/i[0]", "cd", "cd"),
        branch("x[b]/i[1]", "kl", "kl"),
        gen("x[b]/i[0]", "y", "cd"),
        gen("x[b]/i[1]", "y", "kl"),
        joined("x[b]", "i", [0, 1], [0, 1], ["cd", "kl"]),
        joined("", "x", [0, 1], [0, 1], {"a": "A", "b": "Bcdkl"}),
        gen("", "z", "!"),
    )
    keys = seen_by(layout, last_token(layout, "!"))
    assert [text for text, _ in keys] == ["^", "P", "A", "B", "c", "d", "k", "l", "Q", "!"]
    assert [distance for _, distance in keys] == list(range(9, -1, -1))
    last = layout.segments[layout.tokens[last_token(layout, "!")].segment]
    assert sorted(shift for _, shift in last.view) == [0, 0, 1, 1, 3]


def test_the_winner_alone_is_stitched_and_continued() -> None:
    """After `vote` and `stitch` a gen without a prompt draws from the logits of the winner's last token."""
    layout = run(
        """
        main = plan() {
          text("P");
          x = fork(3) { y = gen(max=2); k = gen(type=int, max=1); return(y); } join(vote(k), stitch);
          z = gen(max=1);
          return(x);
        }
        """,
        *[branch(f"x[{i}]", t + k, t) for i, t, k in ((0, "ab", "4"), (1, "cd", "7"), (2, "kl", "7"))],
        *[gen(f"x[{i}]", "y", t) for i, t in enumerate(("ab", "cd", "kl"))],
        *[gen(f"x[{i}]", "k", k, int(k)) for i, k in enumerate("477")],
        joined("", "x", [0, 1, 2], [1], 7),
        gen("", "z", "!"),
    )
    assert layout.value == 7
    draw = layout.draws[(), 0]
    assert TOKENIZER.decode([layout.tokens[draw.after].id]) == b"7"
    assert seen_by(layout, draw.after) == [("^", 4), ("P", 3), ("c", 2), ("d", 1), ("7", 0)]


def test_fresh_sees_only_its_own_text() -> None:
    """A fresh branch starts at position 0 with a start token."""
    layout = run(
        'main = plan() { text("P"); x = fork(1, fresh=true) { y = gen("F", max=1); } join(all); z = gen(max=1); }',
        branch("x[0]", "Fy", "Fy"),
        gen("x[0]", "y", "y"),
        joined("", "x", [0], [], ["Fy"]),
        gen("", "z", "!"),
    )
    assert seen_by(layout, last_token(layout, "y")) == [("^", 2), ("F", 1), ("y", 0)]
    assert seen_by(layout, last_token(layout, "!")) == [("^", 2), ("P", 1), ("!", 0)]


@pytest.mark.parametrize(("written", "text"), [(" 7", "7"), ("7", "7")])
def test_one_trailing_space_is_held_back(written: str, text: str) -> None:
    """The space before a gen is not encoded; the gen may begin with it."""
    layout = run('main = plan() { x = gen("is:  ", max=3); }', replace(gen("", "x", written), text=text, value=text))
    assert "".join(shown(layout, s) for s in range(len(layout.segments))) == "is: " + written
    assert layout.value == "is: " + written


def test_the_assistants_turn_is_opened_once_and_lazily() -> None:
    """The first gen after a turn of the user opens the assistant's, and a fork after that does not again."""
    layout = run(
        """
        main = plan() { user("hi"); x = gen(max=1); y = fork(1) { z = gen(max=1); } join(all, drop); user("so"); }
        """,
        gen("", "x", "a"),
        branch("y[0]", "b", "b"),
        gen("y[0]", "z", "b"),
        joined("", "y", [0], [], ["b"]),
        raw=False,
    )
    text = "".join(_spelled(layout, s) for s in range(len(layout.segments)))
    turn = "<|im_start|>user\n{}<|im_end|>\n"
    assert text == f"<|bos|>{turn.format('hi')}<|im_start|>assistant\nab<|im_end|>\n{turn.format('so')}"


def _spelled(layout: Layout, segment: int) -> str:
    names = {i: text for text, i in TOKENIZER.specials.items()}
    tokens = [layout.tokens[t].id for t in layout.segments[segment].tokens]
    return "".join(names.get(i) or TOKENIZER.decode([i]).decode() for i in tokens)


def test_loop_rounds_stand_in_the_path_and_until_is_derived() -> None:
    """A loop ends when its condition holds; the events of each round carry the round."""
    plan = """
    main = plan() { loop(3) { x = gen("?", type=choice("yes", "no"), max=3); } until(x == "yes"); return(x); }
    """
    rounds = [gen("loop0[0]", "x", "no"), gen("loop0[1]", "x", "yes")]
    layout = run(plan, *rounds)
    assert layout.value == "yes"
    assert [draw.index for draw in layout.draws.values()] == list(range(len(layout.draws)))
    with pytest.raises(ReferenceMismatch, match=r"does not come to"):
        run(plan, *rounds, gen("loop0[2]", "x", "no"))


def test_a_branch_is_tried_again() -> None:
    """A failed branch runs again under a path of its own, and what it wrote the first time is not seen."""
    layout = run(
        """
        main = plan() {
          text("P");
          x = fork(1, retry=1) { y = gen(type=int, max=1); need(y > 4); return(y); } join(all, stitch);
          z = gen("Q", max=1);
          return(x);
        }
        """,
        branch("x[0]", "3", None, "failed"),
        branch("x[0]~1", "5", 5),
        gen("x[0]", "y", "3", 3),
        gen("x[0]~1", "y", "5", 5),
        joined("", "x", [0], [0], [5]),
        gen("", "z", "!"),
    )
    assert [text for text, _ in seen_by(layout, last_token(layout, "!"))] == ["^", "P", "5", "Q", "!"]


def test_a_fallback_takes_the_place_of_a_join_that_is_not_met() -> None:
    """Too few branches, and the fallback's value goes on with the context as it was."""
    layout = run(
        """
        main = plan() {
          text("P");
          x = fork(2, fallback=9) { y = gen(type=int, max=1); need(y > 4); return(y); } join(first(1), stitch);
          z = gen(max=1);
          return(x);
        }
        """,
        branch("x[0]", "3", None, "failed"),
        branch("x[1]", "1", None, "failed"),
        gen("x[0]", "y", "3", 3),
        gen("x[1]", "y", "1", 1),
        joined("", "x", [], [], None, "too few"),
        gen("", "z", "!"),
    )
    assert layout.value == 9
    assert seen_by(layout, last_token(layout, "!")) == [("^", 2), ("P", 1), ("!", 0)]


def test_a_cancelled_branch_is_laid_out_as_far_as_it_came() -> None:
    """What a cancelled branch had written stands in the layout, and nothing sees it."""
    layout = run(
        """
        main = plan() {
          text("P");
          x = fork(2) { y = gen(max=4); w = gen("W", max=4); } join(first(1), drop);
          return(x);
        }
        """,
        branch("x[0]", "abW!", "abW!"),
        branch("x[1]", "cd", None, "cancelled"),
        gen("x[0]", "y", "ab"),
        gen("x[0]", "w", "!"),
        gen("x[1]", "y", "cd", end="cancelled"),
        joined("", "x", [0], [], "abW!"),
    )
    assert seen_by(layout, last_token(layout, "d")) == [("^", 3), ("P", 2), ("c", 1), ("d", 0)]
    assert layout.status == "ok"


def test_a_straddling_token_stands_as_its_kept_bytes() -> None:
    """The context keeps the ids of the event; the draw that was replaced is known from the trace."""
    the, th = ids("the")[0], ids("th")[0]
    layout = lay_out(
        parse_text('main = plan() { text("P"); x = gen(stop="e", max=4); y = gen(max=1); }'),
        None,
        {},
        [gen("", "x", "th", drawn=1, end="stop"), gen("", "y", "!")],
        TOKENIZER,
        RawChat(),
        drawn={((), 0): the, ((), 1): ids("!")[0]},
    )
    assert layout.draws[(), 0].token == the
    assert layout.tokens[layout.draws[(), 1].after].id == th
    assert seen_by(layout, last_token(layout, "!")) == [("^", 3), ("P", 2), ("th", 1), ("!", 0)]


def test_trimmed_tokens_stand_beside_the_context() -> None:
    """A stop of several tokens: the draws inside it saw its first tokens, and what follows does not."""
    layout = lay_out(
        parse_text('main = plan() { text("P"); x = gen(stop="cdk", max=9); y = gen(max=1); }'),
        None,
        {},
        [gen("", "x", "a", drawn=4, end="stop"), gen("", "y", "!")],
        TOKENIZER,
        RawChat(),
        drawn={((), i): ids(c)[0] for i, c in enumerate("acdk!")},
    )
    assert [text for text, _ in seen_by(layout, layout.draws[(), 3].after)] == ["^", "P", "a", "c", "d"]
    assert [text for text, _ in seen_by(layout, last_token(layout, "!"))] == ["^", "P", "a", "!"]


def test_host_calls_are_read_from_the_events() -> None:
    """A function of the caller is never called again; its recorded value, or its error, is what happened."""
    plan = 'main = plan() { x = gen("?", max=1); y = twice(x); return(y); }'
    assert run(plan, gen("", "x", "a"), HostCalled((), "twice", "aa")).value == "aa"
    failed = run(plan, gen("", "x", "a"), HostCalled((), "twice", None, "it broke"))
    assert (failed.status, failed.value) == ("failed", None)


def test_map_reduce_and_calls() -> None:
    """Items bind in order, reduce merges level by level, and a call is a fork of one."""
    layout = run(
        """
        aid = plan(a) { t = gen("<#{a}>", max=1); return(t); }
        main = plan(xs) {
          m = map(i, s: xs) { g = gen("#{i}#{s}", max=1); return(g); } join(all, drop);
          r = reduce(two: m, by=2) { h = gen("#{two}", max=1); return(h); };
          c = aid(r);
          return(c);
        }
        """,
        *[event for i in range(3) for event in branch(f"m[{i}]", f"{i}{'abc'[i]}{'klm'[i]}", "klm"[i])],
        *[gen(f"m[{i}]", "g", "klm"[i]) for i in range(3)],
        joined("", "m", [0, 1, 2], [], ["k", "l", "m"]),
        branch("r[0]", "k\nlu", "u"),
        gen("r[0]", "h", "u"),
        joined("", "r", [0], [], ["u"]),
        branch("r[1]", "u\nmv", "v"),
        gen("r[1]", "h", "v"),
        joined("", "r", [0], [], ["v"]),
        branch("c[0]", "<v>w", "w"),
        gen("c[0]", "t", "w"),
        joined("", "c", [0], [], "w"),
        RunEnded("ok", "w", ""),
        inputs={"xs": ["a", "b", "c"]},
    )
    assert layout.value == "w"


WRONG: dict[str, tuple[Sequence[Event], str]] = {
    "a vote that was miscounted": ([joined("", "x", [0, 1], [], "cd")], "value of `x`"),
    "a winner under drop": ([joined("", "x", [0, 1], [0], "ab")], "winners of `x`"),
    "an ok branch left out": ([joined("", "x", [1], [], "cd")], "which branches"),
    "a join that failed for no reason": ([joined("", "x", [0, 1], [], None, "too few")], "failed"),
    "a join of another statement": ([joined("", "y", [0, 1], [], "ab")], "place"),
    "no join at all": ([RunEnded("ok", "ab", "")], "status"),
    "a gen too many": ([joined("", "x", [0, 1], [], "ab"), gen("x[0]", "y", "no")], "does not come to"),
    "another value of the run": ([joined("", "x", [0, 1], [], "ab"), RunEnded("ok", "cd", "")], "value"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_events_that_contradict_the_plan_are_refused(wrong: str) -> None:
    """What can be derived from the plan is derived, and a record that says otherwise is named."""
    events, message = WRONG[wrong]
    plan = 'main = plan() { text("P"); x = fork(2) { y = gen(max=2); } join(vote(y), drop); return(x); }'
    branches = [
        *branch("x[0]", "ab", "ab"),
        *branch("x[1]", "cd", "cd"),
        gen("x[0]", "y", "ab"),
        gen("x[1]", "y", "cd"),
    ]
    with pytest.raises(ReferenceMismatch, match=message):
        run(plan, list(branches), list(events))


def test_a_branch_value_that_is_not_what_it_returned_is_refused() -> None:
    """A branch's value and text are derived again and held against its end."""
    plan = 'main = plan() { x = fork(1) { y = gen("Y", max=2); return(y); } join(all, drop); return(x); }'
    good = [gen("x[0]", "y", "ab"), joined("", "x", [0], [], ["ab"])]
    assert run(plan, branch("x[0]", "Yab", "ab"), good).value == ["ab"]
    with pytest.raises(ReferenceMismatch, match="its value"):
        run(plan, branch("x[0]", "Yab", "Yab"), good)
    with pytest.raises(ReferenceMismatch, match="its text"):
        run(plan, branch("x[0]", "ab", "ab"), good)


@pytest.mark.parametrize("fresh", ["", ", fresh=true"])
def test_a_plan_that_calls_itself_too_deep_fails_there(fresh: str) -> None:
    """The call past `depth` fails its caller without a branch or a join of its own, in a fresh view too."""
    from law_runs import ROOMY, hold_against_reference, run

    from anabranch.testing import Plan

    call = f'x = aid("a"{fresh});'
    aid = f'aid = plan(a: text(12), depth=2) {{ g = gen("a", max=1); {call} }}'
    plan = Plan.parse(f"{aid} main = plan() {{ y = fork(2, fallback=[]) {{ {call} }}; }}")
    (result,) = run(ROOMY, [plan], seed=0)
    assert "deeper than 2" in " ".join(branch.reason for branch in result.branches)
    hold_against_reference(plan, result)
