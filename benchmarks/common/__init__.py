"""What benchmarks share. Import it before Hugging Face's libraries: they read the environment when they are imported."""

import os


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
