"""From a program to what a run needs: the passes, in order, on one page. The verifier runs after each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from anabranch.compiler.bounds import Bounds
from anabranch.compiler.graph import Decode, Fork, Graph, Map, Node, Region, Write, walk
from anabranch.compiler.lower import lower
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.simplify import drop_dead_arms, drop_unreached, fold_constants, merge_arms
from anabranch.compiler.sizes import ByteSizes, Sizes, measure
from anabranch.compiler.verify_graph import verify_graph
from anabranch.dsl.ast import Expr, Program, Str
from anabranch.dsl.check import Target, check
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source, Span
from anabranch.dsl.options import show_type
from anabranch.dsl.parse import parse
from anabranch.dsl.spec import ChoiceType, GenType, JsonType, TextType
from anabranch.dsl.types import ANY, bounded_texts, input_mismatch, of_bound, show

if TYPE_CHECKING:
    from torch.fx import GraphModule

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    fold_constants,
    drop_dead_arms,
    drop_unreached,
    merge_arms,
)


class Host(Protocol):
    """Where a plan is to run: its machine, and how it makes tokens of text. An engine is one."""

    @property
    def machine(self) -> Machine: ...
    @property
    def sizes(self) -> Sizes: ...
    @property
    def max_context(self) -> int: ...


class GraphMaker(Protocol):
    """What makes a graph of a plan. A loaded model is one."""

    def plan_graph(self, compiled: Compiled, **options: Any) -> GraphModule: ...


NEVER = 1 << 30
"""A least length from here on says that no tokens make a value: automata count so for a state that reaches none."""


class LeastTokens(Protocol):
    """The fewest tokens that a value of a type takes, with a space before it that is no part of it or without.

    `NEVER` or more where no tokens make a value.
    Raises PlanError if the type cannot be used.
    """

    def __call__(self, kind: GenType, *, held_space: bool) -> int: ...


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan that compiled.

    program, graph: what it was, and what it became
    warnings: of the checker, in order of the text; skipped: what could not be checked, and why
    reads_logprobs: some join chooses by log-probability, so they are wanted of every token
    """

    program: Program
    graph: Graph
    warnings: tuple[Diagnostic, ...] = ()
    skipped: tuple[str, ...] = ()
    reads_logprobs: bool = False

    def to_fx(self, model: GraphMaker, **options: Any) -> GraphModule:
        """The plan as a `torch.fx.GraphModule` for a model; `options` as of `runtime/plan_graph.py`.

        Raises PlanError `not-in-graph` for what a graph cannot hold.
        """
        return model.plan_graph(self, **options)

    def bounds(self, host: Host, inputs: Mapping[str, Any]) -> Bounds:
        """The bounds of a run on `inputs`. Raises PlanError as `check_inputs` and `check_bounds` do."""
        self.check_inputs(inputs, host.sizes)
        return self.check_bounds(self.bounds_on(host.machine, host.sizes, inputs), host.machine, host.max_context)

    def bounds_on(
        self, machine: Machine, sizes: Sizes | None = None, inputs: Mapping[str, Any] | None = None
    ) -> Bounds:
        """The bounds on a machine.

        sizes: how text becomes tokens; bytes are counted when None
        inputs: parameters that are known; the others count as what they state
        """
        counted = ByteSizes() if sizes is None else sizes
        measured = measure(self.graph, counted, inputs)
        return Bounds(self.graph, measured, machine, start=counted.start)

    def check_inputs(self, inputs: Mapping[str, Any], sizes: Sizes | None = None) -> None:
        """Whether the main plan may run on `inputs`; `sizes` as in `check_values`.

        Raises PlanError: missing-input, unknown-input, bad-input.
        """
        plan = self.graph.plans[self.graph.main]
        found: list[Diagnostic] = []
        for name in plan.params:
            if name not in inputs:
                found.append(
                    Diagnostic(
                        "missing-input",
                        f"`{plan.name}` needs `{name}`, and it was not given",
                        plan.span,
                        help=f"give it: `--input {name}=...`",
                    )
                )
        for name in inputs:
            if name not in plan.params:
                takes = ", ".join(f"`{param}`" for param in plan.params) or "none"
                found.append(
                    Diagnostic(
                        "unknown-input", f"`{plan.name}` has no parameter `{name}`", None, help=f"it takes {takes}"
                    )
                )
        if found:
            raise PlanError(found, self.program.source)
        self.check_values(inputs, sizes)

    def check_values(self, inputs: Mapping[str, Any], sizes: Sizes | None = None) -> None:
        """The values of those parameters that are given, against their stated bounds.

        sizes: counts the tokens of a text; its length is not checked when None, or when the counts are not exact
        Raises PlanError: bad-input.
        """
        plan = self.graph.plans[self.graph.main]
        found: list[Diagnostic] = []
        for place, name in enumerate(plan.params):
            if name not in inputs:
                continue
            bound = plan.bounds[place] if plan.bounds else None
            span = None if bound is None else bound.span
            stated = ANY if bound is None else of_bound(bound)
            reason = input_mismatch(inputs[name], stated)
            if reason:
                found.append(
                    Diagnostic(
                        "bad-input",
                        f"the input `{name}` takes {show(stated)}, and {reason}",
                        span,
                        help="give a value of that type, or change what the parameter states",
                    )
                )
            elif sizes is not None and sizes.exact:
                for text, most in bounded_texts(inputs[name], stated):
                    tokens = sizes.tokens([(text, False)])
                    if tokens > most:
                        found.append(_input_too_long(name, tokens, most, span))
                        break
        if found:
            raise PlanError(found, self.program.source)

    def check_least(self, least_tokens: LeastTokens) -> None:
        """Whether every `max` leaves room for the shortest value of its type, in a model's tokens.

        Where only the run knows whether a space is held back before a gen, the shorter of the two counts. A gen that
        draws nothing (a recorded one, a choice by logprob) is passed over.
        Raises PlanError: max-too-small, impossible-type, and bad-regex or bad-choice for a type that cannot be used.
        """
        found: list[Diagnostic] = []
        for plan in self.graph.plans.values():
            for region, place in walk(plan.region):
                node = region.nodes[place]
                if not isinstance(node, Decode) or not _is_drawn_by_type(node):
                    continue
                try:
                    diagnostic = _max_too_small(node, holds_space(region, place), least_tokens)
                except PlanError as error:
                    found += [replace(wrong, span=node.span) for wrong in error.diagnostics]
                    continue
                if diagnostic is not None:
                    found.append(diagnostic)
        if found:
            raise PlanError(found, self.program.source)

    def check_bounds(self, bounds: Bounds, machine: Machine, max_context: int | None = None) -> Bounds:
        """Returns `bounds`. Raises PlanError: prompt-too-long, context-too-long, pool-too-small."""
        past = None if max_context is None else bounds.first_past(max_context)
        if past is not None:
            raise PlanError(_too_long(past, bounds, max_context or 0), self.program.source)
        if bounds.pages_depth_first > machine.pages:
            plan = self.graph.plans[self.graph.main]
            raise PlanError(
                Diagnostic(
                    "pool-too-small",
                    f"the plan needs {bounds.pages_depth_first} pages even when its branches run one after another, "
                    f"and the pool has {machine.pages}",
                    plan.span,
                    help=f"give it at least {bounds.pages_depth_first} pages, or lower `max`",
                ),
                self.program.source,
            )
        return bounds


def compile_plan(
    program: Program,
    name: str | None = None,
    *,
    functions: Collection[str] = (),
    target: Target | None = None,
    start_token: bool | None = None,
) -> Compiled:
    """Compile plan `name` of `program` (the last when None).

    functions: names of the host's functions
    target: what the place where it runs can do
    start_token: whether an empty view begins with a token there; None where no model is known
    Raises PlanError for what is wrong with the program, and KeyError if it has no such plan.
    """
    checked = check(program, functions=functions, target=target, start_token=start_token)
    graph = verify_graph(lower(checked, name), stage="lower")
    for run in PASSES:
        graph = verify_graph(run(graph), stage=run.__name__)
    return Compiled(program, graph, checked.warnings, checked.skipped, _reads_logprobs(graph))


def compile(
    plan: Program | Source | str,
    name: str | None = None,
    *,
    functions: Collection[str] = (),
    target: Target | None = None,
    start_token: bool | None = None,
) -> Compiled:
    """Compile a plan's text, a file that was read, or a program: `compile(text).to_fx(model)`.

    Arguments and errors are those of `compile_plan`.
    """
    if not isinstance(plan, Program):
        plan = parse(Source("<plan>", plan) if isinstance(plan, str) else plan)
    return compile_plan(plan, name, functions=functions, target=target, start_token=start_token)


def _reads_logprobs(graph: Graph) -> bool:
    for plan in graph.plans.values():
        for region, place in walk(plan.region):
            node = region.nodes[place]
            if isinstance(node, Fork | Map) and node.join.kind == "best" and node.join.key == "logprob":
                return True
    return False


def draws(node: Decode) -> bool:
    """Whether a gen draws tokens: one with recorded text does not, nor a choice by log-probability."""
    kind = node.spec.type
    return node.spec.recorded is None and not (isinstance(kind, ChoiceType) and kind.by == "logprob")


def _is_drawn_by_type(node: Decode) -> bool:
    # Of a text, or a json, the least is one token, or not known.
    return draws(node) and not isinstance(node.spec.type, TextType | JsonType)


def _max_too_small(node: Decode, held_space: bool | None, least_tokens: LeastTokens) -> Diagnostic | None:
    kind, most = node.spec.type, node.spec.max_tokens
    needs = least_tokens(kind, held_space=bool(held_space))
    if needs > most and held_space is None:
        needs = least_tokens(kind, held_space=True)
    if needs <= most:
        return None
    if needs >= NEVER:
        return Diagnostic("impossible-type", f"no tokens of this model make a value of `{show_type(kind)}`", node.span)
    return Diagnostic(
        "max-too-small",
        f"`max={most}` is too short for `{show_type(kind)}`, which takes at least {needs} tokens of this model",
        node.span,
        help=f"write `max={needs}` or more",
    )


def holds_space(region: Region, place: int) -> bool | None:
    """Whether a space is held back before the gen at `place`; None where only the run knows."""
    node = region.nodes[place]
    if isinstance(node, Decode) and node.prompt is not None:
        return _ends_in_space(node.prompt)
    before = region.nodes[place - 1] if place else None
    match before:
        case Write(hold_space=True, value=value):
            return _ends_in_space(value)
        case Write() | Decode():
            return False
        case _:
            return None


def _ends_in_space(value: Expr) -> bool | None:
    if not isinstance(value, Str):
        return None
    if not value.parts:
        return False
    last = value.parts[-1]
    return last.endswith(" ") if isinstance(last, str) else None


def _input_too_long(name: str, tokens: int, most: int, span: Span | None) -> Diagnostic:
    return Diagnostic(
        "bad-input",
        f"a text of the input `{name}` takes {tokens} tokens, and its bound is {most}",
        span,
        help=f"shorten it, or state `text({tokens})`",
    )


def _too_long(node: Node, bounds: Bounds, max_context: int) -> Diagnostic:
    known = bounds.feed(node).rows
    if isinstance(node, Write) and known > max_context:
        return Diagnostic(
            "prompt-too-long",
            f"this text may take {known} tokens, and the model's context has {max_context}",
            node.span,
            help="shorten it, state a smaller bound for what it interpolates, or take a model with a longer context",
        )
    return Diagnostic(
        "prompt-too-long" if isinstance(node, Write) else "context-too-long",
        f"the context may reach {bounds.largest_position} tokens, and the model's has {max_context}",
        node.span,
        "it may end here first",
        help="lower `max`, drop branches instead of stitching them, or take a model with a longer context",
    )
