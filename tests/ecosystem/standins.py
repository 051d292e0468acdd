"""Stand-ins for the compiled parts of torchvision and torchaudio, whose wheels expect a CUDA build of torch.

Put in before either is imported. What needs the operators themselves (detection models, alignment) stays out of reach.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import torch


def stand_in() -> list[str]:
    """Put stand-ins where the compiled parts do not load; the names of the packages that got some."""
    stood_in = []
    if not _loads("torchvision"):
        # the package registers fakes for these operators when it is imported, so they have to be there by name
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        stood_in.append("torchvision")
    if not _loads("torchaudio"):
        extension = types.ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = extension._IS_ALIGN_AVAILABLE = False
        extension._check_cuda_version = lambda: None
        extension.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = extension
        stood_in.append("torchaudio")
    return stood_in


#: a library's operators live as long as the library
_kept: list[torch.library.Library] = []


def _loads(package: str) -> bool:
    """Whether a package needs no stand-in; what a failed import left behind is taken away."""
    if importlib.util.find_spec(package) is None:
        return True
    try:
        __import__(package)
    except (ImportError, OSError, RuntimeError):
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        return False
    return True
