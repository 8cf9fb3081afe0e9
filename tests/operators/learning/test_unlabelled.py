"""Which rows a step takes of text without labels."""

from operators.learning.unlabelled import Balanced
from tests.operators import small


def test_every_step_takes_as_many_rows_of_each_set():
    sets = [small.rows(number, seed=number) for number in (5, 11, 3)]
    balanced = Balanced(sets, 4, seed=2)
    seen = []
    for step in range(6):
        rows, where = balanced(step, None)
        assert rows is balanced.rows
        assert len(rows) == 19
        assert [sum(first <= i < last for i in where) for first, last in ((0, 5), (5, 16), (16, 19))] == [4, 4, 4]
        seen += where.tolist()
    assert set(seen) == set(range(19))
    for row, first in ((0, 0), (5, 5), (16, 16)):
        source = next(s for s, start in zip(sets, (0, 5, 16), strict=True) if start == first)
        assert rows.ids[row].tolist() == source.ids[row - first].tolist()
