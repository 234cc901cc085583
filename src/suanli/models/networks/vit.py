"""Vision transformers of any size, by default the small one: 22 million parameters.

Published weights say their size themselves. From scratch these networks need far more data or epochs than a
convolutional one of the same cost. Shared parts, names and sources are in `_vit.py`.
"""

from __future__ import annotations

from suanli.core.types import Model
from suanli.models.networks._vit import SOURCE, build
from suanli.models.networks._vit_files import convert, recognize

MODEL = Model(
    name="vit", kinds=("image",), build=build, head="head", source=SOURCE, recognize=recognize, convert=convert
)
