"""What the processes of a group do in `test_strategies`: every case in turn, in the same two processes.

Run as ``python -m tests.operators.together RANK WORLD PORT FOLDER CASE...``; the first writes what it found to FOLDER.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.hidden import Hidden
from lfm.meta.maml import MAML
from lfm.tuning.bottleneck_adapter import BottleneckAdapter
from lfm.tuning.lora import LoRA
from lfm.tuning.prefix import Prefix
from operators.artifact import Dataset, Model
from operators.data.episodes import FewShot
from operators.distillation import FromTeacher
from operators.learning import zero
from operators.learning.loop import Job, Place, train
from operators.meta_training import _job as meta_job
from operators.models.objectives import NextToken
from operators.teaching.features import Features
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.tuning import _job
from tests.operators import small

# Five rows a batch: two workers have three and two, so that one micro-batch of the second is empty.
TRAINING = Training(
    max_steps=6,
    batch_size=5,
    micro_batch_size=1,
    length=16,
    learning_rate=3e-2,
    warmup=0.2,
    weight_decay=0.1,
    clip_norm=0.7,
    validate_every=3,
    patience=1,  # the second look is worse: the result are the weights of the first
    seed=5,
)
# Its rate does not depend on how many steps there will be: a run of four is the start of one of six.
STEADY = replace(TRAINING, schedule="constant", warmup=0.0, validate_every=0, patience=None, checkpoint_every=3)
LABELS = Training(max_steps=4, batch_size=5, micro_batch_size=1, length=16, learning_rate=3e-2, validate_every=2)
ADAPTER = Training(max_steps=20, batch_size=4, length=32, learning_rate=1e-2, seed=5)
# A bias before batch normalisation has a gradient of 0, of whose rounding AdamW would make steps.
EPISODES = Training(
    max_steps=4, batch_size=5, micro_batch_size=1, length=16, packing=False, learning_rate=3e-2, epsilon=1e-3, seed=5
)
INSERTED = {"bottleneck": BottleneckAdapter(width=4, init=1e-2), "prefix": Prefix(length=4, hidden=8)}


def trained(place, folder, training, *, teacher=False, features=False, goes_on=None):
    """One run; `goes_on` is a checkpoint."""
    model = small.model()
    objective = NextToken(model, packed=False)
    if features:
        wider = small.model(seed=1, hidden_size=32, num_key_value_heads=2)
        listened = Teacher(wider, temperature=1.0, packed=False)
        tapped = Features(Hidden(), model, wider)
        objective = FromTeacher(model, listened, Hidden(), hard_weight=0.3, packed=False, features=tapped)
    if teacher:
        listened = Teacher(small.model(seed=1), temperature=1.0, packed=False)
        objective = FromTeacher(model, listened, ForwardKL(), hard_weight=0.3, packed=False)
    job = Job(
        objective=objective,
        rows=small.rows(),
        held_out=small.rows(7, seed=9) if training.validate_every else None,
        export=lambda weights, folder: None,
    )
    work = small.Work(folder / f"rank-{place.rank}")
    work.checkpoints += [goes_on] if goes_on else []
    return train(job, training, place, work, work.scratch), work


def curves(work):
    return {key: work.curve(key) for key in ("loss", "gradient_norm", "held_out_loss")}


def adapter(place, folder, given):
    """LoRA on a base; what each worker holds of it, at the start, at its most and at the end, as shares of all."""
    made = _job(
        place,
        model=Model(str(given / "model"), "d" * 64),
        data=Dataset(str(given / "pairs.jsonl")),
        held_out=None,
        method=LoRA(rank=2),
        training=ADAPTER,
    )
    parameters = [p for p in made.objective.parameters() if not p.requires_grad]
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)

    def held():
        return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in parameters) / total

    shares = [held()]
    for module in made.objective.modules():
        module.register_forward_hook(lambda *_: shares.append(held()))
    work = small.Work(folder / f"rank-{place.rank}")
    got = train(made, ADAPTER, place, work, work.scratch)
    if not place.rank:
        (folder / "exported").mkdir()
        made.export(got.weights, folder / "exported")
    return {"loss": work.curve(), "start": shares[0], "most": max(shares), "end": held()}


def inserted(place, folder, given, method):
    """What this project puts into a base learns there: its loss, and what is kept of it in the folder."""
    training = replace(TRAINING, max_steps=4, length=32, packing=False, validate_every=0, patience=None)
    made = _job(
        place,
        model=Model(str(given / "model"), "d" * 64),
        data=Dataset(str(given / "pairs.jsonl")),
        held_out=None,
        method=method,
        training=training,
    )
    work = small.Work(folder / f"rank-{place.rank}")
    got = train(made, training, place, work, work.scratch)
    if not place.rank:
        made.export(got.weights, folder / "exported")
    return curves(work)


def episodes(place, folder, given, *, texts):
    """MAML of a network with batch normalisation, or of LoRA; of five tasks in a step one worker has more."""
    made = meta_job(
        place,
        model=Model(str(given / ("model" if texts else "network")), "d" * 64),
        data=Dataset(str(given / ("labelled.jsonl" if texts else "images"))),
        held_out=None,
        method=MAML(learning_rate=0.1, steps=2),
        lora=LoRA(rank=2) if texts else None,
        few_shot=FewShot(ways=1 if texts else 2, shots=1, queries=2),
        training=EPISODES,
    )
    work = small.Work(folder / f"rank-{place.rank}")
    return train(made, EPISODES, place, work, work.scratch).weights, work


def frozen(place, folder):
    """What an export gets of a model of which only the head learns."""
    model = small.model().requires_grad_(False)
    before = {f"model.{n}": p.clone() for n, p in model.named_parameters()}
    model.lm_head.requires_grad_(True)
    job = Job(
        objective=NextToken(model, packed=False),
        rows=small.rows(),
        held_out=None,
        export=lambda weights, folder: None,
        needs_frozen=True,
    )
    work = small.Work(folder / f"rank-{place.rank}")
    got = train(job, replace(STEADY, max_steps=2), place, work, work.scratch).weights
    return {n: torch.equal(got[n], p) for n, p in before.items() if n in got}


def probed(place, folder, given):
    """LoRA and a head that learn labels, in batches of which one worker has more rows than the other."""
    made = _job(
        place,
        model=Model(str(given / "classifier"), "d" * 64),
        data=Dataset(str(given / "labelled.jsonl")),
        held_out=Dataset(str(given / "labelled.jsonl")),
        method=LoRA(rank=2),
        training=LABELS,
    )
    work = small.Work(folder / f"rank-{place.rank}")
    train(made, LABELS, place, work, work.scratch)
    return curves(work)


@contextlib.contextmanager
def nothing_whole():
    """Have stage 3 take apart also what is so small that it would leave it whole."""
    before = dict(zero.WHOLE)
    zero.WHOLE.update(dict.fromkeys(before, 0))
    yield
    zero.WHOLE.update(before)


def main(rank, world, port, home, cases):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for case in cases:
        strategy, *what = case.split("-")
        offload = "cpu" if "offload" in what else "none"
        place = Place(rank=rank, world=world, strategy=strategy, offload=offload)
        folder = home / case
        if "adapter" in what:
            with nothing_whole():
                found = adapter(place, folder, home)
        elif "labels" in what:
            found = probed(place, folder, home)
        elif "starts" in what:
            _, work = trained(place, folder, replace(STEADY, max_steps=4))
            found = curves(work)
        elif "resumes" in what:
            _, work = trained(place, folder, STEADY, goes_on=home / "checkpoint")
            found = curves(work)
        elif what[:1] and what[0] in INSERTED:
            with nothing_whole():
                found = inserted(place, folder, home, INSERTED[what[0]])
        elif "frozen" in what:
            found = frozen(place, folder)
        elif "episodes" in what:
            got, work = episodes(place, folder, home, texts="texts" in what)
            found = curves(work)
            if not rank:
                save_file(dict(got), folder / "weights.safetensors")
        else:
            precision = next((w for w in what if "float16" in w), "float32")
            source = {word: True for word in ("teacher", "features") if word in what}
            got, work = trained(place, folder, replace(TRAINING, precision=precision), **source)
            found = curves(work)
            if not rank:
                save_file(dict(got.weights), folder / "weights.safetensors")
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), sys.argv[5:])
