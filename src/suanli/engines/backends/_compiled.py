"""What both Inductor engines share: their configuration, and how the precision of their kernels is found."""

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
    """The precision of most of the convolutions and products that oneDNN ran, as its verbose log says; those that
    Inductor wrote itself or gave to MKL are in float32."""
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as log:
        stdout = os.dup(1)
        libc.fflush(None)
        os.dup2(log.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
                work()
            libc.fflush(None)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        log.seek(0)
        text = log.read().decode(errors="replace")
    precisions = Counter(NAMES.get(name, name) for name in EXECUTED.findall(text))
    return precisions.most_common(1)[0][0] if precisions else "float32"
