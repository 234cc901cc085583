"""What both Inductor engines share: how they are configured, and which precision their kernels ran in."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable

import torch

from suanli.engines.backends._cpu import NAMES

SETTINGS = {"freezing": True, "cpp.dynamic_threads": True}
EXECUTED = re.compile(r",exec,\w+,(?:convolution|matmul|inner_product),[^,]*,[^,]*,src:(\w+):")


def kernel_precision(work: Callable[[], object]) -> str:
    """The precision of most of the convolutions and products that oneDNN was asked for, by its own account; those
    that Inductor wrote itself or gave to MKL are in float32."""
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as said:
        out = os.dup(1)
        libc.fflush(None)
        os.dup2(said.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
                work()
            libc.fflush(None)
        finally:
            os.dup2(out, 1)
            os.close(out)
        said.seek(0)
        text = said.read().decode(errors="replace")
    found = Counter(NAMES.get(name, name) for name in EXECUTED.findall(text))
    return found.most_common(1)[0][0] if found else "float32"
