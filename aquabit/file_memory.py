"""Large tensors whose memory is a file on a disk.

The system reads the pages of such a tensor as they are used and drops them where memory is short, so that a
model may be larger than memory. Nothing else is different: values, operations and gradients are those of any
tensor on the CPU, and writing into one writes to its file. A file has no name once it is mapped: it is gone
with its tensor, however the process ends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aquabit.errors import AquabitError
from aquabit.runtime import give_back

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
LARGE = 1 << 20  # bytes; of smaller tensors a model has few in all, and they stay in memory


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is one that belongs in a file: of LARGE bytes and more, on the CPU."""
    return tensor.device.type == "cpu" and tensor.nbytes >= LARGE


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A contiguous copy of a tensor on the CPU whose memory is a file in ``folder``; raises AquabitError
    where it cannot be written."""
    data = tensor.detach().contiguous()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".weights-") as file:
            file.write(data.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=data.numel(), dtype=data.dtype)
    except (OSError, RuntimeError) as error:
        raise AquabitError(
            f"{data.nbytes / 1e6:,.0f} MB of weights could not be kept in a file of {folder} ({error}); free"
            " some space, or name another folder with AQUABIT_BANK"
        ) from error
    return mapped.view(data.shape)


class CopiesInFiles(TorchDispatchMode):
    """While it lasts what ``to`` and ``clone`` make of tensors on the CPU lies in files of ``folder``, where
    it is large: a library that converts a model as it reads it, or copies one, holds one tensor at a time.

    In the thread that entered it only.
    """

    def __init__(self, folder: Path):
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in COPIES and is_large(found) and args[0].device.type == "cpu":
            found = in_file(found, self.folder)  # its memory is free again
            give_back()
        return found
