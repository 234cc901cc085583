"""What the server answers over HTTP, as an OpenAPI document: for people, and for programs that make or test clients.

The schemas say no less than what is answered: a property that isn't in one never comes. What a request may hold is
looser, since the protocol lets a server pass over what it doesn't know. The document is made anew when it is asked for,
since it names the models that are there and says whether a key is needed.

What this doesn't do: check requests or answers. The tests hold the server against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from suanli.serving import describe
from suanli.serving.protocol import DATATYPES, HEADER_LENGTH, MAX_RANK, MAX_TENSORS
from suanli.types import Json

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

Node = dict[str, Json]  # a part of the document

# --- schemas, by what they say ---

STRING: Node = {"type": "string"}
NUMBER: Node = {"type": "number"}
FLAG: Node = {"type": "boolean"}
COUNT: Node = {"type": "integer", "minimum": 0}
SHARE: Node = {"type": "number", "minimum": 0, "maximum": 1}
BINARY: Node = {"type": "string", "format": "binary"}
DATATYPE: Node = {"type": "string", "enum": [*DATATYPES, "BYTES"]}
SHAPE: Node = {"type": "array", "items": COUNT, "maxItems": MAX_RANK}


def _or_null(schema: Node) -> Node:
    return schema | {"type": [schema["type"], "null"]}


def _list(items: Node, **limits: int) -> Node:
    return {"type": "array", "items": items} | limits


def _ref(name: str, kind: str = "schemas") -> Node:
    return {"$ref": f"#/components/{kind}/{name}"}


def _answer(*optional: str, **properties: Node) -> Node:
    """An object that is answered: these properties and no others, all of them but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _asked(*required: str, **properties: Node) -> Node:
    """An object in a request: what else is in it is passed over."""
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _schemas() -> dict[str, Node]:
    return {"Error": _answer(error=STRING)} | _inference() | _about_models() | _for_people()


def _inference() -> dict[str, Node]:
    """Open Inference Protocol, "Inference"; parameters are those of the extensions."""
    elements = {"anyOf": [{"type": ["number", "string", "boolean"]}, _ref("TensorData")]}
    size = _answer(binary_data_size=COUNT)
    name = STRING | {"minLength": 1}
    output = _asked(binary_data=FLAG, classification=COUNT | {"description": "So many of the likeliest classes."})
    whole = _asked(
        binary_data_output=FLAG,
        timeout=_or_null(COUNT) | {"description": "Microseconds; 0: none.", "maximum": (1 << 62) - 1},
    )
    return {
        "TensorData": _list(elements) | {"description": f"Row by row, nested (up to {MAX_RANK} deep) or flat."},
        "RequestInput": _asked(
            "name", "shape", "datatype", "data",
            name=name, shape=SHAPE, datatype=DATATYPE, data=_ref("TensorData"), parameters=_or_null(_asked()),
        ),
        "RequestOutput": _asked("name", name=name, parameters=_or_null(output)),
        "InferRequest": _asked(
            "inputs",
            id=_or_null(STRING),
            inputs=_list(_ref("RequestInput"), minItems=1, maxItems=MAX_TENSORS),
            outputs=_or_null(_list(_ref("RequestOutput"), maxItems=MAX_TENSORS)),
            parameters=_or_null(whole),
        ),
        "ResponseOutput": _answer(
            "data", "parameters",
            name=STRING, datatype=DATATYPE, shape=SHAPE, data=_list({"type": ["number", "string", "boolean"]}),
            parameters=size,
        ),
        "InferResponse": _answer(
            "id", model_name=STRING, model_version=STRING, id=STRING, outputs=_list(_ref("ResponseOutput"))
        ),
    }  # fmt: skip


def _about_models() -> dict[str, Node]:
    """The protocol's metadata, and Triton's configuration, statistics and repository."""
    tensor = _answer(name=STRING, datatype=DATATYPE, shape=_list({"type": "integer", "minimum": -1}))
    configured = _answer(
        name=STRING, data_type={"type": "string", "pattern": "^TYPE_"}, dims=_list({"type": "integer", "minimum": -1})
    )
    computed = {name: _ref("Duration") for name in ("compute_input", "compute_infer", "compute_output")}
    return {
        "ServerMetadata": _answer(name=STRING, version=STRING, extensions=_list(STRING)),
        "ModelMetadata": _answer(
            name=STRING, versions=_list(STRING), platform=STRING, inputs=_list(tensor), outputs=_list(tensor)
        ),
        "ModelConfig": _answer(
            name=STRING,
            platform=STRING,
            backend=STRING,
            max_batch_size=COUNT,
            input=_list(configured),
            output=_list(configured),
            dynamic_batching=_answer(preferred_batch_size=_list(COUNT), max_queue_delay_microseconds=COUNT),
        ),
        "Duration": _answer(count=COUNT, ns=COUNT),
        "ModelStats": _answer(
            name=STRING,
            version=STRING,
            last_inference=COUNT | {"description": "Milliseconds since 1970; 0: never."},
            inference_count=COUNT,
            execution_count=COUNT,
            inference_stats=_answer(**{name: _ref("Duration") for name in ("success", "fail", "queue")}, **computed),
            batch_stats=_list(_answer(batch_size=COUNT, **computed)),
        ),
        "ModelState": _answer(
            name=STRING,
            version=STRING,
            state={"type": "string", "enum": ["READY", "LOADING", "UNAVAILABLE"]},
            reason=STRING,
        ),
    }


def _for_people() -> dict[str, Node]:
    prediction = _answer(
        name=STRING,
        label=_or_null(STRING),
        probability=_or_null(SHARE),
        probabilities={"type": "object", "additionalProperties": SHARE, "description": "The likeliest first."},
        error=_or_null(STRING),
    )
    state = {"type": "string", "enum": ["loading", "ready", "failed", "draining", "closed"]}
    always = {"name": STRING, "version": STRING, "state": state, "reason": STRING, "classes": _list(STRING)}
    loaded = dict.fromkeys(("engine", "precision", "kind"), _or_null(STRING))
    loaded |= dict.fromkeys(("threads", "height", "width", "channels", "batch_limit", "memory_bytes"), _or_null(COUNT))
    loaded |= dict.fromkeys(("p50_ms", "p99_ms", "target_ms"), _or_null(NUMBER | {"minimum": 0}))
    loaded |= dict.fromkeys(("waiting", "requests", "refused", "failed", "restarts"), COUNT) | {"draws": FLAG}
    return {
        "Predictions": _answer(
            model=STRING, version=STRING, engine=STRING, precision=STRING, seconds=NUMBER, predictions=_list(prediction)
        ),
        "Status": _answer(
            name=STRING,
            version=STRING,
            ready=FLAG,
            draining=FLAG,
            uptime_s=NUMBER,
            key_needed=FLAG,
            models=_list(_answer(*loaded, **always, **loaded)),
        ),
    }


# --- operations ---


def _json(schema: Node) -> Node:
    return {"application/json": {"schema": schema}}


def _response(about: str, content: Node, **headers: Node) -> Node:
    headers = {"X-Request-Id": {"schema": STRING, "required": True}} | {
        name.replace("_", "-"): {"schema": schema} for name, schema in headers.items()
    }
    return {"description": about, "headers": headers, "content": content}


def _refusals() -> dict[str, Node]:
    more = {401: {"WWW_Authenticate": STRING}, 503: {"Retry_After": COUNT}}
    return {
        f"Refused{code}": _response(reason, _json(_ref("Error")), **more.get(code, {}))
        for code, reason in REASONS.items()
    }


class _Paths:
    """Collects operations; each may also be refused in the ways that any request may."""

    def __init__(self, key_needed: bool) -> None:
        self.found: dict[str, Node] = {}
        self._key_needed = key_needed

    def add(
        self,
        way: str,
        identity: str,
        about: str,
        content: Node,
        *,
        refusals: Sequence[int] = (),
        body: Node | None = None,
        parameters: Sequence[Node] = (),
        open_to_all: bool = False,
        **others: Node,
    ) -> None:
        """`way` is "GET /path"; `content` is that of status 200; `others` are responses such as `_304`."""
        method, path = way.split()
        codes = {421, 500, *refusals}
        codes |= {403, 413, 415} if method == "POST" else set()
        codes |= {401} if self._key_needed and not open_to_all else set()
        responses = {"200": _response("Done.", content)}
        responses |= {str(code): _ref(f"Refused{code}", "responses") for code in sorted(codes)}
        responses |= {name.removeprefix("_"): response for name, response in others.items()}
        operation: Node = {"operationId": identity, "summary": about, "responses": responses}
        if body is not None:
            operation["requestBody"] = body
        if parameters:
            operation["parameters"] = list(parameters)
        if open_to_all:
            operation["security"] = []
        self.found.setdefault(path, {})[method.lower()] = operation


def document(*, key_needed: bool = False, models: Mapping[str, Sequence[str]] | None = None) -> dict[str, Json]:
    """The document of a server. `models` are names with their versions, which it shows as examples."""
    models = models or {}
    paths = _Paths(key_needed)
    _server(paths)
    named = _parameter("name", models)
    _model(paths, "/v2/models/{name}", "", [named])
    versions = [version for found in models.values() for version in found]
    _model(paths, "/v2/models/{name}/versions/{version}", "_version", [named, _parameter("version", versions)])
    _repository(paths, named)
    _people(paths)
    schemes: Node = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    found: dict[str, Json] = {
        "openapi": "3.1.0",
        "info": {
            "title": "suanli",
            "version": describe.version(),
            "description": ABOUT,
            "license": {"name": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths.found,
        "components": {"schemas": _schemas(), "responses": _refusals()}
        | ({"securitySchemes": schemes} if key_needed else {}),
    }
    return found | ({"security": [{"bearer": []}, {"header": []}]} if key_needed else {})


def _parameter(name: str, examples: Mapping[str, Json] | Sequence[str]) -> Node:
    shown = {"examples": {value: {"value": value} for value in examples}} if examples else {}
    return {"name": name, "in": "path", "required": True, "schema": STRING | {"minLength": 1}} | shown


def _server(paths: _Paths) -> None:
    paths.add("GET /v2", "server_metadata", "About the server.", _json(_ref("ServerMetadata")))
    live = _json(_answer(live=FLAG))
    paths.add("GET /v2/health/live", "server_live", "Whether the server runs.", live, open_to_all=True)
    ready = _json(_answer(ready=FLAG))
    paths.add(
        "GET /v2/health/ready", "server_ready", "Whether every model answers.", ready,
        open_to_all=True, _503=_response("A model doesn't, or the server is about to stop.", ready),
    )  # fmt: skip
    stats = _json(_answer(model_stats=_list(_ref("ModelStats"))))
    paths.add("GET /v2/models/stats", "all_stats", "Statistics of every model.", stats)


def _model(paths: _Paths, path: str, suffix: str, parameters: Sequence[Node]) -> None:
    def add(way: str, identity: str, about: str, content: Node, refusals: Sequence[int], **more: Json) -> None:
        given = [*parameters, *more.pop("parameters", ())]
        paths.add(way, identity + suffix, about, content, refusals=refusals, parameters=given, **more)

    add(f"GET {path}", "model_metadata", "Names, datatypes and shapes.", _json(_ref("ModelMetadata")), (404, 503))
    ready = _answer(name=STRING, ready=FLAG)
    add(
        f"GET {path}/ready", "model_ready", "Whether the model answers.", _json(ready), (404,),
        _503=_response("It doesn't yet.", _json({"anyOf": [ready, _ref("Error")]}), Retry_After=COUNT),
    )  # fmt: skip
    add(f"GET {path}/config", "model_config", "Triton's model configuration.", _json(_ref("ModelConfig")), (404, 503))
    stats = _json(_answer(model_stats=_list(_ref("ModelStats"))))
    add(f"GET {path}/stats", "model_stats", "Statistics.", stats, (404, 503))
    length: Node = {"name": HEADER_LENGTH, "in": "header", "schema": COUNT}
    length["description"] = "Where the JSON ends and the bytes of tensors begin; 0: all of it is one picture or text."
    binary: Node = {"application/octet-stream": {"schema": BINARY}}
    response = _response("Done.", _json(_ref("InferResponse")) | binary, **{HEADER_LENGTH: COUNT})
    add(
        f"POST {path}/infer", "infer", "Answers for tensors.", {}, (400, 404, 503, 504), parameters=[length],
        body={"required": True, "content": _json(_ref("InferRequest")) | binary}, _200=response,
    )  # fmt: skip


def _repository(paths: _Paths, named: Node) -> None:
    states = _json(_list(_ref("ModelState")))
    body: Node = {"content": _json(_asked(ready=FLAG | {"description": "Only those that are."}))}
    paths.add("POST /v2/repository/index", "repository_index", "Models and states.", states, refusals=(400,), body=body)
    for verb, about in (("load", "Load a model, or load it again."), ("unload", "Answer what was asked, and unload.")):
        paths.add(
            f"POST /v2/repository/models/{{name}}/{verb}", f"model_{verb}", about, _json(_answer()),
            refusals=(400, 404, 503), parameters=[named], body={"content": _json(_asked())},
        )  # fmt: skip


def _people(paths: _Paths) -> None:
    query = {
        "top": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 5},
        "model": STRING,
        "version": STRING,
    }
    texts = _asked("inputs", inputs=_list(STRING, minItems=1))
    files: Node = {"type": "object", "additionalProperties": BINARY, "minProperties": 1}
    paths.add(
        "POST /predict", "predict", "Names what is in pictures or texts.", _json(_ref("Predictions")),
        refusals=(400, 404, 503, 504),
        parameters=[{"name": name, "in": "query", "schema": schema} for name, schema in query.items()],
        body={"required": True, "content": {
            "multipart/form-data": {"schema": files},
            "image/*": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
            "application/json": {"schema": texts},
            "text/plain": {"schema": STRING | {"minLength": 1}},
        }},
    )  # fmt: skip
    paths.add("GET /status", "status", "What the pages show.", _json(_ref("Status")), open_to_all=True)
    plain: Node = {"text/plain": {"schema": STRING}}
    paths.add("GET /metrics", "metrics", "Figures for Prometheus.", plain)
    paths.add("GET /openapi.json", "openapi", "This document.", _json({"type": "object"}))
    page: Node = {"text/html": {"schema": STRING}}
    for path, about in (("/", "A page to try the models."), ("/health", "A page about the server's health.")):
        same = _response("The page is as the entity tag in If-None-Match says.", {})
        identity = f"page{path.strip('/') and '_health'}"
        paths.add(f"GET {path}", identity, about, page, open_to_all=True, _304=same)
