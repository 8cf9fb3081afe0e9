"""Low-rank adaptation."""

import pytest
import torch
from torch import nn

from lfm.errors import HyperparameterError
from lfm.tuning.lora import LoRA


def asked(method):
    calls = []
    method.attach(nn.Linear(2, 2), lambda kind, **fields: calls.append((kind, fields)))
    return calls


def test_it_asks_for_what_its_fields_say():
    method = LoRA(rank=4, alpha=12, dropout=0.1, targets=("q_proj", "v_proj"), stable_rank=True)
    fields = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    assert asked(method) == [("LORA", fields)]
    assert asked(LoRA())[0][1]["target_modules"] == "all-linear"


@pytest.mark.parametrize("stable", [False, True])
def test_peft_multiplies_with_the_same_scale(stable):
    import peft

    method = LoRA(rank=4, alpha=12, targets=("0",), stable_rank=stable)
    ((kind, fields),) = asked(method)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 3))
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    model = peft.get_peft_model(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](**fields))
    layer = model.base_model.model[0]
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(high, torch.zeros(3, 4)), "it does not start unchanged"
    nn.init.normal_(high)
    x = torch.randn(7, 5)
    wanted = torch.stack([(weight + method.scale * high @ low) @ row + bias for row in x])
    torch.testing.assert_close(model(x), wanted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.0.lora_{m}.default.weight" for m in "AB"
    }


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("targets", ())])
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(HyperparameterError, match=f"LoRA: {field}="):
        LoRA(**{field: value})
