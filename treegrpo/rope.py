"""Rotary embeddings whose frequencies depend on the longest path of the row: what a packed row cannot mix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rope settings of a text config, one a kind of layer; [] where it has none."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or ([found] if found else [])


def rope_kind(settings: dict[str, Any]) -> str:
    return str(settings.get("rope_type", settings.get("type", "default")))


def check_lengths(config: Any, lengths: Iterable[int]) -> None:
    """ValueError where ``longrope`` would give some leaf of a packed row the frequencies of a longer one.

    transformers takes the long factors for a whole row as soon as one position in it is beyond
    ``original_max_position_embeddings``; alone, a shorter leaf has the short ones.
    """
    for settings in rope_settings(config):
        if rope_kind(settings) != "longrope":
            continue
        limit = settings.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        lengths = list(lengths)
        if min(lengths) <= limit < max(lengths):
            leaf = next(i for i, length in enumerate(lengths) if length > limit)
            raise ValueError(
                f"leaf {leaf} of the row has {lengths[leaf]} tokens, others at most"
                f" original_max_position_embeddings={limit}: longrope would rotate all of them by the long factors;"
                " pack leaves of up to and of over that length apart, or cut them to it"
            )
