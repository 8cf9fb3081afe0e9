"""Whether a document is what its schema says, without a field that the schema does not know.

Kubernetes drops unknown fields and Ray Serve ignores them, so that a misspelt one would be lost without a word.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from cluster.manifests.finding import Finding

OPEN = "x-kubernetes-preserve-unknown-fields"


def strict(schema: Any) -> Any:
    """A schema of Kubernetes as one of JSON Schema, which takes no field that it does not name."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {k: strict(v) for k, v in schema.items() if k not in ("nullable", "properties")}
    if "properties" in schema:
        made["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if not schema.get(OPEN) and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in made:
        kinds = made["type"] if isinstance(made["type"], list) else [made["type"]]
        made["type"] = [*kinds, "null"]
    return made


def of_kubernetes(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The strict schema of a whole resource: Kubernetes itself looks after ``metadata`` of the resource."""
    made: dict[str, Any] = strict(schema)
    made["properties"]["metadata"] = {"type": "object"}
    made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return made


def misfits(document: Any, schema: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Every part of a document that a schema refuses."""
    from jsonschema import Draft7Validator

    found = Draft7Validator(schema).iter_errors(document)
    return tuple(Finding("schema", ".".join(map(str, e.absolute_path)) or "document", e.message) for e in found)


@functools.cache
def launcher_schema() -> dict[str, Any]:
    """The schema of Ray's launcher, from the Ray that is installed."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, Any] = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return found


def serve_misfits(config: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Every part of a config that Ray Serve refuses, or that it would not read."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    unknown = [Finding("schema", where, "a field that Ray Serve does not read") for where in _unknown(config)]
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        said = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        return (*unknown, *(Finding("schema", where, sentence) for where, sentence in said))
    return tuple(unknown)


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
    from ray.serve.schema import ServeDeploySchema

    yield from _unread(ServeDeploySchema, config, "")


def _unread(kind: Any, value: Any, where: str) -> Iterator[str]:
    """Keys of a value, and of all below it, that its class has no field for."""
    from pydantic import BaseModel

    below = f"{where}." if where else ""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, Mapping):
        known = {name: f.annotation for name, f in kind.model_fields.items()}
        for key, inner in value.items():
            if key not in known:
                yield f"{below}{key}"
            else:
                yield from _unread(known[key], inner, f"{below}{key}")
    elif get_origin(kind) in (list, tuple) and isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _unread(get_args(kind)[0], inner, f"{below}{number}")
    elif get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _unread(member, value, where)
