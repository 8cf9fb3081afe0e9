"""What is loaded: nothing of it runs code, is unpickled or lies elsewhere than it says; each is refused by its name."""

import json
import pickle

import pytest

from operators.artifact import Adapter, Dataset, Metrics, Model
from operators.data.records import records
from operators.data.row_files import DatasetError, files_of
from operators.gating import documents_of
from operators.measures.measure import DOCUMENTS
from operators.models.foreign_code import ForeignCode, refuse_foreign_code
from pipelines.inputs.inspector import Looks
from pipelines.plan import InputProblem
from pipelines.storage import s3_client
from pipelines.storage.digests import Digests
from pipelines.store import DamagedArtifact, Result

LLAMA = {"model_type": "llama"}
CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.fixture
def looks(tmp_path):
    return Looks(tmp_path / "memory.sqlite", None)


@pytest.fixture
def folder_of(tmp_path):
    """A folder with files of JSON or of text."""

    def made(name="m", **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    return made


def refused(looks, artifact):
    with pytest.raises(InputProblem) as problem:
        looks.check(artifact)
    return str(problem.value).removeprefix(f"{artifact.uri!r} ")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"config__json": {"model_type": "own", "auto_map": CODE}},
            "names code of its own in config.json (auto_map 'configuration_own.Own'), which is never run, expected a "
            "class that transformers has. Convert it to one where you trust it, or give another.",
        ),
        (
            {
                "config__json": {"model_type": "own"},
                "tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}},
            },
            "names code of its own in tokenizer_config.json (auto_map 'tokenization_own.Own'), which is never run, "
            "expected a class that transformers has. Convert it to one where you trust it, or give another.",
        ),
        (
            {"config__json": {**LLAMA, "text_config": {"attn_implementation": "somebody/kernel"}}},
            "names a kernel to fetch in config.json (attn_implementation 'somebody/kernel'), which is never run, "
            "expected an implementation that transformers has, such as 'sdpa'. Remove it from the file.",
        ),
        (
            {
                "config__json": LLAMA,
                "model__safetensors__index__json": {"weight_map": {"a": "../../x.safetensors"}},
            },
            "holds a model.safetensors.index.json that is none: names '../../x.safetensors', expected files of "
            "safetensors that lie beside it. Save the folder again.",
        ),
        (
            {"config__json": LLAMA, "model__safetensors__index__json": {"weight_map": {"a": "pytorch_model.bin"}}},
            "holds a model.safetensors.index.json that is none: names 'pytorch_model.bin', expected files of "
            "safetensors that lie beside it. Save the folder again.",
        ),
    ],
)
def test_a_model_that_loading_would_do_more_with_than_read_is_refused(looks, folder_of, files, said):
    folder = folder_of(model__safetensors="x", **files)
    assert refused(looks, Model(str(folder))) == said
    with pytest.raises(ForeignCode) as failed:  # where a step loads what another one made
        refuse_foreign_code(folder)
    assert str(failed.value) == f"{str(folder)!r} {said}"
    assert type(failed.value)(*failed.value.args).args == failed.value.args


def test_a_model_in_a_bucket_is_refused_by_its_configs_before_its_weights_are_fetched(looks, bucket):
    config = json.dumps({"model_type": "own", "auto_map": CODE}).encode()
    for name, content in {"config.json": config, "model.safetensors": b"x", "modeling_own.py": b"raise"}.items():
        s3_client.client().put_object(Bucket=bucket, Key=f"m/{name}", Body=content)
    said = refused(looks, Model(f"s3://{bucket}/m"))
    assert said.startswith(
        "names code of its own in config.json (auto_map 'configuration_own.Own'), which is never run"
    )


def test_an_adapter_that_has_a_module_imported_is_refused(looks, folder_of):
    config = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}
    folder = folder_of(adapter_config__json=config, adapter_model__safetensors="x")
    assert refused(looks, Adapter(str(folder))) == (
        "names a module to import in adapter_config.json (megatron_core 'evil'), expected an adapter without it. "
        "Train the adapter without Megatron."
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "model.pkl"])
def test_pickles_are_not_opened_where_a_step_loads_them(folder_of, name):
    folder = folder_of(config__json=LLAMA, **{name.replace(".", "__"): "x"})
    with pytest.raises(ForeignCode, match=r"weights only as pickles .*, which are never opened, expected safetensors"):
        refuse_foreign_code(folder)


def test_a_model_whose_code_transformers_has_is_taken_without_its_own(looks, folder_of):
    """Many carry theirs along although nobody needs it any more."""
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    folder = folder_of(
        config__json={**LLAMA, "auto_map": CODE, "attn_implementation": "sdpa"},
        tokenizer_config__json=tokenizer, model__safetensors="x", modeling_own__py="raise SystemExit",
    )  # fmt: skip
    assert looks.check(Model(str(folder))) == Model(str(folder))


def test_a_link_out_of_a_model_s_folder_is_refused_and_the_hub_s_own_are_not(looks, folder_of, tmp_path):
    (tmp_path / "key").write_text("private")
    folder = folder_of("m", config__json=LLAMA, model__safetensors="x")
    (folder / "tokenizer.json").symlink_to("../key")
    assert refused(looks, Model(str(folder))) == (
        f"holds 'tokenizer.json', a link that leads out of it (to {str(tmp_path / 'key')!r}), expected files of its "
        "own. Copy the file to where the link is."
    )
    blobs = folder_of("models--o--m/blobs", a=LLAMA, b="x")
    snapshot = blobs.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/b")
    assert looks.check(Model(str(snapshot))) == Model(str(snapshot))
    (tmp_path / "linked").symlink_to(snapshot)  # the whole folder may be one
    assert looks.check(Model(str(tmp_path / "linked"))) == Model(str(tmp_path / "linked"))
    (snapshot / "tokenizer.json").symlink_to("../../../key")
    assert "holds 'tokenizer.json', a link that leads out of it" in refused(looks, Model(str(snapshot)))


@pytest.mark.parametrize("what", ["the folder", "a file"])
def test_a_link_in_the_place_of_an_artifact_is_damage_and_is_made_good(store, tmp_path, what):
    def put():
        folder = store.storage.scratch()
        (folder / "data.txt").write_text("x")
        return store.put(folder, "dataset", {})

    digest = put()
    store.commit(Result(fingerprint="f", kind="dataset", digest=digest))
    place = store.storage.root / "artifacts" / digest
    elsewhere = tmp_path / "elsewhere"
    if what == "the folder":
        place.rename(elsewhere)
        place.symlink_to(elsewhere)
    else:
        elsewhere.mkdir()
        (place / "data.txt").rename(elsewhere / "data.txt")
        (place / "data.txt").symlink_to(elsewhere / "data.txt")
    assert store.hit("f") is None
    with pytest.raises(DamagedArtifact, match=r"is not what was put in; it is in quarantine now"):
        store.verified(digest, Digests(tmp_path / "memory.sqlite"))
    assert (elsewhere / "data.txt").read_text() == "x"
    assert put() == digest
    assert store.hit("f").digest == digest
    assert not (place / "data.txt").is_symlink()
    store.storage.delete(f"quarantine/{store.storage.folders('quarantine')[0]}")
    assert (elsewhere / "data.txt").read_text() == "x"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_a_column_of_pickles_is_refused_and_not_opened(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    column = pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([pickle.dumps(Bomb())], pa.large_binary())
    )
    pq.write_table(pa.table({"text": column, "other": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError) as refusal:
        list(records(tmp_path / "a.parquet", {"text", "other"}))
    assert str(refusal.value) == (
        f"{tmp_path / 'a.parquet'}: has the column 'text' of the extension type 'ray.data.arrow_pickled_object', "
        "expected a type of Arrow's own. Write it as plain strings, numbers, lists and structs."
    )
    assert [row for _, row in records(tmp_path / "a.parquet", {"other"})] == [{"other": "a"}]
    (tmp_path / "a.parquet").rename(tmp_path / DOCUMENTS)
    with pytest.raises(DatasetError, match="has the column 'text' of the extension type"):
        documents_of(Metrics(str(tmp_path)), "a set")


@pytest.mark.parametrize("name", ["load.py", "rows.pkl", "rows.arrow", "rows.npy"])
def test_data_in_scripts_and_pickles_are_no_rows(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DatasetError, match=r"holds no file of rows, expected \.parquet, \.jsonl, \.json"):
        files_of(tmp_path)
    assert Looks(tmp_path / "m.sqlite", None).check(Dataset(str(tmp_path))), "nothing of it is opened to look at it"


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getpid() }}"]
)
def test_a_chat_template_reaches_nothing_of_python(template):
    from jinja2.exceptions import SecurityError

    from tests.operators.small import tokenizer

    made = tokenizer()
    made.chat_template = template
    with pytest.raises(SecurityError):
        made.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
