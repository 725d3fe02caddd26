"""Layouts of raw videos, each in a file of its own behind ``source.Source``."""

from __future__ import annotations

from collections.abc import Sequence

from pose_core.data.sources.parquet import ParquetVideos
from pose_core.data.sources.source import Files, Source, Stored, Unit
from pose_core.data.sources.videos import Videos
from pose_core.data.sources.webdataset import WebDataset

SOURCES: dict[str, Source] = {source.name: source for source in (WebDataset(), Videos(), ParquetVideos())}
"""Every layout the program reads; each claims what it knows of a listing, so that one bucket may hold several."""


def claim(listing: Sequence[Stored], files: Files) -> list[Unit]:
    """Everything in ``listing`` that some source reads, in the listing's order."""
    return [unit for source in SOURCES.values() for unit in source.claim(listing, files)]
