"""What importing costs, and what hides what."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(code, *, cwd=ROOT):
    """The top-level modules that a fresh process has after running `code`."""
    listing = f"{code}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", listing], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_methods_load_neither_ray_nor_transformers_nor_pydantic():
    heavy = {"ray", "transformers", "pydantic", "mlflow", "peft", "yaml"}
    every = "import lfm\nfor n in lfm.names(): lfm.find(n)"
    assert not loaded_by(every) & heavy


def test_help_loads_nothing_heavy():
    heavy = {"ray", "torch", "transformers", "pydantic", "mlflow", "rich", "yaml"}
    assert not loaded_by("from pipelines.__main__ import parser\nparser().format_help()") & heavy


def test_planning_loads_neither_ray_nor_transformers():
    code = "import pipelines.commands.plan\nfrom operators.catalog import Catalog\nc = Catalog()\n"
    every = f"{code}for v in c.verbs(): c.operator(v)"
    assert not loaded_by(every) & {"ray", "transformers", "mlflow", "peft", "fastapi"}


def test_a_run_loads_torch_only_with_a_step_that_needs_it():
    assert not loaded_by("import pipelines.commands.run") & {"ray", "torch", "transformers", "mlflow", "pyarrow"}


def test_a_package_that_hides_one_of_ours_is_named(tmp_path):
    (tmp_path / "operators").mkdir()
    (tmp_path / "operators" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom pipelines.__main__ import main\nsys.exit(main(['ps']))"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"package 'operators': Python finds {tmp_path / 'operators'}, expected {ROOT}")
