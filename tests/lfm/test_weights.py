import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.errors import ShapeError, UnknownName
from lfm.weights import Header, Weights, WeightsError, Writer, layout


def parameters():
    draw = torch.Generator().manual_seed(0)
    return {
        "scalar": torch.tensor(3.5),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5, generator=draw).bfloat16(),
        "matrix": torch.randn(4, 5, generator=draw),
        "eighth": torch.randn(7, generator=draw).to(torch.float8_e4m3fn),
        "counts": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }


def headers(values):
    return {n: Header(tuple(v.shape), v.dtype) for n, v in values.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value.to(torch.float64), other[name].to(torch.float64)), name


def read_all(folder):
    weights = Weights(folder)
    return {n: weights.read(n) for n in weights.headers}


def save_sharded(folder, values):
    files = {}
    for i, (name, value) in enumerate(values.items()):
        file = f"model-{i + 1:05}-of-{len(values):05}.safetensors"
        save_file({name: value}, folder / file)
        files[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_weights_reads_what_safetensors_wrote(tmp_path):
    save_file(parameters(), tmp_path / "model.safetensors")
    same(read_all(tmp_path), parameters())
    assert Weights(tmp_path).headers == headers(parameters())


def test_weights_reads_sharded_folders(tmp_path):
    save_sharded(tmp_path, parameters())
    same(read_all(tmp_path), parameters())


def test_weights_reads_what_an_adapter_is_called(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert Weights(tmp_path, "adapter_model").read("a").tolist() == [1.0, 1.0]


def test_weights_hands_out_memory_of_its_own(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    weights.read("a").add_(1)
    assert weights.read("a").tolist() == [1.0, 1.0]


def test_weights_names_the_near_parameter_where_one_is_unknown(tmp_path):
    save_file({"matrix": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownName, match="Did you mean 'matrix'"):
        Weights(tmp_path).read("matrx")


def test_weights_refuses_a_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(
        WeightsError, match=r"no weights, expected model\.safetensors or model\.safetensors\.index\.json"
    ):
        Weights(tmp_path)


def test_weights_refuses_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"matrix": torch.ones(100)}, path)
    data = path.read_bytes()
    for size in (4, 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match="expected a whole safetensors file"):
            Weights(tmp_path)


def test_weights_refuses_a_file_that_is_none(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")
    with pytest.raises(WeightsError, match="unreadable, expected a JSON object"):
        Weights(tmp_path)


def test_weights_refuses_an_index_that_leads_out_of_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(WeightsError, match="expected files of safetensors that lie beside it"):
        Weights(inside)


def test_weights_refuses_an_index_that_names_what_a_file_does_not_hold(tmp_path):
    save_sharded(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)})
    index = tmp_path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**files, "c": files["a"]}}))
    with pytest.raises(WeightsError, match="no parameter 'c', expected what the index says"):
        Weights(tmp_path)


@pytest.mark.parametrize("shard_bytes", [1, 40, 100, 10**9])
def test_writer_writes_what_safetensors_and_weights_read(tmp_path, shard_bytes):
    values = parameters()
    with Writer(tmp_path, headers(values), shard_bytes=shard_bytes) as out:
        for name in reversed(values):
            out.write(name, values[name])
    same(read_all(tmp_path), values)
    loaded = {}
    for path in tmp_path.glob("*.safetensors"):
        loaded |= load_file(path)
    same(dict(sorted(loaded.items())), dict(sorted(values.items())))


def test_writer_names_shards_as_transformers_does(tmp_path):
    values = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(100)}
    with Writer(tmp_path, headers(values), shard_bytes=32) as out:
        for name, value in values.items():
            out.write(name, value)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 432}
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": one, "b": one, "c": two}


def test_writer_writes_a_view_that_is_not_contiguous(tmp_path):
    value = torch.arange(6.0).reshape(2, 3).T
    with Writer(tmp_path, headers({"a": value})) as out:
        out.write("a", value)
    assert torch.equal(Weights(tmp_path).read("a"), value)


def test_layout_is_known_before_anything_is_written(tmp_path):
    values = parameters()
    shards = layout(headers(values), 60)
    with Writer(tmp_path, headers(values), shard_bytes=60) as out:
        assert {s.file: s.size for s in shards} == {p.name: p.stat().st_size for p in tmp_path.glob("*.safetensors")}
        for name, value in values.items():
            out.write(name, value)
    assert {s.file: s.size for s in shards} == {p.name: p.stat().st_size for p in tmp_path.glob("*.safetensors")}


def test_layout_puts_every_parameter_at_a_multiple_of_its_items_size():
    for shard in layout(headers(parameters()), 10**9):
        for name, offset in shard.offsets.items():
            assert offset % headers(parameters())[name].dtype.itemsize == 0


def test_writer_says_what_was_not_written(tmp_path):
    with pytest.raises(WeightsError, match="1 parameters were not written, first 'b'"):  # noqa: SIM117
        with Writer(tmp_path, headers({"a": torch.ones(1), "b": torch.ones(1)})) as out:
            out.write("a", torch.ones(1))


def test_writer_refuses_another_shape_and_another_name(tmp_path):
    out = Writer(tmp_path, headers({"a": torch.ones(2)}))
    with pytest.raises(ShapeError, match=r"'a' has shape \(3,\), expected \(2,\)"):
        out.write("a", torch.ones(3))
    with pytest.raises(UnknownName, match="No parameter is called 'b'"):
        out.write("b", torch.ones(2))


def test_an_error_about_weights_crosses_processes():
    error = WeightsError("here", "this", "that")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "here: this, expected that."
