"""Ways to break a sound checkpoint folder, each with the code by which the doctor must name it."""

from checkpoint_faults import config_files, tokenizer_files, torch_files, weight_files
from checkpoint_faults.base import BREAKS, CONFIG, edit_json
from checkpoint_faults.torch_files import edit_zip
from checkpoint_faults.weight_files import edit_weights

__all__ = [
    "BREAKS",
    "CONFIG",
    "config_files",
    "edit_json",
    "edit_weights",
    "edit_zip",
    "tokenizer_files",
    "torch_files",
    "weight_files",
]
