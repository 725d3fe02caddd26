"""Every kind of file that ends up in a bucket and should not: what it is, and what must become of it.

``GOOD`` says that the clip must come out right; a text is how the reason must begin that quarantine gives; ``EITHER``
leaves both open (random damage may hit nothing that matters).
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import footage
import numpy as np

GOOD, EITHER = "good", "either"


@dataclass
class Hostile:
    """One sample: its members by extension, and tar members that stand beside it."""

    kind: str
    outcome: str
    members: dict[str, bytes]
    beside: list[tarfile.TarInfo] = field(default_factory=list)


def caption(seed: int = 0) -> bytes:
    return json.dumps({"prompt": f"a square {seed}"}).encode()


def _video(kind: str, outcome: str, video: bytes) -> Callable[[int], Hostile]:
    return lambda seed: Hostile(kind, outcome, {"mp4": video, "json": caption(seed)})


def _seeded(kind: str, outcome: str, make: Callable[[int], bytes]) -> Callable[[int], Hostile]:
    return lambda seed: Hostile(kind, outcome, {"mp4": make(seed), "json": caption(seed)})


def _captioned(kind: str, outcome: str, json_bytes: bytes) -> Callable[[int], Hostile]:
    return lambda seed: Hostile(kind, outcome, {"mp4": footage.good(seed), "json": json_bytes})


def cut_in_half(seed: int) -> bytes:
    whole = footage.good(seed)
    share = np.random.default_rng(seed).uniform(0.2, 0.9)
    return whole[: int(len(whole) * share)]


def cut_behind_its_index(seed: int) -> bytes:
    """The index is in front and whole, so that players show the beginning as if nothing were wrong."""
    whole = footage.encode(footage.moving_square(seed, 40), options={"crf": "5", "g": "8"})
    index = whole.index(b"moov") - 4
    size = int.from_bytes(whole[index : index + 4], "big")
    box, media = whole[index : index + size], whole.index(b"mdat") - 4
    moved = bytearray(box)
    table = moved.index(b"stco")
    for entry in range(int.from_bytes(moved[table + 8 : table + 12], "big")):
        at = table + 12 + 4 * entry
        offset = int.from_bytes(moved[at : at + 4], "big") + size
        moved[at : at + 4] = offset.to_bytes(4, "big")
    fast = whole[:media] + bytes(moved) + whole[media:index]
    return fast[: len(fast) - (index - media) // 3]


def damaged(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    content = np.frombuffer(footage.good(seed), np.uint8).copy()
    content[rng.integers(0, len(content), 20)] = rng.integers(0, 256, 20)
    return content.tobytes()


def enormous(seed: int) -> bytes:
    """A frame of 131 072 x 131 072 pixels, 51 GB of RGB, behind a header that says 32 x 32."""
    whole = footage.encode(footage.moving_square(seed), container="mov", codec="png", pixels="rgb24", options={})
    content = bytearray(whole)
    at = content.find(b"IHDR")
    while at >= 0:
        content[at + 4 : at + 12] = struct.pack(">II", 131_072, 131_072)
        content[at + 17 : at + 21] = struct.pack(">I", zlib.crc32(content[at : at + 17]))
        at = content.find(b"IHDR", at + 4)
    return bytes(content)


def claims_to_be_enormous(seed: int) -> bytes:
    content = bytearray(footage.good(seed))
    entry = content.index(b"avc1", content.index(b"stsd"))
    content[entry + 28 : entry + 32] = struct.pack(">HH", 65_535, 65_535)
    return bytes(content)


def uneven(seed: int) -> bytes:
    """Frames at uneven times; the clip must hold those nearest to every eighth of a second."""
    return footage.encode(footage.moving_square(seed), times=np.arange(9) / 8 + np.tile([0, 0.02, -0.02], 3))


def turned(seed: int) -> bytes:
    return footage.encode(np.rot90(footage.moving_square(seed), 1, (1, 2)), rotation=-90)


def odd_sized(seed: int) -> bytes:
    frames = np.pad(footage.moving_square(seed), [(0, 0), (0, 1), (0, 1), (0, 0)], mode="edge")
    return footage.encode(frames, pixels="yuv444p")


def ten_bits(seed: int) -> bytes:
    options = {"crf": "5", "x265-params": "log-level=none"}
    return footage.encode(footage.moving_square(seed), codec="libx265", pixels="yuv420p10le", options=options)


def duplicate_videos(seed: int) -> Hostile:
    members = {"mp4": footage.good(seed), "json": caption(seed), "mov": footage.good(seed + 1)}
    return Hostile("two videos under one key", "tar: two videos", members)


def _beside(kind: str, outcome: str, name: str, **changes: object) -> Callable[[int], Hostile]:
    """A good sample with an odd tar member next to it; ``outcome`` is the odd member's."""

    def make(seed: int) -> Hostile:
        member = tarfile.TarInfo(name.replace("*", str(seed)))
        for attribute, value in changes.items():
            setattr(member, attribute, value)
        return Hostile(kind, outcome, {}, [member])

    return make


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
VIDEOS: list[Callable[[int], Hostile]] = [
    _video("zero bytes", "decode: no bytes", b""),
    _seeded("truncated", "decode: ", cut_in_half),
    _seeded("truncated behind its index", "decode: cut short", cut_behind_its_index),
    _seeded("damaged", EITHER, damaged),
    _video("text", "decode: unreadable, not a video", b"this is not a video\n" * 50),
    _video("playlist", "decode: unreadable, not a video", PLAYLIST),
    _video("html", "decode: unreadable, not a video", b"<html><title>404 Not Found</title></html>"),
    _seeded("matroska named mp4", GOOD, lambda seed: footage.encode(footage.moving_square(seed), container="matroska")),
    _seeded("transport stream named mp4", GOOD, lambda s: footage.encode(footage.moving_square(s), container="mpegts")),
    _video("audio only", "decode: no video stream", footage.sound_only()),
    _seeded("one frame", "filter: short", lambda seed: footage.encode(footage.moving_square(seed)[:1])),
    _seeded("enormous", "decode: ", enormous),
    _seeded("claims to be enormous", GOOD, claims_to_be_enormous),
    _seeded("variable frame rate", GOOD, uneven),
    _seeded("rotation metadata", GOOD, turned),
    _seeded("10 bit", GOOD, ten_bits),
    _seeded("odd size", GOOD, odd_sized),
    _seeded("interlaced", GOOD, lambda seed: footage.interlaced(seed)[0]),
]
CAPTIONS: list[Callable[[int], Hostile]] = [
    _captioned("broken UTF-8", "caption: json is not UTF-8", b'{"prompt": "a \xff\xfe square"}'),
    _captioned("broken json", "caption: json cannot be parsed", b'{"prompt": '),
    _captioned("1 MiB caption", "caption: too long", json.dumps({"prompt": "word " * (1 << 18)}).encode()),
    _captioned("deep json", "caption: json cannot be parsed", b"[" * 100_000),
    _captioned("no prompt", "caption: no prompt", b"{}"),
    _captioned("empty prompt", "caption: empty prompt", b'{"prompt": "  "}'),
    _captioned("number", "caption: prompt is not text", b'{"prompt": 7}'),
    _captioned("half a character", "caption: prompt is not text", b'{"prompt": "\\ud800"}'),
    _captioned("unknown split", "caption: split", b'{"prompt": "a", "split": "elsewhere"}'),
    _captioned("a list", "caption: json is not an object", b'["prompt"]'),
]
IN_TARS: list[Callable[[int], Hostile]] = [
    lambda seed: Hostile("no caption", "caption: none", {"mp4": footage.good(seed)}),
    lambda seed: Hostile("no video", "decode: no video member", {"json": caption(seed)}),
    duplicate_videos,
    _beside("climbs out", "tar: a name that leaves", "../../climber-*.mp4"),
    _beside("absolute", "tar: a name that leaves", "/tmp/absolute-*.mp4"),
    _beside("symbolic link", "tar: a link", "link-*.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    _beside("hard link", "tar: a link", "hard-*.mp4", type=tarfile.LNKTYPE, linkname="../secret.mp4"),
    _beside("device", "tar: a device", "device-*.mp4", type=tarfile.CHRTYPE),
    _beside("sparse", "tar: a sparse file", "sparse-*.mp4", type=tarfile.GNUTYPE_SPARSE),
]


def tar_of(samples: list[tuple[str, Hostile]]) -> bytes:
    """A tar of samples by key, with all that is odd about them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, sample in samples:
            for extension, content in sample.members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for member in sample.beside:
                tar.addfile(member)
    return buffer.getvalue()
