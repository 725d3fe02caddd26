"""How fast is the way from object storage to training batches? Every side reads the same SeaweedFS, in turns.

Raw clips: this project's path (Ray tasks decode, one process puts batches together) against a bare loop of PyAV, which
is the limit, and against WebDataset with PyTorch's DataLoader; each with as many decoding processes. Prepared shards:
this project's reader against a bare pyarrow read of the same columns. A turn first reads untimed what was made while
the others had theirs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import ray
import webdataset
from figures import Figure, record, show
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

from pose_core import config
from pose_core.data.buckets import Bucket
from pose_core.data.clip_list import NO_MEASURES, clips_of, table_bytes
from pose_core.data.clips import encode_mp4
from pose_core.data.inspection import Inspection
from pose_core.data.order import Order, Position
from pose_core.data.shards import parquet_bytes, to_table, write_tar
from pose_core.data.sources import SOURCES, claim
from pose_core.errors import PoseError
from pose_core.runtime.batches import Batches
from pose_core.runtime.cli import positive_int
from pose_core.runtime.clip_encoder import clip_encoder
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.local_ray import LocalRay
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.prepared_chunks import READERS, PreparedChunks
from pose_core.runtime.raw_chunks import RawChunks, RawPlan, start_feed
from pose_core.runtime.raw_clips import CLIP_LIST, RawClips
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store

PROCESSES = 2
FRAMES, SIDE, RATE = 17, 192, 16.0
TARS, CLIPS_PER_TAR, DIFFERENT_CLIPS = 16, 16, 16
SHARDS, ROWS_PER_SHARD = 40, 64
BATCH, CHUNK, SIDE_BY_SIDE, AHEAD = 8, 16, 4, 4
WARM_CLIPS, TIMED_CLIPS = (SIDE_BY_SIDE + AHEAD) * CHUNK, 192
WARM_SHARDS, TIMED_SHARDS = 24, 40
DEMO_STEPS = 30
KEEP_WORKERS = {"RAY_num_workers_soft_limit": "8"}
"""Ray ends workers that idle, as ours do while the other sides have their turns; a run that goes on keeps them busy."""
COLUMNS = ("key", *TRAINED_ON)
PROJECT = Path(__file__).resolve().parents[1]

Take = Callable[[int], None]
"""Reads so many clips or shards."""


def clips() -> list[bytes]:
    """Videos with texture that moves, like footage, each a little different."""
    rng = np.random.default_rng(0)
    scene = sum(gaussian_filter(rng.normal(size=(SIDE * 2, SIDE * 2, 3)), (s, s, 0)) * s for s in (1, 4, 16))
    scene = ((scene - scene.min()) / np.ptp(scene) * 255).astype(np.uint8)
    found = []
    for x, y in rng.integers(0, SIDE - FRAMES, (DIFFERENT_CLIPS, 2)):
        frames = np.stack([scene[y + t : y + t + SIDE, x + t // 2 : x + t // 2 + SIDE] for t in range(FRAMES)])
        found.append(encode_mp4(frames, RATE, quality=20))
    return found


def upload(store: Store) -> None:
    """Raw tars below ``raw/`` and prepared shards, as the digits have them, below ``train/``."""
    videos, caption = itertools.cycle(clips()), json.dumps({"prompt": "a moving texture"}).encode()
    for index in range(TARS):
        buffer = io.BytesIO()
        write_tar(buffer, ((f"{index}-{n}", {"mp4": next(videos), "json": caption}) for n in range(CLIPS_PER_TAR)))
        store.write_bytes(f"raw/{index:03}.tar", buffer.getvalue())
    rng = np.random.default_rng(0)
    cells = {"latents": (8, 5, 8, 8), "text": (16, 64), "image": (17, 64), "first_frame": (10, 5, 8, 8)}
    for shard in range(10 * SIDE_BY_SIDE):
        rows: dict[str, Any] = {"key": [f"{shard}-{row}" for row in range(ROWS_PER_SHARD)]}
        rows |= {name: rng.normal(size=(ROWS_PER_SHARD, *cell)).astype(np.float32) for name, cell in cells.items()}
        store.write_bytes(f"train/{shard:03}.parquet", parquet_bytes(to_table(rows)))


def decode(mp4: bytes) -> np.ndarray:
    """What a bare loop does: every frame to RGB."""
    with av.open(io.BytesIO(mp4), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def decode_tar(uri: str, key: str) -> int:
    """All videos of a tar, decoded and thrown away."""
    with tarfile.open(fileobj=io.BytesIO(Store.open(uri).read_bytes(key))) as tar:
        videos = [member for member in tar if member.name.endswith(".mp4")]
        return len([decode(tar.extractfile(member).read()) for member in videos])  # type: ignore[union-attr]


def pyav(uri: str, stack: ExitStack) -> Take:
    """A bare PyAV loop in each process, a tar at a time."""
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(PROCESSES))
    keys = itertools.cycle(f"raw/{tar:03}.tar" for tar in range(TARS))

    def take(count: int) -> None:
        jobs = [(uri, next(keys)) for _ in range(count // CLIPS_PER_TAR)]
        pool.starmap(decode_tar, jobs, chunksize=1)

    return take


def open_in_store(url: str, mode: str = "rb", buffer: int = 0, **others: Any) -> Any:
    """WebDataset's way to our store, in its own process."""
    bucket, key = url.removeprefix("s3://").split("/", 1)
    return io.BytesIO(Store.open(f"s3://{bucket}").read_bytes(key))


def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
    """A sample for WebDataset: pixels and prompt."""
    return decode(sample["mp4"]), json.loads(sample["json"])["prompt"]


webdataset.gopen_schemes["s3"] = open_in_store


def with_webdataset(uri: str, stack: ExitStack) -> Take:
    """WebDataset and PyTorch's DataLoader, as their documentation puts them together, without end."""
    urls = [f"{uri}/raw/{tar:03}.tar" for tar in range(TARS)]
    dataset = webdataset.WebDataset(urls, shardshuffle=TARS, empty_check=False).shuffle(CHUNK).map(decoded).repeat()
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=PROCESSES, multiprocessing_context="spawn")
    return batches(iter(loader))


def raw(files: SteadyFiles, stack: ExitStack) -> Take:
    """This project's raw path, pixels instead of latents, so that nothing but reading and decoding counts."""
    return batches(open_raw(files, stack))


def open_raw(files: SteadyFiles, stack: ExitStack, **plan: Any) -> Batches:
    listed = files.store.child("listed" if plan else "listed_pixels")
    found = RawClips(RawFiles(files), listed, CLIPS_PER_TAR, 0.0, RATE)
    order = Order(len(found.shards()), SIDE_BY_SIDE, seed=0)
    # Two at a time on two CPUs, with room for what looks up where samples are, and for an encoder.
    feed = start_feed(RawPlan(found, order, CHUNK, AHEAD, decode_cpus=0.8, **plan), Position(), 1)
    stack.callback(ray.kill, feed)
    return stack.enter_context(
        Batches(RawChunks(feed, Position()), order, Position(), batch=BATCH, rank=0, ranks=1, ahead=4)
    )


def list_clips(files: SteadyFiles) -> None:
    """The lists that ``prepare_data`` would leave, for pixels and for the encoder: every video is one clip."""
    base, raw = config.load("", []).data, RawFiles(files)
    units = claim(files.store.stored("raw"), raw)
    samples = [sample for unit in units for sample in SOURCES[unit.source].samples(unit, raw, 1 << 30)]
    buckets = {"listed": (base.frames, base.height, base.width), "listed_pixels": (FRAMES, SIDE, SIDE)}
    for name, sizes in buckets.items():
        inspection = Inspection(clips=[replace(NO_MEASURES, bucket=Bucket(*sizes, RATE).name)])
        clips = [clip for each in samples for clip in clips_of(each, inspection)]
        files.store.child(name).write_bytes(CLIP_LIST, table_bytes(clips, 0.0))


def batches(source: Iterator[Any]) -> Take:
    def take(count: int) -> None:
        for _ in range(count // BATCH):
            next(source)

    return take


def prepared(files: SteadyFiles, stack: ExitStack) -> Take:
    """This project's reader of prepared shards."""
    source = stack.enter_context(open_prepared(files, SHARDS))

    def take(count: int) -> None:
        for _ in range(count * ROWS_PER_SHARD // 16):
            next(source)

    return take


def open_prepared(files: SteadyFiles, shards: int) -> Batches:
    listed = {f"train/{shard:03}.parquet": ROWS_PER_SHARD for shard in range(shards)}
    order = Order(shards, SIDE_BY_SIDE, seed=0)
    chunks = PreparedChunks(files, listed, COLUMNS, ROWS_PER_SHARD)
    ahead = SIDE_BY_SIDE * ROWS_PER_SHARD // 16
    return Batches(chunks, order, Position(), batch=16, rank=0, ranks=1, ahead=ahead)


def pyarrow_read(store: Store, stack: ExitStack) -> Take:
    """A bare read with pyarrow, on as many threads."""
    filesystem, base = store.arrow()
    keys = itertools.cycle(f"{base}/train/{shard:03}.parquet" for shard in range(SHARDS))
    threads = stack.enter_context(ThreadPoolExecutor(READERS))

    def read(path: str) -> int:
        return pq.read_table(path, filesystem=filesystem, columns=list(COLUMNS)).num_rows

    def take(count: int) -> None:
        assert sum(threads.map(read, [next(keys) for _ in range(count)])) == count * ROWS_PER_SHARD

    return take


def rates(sides: dict[str, Take], warm: int, timed: int, rounds: int) -> dict[str, list[float]]:
    """Clips or shards a second of each side in each round; the sides take turns, in another order each round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sides[name](warm)
            started = time.perf_counter()
            sides[name](timed)
            if turn:  # the first round warms up
                found[name].append(timed / (time.perf_counter() - started))
    return found


def ratio(figure: str, rate: dict[str, list[float]], ours: str, theirs: str, bar: float) -> Figure:
    """The median of the rounds' ratios."""
    each = [mine / other for mine, other in zip(rate[ours], rate[theirs], strict=True)]
    return Figure(figure, median(each), "x", bar, len(each))


def first_batches(files: SteadyFiles) -> list[Figure]:
    """From a running cluster to the first batch: of prepared shards, of raw clips as pixels, and encoded.

    The last one is the longest way: encoders start, clips are decoded and encoded.
    """
    encoder = partial(clip_encoder, config.load("", []))
    ways: dict[str, Callable[[ExitStack], Batches]] = {
        "_prepared": lambda stack: stack.enter_context(open_prepared(files, SHARDS)),
        "_raw_pixels": lambda stack: open_raw(files, stack),
        "": lambda stack: open_raw(files, stack, encoder=encoder, encoder_cpus=0.2),
    }
    figures = []
    for name, way in ways.items():
        with ExitStack() as stack:
            started = time.perf_counter()
            next(way(stack))
            figures.append(Figure(f"seconds_to_first_batch{name}", time.perf_counter() - started, "s", 10.0, 1))
    return figures


def peak_memory(uri: str, shards: int) -> None:
    """Print this process's peak memory after reading so many shards twice."""
    with open_prepared(SteadyFiles(Store.open(uri), 30), shards) as source:
        for _ in range(2 * shards * ROWS_PER_SHARD // 16):
            next(source)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory_growth(uri: str) -> Figure:
    """Peak memory of a process that reads ten times as many shards, over one that reads one window of them."""
    peaks = []
    for shards in (SIDE_BY_SIDE, 10 * SIDE_BY_SIDE):
        command = [sys.executable, __file__, "--peak-memory", str(shards), "--store", uri]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return Figure("memory_growth_x10", peaks[1] / peaks[0], "x", 1.1, 1)


def demo_wait(store: Store) -> Figure:
    """Share of the time that the demo's first phase waits for data, of so many steps with the settings of the demo."""
    overrides = [f"storage.uri={store.uri}", "run.name=demo", f"priming.steps={DEMO_STEPS}", "alarms.every_steps=0"]
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("prepare_data", "stability_priming"):
            script = PROJECT / "pipelines" / f"{stage}.py"
            subprocess.run([sys.executable, script, *overrides], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    metrics = store.read_json("runs/demo/stability_priming/manifest.json")["metrics"]
    return Figure("data_wait_share", metrics["data_wait_share"], "x", 0.02, 1)


def run(arguments: argparse.Namespace) -> None:
    load, figures = os.getloadavg()[0], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        server = stack.enter_context(EmbeddedStore(folder / "store"))
        store = Store.open(server.uri).child("benchmark")
        upload(store)
        files = SteadyFiles(store, 30)
        list_clips(files)
        with ExitStack() as sides:
            readers = {"ours": prepared(files, sides), "pyarrow": pyarrow_read(store, sides)}
            rate = rates(readers, WARM_SHARDS, TIMED_SHARDS, arguments.rounds)
            figures.append(ratio("prepared_vs_pyarrow", rate, "ours", "pyarrow", 0.8))
        figures.append(memory_growth(store.uri))
        with ExitStack() as sides:
            sides.enter_context(LocalRay(folder / "ray", KEEP_WORKERS))
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
            sides.callback(ray.shutdown)
            figures += first_batches(files)
            # Not before: their processes read ahead from the moment they start.
            bare, loader = pyav(store.uri, sides), with_webdataset(store.uri, sides)
            rate = rates(
                {"ours": raw(files, sides), "pyav": bare, "webdataset": loader},
                WARM_CLIPS,
                TIMED_CLIPS,
                arguments.rounds,
            )
            figures.append(ratio("raw_vs_pyav", rate, "ours", "pyav", 0.9))
            figures.append(ratio("raw_vs_webdataset", rate, "ours", "webdataset", 1.0))
        if not arguments.without_demo:
            figures.append(demo_wait(store))
    show(figures)
    if arguments.record:
        conditions = {"processes": PROCESSES, "clip": [FRAMES, SIDE, SIDE], "rounds": arguments.rounds}
        print(f"recorded in {record('data_throughput', figures, conditions, load)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=5, help="measurements of each ratio (default: 5)")
    parser.add_argument("--without-demo", action="store_true", help="leave out data_wait_share, which takes minutes")
    parser.add_argument("--record", action="store_true", help="also append to results/data_throughput.json")
    parser.add_argument("--peak-memory", type=positive_int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        return peak_memory(arguments.store, arguments.peak_memory)
    try:
        run(arguments)
    except PoseError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
