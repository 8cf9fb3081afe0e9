"""Where Ray finds a token, and who else may."""

import pytest

from cluster.jobs import Jobs
from cluster.profile import Head, Profile, ProfileError
from cluster.tokens import NoToken, TokenInCluster, authenticated, made_token, outside

OTHERS = {"RAY_AUTH_MODE": "k8s", "RAY_AUTH_TOKEN": "another", "RAY_AUTH_TOKEN_PATH": "/another", "HOME": "/h"}


def test_processes_get_the_token_that_is_named_and_no_other(tmp_path):
    path = tmp_path / "token"
    path.write_text("t")
    assert authenticated(OTHERS, "") == {"HOME": "/h", "RAY_AUTH_MODE": "disabled"}
    assert authenticated(OTHERS, f"file:{path}") == {
        "HOME": "/h", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)
    }  # fmt: skip
    assert authenticated({"MINE": "t"}, "env:MINE") == {
        "MINE": "t", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("env:NOWHERE", "token 'env:NOWHERE': no such variable, expected Ray's token."),
        ("file:/nowhere", "token 'file:/nowhere': no such file, expected Ray's token."),
        ("secret:ray", "token 'secret:ray': a place inside of Kubernetes, expected Ray's token."),
    ],
)
def test_a_token_that_is_not_there_is_named(token, said):
    with pytest.raises(NoToken) as refused:
        authenticated({}, token)
    assert said in str(refused.value)


IN_KUBERNETES = {"name": "gpus", "place": "kuberay", "namespace": "team", "head": Head(cpus=1, memory_gib=1)}


@pytest.mark.parametrize(("token", "secret"), [("", "gpus"), ("secret:ours", "ours")])
def test_a_cluster_that_asks_for_a_token_is_not_taken_for_one_without(token, secret, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    there = Profile(**IN_KUBERNETES, token=token, dashboard="http://127.0.0.1:1")
    with pytest.raises(TokenInCluster) as refused:
        Jobs(there)
    assert str(refused.value) == (
        f"cluster 'gpus': RAY_AUTH_TOKEN is not set, expected the token of its Ray, which secret '{secret}' has. Set "
        f"it: export RAY_AUTH_TOKEN=$(kubectl -n team get secret {secret} -o jsonpath='{{.data.auth_token}}' | "
        "base64 -d); or name its place in the profile's 'token'."
    )
    assert outside(there, {"RAY_AUTH_TOKEN": "t"}) == "env:RAY_AUTH_TOKEN"


def test_the_token_that_a_profile_names_is_the_one():
    assert outside(Profile(**IN_KUBERNETES, token="env:MINE"), {"RAY_AUTH_TOKEN": "t"}) == "env:MINE"
    known = {"name": "there", "head": Head(cpus=1, memory_gib=1, type="m5.large")}
    assert outside(Profile(**known, place="address", address="head:6379"), {}) == "", "it may ask for none"
    with pytest.raises(ProfileError, match="token='', expected file:PATH, as it was copied to the machines"):
        outside(Profile(**known, place="aws", region="eu-west-1"), {})


def test_a_token_is_made_once_and_only_this_user_may_read_it(tmp_path):
    path = tmp_path / "token"
    assert made_token(path) == made_token(path) == f"file:{path}"
    first = path.read_text()
    assert (len(first), path.stat().st_mode & 0o777) == (64, 0o600)
    assert made_token(tmp_path / "other") != first
    assert (tmp_path / "other").read_text() != first
