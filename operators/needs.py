"""Whether a step gives what its method needs: what every verb asks before anything runs."""

from collections.abc import Collection, Iterator

from lfm.method import Method
from operators.resources import Resources
from operators.training import Training


def unmet(
    method: Method,
    *,
    resources: Resources | None = None,
    training: Training | None = None,
    models: int | None = None,
    called: str = "models",
    data: bool | None = None,
    architectures: Collection[str | None] = (),
    statistics: Collection[str] | None = None,
) -> Iterator[str]:
    """What a method needs and does not get, a clause each.

    Args:
        method: Its class says what it needs.
        resources: What the step asks for; None where nothing is trained.
        training: How it trains; None where nothing is trained.
        models: How many models it is given to learn from.
        called: What the step calls these (``experts``).
        data: Whether it is given data; None where the verb's signature decides that.
        architectures: What these are, as far as that is known.
        statistics: What has been measured of every model, as far as that is known; None where it is not known yet.
    """
    needs, name = method.needs, type(method).__name__
    if resources is not None and resources.strategy not in needs.strategies:
        allowed = ", ".join(needs.strategies)
        yield f"{name}: strategy={resources.strategy!r}, expected one of {allowed}. It cannot share a model that way."
    if training is not None and needs.cache and training.gradient_checkpointing:
        why = "Recomputed layers have no cache, in which what it learns lies."
        yield f"{name}: gradient_checkpointing=True, expected false. {why} Lower micro_batch_size instead."
    if training is not None and needs.cache and training.packing:
        yield f"{name}: packing=True, expected false. Documents of one row would share a cache. Set packing to false."
    if models is not None:
        least, most = needs.models
        if models < least or (most is not None and models > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            yield f"{name}: {models} {called}, expected {wanted}. Give it as many, or choose another method."
    if data is False and needs.data != "none":
        yield f"{name}: no data, expected {needs.data} rows to learn from. Name them under data."
    if data is True and needs.data == "none":
        yield f"{name}: data is given, expected none, as it uses none. Leave it out."
    if needs.architecture != "any":
        for what in {a for a in architectures if a is not None and a != needs.architecture}:
            fix = "Give another, or choose another method."
            yield f"{name}: {what!r} under {called}, expected {needs.architecture!r}. {fix}"
    for kind in needs.statistics:
        if statistics is not None and kind not in statistics:
            fix = f"Make a step of the verb 'measure' with statistics: [{kind}] for each."
            yield f"{name}: no {kind!r} of the {called}, expected what was measured of each. {fix}"
