"""How many KV pages a thousand short branches on one long prefix take, through `engine.run`.

    python benchmarks/pages.py [--model random] [--branches 1000]

A prefix of 1,024 tokens fills 64 pages of 16; a branch of 12 tokens needs a page of its own. So 1,000 branches should
take 1,064 pages and no more. The count does not depend on the model's weights, and the random model is quick.
"""

from __future__ import annotations

import argparse

import anabranch

PREFIX_TOKENS = 1024
BRANCH_TOKENS = 12
PAGE_SIZE = 16

PLAN = """
wide = plan(prefix: text(1024)) {{
  text("#{{prefix}}");
  notes = fork({branches}) {{ note = gen(max={tokens}); return(note); }} join(all, drop);
  return(len(notes));
}}
"""


def main() -> None:
    """Run the plan once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random")
    parser.add_argument("--branches", type=int, default=1000)
    options = parser.parse_args()
    model = anabranch.load(options.model, template="raw")
    # No id is -1, so no branch ends its turn early: each takes all of its tokens.
    model.tokenizer.eos_ids = frozenset({-1})
    start = int(model.tokenizer.bos_id is not None)
    prefix = "a" * (PREFIX_TOKENS - start)
    if options.model != "random":
        prefix = prefix_of(model, PREFIX_TOKENS - start)
    engine = anabranch.Engine(
        model, anabranch.EngineConfig(lanes=options.branches, page_size=PAGE_SIZE, pages=2 * options.branches + 128)
    )
    plan = PLAN.format(branches=options.branches, tokens=BRANCH_TOKENS)
    [result] = engine.run(anabranch.parse_text(plan, "wide.plan"), {"prefix": prefix})
    counts = result.counts
    expected = PREFIX_TOKENS // PAGE_SIZE + options.branches
    if counts["tokens_decoded"] != options.branches * BRANCH_TOKENS or counts["tokens_prefilled"] != PREFIX_TOKENS:
        raise SystemExit(f"not the run that was meant: {result.status} {result.reason} {dict(counts)}")
    print(f"{options.branches} branches of {BRANCH_TOKENS} tokens on {PREFIX_TOKENS} tokens, pages of {PAGE_SIZE}")
    print(f"pages_peak   {counts['pages_peak']} (at most {expected} expected)")
    print(f"pages_bound  {counts['pages_bound']}")
    print(f"steps        {counts['steps']} of at most {counts['steps_bound']}")
    print(f"elapsed_s    {counts['elapsed_s']:.1f}")
    if counts["pages_peak"] > expected:
        raise SystemExit(1)


def prefix_of(model: anabranch.LoadedModel, num_tokens: int) -> str:
    """A text of exactly `num_tokens` tokens, made of words."""
    for num_words in range(num_tokens // 2, 2 * num_tokens):
        text = " ".join(["river"] * num_words)
        if len(model.tokenizer.encode([(text, False)])) == num_tokens:
            return text
    raise SystemExit("no prefix of that many tokens was found")


if __name__ == "__main__":
    main()
