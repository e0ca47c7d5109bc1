"""What every recorded schedule must hold: the rules by name, and how one is reported broken."""

from __future__ import annotations

from typing import NoReturn

RULES = {
    # memory
    "known-names": "threads and segments are numbered in order of use, and a step names ones that are there",
    "page-is-free": "a segment gets a page of the machine that nothing owns",
    "pages-as-needed": "a segment holds the pages that its tokens take, and gives back only those beyond its length",
    "sealed-not-written": "a segment is written by its own thread until it is sealed, and not while it is swapped out",
    "shared-not-written": "a page that the prefix cache or another segment owns too is never written",
    "free-when-unseen": "a segment is freed when no thread that runs, waits or may yet be stitched sees it",
    "freed-once": "a segment is freed once, and nothing happens to it afterwards",
    "swapped-back": "a segment is swapped out once at a time, comes back whole, and is not read meanwhile",
    "lost-is-fed-again": "what a thread lost is fed again, in order, before anything else of it",
    "cache-whole-pages": "the prefix cache takes full pages that a segment owns, each once, and lets go of its own",
    "adopt-the-same": "an adopted page is the cache's and holds what its thread would have written there",
    # attention
    "no-read-after-free": "a slot is read only while it holds a token",
    "reads-its-view": "a row reads each key of its view once, its own included, and no other",
    "right-distance": "a key is read with the shift that its segment has in the row's view",
    "right-position": "a row stands at the position of its token, and a segment starts where its thread stands",
    # meaning
    "in-order": "a thread comes to the nodes of its plan in order, in one arm of each condition",
    "rounds-of-the-loop": "a loop goes through its rounds in order, as many as its node permits",
    "waits-for-its-branches": "between a fork and its join a thread does nothing, and it forks where its node does",
    "branch-once": "a branch is one of its fork and starts once, and again only after a failure, within `retry`",
    "path-of-the-branch": "a thread's path is its parent's, the loops' rounds, and its own place, and no other's",
    "joined-when-permitted": "a join is read once its kind permits, and yields or fails as its kind says",
    "winners-of-the-join": "a join's branches and winners are those that its kind permits",
    "stitch-the-winners": "after a join that stitches, and only there, the winners' own segments enter the view",
    "losers-stop": "after its join is read no branch runs on",
    "over-is-over": "a thread that ended does nothing more, but that a winner's last tokens are fed for its join",
    "ends-at-its-end": "a thread ends ok only at a `return` or at the end of its plan's text",
    # tokens
    "fed-in-order": "a thread feeds its tokens in order, each once unless it was lost or taken back",
    "kind-of-row": "drawn tokens are decode or flush rows, known ones prefill, and recompute is what was fed before",
    "flush-then-seal": "a token is flushed only because its segment is sealed next",
    "draws-of-the-gen": "tokens are drawn at a gen that samples, at most its `max`",
    "draw-has-a-seat": "a token is drawn in a call in which its thread holds a seat, one each",
    "logits-at-hand": "a token is drawn from the logits of the last token of its context, which a call has computed",
    "budget-kept": "no more tokens are drawn than a budget around them permits",
    # limits
    "lanes": "a call seats running threads, each once, and no more than there are lanes; rows are fed by seated ones",
    "chunk": "a call feeds no more rows beside sampled tokens than the chunk",
    "limit-of-the-fork": "no more branches run at once than `limit` says",
    "order-of-ends": "a join reads branches as they end, and under `deterministic` by (tokens decoded, index)",
    "within-bounds": "tokens, the critical path, pages and calls stay within what was computed before the run",
    # the end
    "all-over": "at the end every run has begun, and every thread has ended",
    "all-freed": "at the end every segment is freed",
}


class Fault(Exception):
    """A rule of `RULES` is broken; the driver adds where."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        self.message = message
        super().__init__(message)


def fault(rule: str, message: str) -> NoReturn:
    raise Fault(rule, message)
