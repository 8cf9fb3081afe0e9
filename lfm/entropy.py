"""How unsure a model is, which needs no label."""

from jaxtyping import Float
from torch import Tensor


def entropy(logits: Float[Tensor, "*places classes"]) -> Float[Tensor, "*places"]:
    """The entropy of each distribution, in nats: 0 where one class has all, `log(classes)` where all have the same."""
    shares = logits.log_softmax(dim=-1)
    return -(shares.exp() * shares).sum(dim=-1)
