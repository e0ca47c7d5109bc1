"""Run a plan on a model of transformers: `pip install 'anabranch[transformers]'`.

python examples/hf_model.py [FOLDER or ORG/NAME]

Without an argument: a small Phi with random weights and a tokenizer of bytes, which writes nonsense.
"""

from __future__ import annotations

import sys

import anabranch
from anabranch.runtime.hf import load_hf

PLAN = """
go = plan(question) {
  user("#{question}");
  answer = fork(3) {
    thought = gen(max=40, temperature=0.8);
    n = gen("So: ", type=int, max=4);
    return(n);
  } join(vote(n), stitch);
  return(answer);
}
"""


def small_phi() -> anabranch.LoadedModel:
    """A kind of model that `anabranch.load` does not read."""
    from transformers import PhiConfig, PhiForCausalLM

    from anabranch.runtime.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PhiConfig(vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=None, **sizes)
    return load_hf(PhiForCausalLM(config), tokenizer)


def main() -> None:
    """Print what the plan came to."""
    model = load_hf(sys.argv[1]) if len(sys.argv) > 1 else small_phi()
    [result] = anabranch.Engine(model).run(PLAN, {"question": "How many legs does a spider have?"})
    print(result.status, result.value, result.counts["tokens_aliased"], "tokens aliased")


if __name__ == "__main__":
    main()
