"""The trivial engine of `serve_peers.py` behind LitServe: python serve_litserve.py PORT.

Source: "LitAPI", "LitServer" and "fast_queue" in its documentation. Pixels are an uploaded file, its way to
take bytes.
"""

# No `from __future__ import annotations` here: LitServe needs the type of `request` itself.
import sys

import litserve
from fastapi import UploadFile

from serve_peers import probabilities


class Trivial(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: UploadFile) -> bytes:
        return request.file.read()

    def predict(self, x: bytes) -> list[float]:
        return probabilities(x)

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"probabilities": output}


if __name__ == "__main__":
    server = litserve.LitServer(Trivial(), accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False)
