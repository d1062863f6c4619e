"""The only place that imports `megatron` or `transformer_engine`."""

import warnings

from w2s.megatron import engine
from w2s.megatron.late import import_megatron

# Megatron says at every import that Apex and Transformer Engine are missing; `w2s doctor` says it once, where asked.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
# With the stand-ins of w2s.megatron.cpu at work, torch blames them for what Megatron does on purpose.
warnings.filterwarnings("ignore", module=r"w2s\.megatron\.cpu")

engine.settle()
import_megatron()
