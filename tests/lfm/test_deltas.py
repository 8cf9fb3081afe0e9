import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lfm.deltas import DamagedDelta, Dense, LowRank, applied, read, write
from lfm.errors import ShapeError, UnknownName
from lfm.weights import WeightsError


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"in": nn.Linear(5, 4), "out": nn.Linear(4, 3)}).to(dtype)


DELTA = {"in.weight": LowRank(draws(4, 2), draws(2, 5, seed=1)), "out.bias": Dense(draws(3, seed=2))}


def test_a_low_rank_change_is_the_sum_of_its_columns_times_its_rows():
    change = DELTA["in.weight"]
    assert change.shape == (4, 5)
    for i in range(4):
        for j in range(5):
            slow = sum(float(change.left[i, k]) * float(change.right[k, j]) for k in range(2))
            assert float(change.whole()[i, j]) == pytest.approx(slow, rel=1e-5)
    half = LowRank(change.left.bfloat16(), change.right.bfloat16())
    assert half.whole().dtype == Dense(half.left).whole().dtype == torch.float32


def test_what_is_written_is_read_again(tmp_path):
    write(DELTA, tmp_path)
    assert set(load_file(tmp_path / "delta.safetensors")) == {"in.weight.left", "in.weight.right", "out.bias.added"}
    found = read(tmp_path)
    assert found.keys() == DELTA.keys()
    assert torch.equal(found["in.weight"].left, DELTA["in.weight"].left)
    assert torch.equal(found["in.weight"].right, DELTA["in.weight"].right)
    assert torch.equal(found["out.bias"].added, DELTA["out.bias"].added)


def test_views_and_half_precision_are_written_in_float32(tmp_path):
    wide = draws(5, 4).bfloat16()
    write({"w": Dense(wide.T), "v": LowRank(wide[:, :2], wide.T[:2])}, tmp_path)
    found = read(tmp_path)
    assert torch.equal(found["w"].added, wide.T.float())
    assert torch.equal(found["v"].left, wide[:, :2].float())
    assert torch.equal(found["v"].right, wide.T[:2].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_change_for_a_while_and_then_its_own_weights_bit_for_bit(dtype):
    model = network(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = {k: p.data_ptr() for k, p in model.named_parameters()}
    with applied(model, DELTA):
        inside = {k: v.clone() for k, v in model.state_dict().items()}
    for name, was in before.items():
        more = DELTA[name].whole() if name in DELTA else torch.zeros(was.shape)
        assert torch.equal(inside[name], (was.float() + more).to(dtype))
        assert inside[name].dtype == dtype
        assert torch.equal(model.state_dict()[name], was)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == places  # the saved tensors themselves
    subtracted = inside["in.weight"] - DELTA["in.weight"].whole().to(dtype)
    assert not torch.equal(subtracted, before["in.weight"])  # which is why nothing is subtracted


def test_weights_come_back_also_when_the_block_fails():
    model = network()
    before = model["in"].weight.clone()

    def failing():
        with applied(model, DELTA):
            assert not torch.equal(model["in"].weight, before)
            raise RuntimeError("asked to")

    with pytest.raises(RuntimeError, match="asked to"):
        failing()
    assert torch.equal(model["in"].weight, before)


def test_changes_lie_on_each_other():
    model = network()
    with applied(model, DELTA):
        once = model["in"].weight.clone()
        with applied(model, DELTA):
            assert torch.equal(model["in"].weight, once + DELTA["in.weight"].whole())
        assert torch.equal(model["in"].weight, once)


def test_a_change_of_something_else_is_refused_before_anything_changes():
    model = network()
    before = model["in"].weight.clone()
    said = r"No parameter is called 'inn.weight'. Did you mean 'in.weight'"
    with pytest.raises(UnknownName, match=said), applied(model, {**DELTA, "inn.weight": DELTA["in.weight"]}):
        pass
    said = (
        r"change of 'out.weight' has shape \(4, 5\), expected \(3, 4\)\. Apply it to the model that it was made for\."
    )
    with pytest.raises(ShapeError, match=said), applied(model, {**DELTA, "out.weight": DELTA["in.weight"]}):
        pass
    assert torch.equal(model["in"].weight, before)


@pytest.mark.parametrize(
    ("parts", "said"),
    [(("left",), "left"), (("left", "right", "added"), "added and left and right"), (("other",), "other")],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, parts, said):
    save_file({f"w.{part}": torch.zeros(2, 2) for part in parts}, tmp_path / "delta.safetensors")
    with pytest.raises(DamagedDelta) as caught:
        read(tmp_path)
    assert str(caught.value) == str(DamagedDelta(*caught.value.args))
    assert f"'w' with {said}, expected 'added', or 'left' and 'right', of each parameter" in str(caught.value)


def test_a_folder_without_changes_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"delta\.safetensors"):
        read(tmp_path)
