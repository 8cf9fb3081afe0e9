"""What a step holds and computes, as its operator foresees it: bytes of each worker at the peak, and operations."""

from dataclasses import dataclass, fields

PROCESS = 800_000_000
"""Bytes of a process that has imported torch, transformers and Ray, and holds nothing yet."""
CONTEXT = 500_000_000
"""Bytes of a GPU that a process takes by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What each worker of a step holds at its peak, in bytes.

    Attributes:
        parameters: All weights of what learns or answers, and its buffers.
        gradients: Of the weights that learn.
        moments: AdamW's two, and the copy of the weights that ZeRO moves.
        activations: What a forward pass keeps for the backward pass, and what comes and goes in both.
        teacher: The weights of whoever else is asked; what it computes is among the activations.
        buckets: Copies of gradients and weights on their way to or from other workers.
        offloaded: What lies in host memory instead of a GPU's.
        checkpoint: Copies on the host from which the first worker writes a checkpoint, made between two steps, when
            there are neither gradients nor activations.
        device: ``cpu``, or ``cuda`` where the step asks for GPUs: what the others lie on.
        flops: Floating-point operations of the whole step, all workers together; 0 where their number is not known.
    """

    parameters: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    teacher: int = 0
    buckets: int = 0
    offloaded: int = 0
    checkpoint: int = 0
    device: str = "cpu"
    flops: float = 0.0

    @property
    def kept(self) -> int:
        """What is there all the time, where the step computes."""
        return self.parameters + self.moments + self.teacher

    @property
    def computing(self) -> int:
        """The peak of a step of the optimizer, where it computes."""
        return self.kept + self.gradients + self.activations + self.buckets

    @property
    def on_device(self) -> int:
        """The most that a GPU holds; 0 on a CPU."""
        return 0 if self.device == "cpu" else self.computing + CONTEXT

    @property
    def on_host(self) -> int:
        """The most that the process holds in host memory beside its code."""
        if self.device == "cpu":
            return max(self.computing, self.kept + self.checkpoint) + self.offloaded
        return self.offloaded + self.checkpoint

    def items(self) -> dict[str, int]:
        """Everything that is counted in bytes, by name, without what is nothing."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}
        return {name: size for name, size in named.items() if size}
