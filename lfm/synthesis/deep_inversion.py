"""DeepInversion, and its adaptive form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lfm.inversion import norm_statistics, total_variation
from lfm.method import Needs
from lfm.networks import evaluating
from lfm.oracle import Oracle
from lfm.synthesis.base import Batch, State, Synthesize


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepInversion(Synthesize):
    """Turn noise into images that a teacher takes for its classes and whose statistics its normalisation remembers.

    1. Start. `batch_size` images of noise, each with one of the classes as its target, in turn.
    2. Ask. Cross entropy says how far the teacher is from seeing the targets.
    3. Compare. In each batch normalisation the batch's mean `m` and variance `v` should be the running ones.
    4. Smooth. Total variation `TV` and length are small in natural images.
    5. Compete. Where `competition` is above 0, images on which a student differs from the teacher are preferred.

    The result is where Adam is after `steps` steps on `x` for `CE(teacher(x), target) + batchnorm * sum over layers of
    (|m - running_mean| + |v - running_var|) + total_variation * TV(x) + l2 * |x| + competition * (1 - JS)`.

    Attributes:
        num_images: How many are made, a multiple of `batch_size`.
        batch_size: Images that share their statistics, at least 2.
        steps: Of Adam for each batch, at least 0; 0 leaves the noise as it is.
        learning_rate: Adam's, above 0.
        total_variation: Weighs the roughness of the batch, at least 0. The paper's alpha_tv.
        l2: Weighs the length of the batch, at least 0. The paper's alpha_l2.
        batchnorm: Weighs the statistics, at least 0. The paper's alpha_f.
        competition: Weighs how much student and teacher agree, at least 0. The paper's alpha_c; above 0 it is Adaptive
            DeepInversion and needs a student. JS is the Jensen-Shannon divergence of what both say, in nats.
        jitter: Pixels by which the batch is rolled at most, anew for each step, at least 0: for networks that were
            trained on shifted images. The paper's code rolls images of 32 x 32 by 2.

    Differs from the paper:
        Pixels stay in [0, 1], where a network's own normalisation expects them, and start evenly spread there. Nothing
        is flipped, as a class need not be the same in a mirror. JS is at most log 2, as nothing divides it.

    Example:
        >>> from lfm.networks import ImageNetwork, Network
        >>> teacher = ImageNetwork(Network(widths=(2,)), (1, 4, 4), 3)
        >>> method = DeepInversion(num_images=4, batch_size=4, steps=0)
        >>> _, batch = method.round(method.start((1, 4, 4), 3, seed=0), teacher, None)
        >>> batch.labels
        tensor([0, 1, 2, 0])

    Reference:
        Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.
        https://arxiv.org/abs/1912.08795
    """

    reference, area, leaf = "arXiv:1912.08795", "distillation", "B1"
    needs = Needs(access="gradients", data="none", architecture="batchnorm", strategies=("single",))
    gives = "dataset"

    num_images: int = 2560
    batch_size: int = 256
    steps: int = 2000
    learning_rate: float = 0.1
    total_variation: float = 2.5e-5
    l2: float = 3e-8
    batchnorm: float = 10.0
    competition: float = 0.0
    jitter: int = 0

    def __post_init__(self) -> None:
        self.require(self.batch_size >= 2, "batch_size", "batch_size >= 2")
        whole = self.num_images >= 1 and self.num_images % self.batch_size == 0
        self.require(whole, "num_images", "a multiple of batch_size, at least 1 of them")
        self.require(self.steps >= 0, "steps", "steps >= 0")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(self.total_variation >= 0, "total_variation", "total_variation >= 0")
        self.require(self.l2 >= 0, "l2", "l2 >= 0")
        self.require(self.batchnorm >= 0, "batchnorm", "batchnorm >= 0")
        self.require(self.competition >= 0, "competition", "competition >= 0")
        self.require(self.jitter >= 0, "jitter", "jitter >= 0")

    @property
    @override
    def rounds(self) -> int:
        return self.num_images // self.batch_size

    @property
    @override
    def meets_student(self) -> bool:
        return self.competition > 0

    @override
    def start(self, shape: tuple[int, int, int], num_classes: int, *, seed: int) -> State:
        draws = torch.Generator().manual_seed(seed)
        noise = torch.rand((self.batch_size, *shape), generator=draws)
        return {"noise": noise, "labels": torch.arange(self.batch_size) % num_classes, "draws": draws.get_state()}

    @override
    def round(self, state: State, teacher: nn.Module | Oracle, student: nn.Module | None) -> tuple[State, Batch]:
        assert isinstance(teacher, nn.Module)
        images, labels = state["noise"].clone().requires_grad_(), state["labels"]
        draws = torch.Generator()
        draws.set_state(state["draws"].cpu())
        optimizer = torch.optim.Adam([images], lr=self.learning_rate)
        with evaluating(*(m for m in (teacher, student) if m is not None)):
            for _ in range(self.steps):
                down, right = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=draws).tolist()
                (images.grad,) = torch.autograd.grad(
                    self.loss(images.roll((down, right), (2, 3)), labels, teacher, student), images
                )
                optimizer.step()
                with torch.no_grad():
                    images.clamp_(0, 1)
        noise = torch.rand(images.shape, generator=draws).to(images)
        return {"noise": noise, "labels": labels, "draws": draws.get_state()}, Batch(images.detach(), labels)

    def loss(
        self,
        images: Float[Tensor, "images channels height width"],
        labels: Int[Tensor, "images"],
        teacher: nn.Module,
        student: nn.Module | None = None,
    ) -> Float[Tensor, ""]:
        """What the steps make small; both models are in evaluation mode."""
        with norm_statistics(teacher) as seen:
            said = teacher(images)
        found: Tensor = functional.cross_entropy(said, labels) + self.batchnorm * seen.loss()
        found = found + self.total_variation * total_variation(images) + self.l2 * torch.linalg.vector_norm(images)
        if student is None or self.competition == 0:
            return found
        both = torch.stack([said, student(images)]).log_softmax(dim=-1)
        middle = both.logsumexp(dim=0) - both.new_tensor(2.0).log()
        divergence = (both.exp() * (both - middle)).sum(dim=-1).mean()  # over images, and half of either model
        return found + self.competition * (1 - divergence)
