"""What is known of a licence by its identifier, as model cards write it."""

from __future__ import annotations

# Parts of identifiers of licences that forbid commercial use or allow research only. The list is that of the
# identifiers which model hubs offer: https://huggingface.co/docs/hub/repositories-licenses
_FORBIDDING = (
    *("-nc", "noncommercial", "non-commercial", "nclv1", "research", "apple-amlr", "academic", "deepfloyd", "mnpl"),
    "nscl",
)
_ALLOWING = (
    *("apache", "mit", "bsd", "isc", "cc0", "cc-by-2", "cc-by-3", "cc-by-4", "cc-by-sa", "unlicense"),
    *("wtfpl", "zlib", "bsl-1.0", "artistic", "mpl", "lgpl", "gpl", "agpl", "epl", "eupl", "osl", "ecl", "afl", "pddl"),
    *("odc-by", "odbl", "ncsa", "postgresql", "cdla-permissive", "openrail", "bigscience", "creativeml", "openmdw"),
)


def allows_commercial_use(licence: str | None) -> bool | None:
    """None: nobody can tell from the identifier alone, such as "other"."""
    name = (licence or "").strip().casefold().replace("_", "-").replace(" ", "-")
    if any(part in name for part in _FORBIDDING):
        return False
    return True if name.startswith(_ALLOWING) else None
