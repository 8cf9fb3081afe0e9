import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.base import Layer
from lfm.merging.passthrough import Passthrough


def value(method, place=0, name="layers.0.o_proj.weight"):
    return method.merge(name, torch.zeros(2), torch.tensor([[2.0, -4.0]]), {"layer": torch.tensor(place)}).tolist()


def test_passthrough_stacks_all_layers_of_every_expert():
    assert Passthrough().layers(2, 2) == [Layer(0, 0), Layer(0, 1), Layer(1, 0), Layer(1, 1)]


def test_passthrough_takes_the_layers_of_each_slice_in_order():
    method = Passthrough(slices=((1, 1, 3), (0, 0, 1), (1, 2, 3)))
    assert method.layers(2, 3) == [Layer(1, 1), Layer(1, 2), Layer(0, 0), Layer(1, 2)]


def test_passthrough_of_the_paper_leaves_out_the_ends_that_meet():
    method = Passthrough(slices=((0, 0, 24), (0, 8, 32)))
    places = [layer.layer for layer in method.layers(1, 32)]
    assert places == [*range(24), *range(8, 32)]
    assert len(places) == 48


def test_passthrough_hands_on_what_the_expert_has():
    assert value(Passthrough()) == [2.0, -4.0]


def test_passthrough_scales_each_slice_with_its_own_number():
    method = Passthrough(slices=((0, 0, 2), (0, 1, 2)), scale=(0.5, 3.0))
    assert [value(method, place)[0] for place in range(3)] == [1.0, 1.0, 6.0]


def test_passthrough_scales_only_what_is_named():
    method = Passthrough(scale=0.0, scaled=("o_proj", "down_proj"))
    assert value(method) == [0.0, 0.0]
    assert value(method, name="layers.0.q_proj.weight") == [2.0, -4.0]


def test_passthrough_leaves_its_inputs_alone():
    experts = torch.ones(1, 3)
    merged = Passthrough().merge("w", torch.zeros(3), experts, {"layer": torch.tensor(0)})
    merged.add_(1)
    Passthrough(scale=2.0).merge("w", torch.zeros(3), experts, {"layer": torch.tensor(0)})
    assert torch.equal(experts, torch.ones(1, 3))


def test_passthrough_refuses_slices_that_are_not_there():
    with pytest.raises(HyperparameterError, match="expected an expert, a first layer and a later end in each"):
        Passthrough(slices=((0, 2, 2),))
    with pytest.raises(HyperparameterError, match="expected one number, or one for each of the slices"):
        Passthrough(slices=((0, 0, 1),), scale=(1.0, 2.0))
    with pytest.raises(HyperparameterError, match="expected experts from 0 to 0"):
        Passthrough(slices=((1, 0, 1),)).check(1)
    with pytest.raises(HyperparameterError, match="expected layers from 0 to 2, the end"):
        Passthrough(slices=((0, 0, 3),)).layers(1, 2)
