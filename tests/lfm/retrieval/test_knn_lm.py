"""kNN-LM against loops over tokens and entries."""

import math

import numpy as np
import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.hooks import Blocks
from lfm.retrieval import _search
from lfm.retrieval._search import Exact, FaissMissing
from lfm.retrieval.base import Neighbours
from lfm.retrieval.knn_lm import KNNLM
from tests.operators import small

VOCABULARY = 7


def store(entries=50, width=6, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    keys = draw.normal(size=(entries, width)).astype(dtype)
    return keys, draw.integers(0, VOCABULARY, entries).astype(np.int32)


def asked(number=9, width=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw), torch.randn(number, VOCABULARY, generator=draw)


def nearest(keys, query, k):
    """Numbers and squared distances of the nearest keys, by the definition."""
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(key, query, strict=True)) for key in keys]
    order = sorted(range(len(keys)), key=lambda i: distances[i])[:k]
    return order, [distances[i] for i in order]


def mixed(keys, values, query, logits, *, k, share, temperature):
    """Equations 2 and 3 of the paper, entry by entry."""
    order, distances = nearest(keys, query, k)
    weights = [math.exp(-d / temperature) for d in distances]
    retrieved = [0.0] * len(logits)
    for i, weight in zip(order, weights, strict=True):
        retrieved[int(values[i])] += weight / sum(weights)
    total = sum(math.exp(x) for x in logits)
    return [share * r + (1 - share) * math.exp(x) / total for r, x in zip(retrieved, logits, strict=True)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("k", "share", "temperature"), [(1, 0.25, 1.0), (8, 0.5, 0.3), (1024, 0.9, 10.0)])
def test_it_mixes_the_model_with_what_followed_near_by(k, share, temperature, dtype):
    keys, values = store(dtype=dtype)
    queries, logits = asked()
    method = KNNLM(k=k, share=share, temperature=temperature)
    found = method.opened(keys, values, method.build(keys)).nearest(queries, method.k)
    told = method.combine(logits, found)
    wanted = [
        mixed(keys, values, q, x, k=k, share=share, temperature=temperature)
        for q, x in zip(queries.tolist(), logits.tolist(), strict=True)
    ]
    torch.testing.assert_close(told.exp(), torch.tensor(wanted), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(told.exp().sum(dim=1), torch.ones(len(queries)))
    own = logits.log_softmax(dim=1)
    for token in range(VOCABULARY):
        targets = torch.full((len(queries),), token)
        torch.testing.assert_close(method.told(own[:, token], targets, found), told[:, token])


def test_without_a_share_it_is_the_model():
    keys, values = store()
    queries, logits = asked()
    method = KNNLM(share=0.0, k=4)
    found = Exact(keys, values).nearest(queries, 4)
    assert torch.equal(method.combine(logits, found), logits.log_softmax(dim=1))
    assert torch.equal(method.told(logits[:, 0], torch.zeros(9, dtype=torch.int64), found), logits[:, 0])


def test_a_token_that_stands_there_twice_has_the_most_of_what_is_retrieved():
    keys = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]], np.float32)
    values = np.array([3, 5, 5], np.int32)
    found = Exact(keys, values).nearest(torch.zeros(1, 2), 3)
    told = KNNLM(share=0.999).combine(torch.zeros(1, VOCABULARY), found)[0].exp()
    assert told.argmax() == 5
    twice = 2 * math.exp(-0.01)
    assert float(told[5]) == pytest.approx(0.999 * twice / (1 + twice) + 0.001 / VOCABULARY, rel=1e-5)


def test_stretches_find_what_one_comparison_of_all_finds(monkeypatch):
    keys, values = store(entries=103)
    queries, _ = asked(number=11)
    whole = Exact(keys, values).nearest(queries, 10)
    for name, size in (("STRETCH", 7), ("QUERIES", 4), ("GATHERED", 130)):
        monkeypatch.setattr(_search, name, size)
    parts = Exact(keys, values).nearest(queries, 10)
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.distances, whole.distances)
    for query, distances, tokens in zip(queries.tolist(), parts.distances, parts.tokens, strict=True):
        order, wanted = nearest(keys, query, 10)
        torch.testing.assert_close(distances, torch.tensor(wanted))
        assert tokens.tolist() == values[order].tolist()
    alone = [Exact(keys, values).nearest(query[None], 10) for query in queries]
    assert torch.equal(torch.cat([a.tokens for a in alone]), whole.tokens)
    torch.testing.assert_close(torch.cat([a.distances for a in alone]), whole.distances)


def test_small_distances_between_large_keys_are_kept():
    keys, values = store(seed=2)
    far = (keys * 0.01 + 300.0).astype(np.float32)
    queries = torch.from_numpy(far[:5]) + 0.004
    found = Exact(far, values).nearest(queries, 3)
    for query, distances in zip(queries.tolist(), found.distances, strict=True):
        torch.testing.assert_close(distances, torch.tensor(nearest(far, query, 3)[1]), rtol=1e-4, atol=1e-7)


def test_a_flat_index_finds_what_comparing_all_finds():
    pytest.importorskip("faiss")
    keys, values = store(entries=200, dtype=np.float16)
    queries, logits = asked()
    exact, flat = KNNLM(k=12), KNNLM(k=12, search="flat")
    found = [m.opened(keys, values, m.build(keys)).nearest(queries, m.k) for m in (exact, flat)]
    assert torch.equal(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].distances, found[1].distances)
    torch.testing.assert_close(exact.combine(logits, found[0]), flat.combine(logits, found[1]))


def test_cells_and_codes_propose_and_the_keys_themselves_decide():
    pytest.importorskip("faiss")
    keys, values = store(entries=600)
    queries, logits = asked()
    method = KNNLM(k=40, search="ivf_pq", centroids=4, probes=4, code_bytes=3)
    near = method.opened(keys, values, method.build(keys))
    found = near.nearest(queries, method.k)
    assert torch.isfinite(found.distances).all()
    for query, distances in zip(queries.tolist(), found.distances.tolist(), strict=True):
        wanted = nearest(keys, query, 600)[1]
        assert distances == sorted(distances)
        assert distances[0] == pytest.approx(wanted[0], rel=1e-4)  # 40 of 600 by their codes hold the nearest
        own = {round(d, 4) for d in wanted}
        assert sum(round(d, 4) in own for d in distances) > 35  # each is a key's own distance, but for rounding
    few = KNNLM(k=400, search="ivf_pq", centroids=4, probes=1, code_bytes=3)
    found = few.opened(keys, values, few.build(keys)).nearest(queries, 400)
    assert found.distances.isinf().any(dim=1).all(), "one cell of four holds fewer than 400 of 600"
    torch.testing.assert_close(few.combine(logits, found).exp().sum(dim=1), torch.ones(9))


def test_where_nothing_is_found_the_model_alone_tells():
    _, logits = asked()
    nothing = Neighbours(torch.full((9, 2), torch.inf), torch.zeros(9, 2, dtype=torch.int64))
    own = logits.log_softmax(dim=1)
    assert torch.equal(KNNLM().combine(logits, nothing), own)
    assert torch.equal(KNNLM().told(own[:, 2], torch.full((9,), 2), nothing), own[:, 2])


def test_a_search_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_search, "find_spec", lambda name: None)
    KNNLM().check(2, 16)
    with pytest.raises(FaissMissing, match="KNNLM: FAISS is not installed, expected it for this search") as caught:
        KNNLM(search="flat").check(None, None)
    assert str(FaissMissing(*caught.value.args)) == str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.mlp.gate_proj"),
        ("gpt2", "transformer.h.1.mlp.c_fc"),
        ("opt", "model.decoder.layers.1.fc1"),
    ],
)
def test_keys_are_what_enters_the_last_layers_mlp(kind, name):
    blocks = Blocks(small.model(kind))
    assert KNNLM().watched(blocks) == name
    assert KNNLM(layer=0).watched(blocks) == name.replace(".1.", ".0.")
    assert KNNLM(key="output").watched(blocks) is None
    with pytest.raises(HyperparameterError, match="KNNLM: layer=2, expected layer < 2, the model's layers"):
        KNNLM(layer=2).watched(blocks)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 0),
        ("share", 1.0),
        ("share", -0.1),
        ("temperature", 0.0),
        ("key", "attention"),
        ("layer", -1),
        ("search", "annoy"),
        ("centroids", 0),
        ("probes", 0),
        ("probes", 5000),
        ("code_bytes", 0),
    ],
)
def test_fields_have_ranges(field, value):
    with pytest.raises(HyperparameterError, match=f"KNNLM: {field}="):
        KNNLM(**{field: value})


def test_what_the_keys_do_not_allow_is_refused():
    pytest.importorskip("faiss")
    with pytest.raises(HyperparameterError, match="code_bytes=64, expected a divisor of the keys' width 96"):
        KNNLM(search="ivf_pq").check(None, 96)
    with pytest.raises(HyperparameterError, match="centroids=4096, expected at most the 50 entries"):
        KNNLM(search="ivf_pq", code_bytes=3).build(store()[0])
    with pytest.raises(HyperparameterError, match="layer=1, expected"):
        KNNLM(key="output", layer=1)
