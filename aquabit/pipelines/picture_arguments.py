"""Pictures that a pipeline's call takes: under which names, and those of a protocol as it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from aquabit.inputs import Inputs
from aquabit.pipelines.family import family
from aquabit.pipelines.sizes import image_size
from aquabit.scheme import AquabitError, Protocol

PICTURE = ("image", "control_image", "images", "cond_image", "example_image", "reference_image")
ROLES: Mapping[str, tuple[str, ...]] = {
    "mask": ("mask_image", "mask", "control_mask"),
    "control": ("control_image",),
    "reference": ("image_reference", "reference_image"),
    "last": ("last_image",),
}
MADE_UP = ""  # the folder of pictures that are in none
ANY_SIDE = 512  # pixels of these where nothing tells a size


def picture_arguments(pipe: Any) -> dict[str, str]:
    """ "" and roles (``inputs.ROLES``) -> the arguments of the pipeline's call that take such pictures; none
    where it takes no pictures."""
    taken = inspect.signature(type(pipe).__call__).parameters
    found = {"": next((name for name in PICTURE if name in taken), None)}
    if found[""] is None:
        return {}
    for role, names in ROLES.items():
        found[role] = next((name for name in names if name in taken and name not in found.values()), None)
    return {role: name for role, name in found.items() if name is not None}


def made_up(pipe: Any, roles: Sequence[str] | None = None) -> Inputs:
    """One picture with ``roles`` (None: all that a pipeline may take) beside it, for calls whose images
    nobody sees."""
    every = tuple(role for role in picture_arguments(pipe) if role)
    return Inputs(MADE_UP, (("", ""),), every if roles is None else tuple(roles))


def check_roles(pipe: Any, protocol: Protocol) -> None:
    """Raise AquabitError where a protocol has pictures that the pipeline takes none of."""
    if protocol.inputs is None:
        return
    name, taken = type(pipe).__name__, picture_arguments(pipe)
    if not taken:
        raise AquabitError(
            f"inputs are {protocol.inputs.folder}, but {name} takes no pictures; leave them out"
        )
    for role in protocol.inputs.roles:
        if role not in taken:
            raise AquabitError(
                f"{protocol.inputs.folder} has a {role} beside each picture, but {name} takes none"
            )


def missing_pictures(pipe: Any, protocol: Protocol) -> dict[str, str]:
    """Role -> argument of the pictures that the pipeline takes and a protocol does not have."""
    given = () if protocol.inputs is None else ("", *protocol.inputs.roles)
    return {role: name for role, name in picture_arguments(pipe).items() if role not in given}


def pictures_for(pipe: Any, protocol: Protocol, indices: Sequence[int], alone: bool) -> dict[str, Any]:
    """The arguments of the call with pictures for some images, of the size that the pipeline works at: a
    list with one a sample, or (``alone``) the picture itself; of an argument of several pictures a list of
    it."""
    if protocol.inputs is None:
        return {}
    own, names = family(pipe), picture_arguments(pipe)
    whole = image_size(pipe, protocol.resolution)
    published = own.resolution if own is not None else None
    if whole is None and (published is not None or protocol.inputs.folder == MADE_UP):
        whole = published or ANY_SIDE, published or ANY_SIDE
    if whole is None:
        raise AquabitError(
            f"{type(pipe).__name__} does not tell the size of its images, which pictures are cut to; give"
            " --resolution"
        )
    shrink = own.shrink if own else 1
    size = max(1, whole[0] // shrink), max(1, whole[1] // shrink)
    if protocol.inputs.folder == MADE_UP:
        loaded = [_made_up(protocol.inputs.roles, size) for _ in indices]
    else:
        loaded = [protocol.inputs.load(i, size) for i in indices]
    found: dict[str, Any] = {}
    for role in ("", *protocol.inputs.roles):
        column = [pictures[role] for pictures in loaded]
        single = alone and not names[role].endswith("images")
        found[names[role]] = column[0] if single else column
    return found


def _made_up(roles: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    """A ramp from black to white; as a mask its lighter half."""
    from PIL import Image

    ramp = Image.linear_gradient("L").resize(size[::-1])
    return {role: ramp if role == "mask" else ramp.convert("RGB") for role in ("", *roles)}
