"""What tests share: a store, a user's own operator, one Ray."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores: what runs at once in tests has one thread each. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every run would start a process that tells MLflow; the tests that want it say so.
os.environ["MLFLOW_TRACKING_URI"] = "none"

from cluster.capacity import Capacity
from cluster.connect import cluster
from cluster.pool import Pool
from operators.catalog import Catalog
from operators.code import bring
from pipelines.source import pack
from pipelines.spec import Spec, load
from pipelines.storage.local import LocalStorage
from pipelines.store import Store

# What no output of a run may hold: every process of the tests, Ray's workers included, has it in its environment.
CANARY = "canary-1c9e5a"
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
)

NOOP = '''
"""An operator that does next to nothing, and what else a test asks of it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace


@operator()
def noop(
    work: Workspace,
    *,
    after: Sequence[Dataset] = (),
    size: int = 1,
    fail: str = "",
    touch: str = "",
    until: str = "",
    workers: int = 0,
) -> Dataset:
    """Write `size` bytes."""
    print("noop says hello")
    subprocess.run([sys.executable, "-c", "print('and so does its child')"], check=True)
    work.progress(1, 2, loss=0.5)
    if touch:
        with open(touch, "a") as file:
            file.write("x")
    while until and not Path(until).exists():
        pass
    if workers:
        together(workers)
    if fail == "raise":
        raise ValueError("asked to fail")
    if fail == "child":
        subprocess.run([sys.executable, "-c", "import sys; sys.exit(3)"], check=True)
    if fail == "exit":
        sys.exit(3)
    if fail == "die":
        os._exit(1)
    if fail == "memory" and Path(touch).read_text() == "x":  # the first time
        raise MemoryError("asked to run out of it")
    if fail == "hang":
        child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        Path(touch).write_text(str(child.pid))
        child.wait()
    path = work.scratch / "data.txt"
    path.write_text("x" * size)
    return work.save(Dataset, path, {"size": size, "seed": work.seed})


def together(workers: int) -> None:
    """Have as many tasks of one CPU run at the same time."""
    import tempfile

    import ray

    folder = tempfile.mkdtemp()

    def meet(rank: int) -> None:
        Path(folder, str(rank)).touch()
        while len(os.listdir(folder)) < workers:
            pass

    ray.get([ray.remote(num_cpus=1)(meet).remote(r) for r in range(workers)])
'''

DIAMOND = """
name: diamond
uses: [noop.py]
inputs:
  text: {dataset: TEXT}
steps:
  a: {operator: noop, inputs: {after: [text]}}
  b: {operator: noop, inputs: {after: [a]}, params: {size: 2}}
  c: {operator: noop, inputs: {after: [a]}, params: {size: 3}}
  d: {operator: noop, inputs: {after: [b, c]}, params: {size: 4}}
"""


class Project:
    """A folder with a pipeline of no-ops, as a user has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "noop.py").write_text(NOOP)
        (folder / "text.txt").write_text("some text")
        self.pipeline = folder / "diamond.yaml"
        self.pipeline.write_text(DIAMOND.replace("TEXT", str(folder / "text.txt")))

    def spec(self, *changes: str) -> tuple[Spec, Catalog]:
        code = pack(self.folder, tuple(sorted(p.name for p in self.folder.glob("*.py"))))
        catalog = Catalog(bring(code, str(self.folder)))
        text = self.pipeline.read_text()
        return load(text, source="diamond.yaml", catalog=catalog, code=code, changes=changes), catalog


@pytest.fixture
def workspace(tmp_path: Path):
    """What an operator's body gets, without a store."""
    from tests.operators.small import Work  # with torch, which not every test needs

    return Work(tmp_path / "workspace")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalStorage(tmp_path / "store"))


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """Where the tests' S3 will listen; Ray's workers know of it only from the environment that they start with."""
    with socket.socket() as place, pytest.MonkeyPatch.context() as environment:
        place.bind(("127.0.0.1", 0))
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{place.getsockname()[1]}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        for name in SECRETS:
            environment.setenv(name, f"{CANARY}-{name}")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield place


@pytest.fixture(scope="session")
def one_ray(s3_environment: socket.socket) -> Iterator[Capacity]:
    """The Ray that all tests of the session share."""
    with cluster("local") as there:
        yield there


@pytest.fixture(scope="session")
def brought_up(tmp_path_factory: pytest.TempPathFactory):
    """The cluster of `four_nodes`, in processes of its own: nothing connects to it but the runs that tests start."""
    from tests.pipelines.nodes import FourNodes

    made = FourNodes(tmp_path_factory.mktemp("nodes"))
    yield made
    made.end()


@pytest.fixture
def four_nodes(brought_up):
    """A cluster of a head and four nodes, one CPU each, which all tests of the session share; one has a GPU."""
    brought_up.complete()
    return brought_up


@pytest.fixture
def ray_local(one_ray: Capacity):
    """What `run` takes as `connect`: the tests' shared Ray."""
    return lambda: contextlib.nullcontext(Pool())
