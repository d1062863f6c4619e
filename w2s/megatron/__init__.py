"""The only place that imports `megatron` or `transformer_engine`."""

import warnings

from w2s.megatron.fp8 import transformer_engine
from w2s.megatron.lazy_import import import_megatron

# Megatron says at every import that Apex and Transformer Engine are missing; `w2s doctor` says it once, where asked.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
# With the stand-ins of w2s.megatron.cpu at work, torch blames them for what Megatron does on purpose.
warnings.filterwarnings("ignore", module=r"w2s\.megatron\.cpu")

transformer_engine.load_or_hide()
import_megatron()
