"""Sizes of buckets fit the model and the ratio, and every source goes to the nearest that its length fills."""

from __future__ import annotations

import math

import pytest

from pose_core.data.buckets import Bucket, cropped_share, nearest, plan_buckets
from pose_core.errors import DataError

BASE = Bucket(81, 480, 832, 16.0)


def plan(*ratios: str, lengths: tuple[int, ...] = ()) -> tuple[Bucket, ...]:
    return plan_buckets(BASE, ratios, lengths, temporal_factor=4, side_step=16)


def test_without_more_there_is_one_bucket() -> None:
    assert plan() == (BASE,) and BASE.name == "81x480x832" and BASE.seconds == 5


def test_sizes_are_multiples_near_the_area_and_the_ratio() -> None:
    buckets = plan("16:9", "9:16", "1:1", "4:3", "21:9")
    assert (buckets[2].height, buckets[2].width) == (848, 480)
    for bucket, ratio in zip(buckets[1:], (16 / 9, 9 / 16, 1, 4 / 3, 21 / 9), strict=True):
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert bucket.height * bucket.width == pytest.approx(480 * 832, rel=0.06)
        assert bucket.width / bucket.height == pytest.approx(ratio, rel=0.05)


def test_every_length_comes_in_every_shape_once() -> None:
    buckets = plan("1:1", lengths=(49, 81))
    assert [bucket.name for bucket in buckets] == ["81x480x832", "81x624x624", "49x480x832", "49x624x624"]


@pytest.mark.parametrize(("ratios", "lengths"), [(("16x9",), ()), (("0:9",), ()), ((), (80,))])
def test_what_does_not_fit_is_refused_by_name(ratios: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"data\.(aspect_ratios='(16x9|0:9)'|bucket_frames=80)") as caught:
        plan(*ratios, lengths=lengths)
    assert caught.value.exit_code == 2


def test_the_nearest_shape_and_the_longest_length_that_is_filled() -> None:
    buckets = plan("9:16", "1:1", lengths=(33, 49))
    assert nearest(buckets, 16 / 9, 60.0) == BASE
    assert nearest(buckets, 9 / 16, 60.0) == Bucket(81, 848, 480, 16.0)
    assert nearest(buckets, 1.2, 4.9) == Bucket(49, 624, 624, 16.0)
    assert nearest(buckets, 1.2, 3.0) == Bucket(49, 624, 624, 16.0)
    assert nearest(buckets, 1.2, 2.99) == Bucket(33, 624, 624, 16.0)
    assert nearest(buckets, 1.2, 1.9) is None


def test_the_share_that_is_cut_off() -> None:
    square = Bucket(9, 32, 32, 8.0)
    assert cropped_share(square, 1.0) == 0
    assert math.isclose(cropped_share(square, 2.0), 0.5) and math.isclose(cropped_share(square, 0.5), 0.5)
