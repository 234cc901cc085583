"""A folder as publishers of weights lay it out: config.json, preprocessor_config.json, a README.md that begins with
facts in YAML, and one safetensors file, or several with an index.

config.json is timm's (with `pretrained_cfg`) or that of transformers, whose preprocessing is in the second file. Nobody
vouches for them: what can't be read is left out, and images prepared as suanli can't prepare them are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.core.paths import cache_dir, safe_name
from suanli.core.storage import atomic_file
from suanli.core.types import Json
from suanli.models.conversion import file_checksum, is_pickle
from suanli.models.fitting import recognize
from suanli.models.licences import allows_commercial_use
from suanli.models.safetensors_io import read_shapes
from suanli.models.timm_import import refuse_other_files

FACTS = ("config.json", "preprocessor_config.json", "README.md")  # files beside the weights that are read
USUAL = "model.safetensors"
INDEX = ".safetensors.index.json"
LARGEST_FACTS = 8 << 20  # bytes of one of them
LARGEST_CARD = 1 << 20  # characters of the YAML in a README.md
MOST_RESULTS = 1000  # in a card that are looked at


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a folder says of its weights."""

    config: Mapping[str, Json] = field(default_factory=dict)
    preprocess: Mapping[str, Json] = field(default_factory=dict)  # settings of ours
    classes: tuple[str, ...] | None = None
    licence: str | None = None
    accuracy: float | None = None  # on ImageNet-1k
    learned_from: tuple[str, ...] = ()

    @property
    def stated(self) -> dict[str, Json]:
        """The fields of `Pretrained` that it states."""
        return {
            "preprocess": self.preprocess,
            "classes": self.classes,
            "licence": self.licence,
            "commercial": allows_commercial_use(self.licence),
            "accuracy": self.accuracy,
            "learned_from": self.learned_from,
        }

    @property
    def timm_name(self) -> str | None:
        """The architecture that timm knows by this name; None: the file isn't timm's."""
        name = self.config.get("architecture")
        return name if isinstance(name, str) and "pretrained_cfg" in self.config else None


def read_facts(folder: Path) -> Published:
    """Raises DataError for images that were prepared in a way that suanli has no setting for."""
    config = _read_object(folder / "config.json")
    card = _read_card(folder / "README.md")
    timms = config.get("pretrained_cfg")
    if isinstance(timms, dict):
        preprocess = timm_settings(timms)
        licence = timms.get("license")
        names = timms.get("label_names") or config.get("label_names")
        classes = tuple(map(str, names)) if isinstance(names, list) else None
    else:
        preprocess = _transformers_settings(_read_object(folder / "preprocessor_config.json"), config)
        licence, classes = None, _classes_of(config.get("id2label"))
    stated = card.get("license")
    if stated == "other" and isinstance(card.get("license_name"), str):
        stated = f"other ({card['license_name']})"
    return Published(
        config=config,
        preprocess=preprocess,
        classes=classes,
        licence=next((one.strip() for one in (stated, licence) if isinstance(one, str) and one.strip()), None),
        accuracy=_accuracy_of(card.get("model-index")),
        learned_from=_names_of(card.get("datasets")),
    )


# --- weights ---------------------------------------------------------------------------------


def choose_weights(names: list[str], where: str, *, wanted: str | None = None) -> list[str]:
    """Of the names of files, those to read: a safetensors file, or an index. Raises UsageError where there are none,
    only pickles, or several of which none is the usual one."""
    if wanted is not None:
        if wanted not in names:
            raise UsageError(f"{where} has no file {wanted!r}.", fix=f"It has {_few(names)}.")
        return [wanted]
    files = [name for name in names if name.endswith((".safetensors", INDEX)) and "/" not in name]
    shards = [name for name in files if name.endswith(INDEX)]
    if USUAL in files:
        return [USUAL]
    if shards:
        if len(shards) > 1:
            raise UsageError(f"{where} has several weights: {_few(shards)}.", fix="Name one of these files.")
        return shards
    if len(files) == 1:
        return files
    if files:
        raise UsageError(f"{where} has several weights files: {_few(files)}.", fix="Name the one that you want.")
    pickles = [name for name in names if is_pickle(Path(name))]
    if pickles:
        raise UsageError(
            f"{where} has its weights only as a pickle ({_few(pickles)}), which can run any code when it is opened.",
            fix="Get that file, convert it in a process that can run no code, and give the result: "
            f"suanli convert {Path(pickles[0]).name}",
        )
    raise UsageError(f"{where} has no weights (.safetensors).", fix=f"It has {_few(names)}.")


def open_weights(folder: Path, name: str) -> Path:
    """The one file with all tensors of `folder`; those of an index are joined in the cache. Raises DamagedFile."""
    path = folder / name
    if not name.endswith(INDEX):
        return path
    files = shards_of(path)
    joined = cache_dir() / "weights" / f"{safe_name(folder.name, 'joined', 40)}-{_digest(path, files)}.safetensors"
    if not joined.exists():
        from suanli.models.safetensors_io import StoredTensors, write_tensors

        tensors = StoredTensors(files)
        if missing := set(_read_object(path)["weight_map"]) - set(tensors):
            raise DamagedFile(f"{folder} lacks the tensors {_few(sorted(missing))}.", fix="Download it again.")
        with atomic_file(joined) as stream:
            write_tensors(stream, tensors, {"format": "pt"})
    return joined


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, all beside it. Raises DamagedFile."""
    places = _read_object(index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise DamagedFile(f"{index} names no safetensors files beside it.", fix="Download it again.")
    return [index.parent / name for name in names]


def _digest(index: Path, files: list[Path]) -> str:
    import hashlib

    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DamagedFile(f"{index.parent} lacks {_few(missing)}.", fix="Download it again.")
    sums = [file_checksum(file) for file in (index, *files)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def find_network(file: Path, published: Published) -> tuple[str | None, dict[str, Json]]:
    """The network that has these tensors, and its arguments: ours, else timm's where the folder names one; None: nobody
    knows."""
    found = recognize(read_shapes(file), published.config)
    if found is not None:
        return found
    if published.timm_name is None:
        return None, {}
    args = published.config.get("model_args")
    args = args if isinstance(args, dict) else {}
    refuse_other_files(args, "The config.json of these weights")
    return f"timm:{published.timm_name}", args


# --- preprocessing ---------------------------------------------------------------------------


def timm_settings(config: Mapping[str, Json]) -> dict[str, Json]:
    """From timm's `pretrained_cfg`: input_size (C, H, W), mean and std where white is 1, and crop_mode."""
    settings: dict[str, Json] = {}
    size = config.get("input_size")
    if isinstance(size, (list, tuple)) and len(size) == 3:
        settings |= _size(size[1:])
    settings |= {name: list(config[name]) for name in ("mean", "std") if _are_numbers(config.get(name))}
    settings["resize"] = {"squash": "squash", "border": "pad"}.get(str(config.get("crop_mode")), "crop")
    return settings


def _transformers_settings(processor: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, Json]:
    """From preprocessor_config.json, and the size of config.json where it says none."""
    if processor.get("do_flip_channel_order"):
        raise DataError(
            "These weights learned from images with blue first (do_flip_channel_order), and suanli's have red first.",
            fix="Choose other weights.",
        )
    settings: dict[str, Json] = {}
    crop, size = processor.get("crop_size"), processor.get("size")
    if processor.get("do_center_crop", crop is not None) and (sides := _size(crop)):
        settings |= sides | {"resize": "crop"}
    elif isinstance(size, dict) and (side := size.get("longest_edge")) and "shortest_edge" not in size:
        settings |= _size(side) | {"resize": "pad"}
    elif sides := _size(size):
        keeps_shape = isinstance(size, dict) and "shortest_edge" in size
        settings |= sides | {"resize": "crop" if keeps_shape else "squash"}
    elif sides := _size(_vision(config).get("image_size")):
        settings |= sides
    if not processor:
        return settings
    factor = processor.get("rescale_factor", 1 / 255)
    scale = 255 * factor if processor.get("do_rescale", True) and _are_numbers([factor]) else 255.0
    mean: Json = [0.0]
    std: Json = [1.0]
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean"), processor.get("image_std")
    if _are_numbers(mean) and _are_numbers(std) and scale:  # theirs are of pixels times the factor
        settings |= {"mean": [round(v / scale, 9) for v in mean], "std": [round(v / scale, 9) for v in std]}
    return settings


def _vision(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """The part of a config.json that is about images, such as that of CLIP's image tower."""
    part = config.get("vision_config")
    return part if isinstance(part, dict) else config


def _size(value: Json) -> dict[str, Json]:
    """{"size": …} for 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}; else nothing."""
    if isinstance(value, dict):
        one = value.get("shortest_edge") or value.get("longest_edge")
        value = [value.get("height"), value.get("width")] if one is None else one
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return {}
    return {"size": sides[0] if sides[0] == sides[1] else sides}


def _are_numbers(value: Json) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
    )


# --- facts -----------------------------------------------------------------------------------


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none. Raises DamagedFile."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_small(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not valid JSON ({error}).", fix="Download it again.") from error
    return value if isinstance(value, dict) else {}


def _read_card(path: Path) -> dict[str, Any]:
    """The facts at the head of a README.md; empty where there are none, or they can't be read."""
    try:
        import yaml
    except ImportError:
        return {}
    if not path.is_file():
        return {}
    head, _, rest = _read_small(path).decode("utf-8", "replace").lstrip("\ufeff").partition("\n")
    block, end, _ = rest.partition("\n---")
    if head.strip() != "---" or not end or len(block) > LARGEST_CARD:
        return {}
    try:
        value = yaml.load(block, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # plain values alone
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_small(path: Path) -> bytes:
    with path.open("rb") as stream:
        content = stream.read(LARGEST_FACTS + 1)
    if len(content) > LARGEST_FACTS:
        raise DamagedFile(f"{path} is larger than {LARGEST_FACTS >> 20} MB.", fix="Download it again.")
    return content


def _classes_of(value: Json) -> tuple[str, ...] | None:
    """From {"0": "cat", "1": "dog"}; None for names that say nothing, such as LABEL_0."""
    try:
        names = tuple(str(name) for _, name in sorted((int(key), name) for key, name in value.items()))
    except (AttributeError, TypeError, ValueError):
        return None
    return None if not names or names[0] == "LABEL_0" else names


def _accuracy_of(index: Json) -> float | None:
    """The top-1 accuracy on ImageNet-1k, as a fraction, in a card's `model-index`."""
    try:
        for result in islice((result for model in index for result in model["results"]), MOST_RESULTS):
            data = f"{result['dataset'].get('type', '')} {result['dataset'].get('name', '')}".casefold()
            for metric in result["metrics"][:MOST_RESULTS]:
                kind = f"{metric.get('type', '')} {metric.get('name', '')}".casefold().replace("-", "").replace(" ", "")
                if "imagenet" in data and ("accuracy" in kind or "top1" in kind) and "top5" not in kind:
                    value = float(metric["value"])
                    return value / 100 if 1 < value <= 100 else value if 0 < value <= 1 else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return None


def _names_of(value: Json) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    return tuple(name.casefold() for name in names if isinstance(name, str))


def _few(names: list[str], count: int = 8) -> str:
    shown = ", ".join(names[:count]) or "nothing"
    return shown + (f", … ({len(names)} in all)" if len(names) > count else "")
