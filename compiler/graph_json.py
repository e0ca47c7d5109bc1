"""A graph as JSON, so that a plan which was compiled once runs without its parser and the passes.

The document is an object: `format` "anabranch-graph", `version` 1, and `records`, a table as `typed_json` has it, whose
root is the graph. What is read is made of the records of `graph`, `spec` and `ast` alone, whatever the file holds;
whether the graph keeps the compiler's rules is for `verify_graph` to say.
"""

from __future__ import annotations

import json
from typing import Final, NoReturn, cast

from anabranch.compiler.graph import Graph
from anabranch.compiler.typed_json import from_table, to_table
from anabranch.dsl.diagnostics import Diagnostic, PlanError

FORMAT: Final = "anabranch-graph"
VERSION: Final = 1
MAX_DEPTH: Final = 256
"""How deep records may stand in one another. The parser's 160 levels come to at most half as many again: a statement
and its block are a node, an arm and a region."""


def bad_build(what: str) -> PlanError:
    """The error for a part of a build that can't be used."""
    return PlanError(
        Diagnostic("bad-build", f"this build can't be used: {what}", help="`anabranch build` makes it anew")
    )


def to_json(graph: Graph) -> str:
    """The graph as one JSON document, a record a line."""
    lines = ",\n".join(json.dumps(record, separators=(",", ":"), allow_nan=False) for record in to_table(graph))
    return f'{{"format":"{FORMAT}","version":{VERSION},"records":[\n{lines}\n]}}\n'


def from_json(text: str | bytes) -> Graph:
    """Read what `to_json` wrote. Raises PlanError `bad-build`, saying where and what, for anything else."""
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_build(f"its graph is no JSON ({error})") from None
    if not isinstance(document, dict) or set(document) != {"format", "version", "records"}:
        raise bad_build("its graph must be an object of `format`, `version` and `records`")
    if document["format"] != FORMAT or document["version"] != VERSION:
        raise bad_build(f"its graph must be of the format {FORMAT}, version {VERSION}")
    return cast(Graph, from_table(Graph, document["records"], _refuse, max_depth=MAX_DEPTH))


def _refuse(what: str) -> PlanError:
    return bad_build(f"in its graph, {what}")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"`{text}` is no number")
