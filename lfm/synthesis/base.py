"""Contract of synthesis: a teacher alone gives what a student learns from, without data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.method import Method, Needs
from lfm.oracle import Oracle

State: TypeAlias = Mapping[str, Tensor]
"""All that a method remembers between two rounds, by name: it goes into a checkpoint as it is."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that were made together.

    Attributes:
        images: Pixels in [0, 1].
        labels: The class that each is meant to show, or that the teacher sees in it.
    """

    images: Float[Tensor, "images channels height width"]
    labels: Int[Tensor, "images"]


class Synthesize(Method, ABC):
    """Makes images round by round, from what a teacher says of them.

    The operator calls `start` once and `round` so often as `rounds` says. What it keeps in between, the state and a
    student that learns, is all that a later process needs to go on as if nothing had happened. Images have pixels in
    [0, 1]: models bring their own normalisation.

    Attributes:
        gives: ``dataset`` where all batches are the result, for whoever wants to learn from them; ``model`` where it is
            the student, which learns in the rounds.
        batch_size: Images of a batch.
        budget: About how many images the teacher is asked at most, where it is an `Oracle`; None where it is none.
    """

    __slots__ = ()
    needs = Needs(access="probabilities", data="none", strategies=("single",))
    gives: ClassVar[Literal["dataset", "model"]]
    batch_size: int
    budget: int | None = None

    @property
    @abstractmethod
    def rounds(self) -> int:
        """How many there are in all."""

    @property
    @abstractmethod
    def meets_student(self) -> bool:
        """Whether a round takes a student."""

    @abstractmethod
    def start(self, shape: tuple[int, int, int], num_classes: int, *, seed: int) -> State:
        """The state before the first round, on the CPU.

        Args:
            shape: Of an image: channels, height, width.
            num_classes: How many the teacher knows.
            seed: Decides all that is drawn.
        """

    @abstractmethod
    def round(self, state: State, teacher: nn.Module | Oracle, student: nn.Module | None) -> tuple[State, Batch]:
        """One batch more; the given state stays as it is.

        Args:
            state: What the round before left. The pixels are made on its device.
            teacher: Gives logits for images, and is left as it was. An `Oracle` gives probabilities, where `needs`
                says that no more is taken.
            student: Gives logits; changed in place where `gives` is ``model``, left as it was otherwise.
        """
