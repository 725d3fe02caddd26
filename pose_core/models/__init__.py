"""The only home of diffusers, transformers and peft."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
