"""Multiverse: `<Parallel>`, `<Goal>` with an `<Outline>` for each `<Path>`, and a `<Conclusion>`.

The paths see what is before them and not one another, start at one position, and their keys and values go on as they
are: the conclusion stands at the largest position that one of them came to. The engine writes `<Path>` and its number,
and `<Conclusion>`; the model all the rest.

Source: Yang et al. 2025, "Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation"
(arXiv 2506.09991), sections 4.3, 5.2 and 5.3 and figures 5 and 6.
"""

from __future__ import annotations

from typing import Final

from anabranch.dsl.dialects.blocks import BlockFormat, BlockReader

FORMAT: Final = BlockFormat(head="Goal", thread="Path", head_text=True, open_outlines=False, seed_colon=False)


class MultiverseReader(BlockReader):
    """A push parser of Multiverse's text."""

    FORMAT = FORMAT
