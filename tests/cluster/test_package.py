"""What travels to a cluster, and what never does."""

import io
import json
import os
import zipfile

import pytest

from cluster.package import JOB, PackageTooLarge, package_here, packaged, uri_of

KEPT = ("pyproject.toml", "lfm/a.py", "operators/deep/b.py", "cluster/credentials.py", "pipelines/recipes/r.yaml")
LEFT = (
    *("README.md", ".git/HEAD", "tests/t.py", "benchmarks/b.py", "other/o.py", "lfm/__pycache__/a.pyc"),
    *("lfm/.env", "lfm/.env.local", "operators/server.pem", "operators/server.KEY", "pipelines/id_rsa"),
    *("pipelines/id_ed25519.pub", "cluster/credentials", "cluster/.lfm/runs/x", "cluster/build/x.py", "lfm/my.token"),
)


@pytest.fixture
def checkout(tmp_path):
    for name in (*KEPT, *LEFT, "lfm/env/pyvenv.cfg", "lfm/env/lib/x.py"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"of {name}")
    return tmp_path / "checkout"


def names_in(package):
    with zipfile.ZipFile(io.BytesIO(package.data)) as archive:
        assert {i.filename.partition("/")[0] for i in archive.infolist()} == {"package"}
        return {i.filename.removeprefix("package/"): archive.read(i) for i in archive.infolist()}


def test_code_travels_and_keys_environments_tests_and_stores_do_not(checkout):
    package = packaged(checkout, {"own/small.yaml": b"name: small"}, version="1.2")
    about = "learn_from_model-1.2.dist-info/METADATA"
    files = names_in(package)
    assert {*files} == {*KEPT, "own/small.yaml", about}
    assert files["lfm/a.py"] == b"of lfm/a.py"
    assert files[about].decode().splitlines()[1:] == ["Name: learn-from-model", "Version: 1.2"]
    assert package.size == sum(map(len, files.values()))
    assert f"{package}".startswith(f"package {package.digest[:12]} of 7 files, 1.")


def test_it_is_named_by_what_is_in_it_and_by_nothing_else(checkout):
    first = packaged(checkout, {"own/a": b"1"}, version="1")
    os.utime(checkout / "lfm/a.py", (1, 1))
    (checkout / "lfm/.env").write_text("another")
    assert packaged(checkout, {"own/a": b"1"}, version="1") == first
    assert packaged(checkout, {"own/a": b"2"}, version="1").digest != first.digest
    assert packaged(checkout, {"own/b": b"1"}, version="1").digest != first.digest
    (checkout / "lfm/a.py").write_text("new")
    assert packaged(checkout, {"own/a": b"1"}, version="1").digest != first.digest


def test_one_that_is_too_large_names_its_largest_files(checkout):
    (checkout / "lfm/weights.bin").write_bytes(b"0" * 300_000)
    with pytest.raises(
        PackageTooLarge, match=r"expected at most 0\.2 MB\. The largest files: lfm/weights\.bin \(0\.3 MB\), "
    ):
        packaged(checkout, {}, version="1", max_bytes=200_000)


def test_ray_reads_it_by_a_uri():
    assert uri_of("s3://bucket/some/where", "packages/a.zip") == "s3://bucket/some/where/packages/a.zip"
    assert uri_of("/nfs/my store", "packages/a.zip") == "file:///nfs/my%20store/packages/a.zip"


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, ""),
        ({"runtime_env": {}}, ""),
        ({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}, ""),
        ({"runtime_env": {"working_dir": f"s3://bucket/lfm/packages/{'a' * 64}.zip"}}, "a" * 64),
    ],
)
def test_a_job_knows_with_which_one_it_came(told, found, monkeypatch):
    monkeypatch.delenv(JOB, raising=False)
    if told is not None:
        monkeypatch.setenv(JOB, json.dumps(told))
    assert package_here() == found
