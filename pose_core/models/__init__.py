"""The only home of diffusers, transformers and peft."""

import diffusers.utils.logging
from transformers.utils import logging

# Their advice is for people who call them directly (a missing torchvision, a progress bar a file).
logging.set_verbosity_error()
logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
