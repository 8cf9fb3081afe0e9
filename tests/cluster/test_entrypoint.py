"""The command that a cluster runs."""

import shlex

from cluster.entrypoint import Entrypoint


def test_only_what_is_asked_for_is_said():
    plain = Entrypoint(pipeline="own/small.yaml", run="r1", store="s3://bucket/lfm")
    assert plain.words == (
        *("python", "-m", "pipelines", "run", "own/small.yaml", "--store", "s3://bucket/lfm"),
        *("--cluster", "profile.yaml", "--address", "auto", "--as", "r1"),
    )


def test_a_shell_reads_the_words_as_they_are():
    whole = Entrypoint(
        pipeline="own/a pipeline.yaml",
        run="r1",
        store="/nfs/lfm",
        changes=("merged.density=[0.1, 0.2]", "text=/data/it's here.txt"),
        until="merged",
        mlflow="http://mlflow:5000",
        deadline_s=8 * 3600,
        max_cost=20,
        priority=-2,
        labels={"team": "x y"},
        python="/opt/venv/bin/python",
    )
    assert tuple(shlex.split(str(whole))) == whole.words
    assert whole.words[:9] == (
        *("/opt/venv/bin/python", "-m", "pipelines", "run", "own/a pipeline.yaml"),
        *("--set", "merged.density=[0.1, 0.2]", "--set", "text=/data/it's here.txt"),
    )
    said = dict(zip(whole.words[9::2], whole.words[10::2], strict=True))
    assert said == {
        "--until": "merged",
        "--mlflow": "http://mlflow:5000",
        "--deadline": "28800s",
        "--max-cost": "20",
        "--priority": "-2",
        "--label": "team=x y",
        "--store": "/nfs/lfm",
        "--cluster": "profile.yaml",
        "--address": "auto",
        "--as": "r1",
    }
