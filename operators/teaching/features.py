"""What flows between the layers of a student and its teacher, brought together for a method that compares it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfm.distillation.base import DistillFeatures
from lfm.hooks import Blocks, streams_of
from operators.models.language_models import trunk_of

Streams = tuple[dict[int, Tensor], dict[int, Tensor]]
"""What flows in the student and in the teacher, by depth."""


class Features(nn.Module):
    """The projections of a method, which learn, and the layers that it taps, which are no part of this module."""

    def __init__(self, method: DistillFeatures, student: Any, teacher: Any) -> None:
        """Find the layers of both.

        Raises:
            NoBlocks: One of them has no layers as a transformer has them.
            HyperparameterError: One of them has not the layers that the method names.
        """
        super().__init__()
        self.blocks = [Blocks(trunk_of(student)), Blocks(trunk_of(teacher))]
        self.method = method
        self.pairs = method.taps(len(self.blocks[0]), len(self.blocks[1]))
        widths = tuple(int(model.config.get_text_config().hidden_size) for model in (student, teacher))
        self.projections = method.projections([(widths[0], widths[1])] * len(self.pairs))

    @contextmanager
    def watched(self) -> Iterator[Streams]:
        """Collect what flows in both while the block runs."""
        student, teacher = ([pair[i] for pair in self.pairs] for i in (0, 1))
        with streams_of(self.blocks[0], student) as mine, streams_of(self.blocks[1], teacher) as theirs:
            yield mine, theirs

    def loss(self, streams: Streams, learnt: Tensor) -> Tensor:
        """The sum over the tokens that are learnt: nothing of the others is projected or compared."""
        mine, theirs = streams
        student = [
            project(mine[m][learnt]).float() for project, (m, _) in zip(self.projections, self.pairs, strict=True)
        ]
        with torch.no_grad():
            teacher = [theirs[n][learnt].float() for _, n in self.pairs]
        return self.method.feature_loss(student, teacher).sum()
