"""The server against what it says of itself: its OpenAPI document, by Schemathesis, over a socket."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from served import Served
from suanli.core.errors import pip_install

for package in ("uvicorn", "httptools", "starlette"):
    pytest.importorskip(package, reason=f"needs: {pip_install('suanli[serve]')}")

from suanli.serving.http import App  # noqa: E402  # after the check
from suanli.serving.log import Log  # noqa: E402
from suanli.serving.model import ModelOptions  # noqa: E402
from suanli.serving.openapi import REASONS, document  # noqa: E402
from suanli.serving.repository import Repository  # noqa: E402

PER_OPERATION = 8  # examples that Schemathesis makes of each operation and phase
SEED = 7


@pytest.fixture
def server(digits_server: Served) -> Served:
    return digits_server


def parts(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a document with its place."""
    yield place, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from parts(value, f"{place}/{key}")


@pytest.mark.parametrize("key_needed", [False, True])
def test_the_document_holds_together(key_needed: bool, tmp_path: Path) -> None:
    (tmp_path / "model.json").touch()
    app = App(Repository(tmp_path, ModelOptions(), Log("none")), log=Log("none"), max_body_bytes=1)
    content = json.loads(json.dumps(document(app.operations, key_needed=key_needed, models={"digits": ["1", "2"]})))
    refs = {node["$ref"] for _, node in parts(content) if isinstance(node, dict) and "$ref" in node}
    kept = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses")
        for name in content["components"][kind]
    }  # fmt: skip
    assert refs <= kept
    assert kept - refs <= {f"#/components/responses/Refused{code}" for code in REASONS}
    operations = [operation for path in content["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for path, methods in content["paths"].items():
        for operation in methods.values():
            declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path))
            assert operation["responses"]["200"]
            assert ("401" in operation["responses"]) == (key_needed and "security" not in operation)


def test_every_path_answers_and_no_other(server: Served) -> None:
    content = server.ask("GET", "/openapi.json").json()
    for path, methods in content["paths"].items():
        here = path.replace("{name}", "digits").replace("{version}", "1")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            if here.endswith("load") and method == "POST":
                continue
            result = server.ask(method, here, b"{}" if method != "GET" else None)
            if method.lower() in methods:
                assert str(result.status) in methods[method.lower()]["responses"], (method, here)
            else:
                assert result.status == 405, (method, here)
                assert result.headers["allow"] == {"get": "GET, HEAD", "post": "POST"}[next(iter(methods))]
    for path in ("/nothing", "/v2/nothing", "/v2/models", "/v2/models/digits/nothing", "/page/../status", "/page/"):
        for method in ("GET", "POST"):
            assert server.ask(method, path).status == 404, (method, path)


@pytest.fixture(scope="module")
def requests() -> dict[str, dict[str, Any]]:
    """Requests that the model can answer, in all the ways that it can be asked."""
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": [7] * 64}
    wanted = [{"name": "probabilities", "parameters": {"classification": 2}}, {"name": "label"}]
    binary = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}]
    return {
        "plain": {"inputs": [image]},
        "classes": {"id": "7", "inputs": [image], "outputs": wanted, "parameters": {"timeout": 60_000_000}},
        "binary": {"inputs": [image], "outputs": binary},
        "all binary": {"id": "8", "inputs": [image], "parameters": {"binary_data_output": True}},
    }


def test_answers_are_as_the_document_says(server: Served, requests: dict[str, dict[str, Any]]) -> None:
    validators = pytest.importorskip("jsonschema_rs", reason=f"needs: {pip_install('suanli[test]')}")
    content = server.ask("GET", "/openapi.json").json()

    def fits(name: str, values: Any) -> None:
        """Raises where a value has a property too few, too many, or of another type."""
        schema = {"$ref": f"#/components/schemas/{name}", "components": content["components"]}
        validators.validator_for(schema).validate(values)

    for request in requests.values():
        fits("InferRequest", request)
        answer = server.ask("POST", "/v2/models/digits/infer", json.dumps(request))
        assert answer.status == 200
        end = int(answer.headers.get("inference-header-content-length", len(answer.body)))
        fits("InferResponse", json.loads(answer.body[:end]))
    picture = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(picture, "png")
    for body, name in ((picture.getvalue(), "Predictions"), (b"no picture", "Unreadable")):
        fits(name, server.ask("POST", "/predict", body, {"Content-Type": "image/png"}).json())
    fits("Status", server.ask("GET", "/status").json())
    fits("ModelStats", server.ask("GET", "/v2/models/digits/stats").json()["model_stats"][0])
    fits("ModelConfig", server.ask("GET", "/v2/models/digits/config").json())
    fits("ModelMetadata", server.ask("GET", "/v2/models/digits").json())
    fits("Error", server.ask("GET", "/v2/models/nobody").json())
    with pytest.raises(validators.ValidationError):
        fits("Error", {"error": 7})


SETTINGS = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503, 504]

[[operations]]  # what a model can't read is refused, and no schema can say what that is
include-path-regex = "infer$|predict$"
checks.positive_data_acceptance.enabled = false
"""


@pytest.mark.slow
def test_schemathesis_finds_no_deviation(server: Served, requests: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Not of load and unload, which would take the model away from the others; Triton's client has those."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip(f"needs: {pip_install('suanli[test]')}")
    api = server.ask("GET", "/openapi.json").json()
    for path in api["paths"]:
        if path.endswith("/infer"):
            content = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            content["examples"] = {name: {"value": request} for name, request in requests.items()}
    (tmp_path / "openapi.json").write_text(json.dumps(api), encoding="utf-8")
    (tmp_path / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "run", "openapi.json", "--url", server.url),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(PER_OPERATION), "--seed", str(SEED)),
        *("--exclude-path-regex", "load$", "--no-shrink", "--max-failures", "20"),
    ]
    # In a process of its own: its warnings and its settings of Hypothesis are not ours.
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + server.log()[-3000:]
    assert re.search(r"\b(\d+) generated, \1 passed", done.stdout), done.stdout
    assert server.ready()
    assert server.events("request failed") == []
