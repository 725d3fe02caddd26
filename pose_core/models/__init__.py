"""The only home of diffusers, transformers and peft."""

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Inside, ``packages`` count as not installed, whether or not this process has imported them before."""
    imported = {package: sys.modules[package] for package in packages if package in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in packages:
            del sys.modules[package]
        sys.modules.update(imported)


def _at_need(package: str) -> None:
    """Let ``package`` import all that it offers only when it is asked for one of these; its modules come one by one."""
    parent, _, name = package.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.loader is not None
    module, lock, begun = importlib.util.module_from_spec(spec), threading.RLock(), False

    def found(attribute: str) -> Any:
        nonlocal begun
        with lock:
            if not begun and not attribute.startswith("__"):
                begun = True
                spec.loader.exec_module(module)  # type: ignore[union-attr]
            try:
                return vars(module)[attribute]
            except KeyError:
                raise AttributeError(f"module {package!r} has no attribute {attribute!r}") from None

    module.__getattr__ = found  # type: ignore[method-assign]
    sys.modules[package] = module
    setattr(sys.modules[parent], name, module)


# All three import what they find installed: 700 modules here, 70 MB and a second in every process, for losses of object
# detection, the sigmas of schedulers and SageMaker's questions, of which nothing is used. They ask once what is there.
with _hidden("scipy", "boto3"):
    import accelerate  # noqa: F401
    import diffusers.utils.logging
    from transformers.utils import is_scipy_available, logging

    is_scipy_available()

# Their advice is for people who call them directly (a missing torchvision, a progress bar a file).
logging.set_verbosity_error()
logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

# Each holds the models of every family that diffusers knows, 76 and 41 files: 8 MB and 0.4 s, for one that is used.
for _package in ("diffusers.models.transformers", "diffusers.models.autoencoders"):
    if _package not in sys.modules:
        _at_need(_package)
