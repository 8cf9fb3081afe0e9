"""How near answers come to those that were expected."""

from collections import Counter

import pytest

from operators.measures.answers import scores
from tests.operators import small


class Saying:
    """An engine with given answers."""

    context, start = 64, 0

    def __init__(self, *said):
        self.said, self.tokenizer = dict(enumerate(said)), small.tokenizer()
        self.asked = []

    def complete(self, prompts, sampling):
        self.asked += [(self.tokenizer.decode(p), sampling.max_tokens, sampling.temperature) for p in prompts]
        return [self.tokenizer(self.said[len(p)])["input_ids"] for p in prompts]


def chrf(said, expected):
    """F2 of runs of 1 to 6 characters, blanks left out, averaged over the lengths that both have."""
    said, expected = said.replace(" ", ""), expected.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, 7):
        one = Counter(said[i : i + n] for i in range(len(said) - n + 1))
        other = Counter(expected[i : i + n] for i in range(len(expected) - n + 1))
        if one and other:
            precisions.append((one & other).total() / one.total())
            recalls.append((one & other).total() / other.total())
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * precision * recall / (4 * precision + recall)


def test_exact_match_and_chrf_compare_what_was_said_with_what_was_expected():
    pairs = [
        ("the cat", "the cat"),
        (" the cat\n", "the cat"),
        ("the cat ran", "the cat"),
        ("", "the cat"),
        ("on", "it"),
    ]
    rows = {"prompt": [], "completion": [expected for _, expected in pairs]}
    engine = Saying()
    for said, _ in pairs:  # prompts of different lengths, by which the engine knows what to say
        prompt = "a" * (len(pairs) - len(rows["prompt"]))
        rows["prompt"].append(prompt)
        turns = [{"role": "user", "content": prompt}]
        text = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        engine.said[len(engine.tokenizer(text)["input_ids"])] = said
    told = []
    found = scores(engine, rows, 7, 2, name="set", told=told.append)
    assert found["answer"] == ["the cat", "the cat", "the cat ran", "", "on"]
    assert found["exact_match"] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert found["chrf"] == pytest.approx([chrf(said.strip(), expected) for said, expected in pairs])
    assert found["chrf"][:2] == [1.0, 1.0]
    assert 0 < found["chrf"][2] < 1
    assert sum(told) == len(pairs)
    assert {(limit, temperature) for _, limit, temperature in engine.asked} == {(7, 0.0)}
