"""Law 1 on generated plans, part 1 of 4."""

from law_runs import hold_aliasing


def test_aliasing_is_invisible() -> None:
    """Forced to the engine's own tokens, the reference gives the engine's logits."""
    hold_aliasing(1)
