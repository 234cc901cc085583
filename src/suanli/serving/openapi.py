"""Routes that say what they take and answer, and the OpenAPI document made of them.

The server answers by the same table of routes from which the document is made, and the types of `bodies` are both what
mypy checks and the document's schemas. The document is made when it is asked for, since it names the models that are
there and says whether a key is needed.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from suanli.core.types import Json as AnyJson
from suanli.serving import bodies, describe
from suanli.serving.bodies import Count, Text
from suanli.serving.protocol import Refusal

ABOUT = """The [Open Inference Protocol](https://github.com/kserve/open-inference-protocol), version 2, with the \
extensions of Triton Inference Server for binary tensors, classification, model configuration, statistics and the \
model repository; and `/predict` for people.

Every answer has an `X-Request-Id`: the client's own, if it sent a plain word. A path that is asked in a way that it \
doesn't take answers 405 with `Allow`. HEAD is answered wherever GET is. Bodies may be compressed \
(`Content-Encoding: gzip` or `deflate`)."""

REASONS = {
    400: "The request can't be understood, or contradicts itself or the model.",
    401: "An API key is needed.",
    403: "The request comes from a page of another site.",
    404: "There is no such model, version or page.",
    413: "The body is larger than the server takes.",
    415: "The body is of a kind, or compressed in a way, that can't be read here.",
    421: "The server is addressed by a name that isn't its own.",
    500: "The engine failed on this request.",
    503: "The model isn't ready, or has as much to do as it can answer in time.",
    504: "The deadline of the request has passed.",
}

T = TypeVar("T")
Node = dict[str, AnyJson]  # a part of the document
Types = Mapping[str, Any]  # by media type, or by name


class JsonResponse(Response, Generic[T]):
    """An answer in JSON. T is its type, from which the document has its schema."""

    media_type = "application/json"

    def __init__(self, values: T, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(values, ensure_ascii=False, default=vars)  # a dataclass is an object, too
        super().__init__(content.encode("utf-8", "replace"), status, headers)


class WrongMethod(Refusal):
    def __init__(self, allowed: str) -> None:
        super().__init__(405, f"This takes {allowed}.")
        self.allowed = "GET, HEAD" if allowed == "GET" else allowed


class Operation(Route):
    """A route, and what the document says of it; its summary is the endpoint's docstring."""

    def __init__(
        self,
        way: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        *,
        open_to_all: bool = False,
        include_in_schema: bool = True,
        body: Types | None = None,
        body_required: bool = True,
        answer: Types | None = None,
        parameters: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        """`way` is "GET /path". `open_to_all`: without a key. `body` and `answer` are types by media type; an answer
        is by default the T of the endpoint's JsonResponse[T]. `parameters` are types by place ("query", "header") and
        name; a header is in the answer, too."""
        self.method, _, path = way.partition(" ")
        super().__init__(path, endpoint, methods=[self.method], include_in_schema=include_in_schema)
        self.open_to_all = open_to_all
        self.body, self.body_required, self.answer, self.parameters = body, body_required, answer, parameters or {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods and scope["method"] not in self.methods:
            raise WrongMethod(self.method)
        response = await self.endpoint(Request(scope, receive))  # refusals are for `App`, not for Starlette
        await response(scope, receive, send)


class _SchemaMaker(GenerateJsonSchema):
    """An object that is answered has no other keys, one in a request may; keys need no title beside their name."""

    def typed_dict_schema(self, schema: Any) -> Node:
        closed = {"additionalProperties": False} if self.mode == "serialization" else {}
        return super().typed_dict_schema(schema) | closed

    def dataclass_schema(self, schema: Any) -> Node:  # which is only answered
        found = super().dataclass_schema(schema)
        return found | {"additionalProperties": False, "required": [*found["properties"]]}

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


@functools.cache
def _schema(kind: Any, mode: JsonSchemaMode) -> tuple[Node, Node]:
    """That of a type, and those that it names."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    found, named = TypeAdapter.json_schemas(
        [(0, mode, adapter)], ref_template="#/components/schemas/{model}", schema_generator=_SchemaMaker
    )
    return found[0, mode], named.get("$defs", {})


class _Document:
    """Collects operations, and the schemas that they name."""

    def __init__(self, *, key_needed: bool, examples: Mapping[str, Sequence[str]]) -> None:
        self.paths: Node = {}
        self.schemas: Node = {}
        self._key_needed, self._examples = key_needed, examples

    def schema(self, kind: Any, mode: JsonSchemaMode = "serialization") -> Node:
        found, named = _schema(kind, mode)
        self.schemas |= named
        return found

    def response(self, about: str, content: Types, headers: Types | None = None) -> Node:
        """One that is answered with these types."""
        sent = {name: {"schema": self.schema(kind)} for name, kind in (headers or {}).items()}
        return {
            "description": about,
            "headers": {"X-Request-Id": {"schema": self.schema(str), "required": True}} | sent,
            "content": {media: {"schema": self.schema(kind)} for media, kind in content.items()},
        }

    def add(self, route: Operation) -> None:
        answer = route.answer or {"application/json": get_args(get_type_hints(route.endpoint)["return"])[0]}
        headers = {name: kind for (place, name), kind in route.parameters.items() if place == "header"}
        responses = {"200": self.response("Done.", answer, headers)}
        for code in sorted(self._refusals(route)):
            responses[str(code)] = {"$ref": f"#/components/responses/Refused{code}"}
        if route.path.endswith("/ready"):
            unready = {"application/json": answer["application/json"] | bodies.Error}
            responses["503"] = self.response("It isn't ready.", unready, {"Retry-After": Count})
        version = "_version" if "{version}" in route.path else ""
        operation: Node = {
            "operationId": f"{route.name}{version}",
            "summary": inspect.getdoc(route.endpoint),
            "parameters": [
                *(self._path_parameter(name) for name in route.param_convertors),
                *(
                    {"name": name, "in": place, "schema": self.schema(kind, "validation")}
                    for (place, name), kind in route.parameters.items()
                ),
            ],
            "responses": responses,
        }
        if route.body is not None:
            content = {media: {"schema": self.schema(kind, "validation")} for media, kind in route.body.items()}
            operation["requestBody"] = {"required": route.body_required, "content": content}
        if route.open_to_all:
            operation["security"] = []
        self.paths[route.path] = {route.method.lower(): operation}

    def _refusals(self, route: Operation) -> set[int]:
        found = {421, 500}
        if self._key_needed and not route.open_to_all:
            found |= {401}
        if route.method == "POST":
            found |= {400, 403, 413, 415}
        if "{name}" in route.path or route.path == "/predict":
            found |= {404, 503}
        if route.path.endswith(("/infer", "/predict")):
            found |= {504}
        return found

    def _path_parameter(self, name: str) -> Node:
        examples = {value: {"value": value} for value in self._examples[name]}
        return {"name": name, "in": "path", "required": True, "schema": self.schema(Text), "examples": examples}


def document(
    operations: Sequence[Operation], *, key_needed: bool, models: Mapping[str, Sequence[str]]
) -> dict[str, AnyJson]:
    """The document of a server. `models` are names with their versions, which it shows as examples."""
    versions = [version for found in models.values() for version in found]
    made = _Document(key_needed=key_needed, examples={"name": [*models], "version": versions})
    for operation in operations:
        if operation.include_in_schema:
            made.add(operation)
    headers: dict[int, Types] = {401: {"WWW-Authenticate": str}, 503: {"Retry-After": Count}}
    refused = {
        f"Refused{code}": made.response(reason, {"application/json": bodies.Error}, headers.get(code))
        for code, reason in REASONS.items()
    }
    components: Node = {"schemas": made.schemas, "responses": refused}
    about = {"title": "suanli", "version": describe.version(), "description": ABOUT, "license": {"name": "Apache-2.0"}}
    found: Node = {"openapi": "3.1.0", "info": about, "servers": [{"url": "/"}], "paths": made.paths}
    if key_needed:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        found["security"] = [{"bearer": []}, {"header": []}]
    return found | {"components": components}
