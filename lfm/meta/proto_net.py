"""Prototypical networks."""

from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from lfm.hooks import inputs_of
from lfm.meta.base import HEAD, Examples, Meta, Parameters, told
from lfm.method import Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtoNet(Meta):
    """Learn features in which an example is of the class whose mean it is nearest to.

    With the features `f` of the support, which are what goes into the network's head:

    1. Average. The prototype of each class is the mean of its examples' `f`.
    2. Ask. An example of the query is of a class the likelier the nearer it is to its prototype.
    3. Learn. The loss on the query changes the features; the network's own head takes no part.

    The probabilities are `softmax(-||f - prototype||^2)`, over classes.

    As in the paper. It trains with more classes in an episode than it is measured with, which here are two numbers of
    `ways`. The prototypes are put in the place of the head, whose logits are then `2 * prototype @ f - ||prototype||^2`
    (its section 2.4): of all classes the same `||f||^2` is left out, of which the softmax does not depend.

    Example:
        >>> model = nn.Sequential()
        >>> model.append(nn.Identity()).add_module("head", nn.Linear(1, 2))
        >>> support = Examples(torch.tensor([[1.0], [3.0], [-1.0]]), torch.tensor([0, 0, 1]))
        >>> found = ProtoNet().adapt(model, dict(model.named_parameters()), support, training=False)
        >>> found["head.weight"].flatten(), found["head.bias"]
        (tensor([ 4., -2.]), tensor([-4., -1.]))

    Reference:
        Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017. https://arxiv.org/abs/1703.05175
    """

    reference, area, leaf = "arXiv:1703.05175", "meta", "base"
    needs = Needs(access="gradients", data="labelled", architecture="network", strategies=("single", "ddp"))

    @override
    def adapt(self, model: nn.Module, parameters: Parameters, support: Examples, *, training: bool) -> Parameters:
        with torch.set_grad_enabled(training), inputs_of(model, [HEAD]) as seen:
            told(model, parameters, support)
            features, classes = seen[HEAD], int(support.targets.max()) + 1
            prototypes = torch.stack([features[support.targets == c].mean(dim=0) for c in range(classes)])
            head = {f"{HEAD}.weight": 2 * prototypes, f"{HEAD}.bias": -prototypes.square().sum(dim=1)}
        return {**parameters, **head}
