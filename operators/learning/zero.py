"""ZeRO: what training holds, taken apart over workers by DeepSpeed; the only file that knows it.

Stage 1 shares out the optimizer's moments, stage 2 also the gradients, stage 3 also the parameters.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lfm.weights import Weights
from operators.data.batches import Batch
from operators.learning.extensions import compile_in_turn
from operators.learning.learner import KINDS, Learner, Place, adamw
from operators.models.objectives import Objective
from operators.training import Training

GROWTH_STEPS = 2000  # float16's scale: as torch's GradScaler has it
WHOLE = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
"""What stage 3 leaves whole, always or for a while, in elements: what DeepSpeed does by itself."""


def _deepspeed(place: Place) -> Any:
    """The library, talking through the process group that is there."""
    if place.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    compile_in_turn()
    if place.device.type == "cpu":
        # Without them it uses gloo, as on any system but Linux; with them it first compiles for most of a minute.
        deepspeed.ops.__compatible_ops__ = {}
    # It calls torch's collectives by their old names, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if place.device.type == "cuda" else "gloo")
    return deepspeed


def _settings(place: Place, training: Training) -> dict[str, Any]:
    stage = int(place.strategy.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, **(WHOLE if stage == 3 else {})}
    if place.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size or 1,
        "zero_optimization": zero,
        "gradient_clipping": training.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would have to be compiled, and rounds otherwise than torch's
    }


@contextlib.contextmanager
def partitioned(place: Place, training: Training, dtype: torch.dtype) -> Iterator[None]:
    """Models that transformers loads here are taken apart while they load, in stage 3; nothing happens elsewhere."""
    if place.strategy != "zero3":
        yield
        return
    _deepspeed(place)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    config = _settings(place, training) | ({half: {"enabled": True}} if half else {})
    alive = HfDeepSpeedConfig(config)  # transformers holds it weakly
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Have every module of a taken-apart model get its parameters while it computes, before an optimizer does that."""
    handles = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
        if own:
            handles.append(module.register_forward_pre_hook(lambda *_, own=own: own[0].all_gather(own)))
            handles.append(module.register_forward_hook(lambda *_, own=own: own[0].partition(own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """Have the parameters of a taken-apart model the shapes that they have whole, without their values or memory."""
    apart: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    for parameter in apart:
        parameter.data = parameter.data.new_empty(1).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter in apart:
            parameter.data = parameter.data.new_empty(0)


class _Autocast(nn.Module):
    """An objective in a precision of its own: DeepSpeed switches off one that is set around it."""

    def __init__(self, learner: "Sharded") -> None:
        super().__init__()
        self.objective = learner.objective
        self.precision = learner.precision

    @override
    def forward(self, batch: Batch) -> Tensor:
        with self.precision():
            loss: Tensor = self.objective(batch)
            return loss


class Sharded(Learner):
    """Strategies ``zero1``, ``zero2`` and ``zero3``; parameters that learn and their moments are float32."""

    def __init__(self, objective: nn.Module, training: Training, place: Place) -> None:
        super().__init__(objective, training, place)
        deepspeed = _deepspeed(place)
        self.whole = place.strategy != "zero3"
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_Autocast(self), optimizer=adamw(self.learnt, training), config=_settings(place, training)
        )
        if not self.whole and isinstance(objective, Objective):
            # The head's weight is used without calling the head.
            for parameter in objective.head[0].linear.parameters():
                deepspeed.zero.register_external_parameter(objective, parameter)
        self.updates = 0
        self.scale, self.since = (65536.0 if training.precision == "float16" else 1.0), 0

    @override
    def learn(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.scale != self.optimizer.loss_scale:
            self.optimizer.override_loss_scale(self.scale)
        loss: Tensor = self.engine(batch)
        # It averages over the workers what has to be summed over them.
        self.engine.backward(loss * (self.place.world / tokens), scale_wrt_gas=False)
        return loss.detach()

    @override
    def step(self, rate: float) -> float | None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.optimizer.overflow:
            if self.scale <= 1:
                return float("inf")
            self.scale, self.since = self.scale / 2, 0
            return None
        self.updates += 1
        self.since += 1
        if self.training.precision == "float16" and self.since == GROWTH_STEPS:
            self.scale, self.since = self.scale * 2, 0
        return float(self.engine.get_global_grad_norm())

    @override
    def precision(self) -> AbstractContextManager[Any]:
        if self.training.precision == "float32":
            return contextlib.nullcontext()
        # The cache would keep whole copies of what is there for a moment only.
        dtype = getattr(torch, self.training.precision)
        return torch.autocast(self.place.device.type, dtype, cache_enabled=False)

    @override
    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.whole:
            return self._here({n: p.detach() for n, p in self.learnt.items()}.items())
        return self._here((n, safe_get_full_fp32_param(p)) for n, p in self.learnt.items())

    @override
    def frozen(self) -> dict[str, Tensor]:
        if self.whole:
            return {}
        return self._here(self._gathered())

    @override
    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.updates:
            return {}
        self._link()
        pairs = ((n, p, kind) for n, p in self.learnt.items() for kind in KINDS)
        return self._here((f"{n}.{kind}", safe_get_full_optimizer_state(p, kind)) for n, p, kind in pairs)

    @override
    def state(self) -> dict[str, float]:
        scale = {"scale": self.scale, "_growth_tracker": self.since}
        return {"updates": self.updates, **(scale if self.training.precision == "float16" else {})}

    @override
    @torch.no_grad()
    def load(self, weights: Weights, moments: Weights, state: Mapping[str, float]) -> None:
        self.updates = int(state["updates"])
        if self.training.precision == "float16":
            self.scale, self.since = state["scale"], int(state["_growth_tracker"])
        groups = "single_partition_of_fp32_groups" if self.whole else "fp32_partitioned_groups_flat"
        for part in getattr(self.optimizer, groups) if self.updates else ():
            kept = {kind: torch.zeros_like(part) for kind in KINDS}
            self.optimizer.state[part] = {"step": torch.tensor(float(self.updates), device=part.device), **kept}
        if self.updates:
            self._link()
        for name, p in self.learnt.items():
            self._put(p, weights.read(name), None)
            for kind in KINDS:
                if f"{name}.{kind}" in moments.headers:
                    self._put(p, moments.read(f"{name}.{kind}"), kind)

    def _link(self) -> None:
        """Have stages 1 and 2 find the moments: by itself it forgets all groups of parameters but the first."""
        if self.whole:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _put(self, p: Any, value: Tensor, kind: str | None) -> None:
        """Give a parameter, or a moment of it, a value; every worker keeps what is its part."""
        if self.whole:
            p.set_full_hp_param(value.to(self.place.device), kind)
            if kind is None:
                p.copy_(value)
            return
        size = p.ds_tensor.numel()  # the last worker's part is filled up
        mine = torch.zeros(size * self.place.world, dtype=value.dtype)
        mine[: value.numel()] = value.flatten()
        mine = mine[size * self.place.rank : size * (self.place.rank + 1)]
        p._z3_optimizer.set_local_hp_param(mine, p, kind)
        if kind is None:
            p.ds_tensor.data.copy_(mine)

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, p in self.objective.named_parameters():
            if name not in self.learnt:
                with deepspeed.zero.GatheredParameters([p]):
                    yield name, p.data

    def _here(self, pairs: Any) -> dict[str, Tensor]:
        """Copies on the first worker's CPU; the others take part and keep nothing."""
        return {name: value.cpu().clone() for name, value in pairs if not self.place.rank}
