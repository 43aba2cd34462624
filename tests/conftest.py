"""Settings that every test shares. The builders of small models and stores are modules beside this file."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

_HOME = tempfile.TemporaryDirectory(prefix="ollama-forge-tests-")  # landings are recorded there, not in the real one
os.environ["OLLAMA_FORGE_HOME"] = _HOME.name
