"""The trivial engine of `serve_peers.py` as a runtime of MLServer. Source: "Custom runtimes" in its documentation."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec

from serve_peers import probabilities


class Trivial(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0])
        answers = np.array([probabilities(row.reshape(-1)) for row in rows], np.float32)
        return types.InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", answers)]
        )
