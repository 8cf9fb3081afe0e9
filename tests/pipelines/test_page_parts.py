"""What the page is made of: curves, numbers, places, markup and colours; and how it is put where it belongs."""

import itertools
import math
import os
import random
import re

import pytest

from pipelines.page.curves import thinned
from pipelines.page.document import PageNotWritten, write
from pipelines.page.layers import Box, arranged, crossings, ranks, spread
from pipelines.page.markup import element
from pipelines.page.scales import (
    MINUS,
    Scale,
    alike,
    brief,
    clock,
    fitted_wide,
    log_ticks,
    tick_texts,
    ticks,
    time_ticks,
)
from pipelines.page.style import STYLE
from pipelines.page.timeline import Axis

# ---- curves


def test_thinning_keeps_both_ends_and_every_spike():
    draw = random.Random(0)
    for count in (2, 499, 500, 501, 1000, 12_345):
        points = [(i, draw.random()) for i in range(count)]
        spikes = draw.sample(range(count), 2)
        for i, height in zip(spikes, (50.0, -50.0), strict=True):
            points[i] = (i, height)
        kept = thinned(points)
        assert len(kept) <= 500
        assert kept == sorted(set(kept))
        assert set(kept) <= set(points)
        assert {points[0], points[-1], *(points[i] for i in spikes)} <= set(kept)
    assert thinned(points[:500]) == points[:500]


# ---- numbers


def test_ticks_are_round_and_inside():
    draw = random.Random(1)
    for _ in range(300):
        low = draw.uniform(-50, 50)
        high = low + 10 ** draw.uniform(-4, 5)
        found = ticks(low, high, 5)
        assert 1 <= len(found) <= 7
        slack = 1e-6 * (high - low)
        assert all(low - slack <= t <= high + slack for t in found)
        assert len(set(tick_texts(found))) == len(found)
        assert all(
            abs(float(s.replace(MINUS, "-")) - t) <= slack for s, t in zip(tick_texts(found), found, strict=True)
        )
        if len(found) > 1:
            step = found[1] - found[0]
            assert any(
                math.isclose(step / 10 ** math.floor(math.log10(step * 1.0001)), m, rel_tol=1e-6) for m in (1, 2, 5)
            )


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(0.9, 12, 5) == [1, 2, 5, 10]
    assert log_ticks(0.9, 120, 5) == [1, 3, 10, 30, 100]
    assert log_ticks(0.9, 12_000, 5) == [1, 10, 100, 1000, 10_000]
    assert len(log_ticks(1e-9, 1e9, 5)) <= 6


def test_an_axis_is_logarithmic_where_a_linear_one_would_squeeze():
    assert fitted_wide([1.0, 100.0], 0, 1).logarithmic
    assert not fitted_wide([0.0, 100.0], 0, 1).logarithmic
    assert not fitted_wide([4.0, 8.0], 0, 1).logarithmic
    assert Scale(1.0, 100.0, 0.0, 10.0, logarithmic=True).at(10.0) == pytest.approx(5.0)
    assert Scale(0.0, 4.0, 100.0, 0.0).at(1.0) == 75.0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (4.30651, "4.307"),
        (-0.5, "-0.5"),
        (2.1e-7, "2.1e-7"),
        (3e7, "3e7"),
        (12345.6, "12346"),
        (1e-4, "1e-4"),
    ],
)
def test_a_number_is_written_with_the_digits_that_a_reader_compares(value, said):
    assert brief(value) == said.replace("-", MINUS)


def test_numbers_of_one_column_have_as_many_decimals():
    assert alike([4.31, 0.5]) == ["4.310", "0.500"]
    assert alike([403.42, 7.0]) == ["403.4", "7.0"]
    assert alike([]) == []


def test_times_on_an_axis_are_round():
    assert [clock(t) for t in time_ticks(525, 10)] == ["0", *(f"{m} min" for m in range(1, 9))]
    assert [clock(t) for t in time_ticks(9 * 3600, 5)] == ["0", "2 h", "4 h", "6 h", "8 h"]
    assert len(time_ticks(1e7, 10)) <= 11
    assert clock(5400) == "1 h 30 min"


def test_a_pause_takes_little_room_however_long_it_was():
    axis = Axis([(0.0, 30.0), (10_000.0, 10_010.0)])
    assert axis.at(0.0) == 0.0
    assert axis.at(30.0) == pytest.approx(97.5 * 30 / 40)
    assert axis.at(10_000.0) == pytest.approx(97.5 * 30 / 40 + 2.5)
    assert axis.at(10_010.0) == pytest.approx(100.0)
    assert axis.pauses() == [(axis.at(30.0), 9970.0)]


# ---- the graph


def random_graph(seed, nodes):
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(nodes)]
    arrows = {(draw.choice(names[:i]), names[i]) for i in range(1, nodes) for _ in range(draw.randint(0, 3))}
    return {n: Box(draw.uniform(40, 200), draw.choice((24.0, 54.0))) for n in names}, sorted(arrows)


GRAPHS = [random_graph(seed, nodes) for seed, nodes in enumerate((1, 2, 5, 20, 60, 100))]


@pytest.mark.parametrize(("boxes", "arrows"), GRAPHS)
def test_no_box_lies_over_another_and_every_arrow_runs_from_left_to_right(boxes, arrows):
    drawn = arranged(boxes, arrows)
    for one, other in itertools.combinations(drawn.boxes.values(), 2):
        beside = one.x + one.width < other.x or other.x + other.width < one.x
        apart = one.y + one.height < other.y or other.y + other.height < one.y
        assert beside or apart
    assert set(drawn.routes) == set(arrows)
    for (source, target), points in drawn.routes.items():
        start, end = drawn.boxes[source], drawn.boxes[target]
        assert points[0] == pytest.approx((start.x + start.width, start.y + start.height / 2))
        assert points[-1] == pytest.approx((end.x, end.y + end.height / 2))
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert all(0 <= y <= drawn.height for _, y in points)
    for box in drawn.boxes.values():
        assert box.x >= 0
        assert box.y >= -1e-9
        assert box.x + box.width <= drawn.width + 1e-9
        assert box.y + box.height <= drawn.height + 1e-9


@pytest.mark.parametrize(("boxes", "arrows"), GRAPHS)
def test_a_line_that_passes_a_box_does_not_cross_it(boxes, arrows):
    drawn = arranged(boxes, arrows)
    for arrow, points in drawn.routes.items():
        for (x, y), (to_x, _) in zip(points[1:-1:2], points[2:-1:2], strict=True):
            for name, box in drawn.boxes.items():
                if name not in arrow and box.x < (x + to_x) / 2 < box.x + box.width:
                    assert not box.y < y < box.y + box.height


def test_crossings_are_counted_as_one_counts_them_by_hand():
    draw = random.Random(2)
    left, right = [(f"l{i}", 0) for i in range(9)], [(f"r{i}", 1) for i in range(8)]
    hops = sorted({(draw.choice(left), draw.choice(right)) for _ in range(30)})
    by_hand = sum(
        (left.index(a) - left.index(c)) * (right.index(b) - right.index(d)) < 0
        for (a, b), (c, d) in itertools.combinations(hops, 2)
    )
    assert crossings([left, right], hops) == by_hand > 0


def test_arrows_that_need_not_cross_do_not():
    boxes = {n: Box(50, 20) for n in ("a", "b", "c", "x", "y", "z")}
    drawn = arranged(boxes, [("a", "z"), ("b", "y"), ("c", "x")])
    heights = {n: b.y for n, b in drawn.boxes.items()}
    assert heights["a"] == heights["z"]
    assert heights["b"] == heights["y"]
    assert heights["c"] == heights["x"]


def test_layers_are_longest_paths_and_a_source_stands_beside_what_it_feeds():
    arrows = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("late", "d")]
    assert ranks(["a", "b", "c", "d", "late"], arrows) == {"a": 0, "b": 1, "c": 2, "d": 3, "late": 2}


def test_places_are_the_nearest_to_those_wished_that_leave_enough_room():
    assert spread([0.0, 5.0, 100.0], [5.0, 5.0], [1.0] * 3) == [0.0, 5.0, 100.0]
    assert spread([0.0, 0.0], [10.0], [1.0, 1.0]) == [-5.0, 5.0]
    assert spread([0.0, 0.0], [10.0], [3.0, 1.0]) == [-2.5, 7.5]
    wished, apart, weights = [3.0, 1.0, 2.0, 9.0], [2.0, 3.0, 1.0], [1.0, 2.0, 1.0, 1.0]
    found = spread(wished, apart, weights)

    def cost(places):
        return sum(w * (p - q) ** 2 for w, p, q in zip(weights, places, wished, strict=True))

    assert all(b - a >= gap - 1e-9 for (a, b), gap in zip(itertools.pairwise(found), apart, strict=True))
    draw = random.Random(3)
    for _ in range(500):
        other = [p + draw.gauss(0, 0.5) for p in found]
        if all(b - a >= gap for (a, b), gap in zip(itertools.pairwise(other), apart, strict=True)):
            assert cost(other) >= cost(found) - 1e-9


# ---- markup and colours


def test_markup_escapes_text_and_leaves_out_what_is_not_given():
    assert element("p", "a<b", None, ["c", element("b", 0)], class_="x&y", title=None, hidden=True, x=0) == (
        '<p class="x&amp;y" hidden x="0">a&lt;bc<b>0</b></p>'
    )
    assert element("rect", x=1.0, y=2.25) == '<rect x="1" y="2.2"/>'


def contrast(one, other):
    """How much two colours differ, as WCAG 2 defines it."""

    def light(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_ground_in_light_and_dark():
    light, dark = (dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", part)) for part in STYLE.split("@media", 2)[:2])
    for colours in (light, dark):
        for text in (
            "text",
            "muted",
            "link",
            "done",
            "reused",
            "running",
            "failed",
            "idle",
            "c0",
            "c1",
            "c2",
            "c3",
            "small",
        ):
            for ground in ("ground", "surface", "sunken"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


# ---- writing it


def test_a_page_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    (tmp_path / "link.html").symlink_to(target)
    write(tmp_path / "link.html", "new \udc80")
    assert target.read_text() == "new ?"
    assert (tmp_path / "link.html").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.html", "page.html"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gone/page.html", "no such file or directory"),
        (".", "is there and no plain file"),
        ("file/page.html", "not a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, where, said):
    (tmp_path / "file").write_text("old")
    with pytest.raises(PageNotWritten, match=said) as caught:
        write(tmp_path / where, "new")
    assert str(caught.value) == (
        f"--html {str(tmp_path / where)!r}: {said}, expected a file that can be written. Give another place."
    )
    assert os.listdir(tmp_path) == ["file"]
