"""The comparison of folders of videos, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pose_core.data.clips import encode_mp4
from pose_core.errors import DataError
from pose_core.runtime.motion_files import compare_folders, measure_file, report

PROGRAM = Path(__file__).parents[2] / "pipelines" / "motion.py"


def clip(step: int, frames: int = 9) -> np.ndarray:
    """A bright square on a textured ground that moves by ``step`` pixels a frame, ``[frames, 64, 96, 3]``."""
    ground = np.random.default_rng(0).integers(60, 90, (64, 96, 3), dtype=np.uint8)
    video = np.repeat(ground[None], frames, axis=0)
    for index, frame in enumerate(video):
        frame[20:44, 4 + step * index : 28 + step * index] = np.linspace(120, 250, 24, dtype=np.uint8)[:, None]
    return video


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """``teacher`` moves, ``alive`` moves too, ``frozen`` shows its first frame for ever."""
    paths = [tmp_path / name for name in ("teacher", "alive", "frozen")]
    for path, step in zip(paths, (5, 4, 0), strict=True):
        path.mkdir()
        for index in range(2):
            (path / f"square-{index}.mp4").write_bytes(encode_mp4(clip(step), 8))
    return paths


def test_a_collapse_to_still_pictures_is_seen_in_one_command(folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *map(str, folders), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "collapsed" in line] == [line for line in lines if line.startswith("frozen has")]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [figures[name]["dynamic_degree"] for name in ("teacher", "alive", "frozen")] == [100, 100, 0]
    assert [figures[name]["still"] for name in ("teacher", "alive", "frozen")] == [0, 0, 100]
    assert [line for line in lines if line.startswith("| frozen | 2.000 | 0.000 | 100.000 |")]


def test_still_pictures_are_named_as_such_without_anything_to_compare_with(folders: list[Path]) -> None:
    text = report(compare_folders(folders[2:], None, lambda *_: None))
    assert text.endswith("frozen holds nothing but still pictures\n")


def test_drift_is_from_the_given_image_where_there_is_one(folders: list[Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray((clip(0)[0].astype(int) - 20).astype(np.uint8)).save(images / "square.png")
    (own,) = compare_folders(folders[2:], None, lambda *_: None).values()
    (given,) = compare_folders(folders[2:], images, lambda *_: None).values()
    assert own["first_frame_drift"] < 1
    assert given["first_frame_drift"] == pytest.approx(20, abs=2)
    with pytest.raises(DataError, match="first frame of"):
        compare_folders(folders[2:], tmp_path, lambda *_: None)


def test_a_faster_copy_of_a_video_is_as_fast_by_the_second(tmp_path: Path) -> None:
    for name, step, rate in (("slow", 4, 8), ("fast", 2, 16)):
        (tmp_path / f"{name}.mp4").write_bytes(encode_mp4(clip(step, 9 if rate == 8 else 17), rate))
    slow, fast = (measure_file(tmp_path / f"{name}.mp4") for name in ("slow", "fast"))
    assert fast.speed == pytest.approx(slow.speed, rel=0.15)


@pytest.mark.parametrize(("suffix", "codec"), [("webm", "libvpx-vp9"), ("gif", "gif"), ("avi", "mpeg4")])
def test_other_containers_are_read(suffix: str, codec: str, tmp_path: Path) -> None:
    file = tmp_path / f"clip.{suffix}"
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = {"gif": "rgb8"}.get(suffix, "yuv420p")
        for frame in clip(5):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    assert measure_file(file).dynamic


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_what_cannot_be_measured_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(DataError, match="holds no video" if content is None else "broken.mp4") as caught:
        compare_folders([tmp_path], None, lambda *_: None)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
