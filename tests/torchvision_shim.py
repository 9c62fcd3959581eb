"""Makes torchvision importable where it is a CUDA build beside a CPU build of torch, and does nothing elsewhere.

Such an import dies with "operator torchvision::nms does not exist", and with it lmms-eval's. Declaring the operators is
enough for everything that does not call them. A plugin of pytest (``-p torchvision_shim``, before the tests' own
imports), and a ``sitecustomize`` for the processes that tests start.
"""

import sys

try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
