"""Where Ray finds a token, and who else may."""

import pytest

from cluster.tokens import NoToken, authenticated, made_token

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


def test_a_token_is_made_once_and_only_this_user_may_read_it(tmp_path):
    path = tmp_path / "token"
    assert made_token(path) == made_token(path) == f"file:{path}"
    first = path.read_text()
    assert (len(first), path.stat().st_mode & 0o777) == (64, 0o600)
    assert made_token(tmp_path / "other") != first
    assert (tmp_path / "other").read_text() != first
