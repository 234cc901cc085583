"""Routes that declare their types, and the OpenAPI document that is generated from them.

The server and the document use the same table of routes, and the document's schemas are the types of `bodies`, which
mypy checks too. The document is generated on request, since it names the current models and says whether a key is
needed.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from suanli.serving import bodies, describe
from suanli.serving.bodies import Count, Text
from suanli.serving.protocol import Refusal

ABOUT = """The [Open Inference Protocol](https://github.com/kserve/open-inference-protocol), version 2, with the \
extensions of Triton Inference Server for binary tensors, classification, model configuration, statistics and the \
model repository; and `/predict`, which takes files and texts as they are.

Every answer has an `X-Request-Id`: the client's own, if it sent a plain word. A method that a path doesn't have gets \
405 with `Allow`. HEAD works wherever GET does. Bodies may be compressed (`Content-Encoding: gzip` or `deflate`)."""

REASONS = {
    400: "The request is malformed, contradicts itself, or doesn't fit the model.",
    401: "An API key is needed.",
    403: "The request comes from a page of another site.",
    404: "There is no such model, version or page.",
    413: "The body is larger than the server accepts.",
    415: "The media type or content encoding of the body isn't supported.",
    421: "The server doesn't answer to this host name.",
    500: "The engine failed on this request.",
    503: "The model isn't ready, or has as many requests as it can answer in time.",
    504: "The deadline of the request has passed.",
}

T = TypeVar("T")
Node = dict[str, Any]  # an object of the document
Types = Mapping[str, Any]  # by media type, or by name


class JsonResponse(Response, Generic[T]):
    """An answer in JSON. The document takes its schema from T, the type of its body."""

    media_type = "application/json"

    def __init__(self, values: T, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(values, ensure_ascii=False)
        super().__init__(content.encode("utf-8", "backslashreplace"), status, headers)


class WrongMethod(Refusal):
    def __init__(self, allowed: str) -> None:
        super().__init__(405, f"This path takes {allowed}.")
        self.allowed = "GET, HEAD" if allowed == "GET" else allowed


class Operation(Route):
    """A route with what the document says about it; its summary is the endpoint's docstring."""

    def __init__(
        self,
        route: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        *,
        open_to_all: bool = False,
        include_in_schema: bool = True,
        body: Types | None = None,
        body_required: bool = True,
        answer: Types | None = None,
        refused: Mapping[int, Any] | None = None,
        parameters: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        """`route` is such as "GET /path". `open_to_all`: it needs no key. `body` and `answer` are types by media type;
        the default answer is the T of the endpoint's JsonResponse[T]. `refused` are types of refusals by status, other
        than `Error`. `parameters` are types by place ("query",
        "header") and name; a header is in the answer, too. A type is whatever pydantic's TypeAdapter takes."""
        self.method, _, path = route.partition(" ")
        super().__init__(path, endpoint, methods=[self.method], include_in_schema=include_in_schema)
        self.open_to_all = open_to_all
        self.body, self.body_required, self.answer, self.parameters = body, body_required, answer, parameters or {}
        self.refused = refused or {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods and scope["method"] not in self.methods:
            raise WrongMethod(self.method)
        response = await self.endpoint(
            Request(scope, receive)
        )  # by itself, since `App` and not Starlette answers refusals
        await response(scope, receive, send)


class _SchemaMaker(GenerateJsonSchema):
    """Objects of answers have no other keys, unless their type says so; those of requests may. Keys have no titles,
    which would repeat names."""

    def typed_dict_schema(self, schema: Any) -> Node:
        closed = {"additionalProperties": False} if self.mode == "serialization" else {}
        return closed | super().typed_dict_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


@functools.cache
def _schema(kind: Any, mode: JsonSchemaMode) -> tuple[Node, Node]:
    """The schema of a type, and by name the schemas that it refers to."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    schemas, definitions = TypeAdapter.json_schemas(
        [(0, mode, adapter)], ref_template="#/components/schemas/{model}", schema_generator=_SchemaMaker
    )
    return schemas[0, mode], definitions.get("$defs", {})


class _DocumentBuilder:
    """Collects operations and the schemas that they refer to."""

    def __init__(self, *, key_needed: bool, examples: Mapping[str, Sequence[str]]) -> None:
        self.paths: Node = {}
        self.schemas: Node = {}
        self._key_needed, self._examples = key_needed, examples

    def schema(self, kind: Any, mode: JsonSchemaMode = "serialization") -> Node:
        schema, definitions = _schema(kind, mode)
        self.schemas |= definitions
        return schema

    def response(self, about: str, content: Types, headers: Types | None = None) -> Node:
        """A response with bodies of these types."""
        more = {name: {"schema": self.schema(kind)} for name, kind in (headers or {}).items()}
        return {
            "description": about,
            "headers": {"X-Request-Id": {"schema": self.schema(str), "required": True}} | more,
            "content": {media: {"schema": self.schema(kind)} for media, kind in content.items()},
        }

    def add(self, route: Operation) -> None:
        answer = route.answer or {"application/json": get_args(get_type_hints(route.endpoint)["return"])[0]}
        headers = {name: kind for (place, name), kind in route.parameters.items() if place == "header"}
        responses = {"200": self.response("Done.", answer, headers)}
        for code in sorted(self._refusals(route)):
            responses[str(code)] = {"$ref": f"#/components/responses/Refused{code}"}
        for code, kind in route.refused.items():
            responses[str(code)] = self.response(REASONS[code], {"application/json": kind})
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
        codes = {421, 500}
        if self._key_needed and not route.open_to_all:
            codes |= {401}
        if route.method == "POST":
            codes |= {400, 403, 413, 415}
        if "{name}" in route.path or route.path == "/predict":
            codes |= {404, 503}
        if route.path.endswith(("/infer", "/predict")):
            codes |= {504}
        return codes

    def _path_parameter(self, name: str) -> Node:
        examples = {value: {"value": value} for value in self._examples[name]}
        return {"name": name, "in": "path", "required": True, "schema": self.schema(Text), "examples": examples}


def document(operations: Sequence[Operation], *, key_needed: bool, models: Mapping[str, Sequence[str]]) -> Node:
    """The document of a server. `models` are names with their versions, which it shows as examples."""
    versions = [*chain.from_iterable(models.values())]
    builder = _DocumentBuilder(key_needed=key_needed, examples={"name": [*models], "version": versions})
    for operation in operations:
        if operation.include_in_schema:
            builder.add(operation)
    headers: dict[int, Types] = {401: {"WWW-Authenticate": str}, 503: {"Retry-After": Count}}
    refused = {
        f"Refused{code}": builder.response(reason, {"application/json": bodies.Error}, headers.get(code))
        for code, reason in REASONS.items()
    }
    components: Node = {"schemas": builder.schemas, "responses": refused}
    about = {"title": "suanli", "version": describe.version(), "description": ABOUT, "license": {"name": "Apache-2.0"}}
    node: Node = {"openapi": "3.1.0", "info": about, "servers": [{"url": "/"}], "paths": builder.paths}
    if key_needed:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        node["security"] = [{"bearer": []}, {"header": []}]
    return node | {"components": components}
