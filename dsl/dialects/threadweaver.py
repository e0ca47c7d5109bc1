"""ThreadWeaver: `<Parallel>`, `<Outlines>` with an `<Outline>` for each `<Thread>`.

Each thread is a request of its own to an engine that knows nothing of it: the text so far, and `<Thread>` with its
number. The parent goes on from a request that holds the text of all of them, one behind the other. The client writes
`<Thread>` with its number, and `</Parallel>`; the model all the rest.

Source: Lian et al. 2025, "ThreadWeaver: Adaptive Threading for Efficient Parallel Reasoning in Language Models"
(arXiv 2512.07843), its project page, and the format as its repository's documents show it.
"""

from __future__ import annotations

from typing import Final

from anabranch.dsl.dialects.blocks import BlockFormat, BlockReader

FORMAT: Final = BlockFormat(head="Outlines", thread="Thread", head_text=False, open_outlines=True, seed_colon=True)


class ThreadWeaverReader(BlockReader):
    """A push parser of ThreadWeaver's text."""

    FORMAT = FORMAT
