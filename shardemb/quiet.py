"""Warnings of libraries that tell a user nothing he could act on."""

from __future__ import annotations

import logging
import os
import threading
import warnings


def silence_libraries() -> None:
    """Call before torch is imported; our own warnings and all errors stay."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for library in (
        "torch",
        "torchrec",
        "fbgemm_gpu",
        "torchmetrics",
        "tensordict",
        "pkg_resources",
    ):
        warnings.filterwarnings("ignore", module=rf"{library}(\..*)?")
    # TorchRec and PyTorch log their own deprecations and group names as warnings.
    for logger in ("torchrec", "torch.fx", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    threading.excepthook = _show_thread_error


def _show_thread_error(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error to the main thread: it need not print it as well."""
    if type(error.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(error)
