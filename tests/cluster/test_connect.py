"""What is said of a Ray that does not come."""

import pytest
import ray

from cluster.connect import NoCluster, cluster


def test_a_node_that_is_slow_to_start_is_said_in_a_sentence(monkeypatch):
    def slow(**asked):
        raise Exception("The current node timed out during startup.\nThis could happen.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(NoCluster) as said, cluster():
        pass
    assert str(said.value) == (
        "Ray at 'local': The current node timed out during startup, expected a cluster that answers. "
        "Run it again when this machine has less to do."
    )
