"""Attention by segment under a sliding window, which the random test model itself does not have."""

from dataclasses import replace
from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.random_model import random_weights
from anabranch.runtime.reference import check_run
from anabranch.testing import Plan, plans


@cache
def windowed(window: int) -> tuple[LoadedModel, dict[str, torch.Tensor]]:
    """The random model with a window of `window` tokens in its first layer and one twice as wide in the others."""
    base = load("random", dtype=torch.float64)
    config = base.decoder.config
    windows = (window, *[2 * window] * (config.num_layers - 1))
    config = replace(config, sliding_window=windows)
    weights = random_weights(config, base.tokenizer, 0)
    decoder = Decoder(config, weights, dtype=torch.float64)
    return replace(base, decoder=decoder), {name: w.double() for name, w in weights.items()}


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)  # fmt: skip
@given(
    plans(),
    st.booleans(),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([4, 16]),
    st.sampled_from([2, 64]),
    st.sampled_from([3, 11]),
)
def test_a_sliding_window_hides_what_is_far(
    plan: Plan, fixed: bool, lanes: int, page_size: int, chunk: int, window: int
) -> None:
    """Whole calls, single rows and shifted segments each hide exactly the keys that are too far away."""
    model, weights = windowed(window)
    config = EngineConfig(
        lanes=lanes, pages=2048, page_size=page_size, chunk=chunk, trace_logits=True,
        deterministic=fixed and not plan.has_deadline,
    )  # fmt: skip
    result = Engine(model, config).run(plan.program, [plan.inputs], functions=plan.functions)[0]
    check_run(
        plan.program, None, plan.inputs, result.events, model.tokenizer, model.chat, model.decoder.config, weights,
        result.logits, tolerance=1e-9,
    )  # fmt: skip
