"""Which examples an episode is made of."""

import numpy as np
import pytest

from lfm.errors import HyperparameterError
from operators.data.episodes import Deck, FewShot
from operators.data.row_files import DatasetError

LABELS = ["b", "a", "c", "a", "b", "c", "a", "b", "c", "c", "b", "a"]
FEW = FewShot(ways=2, shots=1, queries=2)


def test_an_episode_has_other_examples_in_its_query_than_in_its_support_and_one_label_a_row():
    deck = Deck(LABELS, FEW, "somewhere")
    seen = set()
    for i in range(40):
        drawn = deck.draw(3, i)
        assert (drawn.support.shape, drawn.query.shape) == ((2, 1), (2, 2))
        both = np.concatenate([drawn.support, drawn.query], axis=1)
        assert len(set(both.flat)) == both.size
        labels = [{LABELS[n] for n in row} for row in both.tolist()]
        assert all(len(row) == 1 for row in labels)
        assert labels[0] != labels[1]
        seen.add(tuple(row.pop() for row in labels))
    assert len(seen) == 6, "every pair of labels, in either order"


def test_what_is_drawn_depends_on_the_seed_alone():
    deck, other = Deck(LABELS, FEW, "here"), Deck(LABELS, FEW, "there")
    deck.draw(1, 1)
    for seed in ((3, 0), (3, 1), (4, 0), (3, 0, 1)):
        one, same = deck.draw(*seed), other.draw(*seed)
        assert np.array_equal(one.support, same.support)
        assert np.array_equal(one.query, same.query)
    found = [deck.draw(3, step, i).query.tolist() for step in range(3) for i in range(3)]
    assert sum(found.count(one) == 1 for one in found) >= 7


def test_too_few_labels_or_examples_are_named():
    with pytest.raises(DatasetError, match=r"here: has 3 labels, expected at least ways=4"):
        Deck(LABELS, FewShot(ways=4, shots=1, queries=2), "here")
    with pytest.raises(DatasetError, match=r"has 4 rows of the label 'a', expected at least shots \+ queries = 5"):
        Deck(LABELS, FewShot(ways=2, shots=1, queries=4), "here")


@pytest.mark.parametrize("field", ["ways", "shots", "queries"])
def test_an_episode_has_at_least_one_of_each(field):
    with pytest.raises(HyperparameterError, match=f"fewshot: {field}=0"):
        FewShot(**{field: 0})
